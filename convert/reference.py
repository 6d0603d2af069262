"""Yi-VL's forward pass in plain numpy, for the self-test: on the source's weights and on the converted ones at once.

It shares no code with the engine and names weights as they are published. It needs one pass over them, in the order in
which the model uses them, and holds only a slice of them in memory. A stage has several runs, a list entry each, that
differ in their rows and in whose weights they use; the first is by the source's. What these give is compared at once
with what they give in the file's order, before they are rounded: a weight in the wrong place shows there, whatever its
type. Letters as in docs/file-format.md; T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.config import ModelConfig
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.selftest import STRUCTURE_LIMIT, relative_error, spread

Result = TypeVar("Result")
# What is computed from a slice of a tensor, in float32: from its first row, the source's rows, the same in the file's
# order, and as the file's type rounds them.
Work = Callable[[int, FloatArray, FloatArray, FloatArray], Result]
Visit = Callable[[str, Work[Any]], list[Any]]
Runs = list[FloatArray]

# Of the picture's patches, how many the run by the source's weights sees: enough to tell what rounding costs.
_SOURCE_PATCHES = 64
# Rows of a large array that are computed at a time, so that they stay in the processor's cache.
_ROWS = 32


class Reference:
    """The model's stages; ``visit(name, work)`` gives what ``work`` makes of each slice of a tensor, in order."""

    def __init__(
        self, config: ModelConfig, visit: Visit, pool: ThreadPoolExecutor, *, published_rows: bool
    ) -> None:
        self._config = config
        self._visit = visit
        self._pool = pool
        self._published_rows = published_rows
        self._by_file: tuple[bool, ...] = ()  # whose weights each run of the stage uses
        self.structure = (
            0.0  # how far the source's weights and the same in the file's order were apart at most
        )

    def _agree(self, what: str, found: FloatArray, expected: FloatArray) -> None:
        """Raise CheckpointError unless the file's order, unrounded, gives what the source gives."""
        difference = relative_error(found, expected)
        self.structure = max(self.structure, difference)
        if not difference <= STRUCTURE_LIMIT:
            raise CheckpointError(
                f"{what}: the converted weights do not do what the source's do: before any rounding they differ by "
                f"{difference:.3g}, at most {STRUCTURE_LIMIT:.0e} is expected. Please report this."
            )

    # Tensors

    def _vector(self, name: str) -> tuple[FloatArray, FloatArray]:
        """By the source's weights, and by the file's."""
        parts = self._visit(name, lambda _, *rows: rows)
        values, rows, coded = (np.concatenate(side) for side in zip(*parts, strict=True))
        self._agree(name, rows, values)
        return values, coded

    def _product(self, name: str, x: Runs) -> tuple[Runs, FloatArray]:
        """(T, I) -> (T, O) for each run, and for the first by the source's weights in the file's order."""

        def product(_: int, values: FloatArray, rows: FloatArray, coded: FloatArray) -> Runs:
            def times(run: FloatArray, w: FloatArray) -> FloatArray:
                y: FloatArray = run @ w.reshape(len(w), -1).T
                return y

            y = [
                times(run, coded if by_file else values)
                for run, by_file in zip(x, self._by_file, strict=True)
            ]
            return [*y, y[0] if rows is values else times(x[0], rows)]

        parts = self._visit(f"{name}.weight", product)
        *y, ordered = (np.concatenate(run, axis=-1) for run in zip(*parts, strict=True))
        return y, ordered

    def _linear(self, name: str, x: Runs, *, bias: bool = False) -> Runs:
        """(T, I) -> (T, O) for each run."""
        y, ordered = self._product(name, x)
        self._agree(name, ordered, y[0])
        if bias:
            b = self._vector(f"{name}.bias")
            y = [run + b[by_file] for run, by_file in zip(y, self._by_file, strict=True)]
        return y

    def _embeddings(self, name: str, ids: Sequence[int]) -> Runs:
        """(T, D) for each run."""
        wanted = np.array(ids)

        def pick(first: int, *sides: FloatArray) -> tuple[Any, ...]:
            here = np.flatnonzero((wanted >= first) & (wanted < first + len(sides[0])))
            return here, *(side[wanted[here] - first] for side in sides)

        values, rows, coded = (np.empty((len(ids), self._config.decoder.width), np.float32) for _ in range(3))
        for here, *parts in self._visit(name, pick):
            values[here], rows[here], coded[here] = parts
        self._agree(name, rows, values)
        return [coded if by_file else values for by_file in self._by_file]

    # Stages

    def vision(self, pixels: FloatArray) -> Runs:
        """Pixels (3, S, S) -> features (R, W) of some patches by the source, the same by the file, all by the file.

        Some patches attend to each other only: as if the picture had no others.
        """
        c = self._config.vision
        assert c is not None
        side = c.image_size // c.patch_size
        patches = pixels.reshape(3, side, c.patch_size, side, c.patch_size).transpose(1, 3, 0, 2, 4)
        patches = patches.reshape(c.patches, -1)
        some, every = spread(_SOURCE_PATCHES, c.patches), np.arange(c.patches)
        seen = (some, some, every)
        self._by_file = (False, True, True)
        class_row = self._vector("vision_model.embeddings.class_embedding")
        x = self._linear("vision_model.embeddings.patch_embedding", [patches[rows] for rows in seen])
        position = self._vector("vision_model.embeddings.position_embedding.weight")
        x = [
            np.concatenate([class_row[by_file][None], run]) + position[by_file][[0, *(rows + 1)]]
            for run, by_file, rows in zip(x, self._by_file, seen, strict=True)
        ]
        x = self._layer_norm("vision_model.pre_layrnorm", x, c.norm_epsilon)
        for i in range(c.blocks_run):
            name = f"vision_model.encoder.layers.{i}"
            h = self._layer_norm(f"{name}.layer_norm1", x, c.norm_epsilon)
            q, k, v = (self._linear(f"{name}.self_attn.{part}_proj", h, bias=True) for part in "qkv")
            mixed = [self._attention(*run, c.heads, c.heads) for run in zip(q, k, v, strict=True)]
            x = _sum(x, self._linear(f"{name}.self_attn.out_proj", mixed, bias=True))
            h = self._layer_norm(f"{name}.layer_norm2", x, c.norm_epsilon)
            h = self._by_rows(_gelu, self._linear(f"{name}.mlp.fc1", h, bias=True))
            x = _sum(x, self._linear(f"{name}.mlp.fc2", h, bias=True))
        return [run[1:] for run in x]

    def projector(self, features: Runs) -> Runs:
        """(R, W) -> (R, D) for each run of ``vision``."""
        c = self._config.vision
        assert c is not None
        name = "model.mm_projector"
        x = self._linear(f"{name}.0", features, bias=True)
        x = self._by_rows(_gelu, self._layer_norm(f"{name}.1", x, c.projector_norm_epsilon))
        x = self._linear(f"{name}.3", x, bias=True)
        return self._layer_norm(f"{name}.4", x, c.projector_norm_epsilon)

    def logits(self, ids: Sequence[int]) -> Runs:
        """T ids -> (T, V) by the source and by the file."""
        c = self._config.decoder
        self._by_file = (False, True)
        halves = (self._published_rows, False)
        x = self._embeddings("model.embed_tokens.weight", ids)
        for i in range(c.blocks):
            name = f"model.layers.{i}"
            h = self._rms_norm(f"{name}.input_layernorm", x)
            # Rows of Q and K are in another order in the file, so that only what attention makes of them compares.
            q, ordered_q = self._product(f"{name}.self_attn.q_proj", h)
            k, ordered_k = self._product(f"{name}.self_attn.k_proj", h)
            v = self._linear(f"{name}.self_attn.v_proj", h)
            mixed = [self._turned_attention(*run) for run in zip(q, k, v, halves, strict=True)]
            self._agree(
                f"{name}.self_attn", self._turned_attention(ordered_q, ordered_k, v[0], False), mixed[0]
            )
            x = _sum(x, self._linear(f"{name}.self_attn.o_proj", mixed))
            h = self._rms_norm(f"{name}.post_attention_layernorm", x)
            gate, up = self._linear(f"{name}.mlp.gate_proj", h), self._linear(f"{name}.mlp.up_proj", h)
            gated = [_silu(a) * b for a, b in zip(gate, up, strict=True)]
            x = _sum(x, self._linear(f"{name}.mlp.down_proj", gated))
        x = self._rms_norm("model.norm", x)
        return self._linear("model.embed_tokens" if c.tied_embeddings else "lm_head", x)

    # Operations

    def _by_rows(self, function: Callable[[FloatArray], FloatArray], x: Runs) -> Runs:
        """A function of rows by themselves."""

        def pieces(run: FloatArray) -> Iterable[FloatArray]:
            return self._pool.map(
                function, (run[first : first + _ROWS] for first in range(0, len(run), _ROWS))
            )

        return [np.concatenate(list(pieces(run))) for run in x]

    def _layer_norm(self, name: str, x: Runs, epsilon: float) -> Runs:
        weight, bias = self._vector(f"{name}.weight"), self._vector(f"{name}.bias")

        def normalised(run: FloatArray, by_file: bool) -> FloatArray:
            run = run - run.mean(-1, keepdims=True)
            scale = 1 / np.sqrt(np.square(run).mean(-1, keepdims=True) + np.float32(epsilon))
            y: FloatArray = run * scale * weight[by_file] + bias[by_file]
            return y

        return [normalised(*run) for run in zip(x, self._by_file, strict=True)]

    def _rms_norm(self, name: str, x: Runs) -> Runs:
        weight, epsilon = self._vector(f"{name}.weight"), np.float32(self._config.decoder.rms_norm_epsilon)
        return [
            run / np.sqrt(np.square(run).mean(-1, keepdims=True) + epsilon) * weight[by_file]
            for run, by_file in zip(x, self._by_file, strict=True)
        ]

    def _turned_attention(self, q: FloatArray, k: FloatArray, v: FloatArray, halves: bool) -> FloatArray:
        """Attention of a decoder's block; RoPE turns pairs of dimensions j and j + hd/2, or else 2j and 2j + 1."""
        c = self._config.decoder
        frequencies = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        angles = np.arange(len(q))[:, None, None] * frequencies  # (T, 1, hd/2)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

        def turned(rows: FloatArray) -> FloatArray:
            pair = 2 if halves else 3  # the axis of the two in a pair
            shape = (len(rows), -1, 2, c.head_dim // 2) if halves else (len(rows), -1, c.head_dim // 2, 2)
            first, second = np.moveaxis(rows.reshape(shape), pair, 0)
            return np.stack([first * cos - second * sin, second * cos + first * sin], pair).reshape(
                rows.shape
            )

        return self._attention(turned(q), turned(k), v, c.heads, c.kv_heads, causal=True)

    def _attention(
        self, q: FloatArray, k: FloatArray, v: FloatArray, heads: int, kv_heads: int, *, causal: bool = False
    ) -> FloatArray:
        """Queries (T, H hd), keys and values (T, K hd) -> (T, H hd)."""
        hd = q.shape[-1] // heads
        mixed = np.empty_like(q)

        def mix(head: int) -> None:
            mine = slice(head * hd, (head + 1) * hd)
            group = head // (heads // kv_heads)
            shared = slice(group * hd, (group + 1) * hd)
            scores = q[:, mine] @ k[:, shared].T * np.float32(hd**-0.5)
            if causal:
                scores[np.triu_indices(len(scores), 1)] = -np.inf
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            mixed[:, mine] = scores @ v[:, shared] / scores.sum(-1, keepdims=True)

        list(self._pool.map(mix, range(heads)))
        return mixed


def _sum(x: Runs, y: Runs) -> Runs:
    return [a + b for a, b in zip(x, y, strict=True)]


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
        series += np.float32(coefficient)
        series *= t
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    gelu: FloatArray = np.float32(0.5) * x * (1 + erf)
    return gelu
