"""What stands in a GGUF file, by the gguf package's reader."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray


def keys(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(reader: GGUFReader) -> dict[str, ReaderTensor]:
    return {tensor.name: tensor for tensor in reader.tensors}


def shape_of(tensor: ReaderTensor) -> tuple[int, ...]:
    """Outermost dimension first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def weights_of(tensor: ReaderTensor) -> NDArray[np.float32]:
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape_of(tensor))
