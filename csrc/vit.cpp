#include "vit.h"

#include <algorithm>
#include <vector>

namespace yivl {

namespace {

// pixels (3, S, S) -> patches (N, 3 P P): the inputs of each patch in the order (channel, row, column) of the
// convolution.
void cut_patches(Mat patches, Vec pixels, const VitConfig& c) {
    const int64_t P = c.patch_size;
    const int64_t S = c.image_size;
    for (int64_t n = 0; n < patches.rows; ++n) {
        const int64_t top = n / c.grid() * P;
        const int64_t left = n % c.grid() * P;
        float* out = patches.row(n).data();
        for (int64_t channel = 0; channel < 3; ++channel) {
            for (int64_t y = 0; y < P; ++y, out += P) {
                std::copy_n(&pixels[(channel * S + top + y) * S + left], P, out);
            }
        }
    }
}

// x = [class; conv(pixels)] + position
void embed_patches(const VitWeights& w, const VitConfig& c, VitState& s, Vec pixels, Ops& ops) {
    const Mat x = s.x.view();
    std::vector<float> cut(static_cast<size_t>(c.n_patches() * c.patch_pixels()));
    const Mat patches(cut.data(), c.n_patches(), c.patch_pixels());
    cut_patches(patches, pixels, c);
    ops.upload(s.patches.view(), patches);
    ops.linear(s.patches.view(), {{x.row_range(1, c.n_patches()), w.patch_embedding}});
    ops.copy(x.row_range(0, 1), ConstMat(w.class_embedding.data(), 1, c.width));
    ops.add(x, w.position_embedding);
}

// x = x + W_o attention(W_q h, W_k h, W_v h), h = LN1(x)
void self_attention(const VitBlockWeights& w, const VitConfig& c, VitState& s, Ops& ops) {
    ops.linear(
        {s.x.view(), w.ln1.with(c.norm_eps), s.h.view()},
        {{s.q.view(), w.q.weight, w.q.bias}, {s.k.view(), w.k.weight, w.k.bias}, {s.v.view(), w.v.weight, w.v.bias}});
    ops.attention(s.attn.view(), s.q.view(), {s.k.view(), c.n_heads}, {s.v.view(), c.n_heads},
                  {.n_heads = c.n_heads,
                   .n_kv_heads = c.n_heads,
                   .head_dim = c.head_dim,
                   .causal = false,
                   .rounded = w.out.weight.type != WeightType::F32});
    ops.linear(s.attn.view(), {{s.x.view(), w.out.weight, w.out.bias, Then::add}});
}

}  // namespace

ConstMat vit_forward(const VitWeights& w, const VitConfig& c, VitState& s, Vec pixels, Ops& ops, Control& control) {
    const Mat x = s.x.view();
    control.progress(Stage::image, 0.0);
    embed_patches(w, c, s, pixels, ops);
    ops.norm(x, x, w.pre_ln.with(c.norm_eps));

    for (size_t i = 0; i < w.blocks.size(); ++i) {
        const VitBlockWeights& block = w.blocks[i];
        self_attention(block, c, s, ops);
        // x = x + fc2(gelu(fc1(LN2(x))))
        ops.linear({x, block.ln2.with(c.norm_eps), s.h.view()},
                   {{s.mlp.view(), block.fc1.weight, block.fc1.bias, Then::gelu}});
        ops.linear(s.mlp.view(), {{x, block.fc2.weight, block.fc2.bias, Then::add}});
        control.progress(Stage::image, static_cast<double>(i + 1) / static_cast<double>(w.blocks.size() + 1));
    }
    return x.row_range(1, c.n_patches());
}

}  // namespace yivl
