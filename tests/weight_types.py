"""Model files of every weight type, rewritten from an F32 file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf_contents import weights_of
from numpy.typing import NDArray

# What DESIGN calls "weight types read".
ALL_TYPES = [
    *(T.F32, T.F16, T.BF16),
    *(T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1),
    *(T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K),
    *(T.IQ4_NL, T.IQ4_XS),
]
# Byte offsets of the half-precision scales in a block of the types that the gguf package cannot quantise to.
_SCALES = {
    T.Q2_K: (80, 82),
    T.Q3_K: (108,),
    T.Q4_K: (0, 2),
    T.Q5_K: (0, 2),
    T.Q6_K: (208,),
    T.IQ4_NL: (0,),
    T.IQ4_XS: (0,),
}


def random_blocks(kind: T, n_blocks: int, std: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random blocks whose weights have about this standard deviation: (n_blocks, bytes per block)."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (n_blocks, size), dtype=np.uint8)

    def set_scales(value: float) -> None:
        for offset in _SCALES[kind]:
            spread = (value * rng.uniform(0.5, 1.5, n_blocks)).astype(np.float16)
            blocks[:, offset : offset + 2] = spread.view(np.uint8).reshape(n_blocks, 2)

    set_scales(1.0)
    set_scales(std / float(gguf.quants.dequantize(blocks, kind).std()))
    return blocks


def encode(values: NDArray[np.float32], kind: T, rng: np.random.Generator) -> NDArray[np.generic]:
    """A matrix (rows, cols) in the bytes of a type: quantised, or random blocks where gguf cannot quantise."""
    if kind == T.F32:
        return values
    if kind == T.F16:
        return values.astype(np.float16)
    if kind in _SCALES:
        block = gguf.GGML_QUANT_SIZES[kind][0]
        rows, cols = values.shape
        return random_blocks(kind, rows * cols // block, float(values.std()), rng).reshape(rows, -1)
    return gguf.quants.quantize(values, kind)


def rewrite(
    source: Path,
    target: Path,
    *,
    keys: Callable[[dict[str, Any]], dict[str, Any]] = lambda keys: keys,
    tensor: Callable[[str, NDArray[np.float32]], tuple[str, NDArray[Any], T] | None] = lambda name, v: (
        name,
        v,
        T.F32,
    ),
) -> Path:
    """Copies a model file: `keys` gets and returns all keys, `tensor` gives new name, values and type, or drops it."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = keys({name: field.contents() for name, field in fields.items()})
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for name, value in values.items():
        types = fields[name].types
        writer.add_key_value(name, value, types[0], sub_type=types[-1] if len(types) > 1 else None)
    for t in reader.tensors:
        if (new := tensor(t.name, weights_of(t))) is not None:
            writer.add_tensor(new[0], new[1], raw_dtype=new[2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def retype(source: Path, target: Path, kind: T) -> Path:
    """Copies a model file with every matrix of whole blocks in another type."""
    rng = np.random.default_rng(7)
    block = gguf.GGML_QUANT_SIZES[kind][0]

    def tensor(name: str, values: NDArray[np.float32]) -> tuple[str, NDArray[Any], T]:
        if values.ndim == 2 and "position" not in name and values.shape[1] % block == 0:
            return name, encode(values, kind, rng), kind
        return name, values, T.F32

    return rewrite(source, target, tensor=tensor)
