// CLIP ViT: pixels to patch features.
#pragma once

#include "state.h"
#include "weights.h"

namespace yivl {

// pixels (3, S, S) -> features (N, W): hidden_states[mm_vision_select_layer] without the class row, a view into `s`.
ConstMat vit_forward(const VitWeights& w, const VitConfig& c, VitState& s, Vec pixels, Ops& ops, Control& control);

}  // namespace yivl
