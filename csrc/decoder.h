// The Yi decoder: embeddings and KV cache to logits.
#pragma once

#include "state.h"
#include "weights.h"

namespace yivl {

// Runs the T rows of s.x (T, D), at positions [first, first + T), through the layers of `s`, writing their keys and
// values into the cache. Positions before `first` must have been run. The result stays in s.x; after the decoder's last
// layer only the last `n_wanted` rows are there, since nothing else reads the others. `on_layer` sees how many of the
// decoder's layers are done.
void decoder_forward(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t T, int64_t first,
                     int64_t n_wanted, Ops& ops, const std::function<void(int64_t)>& on_layer = {});

// logits (R, V) of rows [row, row + R) of s.x.
void decoder_logits(const DecoderWeights& w, const DecoderConfig& c, DecoderState& s, int64_t row, Mat logits,
                    Ops& ops);

}  // namespace yivl
