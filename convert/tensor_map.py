"""The one table of all tensors: published name, GGUF name, shape, transformation and type policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod


class Policy(Enum):
    """How a tensor's type is chosen."""

    MATRIX = "the type asked for, if a row is a whole number of its blocks; otherwise F16"
    VECTOR = "always F32: it is small, and added or multiplied in float32"
    PATCH = "F16, or F32 with an F32 or BF16 model: no block type divides its rows"


class Part(Enum):
    """Which half of a pair holds a tensor, and in which folder its published form lies."""

    DECODER = "text half; shards of the main folder"
    PROJECTOR = "vision half; shards of the main folder"
    VISION = "vision half; the ViT's own folder"


@dataclass(frozen=True)
class TensorRule:
    """One row of the table; ``{i}`` stands for the number of the block.

    ``axes`` are the letters of docs/file-format.md, outermost first, with ``*`` for a product.
    """

    name: str
    source: str
    axes: str
    policy: Policy
    permuted: bool = False  # rows of each head reordered for RoPE on adjacent pairs


def _matrix(name: str, source: str, axes: str, *, permuted: bool = False) -> TensorRule:
    return TensorRule(name, source, axes, Policy.MATRIX, permuted)


def _vector(name: str, source: str, axes: str) -> TensorRule:
    return TensorRule(name, source, axes, Policy.VECTOR)


_LM = "model.layers.{i}"
DECODER_HEAD = (_matrix("token_embd.weight", "model.embed_tokens.weight", "V D"),)
DECODER_BLOCK = (
    _vector("blk.{i}.attn_norm.weight", f"{_LM}.input_layernorm.weight", "D"),
    _matrix("blk.{i}.attn_q.weight", f"{_LM}.self_attn.q_proj.weight", "H*hd D", permuted=True),
    _matrix("blk.{i}.attn_k.weight", f"{_LM}.self_attn.k_proj.weight", "K*hd D", permuted=True),
    _matrix("blk.{i}.attn_v.weight", f"{_LM}.self_attn.v_proj.weight", "K*hd D"),
    _matrix("blk.{i}.attn_output.weight", f"{_LM}.self_attn.o_proj.weight", "D H*hd"),
    _vector("blk.{i}.ffn_norm.weight", f"{_LM}.post_attention_layernorm.weight", "D"),
    _matrix("blk.{i}.ffn_gate.weight", f"{_LM}.mlp.gate_proj.weight", "F D"),
    _matrix("blk.{i}.ffn_up.weight", f"{_LM}.mlp.up_proj.weight", "F D"),
    _matrix("blk.{i}.ffn_down.weight", f"{_LM}.mlp.down_proj.weight", "D F"),
)
DECODER_TAIL = (
    _vector("output_norm.weight", "model.norm.weight", "D"),
    _matrix("output.weight", "lm_head.weight", "V D"),  # left out if embeddings are tied
)

_EMBEDDINGS = "vision_model.embeddings"
_VIT = "vision_model.encoder.layers.{i}"
VISION_HEAD = (
    _vector("v.class_embd", f"{_EMBEDDINGS}.class_embedding", "W"),
    TensorRule("v.patch_embd.weight", f"{_EMBEDDINGS}.patch_embedding.weight", "W C P P", Policy.PATCH),
    _vector("v.position_embd.weight", f"{_EMBEDDINGS}.position_embedding.weight", "N+1 W"),
    _vector("v.pre_ln.weight", "vision_model.pre_layrnorm.weight", "W"),
    _vector("v.pre_ln.bias", "vision_model.pre_layrnorm.bias", "W"),
)
VISION_BLOCK = (
    _vector("v.blk.{i}.ln1.weight", f"{_VIT}.layer_norm1.weight", "W"),
    _vector("v.blk.{i}.ln1.bias", f"{_VIT}.layer_norm1.bias", "W"),
    _matrix("v.blk.{i}.attn_q.weight", f"{_VIT}.self_attn.q_proj.weight", "W W"),
    _vector("v.blk.{i}.attn_q.bias", f"{_VIT}.self_attn.q_proj.bias", "W"),
    _matrix("v.blk.{i}.attn_k.weight", f"{_VIT}.self_attn.k_proj.weight", "W W"),
    _vector("v.blk.{i}.attn_k.bias", f"{_VIT}.self_attn.k_proj.bias", "W"),
    _matrix("v.blk.{i}.attn_v.weight", f"{_VIT}.self_attn.v_proj.weight", "W W"),
    _vector("v.blk.{i}.attn_v.bias", f"{_VIT}.self_attn.v_proj.bias", "W"),
    _matrix("v.blk.{i}.attn_out.weight", f"{_VIT}.self_attn.out_proj.weight", "W W"),
    _vector("v.blk.{i}.attn_out.bias", f"{_VIT}.self_attn.out_proj.bias", "W"),
    _vector("v.blk.{i}.ln2.weight", f"{_VIT}.layer_norm2.weight", "W"),
    _vector("v.blk.{i}.ln2.bias", f"{_VIT}.layer_norm2.bias", "W"),
    _matrix("v.blk.{i}.ffn_up.weight", f"{_VIT}.mlp.fc1.weight", "VF W"),
    _vector("v.blk.{i}.ffn_up.bias", f"{_VIT}.mlp.fc1.bias", "VF"),
    _matrix("v.blk.{i}.ffn_down.weight", f"{_VIT}.mlp.fc2.weight", "W VF"),
    _vector("v.blk.{i}.ffn_down.bias", f"{_VIT}.mlp.fc2.bias", "W"),
)

PROJECTOR = (
    _matrix("mm.0.weight", "model.mm_projector.0.weight", "D W"),
    _vector("mm.0.bias", "model.mm_projector.0.bias", "D"),
    _vector("mm.1.weight", "model.mm_projector.1.weight", "D"),
    _vector("mm.1.bias", "model.mm_projector.1.bias", "D"),
    _matrix("mm.3.weight", "model.mm_projector.3.weight", "D D"),
    _vector("mm.3.bias", "model.mm_projector.3.bias", "D"),
    _vector("mm.4.weight", "model.mm_projector.4.weight", "D"),
    _vector("mm.4.bias", "model.mm_projector.4.bias", "D"),
)

# What a published folder may hold besides the table: the ViT's copy in the shards (its own folder wins),
# buffers that are computed anew, the layers behind the selected one, and the text side of a whole CLIP model.
IGNORED_IN_SHARDS = (r"model\.vision_tower\..*", r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
IGNORED_IN_VIT = (
    r"vision_model\.embeddings\.position_ids",
    r"vision_model\.encoder\.layers\.\d+\..*",
    r"vision_model\.post_layernorm\.(weight|bias)",
    r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale",
)


@dataclass(frozen=True)
class Tensor:
    """A row of the table for one model: its names, its shape (row-major, outermost first) and its rule."""

    name: str
    source: str
    shape: tuple[int, ...]
    rule: TensorRule
    part: Part


def tensors(
    sizes: Mapping[str, int], *, blocks: int, vision_blocks: int, tied_embeddings: bool = False
) -> Iterator[Tensor]:
    """All tensors of a model in file order; ``sizes`` gives each letter its number.

    With ``vision_blocks`` 0 those of the text half.
    """

    def rows(rules: tuple[TensorRule, ...], part: Part, count: int | None = None) -> Iterator[Tensor]:
        for i in range(1 if count is None else count):
            for rule in rules:
                if not (tied_embeddings and rule.name == "output.weight"):
                    shape = tuple(
                        prod(sizes[letter] for letter in axis.split("*")) for axis in rule.axes.split()
                    )
                    yield Tensor(rule.name.format(i=i), rule.source.format(i=i), shape, rule, part)

    yield from rows(DECODER_HEAD, Part.DECODER)
    yield from rows(DECODER_BLOCK, Part.DECODER, blocks)
    yield from rows(DECODER_TAIL, Part.DECODER)
    if not vision_blocks:
        return
    yield from rows(VISION_HEAD, Part.VISION)
    yield from rows(VISION_BLOCK, Part.VISION, vision_blocks)
    yield from rows(PROJECTOR, Part.PROJECTOR)
