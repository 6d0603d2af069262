"""Weights on disk, read a few rows at a time: safetensors or PyTorch files, in shards or in one file."""

from __future__ import annotations

import json
import math
import pickle
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from yivl_edge.convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]

# What reading JSON of another structure than expected can raise.
_WRONG_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
_INCOMPLETE = "Download it again: the file is damaged or incomplete."


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; ``dtype`` is F32, F16 or BF16, or the file's word for another type."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0  # bytes from the start of the file, where that is known


class WeightsFile(ABC):
    """One file of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = self._read_entries()

    @abstractmethod
    def _read_entries(self) -> dict[str, Entry]: ...

    @abstractmethod
    def read(self, name: str, first: int, count: int) -> FloatArray:
        """Rows ``[first, first + count)`` of the tensor's first axis in float32. Threads may call it."""


_ITEM_TYPES: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class SafetensorsFile(WeightsFile):
    """The safetensors format: 8 bytes of length, a JSON header, then the data.

    Read with plain file reads: pages of a memory map would count as the process's own memory until the kernel
    takes them back.
    """

    _MAX_HEADER = 100_000_000  # the format's own limit

    def _read_entries(self) -> dict[str, Entry]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, self._MAX_HEADER):
                raise CheckpointError(f"{self.path} is no safetensors file of {size} bytes. {_INCOMPLETE}")
            header = file.read(length)
        data = range(8 + length, size)
        try:
            tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
            return {name: self._parse_entry(value, data) for name, value in tensors.items()}
        except (*_WRONG_JSON, ArithmeticError) as error:
            raise CheckpointError(
                f"{self.path}: its safetensors header is wrong ({error}). {_INCOMPLETE}"
            ) from error

    @staticmethod
    def _parse_entry(value: dict[str, Any], data: range) -> Entry:
        dtype, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        start, end = (int(n) for n in value["data_offsets"])
        if min(shape, default=0) < 0 or not 0 <= start <= end <= len(data):
            raise ValueError(f"a tensor of shape {shape} at {start} to {end} of {len(data)} bytes")
        if dtype in _ITEM_TYPES and math.prod(shape) * np.dtype(_ITEM_TYPES[dtype]).itemsize != end - start:
            raise ValueError(f"{end - start} bytes for {shape} of {dtype}")
        return Entry(dtype, shape, data.start + start)

    def read(self, name: str, first: int, count: int) -> FloatArray:
        """See WeightsFile."""
        entry = self.entries[name]
        row_shape = entry.shape[1:]
        items, dtype = math.prod(row_shape), np.dtype(_ITEM_TYPES[entry.dtype])
        start = entry.start + first * items * dtype.itemsize
        values = np.fromfile(self.path, dtype, count * items, offset=start)
        if values.size != count * items:
            raise CheckpointError(f"{self.path} became shorter while it was read")
        return _widen(values, entry.dtype).reshape(count, *row_shape)


def _widen(values: npt.NDArray[Any], dtype: str) -> FloatArray:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


class PyTorchFile(WeightsFile):
    """What ``torch.save`` writes: a pickle, of which only tensors are accepted, and their data."""

    _TYPES: ClassVar[dict[str, str]] = {
        "torch.float32": "F32",
        "torch.float16": "F16",
        "torch.bfloat16": "BF16",
    }

    _REMAP_AFTER = 1 << 26  # bytes

    def __init__(self, path: Path) -> None:
        self._mapped: dict[str, torch.Tensor] = {}
        self._bytes_read = 0
        self._lock = threading.Lock()
        super().__init__(path)

    def _read_entries(self) -> dict[str, Entry]:
        return {
            name: Entry(self._TYPES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in self._load().items()
        }

    def _begins_as_pickle(self) -> bool:
        """As PyTorch wrote before 1.6; since then it writes zip archives."""
        with self.path.open("rb") as file:
            return file.read(1) == b"\x80"

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            import torch
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{self.path.name} is a PyTorch file: reading it needs the package torch (pip install torch)",
                name="torch",
            ) from error
        try:
            tensors = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.path} holds more than tensors; loading it could run code from the file, so it was "
                "refused. Use a copy from a source that you trust, best as safetensors."
            ) from error
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            if self._begins_as_pickle():
                raise CheckpointError(
                    f"{self.path} has the file format of PyTorch before 1.6. Save it again with a current "
                    "torch: torch.save(torch.load(FILE, weights_only=True), FILE)"
                ) from error
            raise CheckpointError(f"{self.path} cannot be read by torch ({error}). {_INCOMPLETE}") from error
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise CheckpointError(f"{self.path} should hold tensors by name, found something else")
        return tensors

    def read(self, name: str, first: int, count: int) -> FloatArray:
        """See WeightsFile."""
        with self._lock:
            if not self._mapped or self._bytes_read > self._REMAP_AFTER:
                # The old mapping goes first: what was read through it then no longer counts as our memory.
                self._mapped, self._bytes_read = {}, 0
                self._mapped = self._load()
            rows = self._mapped[name][first : first + count]
            self._bytes_read += rows.nbytes
            return rows.float().numpy(force=True)


class Weights:
    """All tensors of one folder by name. Opening it reads headers and checks that every shard is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _open_files(folder)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the tensor is there, of this shape and of a type that can be read."""
        file = self._files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder}: the tensor {name} is missing. The weights or config.json belong to another "
                "model, or the download is incomplete."
            )
        entry = file.entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{file.path}: {name} should have shape {shape} by config.json, found {entry.shape}"
            )
        if entry.dtype not in _ITEM_TYPES:
            raise CheckpointError(
                f"{file.path}: {name} should be of type F32, F16 or BF16, found {entry.dtype}. "
                "Convert the published weights, not a quantised copy."
            )

    def dtype(self, name: str) -> str:
        """The tensor's type in the file."""
        return self._files[name].entries[name].dtype

    def read(self, name: str, first: int, count: int) -> FloatArray:
        """Rows ``[first, first + count)`` of the tensor's first axis in float32. Threads may call it."""
        return self._files[name].read(name, first, count)


_KINDS: dict[str, type[WeightsFile]] = {
    "model.safetensors": SafetensorsFile,
    "pytorch_model.bin": PyTorchFile,
}


def _open_files(folder: Path) -> dict[str, WeightsFile]:
    """The file of each tensor. As in transformers, safetensors come before PyTorch files."""
    for single, kind in _KINDS.items():
        if (folder / single).is_file():
            file = kind(folder / single)
            return dict.fromkeys(file.entries, file)
        if (index := folder / f"{single}.index.json").is_file():
            return _open_shards(index, kind)
    raise CheckpointError(
        f"{folder} has no weights. Expected one of "
        + ", ".join(f"{single}, {single}.index.json with its shards" for single in _KINDS)
        + ". Download the whole repository."
    )


def _open_shards(index: Path, kind: type[WeightsFile]) -> dict[str, WeightsFile]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shard_names = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in shard_names):
            raise ValueError("a shard's name is no file name")
    except _WRONG_JSON as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}). Download it again.") from error
    if missing := [name for name in shard_names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(shard_names)} shards are missing, e.g. {missing[0]}. "
            "Download the whole repository."
        )
    shards = {name: kind(index.parent / name) for name in shard_names}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard].entries:
            raise CheckpointError(f"{index} says that {tensor} is in {shard}, but it is not. {_INCOMPLETE}")
    return {tensor: shards[shard] for tensor, shard in weight_map.items()}
