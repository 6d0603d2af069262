"""Yi-VL's forward pass in plain numpy, for the self-test: on the source's weights and on the converted ones at once.

It shares no code with the engine, needs one pass over the weights, in the order in which the model uses them,
and holds only a slice of them in memory. Arrays have a leading axis of 2: by the source's weights, and by the
file's. Letters as in docs/file-format.md; T positions, R image rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.config import ModelConfig
from yivl_edge.selftest import IMAGE_ID

Result = TypeVar("Result")
# What is computed from a slice of a tensor: its first row, the source's rows and the file's, as float32.
Work = Callable[[int, FloatArray, FloatArray], Result]


class Reference:
    """The model's stages; ``visit(name, work)`` gives what ``work`` makes of each slice of a tensor, in order."""

    def __init__(
        self,
        config: ModelConfig,
        visit: Callable[[str, Work[Any]], list[Any]],
        *,
        published_rows: bool,
    ) -> None:
        self._config = config
        self._visit = visit
        self._published_rows = published_rows

    # Tensors

    def _vector(self, name: str) -> FloatArray:
        parts = self._visit(name, lambda _, values, coded: (values, coded))
        return np.stack([np.concatenate(side) for side in zip(*parts, strict=True)])

    def _linear(self, name: str, x: FloatArray, *, bias: bool = False) -> FloatArray:
        """(2, T, I) -> (2, T, O)."""

        def product(_: int, values: FloatArray, coded: FloatArray) -> tuple[FloatArray, FloatArray]:
            return tuple(side @ w.reshape(len(w), -1).T for side, w in zip(x, (values, coded), strict=True))

        parts = self._visit(f"{name}.weight", product)
        y = np.stack([np.concatenate(side, axis=-1) for side in zip(*parts, strict=True)])
        return y + self._vector(f"{name}.bias")[:, None] if bias else y

    def _rows(self, name: str, ids: Sequence[int]) -> FloatArray:
        """(2, T, D)."""
        wanted = np.array(ids)

        def pick(first: int, values: FloatArray, coded: FloatArray) -> tuple[Any, FloatArray, FloatArray]:
            here = np.flatnonzero((wanted >= first) & (wanted < first + len(values)))
            return here, values[wanted[here] - first], coded[wanted[here] - first]

        found = np.zeros((2, len(ids), self._config.decoder.width), np.float32)
        for here, values, coded in self._visit(name, pick):
            found[0, here], found[1, here] = values, coded
        return found

    # Stages

    def vision(self, pixels: FloatArray) -> FloatArray:
        """Pixels (3, S, S) -> features (2, N, W)."""
        c = self._config.vision
        assert c is not None
        side = c.image_size // c.patch_size
        patches = pixels.reshape(3, side, c.patch_size, side, c.patch_size).transpose(1, 3, 0, 2, 4)
        class_row = self._vector("v.class_embd")
        x = self._linear("v.patch_embd", np.stack([patches.reshape(c.patches, -1)] * 2))
        x = np.concatenate([class_row[:, None], x], 1) + self._vector("v.position_embd.weight")
        x = self._layer_norm("v.pre_ln", x, c.norm_epsilon)
        for i in range(c.blocks_run):
            name = f"v.blk.{i}"
            h = self._layer_norm(f"{name}.ln1", x, c.norm_epsilon)
            q, k, v = (self._linear(f"{name}.attn_{part}", h, bias=True) for part in "qkv")
            x = x + self._linear(f"{name}.attn_out", _attention(q, k, v, c.heads, c.heads), bias=True)
            h = self._layer_norm(f"{name}.ln2", x, c.norm_epsilon)
            h = self._linear(f"{name}.ffn_up", h, bias=True)
            x = x + self._linear(f"{name}.ffn_down", _gelu(h), bias=True)
        return x[:, 1:]

    def projector(self, features: FloatArray) -> FloatArray:
        """(2, N, W) -> (2, N, D)."""
        c = self._config.vision
        assert c is not None
        x = self._linear("mm.0", features, bias=True)
        x = _gelu(self._layer_norm("mm.1", x, c.projector_norm_epsilon))
        x = self._linear("mm.3", x, bias=True)
        return self._layer_norm("mm.4", x, c.projector_norm_epsilon)

    def logits(self, ids: Sequence[int], image_rows: FloatArray) -> FloatArray:
        """T ids, R of them IMAGE_ID, and the image's rows (2, R, D) -> (2, T, V)."""
        c = self._config.decoder
        is_text = np.array(ids) != IMAGE_ID
        x = np.zeros((2, len(ids), c.width), np.float32)
        x[:, is_text] = self._rows("token_embd.weight", [i for i in ids if i != IMAGE_ID])
        x[:, ~is_text] = image_rows
        for i in range(c.blocks):
            name = f"blk.{i}"
            h = self._rms_norm(f"{name}.attn_norm", x)
            q, k, v = (self._linear(f"{name}.attn_{part}", h) for part in "qkv")
            mixed = _attention(self._rope(q), self._rope(k), v, c.heads, c.kv_heads, causal=True)
            x = x + self._linear(f"{name}.attn_output", mixed)
            h = self._rms_norm(f"{name}.ffn_norm", x)
            gate, up = self._linear(f"{name}.ffn_gate", h), self._linear(f"{name}.ffn_up", h)
            x = x + self._linear(f"{name}.ffn_down", _silu(gate) * up)
        x = self._rms_norm("output_norm", x)
        return self._linear("token_embd" if c.tied_embeddings else "output", x)

    # Operations

    def _layer_norm(self, name: str, x: FloatArray, epsilon: float) -> FloatArray:
        weight, bias = self._vector(f"{name}.weight"), self._vector(f"{name}.bias")
        x = x - x.mean(-1, keepdims=True)
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(epsilon))
        y: FloatArray = x * scale * weight[:, None] + bias[:, None]
        return y

    def _rms_norm(self, name: str, x: FloatArray) -> FloatArray:
        epsilon = np.float32(self._config.decoder.rms_norm_epsilon)
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
        y: FloatArray = x * scale * self._vector(f"{name}.weight")[:, None]
        return y

    def _rope(self, x: FloatArray) -> FloatArray:
        """Rotates pairs: in the published order dimensions j and j + hd/2, in the file's 2j and 2j + 1."""
        hd = self._config.decoder.head_dim
        frequencies = self._config.decoder.rope_theta ** (-np.arange(0, hd, 2) / hd)
        angles = np.arange(x.shape[1])[:, None, None] * frequencies  # (T, 1, hd/2)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        turned = []
        for rows, halves in zip(x, (self._published_rows, False), strict=True):
            shape = (len(rows), -1, 2, hd // 2) if halves else (len(rows), -1, hd // 2, 2)
            pairs = np.moveaxis(rows.reshape(shape), 2 if halves else 3, 0)
            mixed = np.stack([pairs[0] * cos - pairs[1] * sin, pairs[1] * cos + pairs[0] * sin])
            turned.append(np.moveaxis(mixed, 0, 2 if halves else 3).reshape(rows.shape))
        return np.stack(turned)


def _attention(
    q: FloatArray, k: FloatArray, v: FloatArray, heads: int, kv_heads: int, *, causal: bool = False
) -> FloatArray:
    """Queries (2, T, H hd), keys and values (2, T, K hd) -> (2, T, H hd)."""
    hd = q.shape[-1] // heads
    mixed = np.empty_like(q)
    for i in range(2):
        for head in range(
            heads
        ):  # one at a time: all scores of a large picture would need hundreds of megabytes
            mine = slice(head * hd, (head + 1) * hd)
            group = head // (heads // kv_heads)
            shared = slice(group * hd, (group + 1) * hd)
            scores = q[i, :, mine] @ k[i, :, shared].T * np.float32(hd**-0.5)
            if causal:
                scores[np.triu_indices(len(scores), 1)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[i, :, mine] = scores / scores.sum(-1, keepdims=True) @ v[i, :, shared]
    return mixed


def _silu(x: FloatArray) -> FloatArray:
    """x / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # to infinity, which gives 0
        silu: FloatArray = x / (1 + np.exp(-x))
    return silu


def _gelu(x: FloatArray) -> FloatArray:
    """0.5 x (1 + erf(x / sqrt 2)); erf to 1.5e-7 by Abramowitz and Stegun, 7.1.26."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(coefficient)) * t
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    gelu: FloatArray = np.float32(0.5) * x * (1 + erf)
    return gelu
