"""Importance matrices: the mean square of every matrix's input columns, in the files of llama.cpp's tools/imatrix."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from yivl_edge import ModelFileError, _core
from yivl_edge.convert.header import (
    ARRAY,
    STRING,
    UINT32,
    Key,
    TensorInfo,
    header_start,
    padded,
    tensor_table,
)
from yivl_edge.files import write_whole

_TYPE = "imatrix"
_SUMS, _COUNTS = ".in_sum2", ".counts"

_F32 = 0  # GGUF's number


def write_imatrix(
    path: str | os.PathLike[str],
    columns: Mapping[str, tuple[NDArray[np.float64], int]],
    *,
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Writes an importance matrix as GGUF, complete or not at all.

    Args:
        path: The file to write.
        columns: By tensor name: sums of squares of the input columns (I,), and how many rows were summed.
        datasets: Names of what the model worked on.
        chunk_count: How many texts that was.
        chunk_size: About how many tokens each had.

    Raises:
        ValueError: A sum that is no finite float32.
        OSError: The file cannot be written.
    """
    write_whole(path, _gguf(columns, datasets, chunk_count, chunk_size))


def _gguf(
    columns: Mapping[str, tuple[NDArray[np.float64], int]],
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> bytes:
    """The file; without the keys of a model, which llama.cpp does not write here."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, (sums, rows) in sorted(columns.items()):
        if not np.all(np.abs(sums) <= np.finfo(np.float32).max):
            raise ValueError(f"{name}: expected finite activations, found a sum of squares of {sums.max()}")
        # As llama.cpp has it: a row for each of the experts that share a tensor, of which there is one here.
        tensors[name + _SUMS] = sums.astype("<f4")[None]
        tensors[name + _COUNTS] = np.array([[rows]], "<f4")

    keys = [
        Key("general.type", _TYPE, STRING),
        Key("imatrix.datasets", datasets, ARRAY, STRING),
        Key("imatrix.chunk_count", chunk_count, UINT32),
        Key("imatrix.chunk_size", chunk_size, UINT32),
    ]
    table = tensor_table(TensorInfo(name, a.shape, _F32, a.nbytes) for name, a in tensors.items())
    data = b"".join(padded(values.tobytes()) for values in tensors.values())
    return padded(header_start(keys, 0, len(tensors)) + table) + data


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """Reads an importance matrix that this package or llama.cpp wrote, as GGUF or in the older binary format.

    Returns:
        By tensor name the mean square of each input column, (I,). Tensors that had no input are left out.

    Raises:
        ModelFileError: The file is missing, damaged or no importance matrix; says what was expected and found.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            if file.read(4) != b"GGUF":
                return _read_binary(file, name)
    except OSError as error:
        raise ModelFileError(f"{name}: cannot be read: {error.strerror}") from error
    return _read_gguf(name)


def _read_gguf(path: str) -> dict[str, NDArray[np.float32]]:
    file = _core.GgufFile.open(path)
    kind = file.metadata.get("general.type")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    if kind != _TYPE:
        raise ModelFileError(f"{path}: expected an importance matrix, found general.type {kind!r}")

    def values(name: str, shape: tuple[int, ...] | None = None) -> NDArray[np.float32]:
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{path}: tensor {name!r} is missing")
        if tensor.type != "F32" or prod(tensor.shape) != tensor.shape[-1]:
            expected = "expected one row of F32"
            raise ModelFileError(f"{path}: {name}: {expected}, found {tensor.type} of shape {tensor.shape}")
        return tensor.data.view(np.float32)

    result = {}
    for name in tensors:
        if name.endswith(_SUMS):
            base = name.removesuffix(_SUMS)
            counts = values(base + _COUNTS)
            if counts.size != 1 or not 0 <= counts[0] < np.inf:
                raise ModelFileError(f"{path}: {base + _COUNTS}: expected one count, found {counts[:8]}")
            if counts[0] > 0:
                result[base] = _checked(path, base, values(name) / counts[0])
    return _checked_all(path, result)


def _read_binary(file: BinaryIO, path: str) -> dict[str, NDArray[np.float32]]:
    """A count of entries; of each its name, a number of calls, and that many times the mean squares."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)

    def take(length: int, what: str) -> bytes:
        if not 0 <= length <= size - file.tell():
            raise ModelFileError(
                f"{path}: expected an importance matrix, GGUF or llama.cpp's older format, found none: "
                f"{what} of {length} bytes at {file.tell()}, in a file of {size}"
            )
        return file.read(length)

    def integer(what: str) -> int:
        value: int = struct.unpack("<i", take(4, what))[0]
        return value

    result = {}
    for _ in range(integer("number of entries")):
        raw = take(integer("length of a name"), "name")
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path}: expected a tensor's name, found {raw[:40]!r}") from error
        calls = integer("number of calls")
        sums = np.frombuffer(take(4 * integer("number of values"), f"values of {name!r:.60}"), "<f4")
        if calls < 0:
            raise ModelFileError(f"{path}: {name!r:.60}: expected a number of calls, found {calls}")
        if calls > 0:
            result[name] = _checked(path, name, sums / np.float32(calls))
    return _checked_all(path, result)


def _checked(path: str, name: str, means: NDArray[np.float32]) -> NDArray[np.float32]:
    if means.size == 0 or not np.all((means >= 0) & (means < np.inf)):
        raise ModelFileError(f"{path}: {name!r:.60}: expected mean squares, finite and not negative")
    return means


def _checked_all(path: str, result: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    if not result:
        raise ModelFileError(f"{path}: expected an importance matrix, found one without entries")
    return result
