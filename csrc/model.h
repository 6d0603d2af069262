// The public face of the core: open a file, make a session, get a reply.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>

#include "config.h"
#include "placement.h"
#include "prompt.h"
#include "read_ahead.h"
#include "session.h"
#include "tokenizer.h"
#include "weights.h"

namespace yivl {

struct ModelOptions {
    std::string path;
    std::string mmproj;           // empty: the file holds the vision tower itself, or there is none
    int n_threads = 0;            // 0: one per physical core
    std::string device = "auto";  // as for place_model
    int64_t n_ctx = 0;            // of the sessions that must fit the device's memory; 0: the model's context length
    std::optional<int64_t> n_gpu_layers = {};  // of the decoder, on the GPU; none: as for place_model
};

// Weights, tokeniser and backend: read-only, shared by any number of sessions and threads.
class Model {
public:
    // Throws ModelFileError, std::invalid_argument for an unknown device or YIVL_ISA, and DeviceError or
    // AllocationError for a device that cannot be used.
    static std::shared_ptr<const Model> open(const ModelOptions& options, Control& control);

    const Config& config() const { return config_; }
    const Weights& weights() const { return weights_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }
    Backend& backend() const { return *placement_.backend; }
    // The decoder's first layers run on the CPU where the backend is a GPU that has no room for them: null and 0 where
    // all are the backend's.
    Backend* cpu() const { return placement_.cpu.get(); }
    int64_t n_cpu_layers() const { return placement_.n_cpu_layers; }
    // Layers that run on a GPU.
    int64_t n_gpu_layers() const { return placement_.n_gpu_layers; }

    // Positions that a prompt of these ids takes: an image counts as N.
    int64_t n_positions(std::span<const int32_t> ids) const;
    // Throws what Session::begin throws for this request, whatever its picture; n_ctx 0: the model's context length.
    void check(std::span<const int32_t> ids, const GenerateOptions& options, int64_t n_ctx) const;
    // The part of `check` that concerns the ids.
    void check_ids(std::span<const int32_t> ids, int64_t max_tokens, int64_t n_ctx) const;
    // Throws std::invalid_argument for a text model alone.
    void require_vision() const;

private:
    Model(Config config, Placement placement, Weights weights, Tokenizer tokenizer);

    Config config_;
    Placement placement_;
    Weights weights_;
    Tokenizer tokenizer_;
    ReadAhead read_ahead_;
};

}  // namespace yivl
