#include "projector.h"

namespace yivl {

// embeddings = LN2(W2 gelu(LN1(W1 features + b1)) + b2)
ConstMat projector_forward(const ProjectorWeights& w, const VitConfig& c, VitState& s, ConstMat features, Ops& ops,
                           Control& control) {
    const Mat h = s.projected.view();
    const Mat out = s.embeddings.view();
    ops.linear(features, {{h, w.linear1.weight, w.linear1.bias}});
    ops.norm(h, h, w.norm1.with(c.projector_norm_eps));
    ops.gelu(h);
    ops.linear(h, {{out, w.linear2.weight, w.linear2.bias}});
    ops.norm(out, out, w.norm2.with(c.projector_norm_eps));
    control.progress(Stage::image, 1.0);
    return out;
}

}  // namespace yivl
