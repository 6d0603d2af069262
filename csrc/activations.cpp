#include "activations.h"

#include <stdexcept>

namespace yivl {

namespace {

class RecordingOps final : public Ops {
public:
    RecordingOps(std::unique_ptr<Ops> ops, ActivationStatistics& statistics)
        : ops_(std::move(ops)), statistics_(statistics) {}

    void upload(Mat y, ConstMat host) override { ops_->upload(y, host); }
    void download(Mat host, ConstMat x) override { ops_->download(host, x); }
    void copy(Mat y, ConstMat x) override { ops_->copy(y, x); }
    void linear(const Input& input, std::span<const Product> products) override {
        const ConstMat x = normalised(input);
        const ConstMat values = downloaded(x);
        for (const Product& product : products) statistics_.add(product.w, values);
        ops_->linear(x, products);
    }
    void gated_linear(Mat y, const Input& input, const Weight& gate, const Weight& up) override {
        const ConstMat x = normalised(input);
        const ConstMat values = downloaded(x);
        statistics_.add(gate, values);
        statistics_.add(up, values);
        ops_->gated_linear(y, x, gate, up);
    }
    void norm(Mat y, ConstMat x, const Norm& norm) override { ops_->norm(y, x, norm); }
    void gelu(Mat x) override { ops_->gelu(x); }
    void add(Mat y, ConstMat x) override { ops_->add(y, x); }
    void rope(Mat x, int64_t head_dim, int64_t first, float theta) override { ops_->rope(x, head_dim, first, theta); }
    void attention(Mat out, ConstMat q, ConstHeads k, ConstHeads v, const AttentionShape& shape) override {
        ops_->attention(out, q, k, v, shape);
    }
    void embed(Mat y, const Weight& table, std::span<const int32_t> ids) override { ops_->embed(y, table, ids); }
    int32_t draw(ConstMat x, std::span<const int32_t> previous_ids, const Draw& draw) override {
        return ops_->draw(x, previous_ids, draw);
    }

private:
    ConstMat normalised(const Input& input) {
        if (!input.norm) return input.x;
        ops_->norm(input.room, input.x, *input.norm);
        return input.room;
    }
    ConstMat downloaded(ConstMat x) {
        values_.resize(static_cast<size_t>(x.rows * x.cols));
        const Mat values(values_.data(), x.rows, x.cols);
        ops_->download(values, x);
        return values;
    }

    std::unique_ptr<Ops> ops_;
    ActivationStatistics& statistics_;
    std::vector<float> values_;
};

}  // namespace

ActivationStatistics::ActivationStatistics(const Weights& weights)
    : text_file_(weights.text_file), vision_file_(weights.vision_file) {
    for (const auto& [data, name] : weights.names) columns_[data].name = name;
}

void ActivationStatistics::add(const Weight& w, ConstMat x) {
    const auto found = columns_.find(w.data);
    if (found == columns_.end()) throw std::invalid_argument("activation statistics: of another model");
    Columns& columns = found->second;
    if (!marks_.empty() && static_cast<int64_t>(marks_.size()) != x.rows) {
        throw std::logic_error("activation statistics: expected as many rows as marks");
    }
    columns.sum_of_squares.resize(static_cast<size_t>(x.cols));
    columns.marked_squares.resize(static_cast<size_t>(x.cols));
    for (int64_t i = 0; i < x.rows; ++i) {
        const std::span<const float> row = x.row(i);
        for (size_t j = 0; j < row.size(); ++j) columns.sum_of_squares[j] += double{row[j]} * double{row[j]};
        if (marks_.empty() || !marks_[static_cast<size_t>(i)]) continue;
        for (size_t j = 0; j < row.size(); ++j) columns.marked_squares[j] += double{row[j]} * double{row[j]};
        ++columns.marked_rows;
    }
    columns.rows += x.rows;
}

std::vector<ActivationStatistics::Columns> ActivationStatistics::columns() const {
    std::vector<Columns> result;
    for (const auto& [data, columns] : columns_) {
        if (columns.rows > 0) result.push_back(columns);
    }
    return result;
}

std::unique_ptr<Ops> record_activations(std::unique_ptr<Ops> ops, ActivationStatistics& statistics) {
    return std::make_unique<RecordingOps>(std::move(ops), statistics);
}

}  // namespace yivl
