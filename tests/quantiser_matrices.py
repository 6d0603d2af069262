"""Small matrices on which quantisers are compared, the same in every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from yivl_edge.convert.checkpoint import Weights

Matrix = NDArray[np.float32]

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden" / "checkpoint"
RECORD = ROOT / "tests" / "data" / "llama_quantisers.json"
SHAPE = (16, 1024)
BLOCK_TYPES = [
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
]


def matrices() -> dict[str, Matrix]:
    """Name -> float32 (rows, columns), columns a multiple of 256."""
    rng = np.random.default_rng(20)
    outliers = rng.standard_normal(SHAPE)
    outliers[:, rng.choice(SHAPE[1], 12, replace=False)] *= 20
    drawn = {
        "gaussian": rng.standard_normal(SHAPE),
        "student-t, 3 degrees of freedom": rng.standard_t(3, SHAPE),
        "laplace": rng.laplace(size=SHAPE),
        "gaussian with outlier columns": outliers,
        "gaussian off centre": rng.standard_normal(SHAPE) + 1,
    }
    scaled = {name: (0.02 * values).astype(np.float32) for name, values in drawn.items()}
    demo = {t.name: t for t in GGUFReader(ROOT / "python" / "yivl_edge" / "data" / "demo.gguf").tensors}
    for name in ("blk.2.ffn_gate.weight", "v.blk.3.ffn_down.weight"):
        weights = dequantize(demo[name].data, demo[name].tensor_type)
        scaled[f"demo model, {name}"] = np.ascontiguousarray(weights[:64], dtype=np.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    scaled[f"golden checkpoint, {name}"] = Weights(GOLDEN).read(name, 0, 64)
    return scaled


def importance(columns: int) -> NDArray[np.float32]:
    """Positive, (columns,), spread over some orders of magnitude as mean squares of activations are."""
    return np.exp(1.5 * np.random.default_rng(21).standard_normal(columns)).astype(np.float32)


def weighted_rmse(found: Matrix, expected: Matrix, weight: NDArray[np.float32] | None) -> float:
    """Root of the weighted mean square difference; without weights, of the mean square."""
    squares = (found.astype(np.float64) - expected) ** 2
    return float(np.sqrt(np.average(squares.mean(axis=0), weights=weight)))
