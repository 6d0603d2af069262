// Two linear layers, each followed by a LayerNorm: vision features to decoder embeddings.
#pragma once

#include "state.h"
#include "weights.h"

namespace yivl {

// features (N, W) -> embeddings (N, D), a view into `s`.
ConstMat projector_forward(const ProjectorWeights& w, const VitConfig& c, VitState& s, ConstMat features, Ops& ops,
                           Control& control);

}  // namespace yivl
