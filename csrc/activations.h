// What goes into each matrix of a model while it works: from the mean square of its input columns a quantiser learns
// which weights matter (llama.cpp's "importance matrix").
#pragma once

#include <map>
#include <memory>
#include <string_view>
#include <vector>

#include "weights.h"

namespace yivl {

// Sums over any number of calls on one model. Belongs to one caller at a time.
class ActivationStatistics {
public:
    struct Columns {
        std::string_view name;               // of the tensor, as its file has it
        std::vector<double> sum_of_squares;  // (I)
        int64_t rows = 0;                    // of x that were added
        std::vector<double> marked_squares;  // (I), of the marked ones among them
        int64_t marked_rows = 0;
    };

    explicit ActivationStatistics(const Weights& weights);

    // Which rows of x will be marked in the additions to come, one entry each; none: no row is.
    void mark(std::vector<bool> rows) { marks_ = std::move(rows); }
    // Adds x (T, I), the input of `w`. Throws std::invalid_argument for a matrix of another model.
    void add(const Weight& w, ConstMat x);
    // Of every matrix that has had input.
    std::vector<Columns> columns() const;

private:
    std::shared_ptr<const GgufFile> text_file_, vision_file_;  // hold the names
    std::map<const std::byte*, Columns> columns_;              // by the address of the matrix
    std::vector<bool> marks_;
};

// Computes as `ops` does, and adds the input of every product to `statistics`, which must outlive the result.
std::unique_ptr<Ops> record_activations(std::unique_ptr<Ops> ops, ActivationStatistics& statistics);

}  // namespace yivl
