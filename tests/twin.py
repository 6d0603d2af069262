"""The reference in torch float32, on the weights that a GGUF file holds: transformers' CLIP and LLaMA, and a projector.

Weights are dequantised by `gguf.quants.dequantize`, so that the twin computes with exactly the numbers in the file.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf_contents import weights_of
from numpy.typing import NDArray
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

IMAGE_ID = -200


def _unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows from adjacent-pair order (GGUF) to half-split order (transformers)."""
    rows, cols = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


class _File:
    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: torch.from_numpy(weights_of(t)) for t in reader.tensors}


class Twin:
    """`path` is a single file, or the text model of a pair with `mmproj` the other half."""

    def __init__(self, path: Path, mmproj: Path | None = None) -> None:
        text = _File(path)
        vision = text if mmproj is None else _File(mmproj)
        self._load_decoder(text)
        if "clip.vision.block_count" in vision.fields:
            self._load_vision(vision)

    def _load_decoder(self, file: _File) -> None:
        f, t = file.fields, file.tensors
        n_heads, n_kv = f["llama.attention.head_count"], f["llama.attention.head_count_kv"]
        config = LlamaConfig(
            vocab_size=t["token_embd.weight"].shape[0],
            hidden_size=f["llama.embedding_length"],
            intermediate_size=f["llama.feed_forward_length"],
            num_hidden_layers=f["llama.block_count"],
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv,
            rms_norm_eps=f["llama.attention.layer_norm_rms_epsilon"],
            max_position_embeddings=f["llama.context_length"],
            # transformers 4 reads the first, transformers 5 the second.
            rope_theta=f["llama.rope.freq_base"],
            rope_parameters={"rope_type": "default", "rope_theta": f["llama.rope.freq_base"]},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
        state = {
            "model.embed_tokens.weight": t["token_embd.weight"],
            "model.norm.weight": t["output_norm.weight"],
            "lm_head.weight": t.get("output.weight", t["token_embd.weight"]),
        }
        for i in range(config.num_hidden_layers):
            ours, theirs = f"blk.{i}.", f"model.layers.{i}."
            state |= {
                theirs + "input_layernorm.weight": t[ours + "attn_norm.weight"],
                theirs + "self_attn.q_proj.weight": _unpermute(t[ours + "attn_q.weight"], n_heads),
                theirs + "self_attn.k_proj.weight": _unpermute(t[ours + "attn_k.weight"], n_kv),
                theirs + "self_attn.v_proj.weight": t[ours + "attn_v.weight"],
                theirs + "self_attn.o_proj.weight": t[ours + "attn_output.weight"],
                theirs + "post_attention_layernorm.weight": t[ours + "ffn_norm.weight"],
                theirs + "mlp.gate_proj.weight": t[ours + "ffn_gate.weight"],
                theirs + "mlp.up_proj.weight": t[ours + "ffn_up.weight"],
                theirs + "mlp.down_proj.weight": t[ours + "ffn_down.weight"],
            }
        self.decoder = LlamaForCausalLM(config).eval()
        self.decoder.load_state_dict(state, strict=True)

    def _load_vision(self, file: _File) -> None:
        f, t = file.fields, file.tensors
        self.blocks_run = f.get("yivl.vision.blocks_run", f["clip.vision.block_count"])
        config = CLIPVisionConfig(
            hidden_size=f["clip.vision.embedding_length"],
            intermediate_size=f["clip.vision.feed_forward_length"],
            num_hidden_layers=self.blocks_run,
            num_attention_heads=f["clip.vision.attention.head_count"],
            image_size=f["clip.vision.image_size"],
            patch_size=f["clip.vision.patch_size"],
            layer_norm_eps=f["clip.vision.attention.layer_norm_epsilon"],
            hidden_act="gelu",
            attn_implementation="eager",
        )
        self.vit = CLIPVisionModel(config).eval()
        own = self.vit.state_dict()
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in own) else ""
        state = {
            "embeddings.class_embedding": t["v.class_embd"],
            "embeddings.patch_embedding.weight": t["v.patch_embd.weight"],
            "embeddings.position_embedding.weight": t["v.position_embd.weight"],
        }
        names = {
            "pre_layrnorm": "v.pre_ln",
            **{
                f"encoder.layers.{i}.{theirs}": f"v.blk.{i}.{ours}"
                for i in range(self.blocks_run)
                for theirs, ours in {
                    "layer_norm1": "ln1",
                    "self_attn.q_proj": "attn_q",
                    "self_attn.k_proj": "attn_k",
                    "self_attn.v_proj": "attn_v",
                    "self_attn.out_proj": "attn_out",
                    "layer_norm2": "ln2",
                    "mlp.fc1": "ffn_up",
                    "mlp.fc2": "ffn_down",
                }.items()
            },
        }
        for theirs, ours in names.items():
            state |= {f"{theirs}.{part}": t[f"{ours}.{part}"] for part in ("weight", "bias")}
        missing, unexpected = self.vit.load_state_dict(
            {prefix + k: v for k, v in state.items()}, strict=False
        )
        assert not unexpected, unexpected
        # The final LayerNorm is not part of the selected hidden state.
        assert all("post_layernorm" in name or "position_ids" in name for name in missing), missing
        self.projector = {name: t[name] for name in t if name.startswith("mm.")}
        self.projector_eps = f.get("yivl.vision.projector_norm_epsilon", 1e-5)

    @torch.no_grad()
    def vision_features(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """pixels (3, S, S) -> (N, W)"""
        hidden = self.vit(torch.from_numpy(pixels)[None]).last_hidden_state
        return hidden[0, 1:].numpy()

    @torch.no_grad()
    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """pixels (3, S, S) -> (N, D)"""
        p = self.projector
        width = (p["mm.1.weight"].shape[0],)
        x = functional.linear(
            torch.from_numpy(self.vision_features(pixels)), p["mm.0.weight"], p["mm.0.bias"]
        )
        x = functional.gelu(
            functional.layer_norm(x, width, p["mm.1.weight"], p["mm.1.bias"], self.projector_eps)
        )
        x = functional.linear(x, p["mm.3.weight"], p["mm.3.bias"])
        return functional.layer_norm(x, width, p["mm.4.weight"], p["mm.4.bias"], self.projector_eps).numpy()

    @torch.no_grad()
    def logits(
        self,
        ids: list[int],
        pixels: NDArray[np.float32] | None = None,
        *,
        rows: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Ids with IMAGE_ID where the picture goes -> (T, V), image rows included.

        With `rows` (R, D) each IMAGE_ID is only one of them.
        """
        table = self.decoder.model.embed_tokens.weight
        parts, taken = [], 0
        for token in ids:
            if token != IMAGE_ID:
                parts.append(table[token][None])
            elif rows is not None:
                parts.append(torch.from_numpy(rows[taken : taken + 1]))
                taken += 1
            else:
                assert pixels is not None
                parts.append(torch.from_numpy(self.encode_image(pixels)))
        return self.decoder(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0].numpy()
