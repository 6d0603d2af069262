"""GGUF files that appear under their names only when they are complete."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

_ALIGNMENT = 32
HASHES = "yivl.sha256"


@dataclass(frozen=True)
class Key:
    """A metadata value; ``item_type`` is the type within an array."""

    name: str
    value: Any
    type: GGUFValueType
    item_type: GGUFValueType | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file declares it; ``shape`` is row-major, outermost first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        block, size = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block * size


@dataclass(frozen=True)
class GgufPlan:
    """Everything about a file but the data of its tensors."""

    path: Path
    architecture: str
    keys: Sequence[Key]
    tensors: Sequence[TensorInfo]


# The data of a tensor, in any number of pieces.
ReadData = Callable[[TensorInfo], Iterable[npt.NDArray[Any]]]


class Files:
    """Files being written: tensors in any order, each from its beginning, in any number of pieces."""

    def __init__(self, plans: Sequence[GgufPlan], handles: Sequence[BinaryIO]) -> None:
        self._plans, self._handles = plans, handles
        self._at: dict[str, tuple[BinaryIO, int]] = {}  # where each tensor's next piece goes
        self._ends: dict[str, int] = {}
        self._hashes = {info.name: hashlib.sha256() for plan in plans for info in plan.tensors}
        self._header_sizes = []
        for plan, handle in zip(plans, handles, strict=True):
            header = _header(plan, plan.keys)
            self._header_sizes.append(len(header))
            handle.write(header)
            at = _aligned(len(header))
            for info in plan.tensors:
                self._at[info.name] = handle, at
                self._ends[info.name] = at + info.nbytes
                at = _aligned(at + info.nbytes)
            handle.truncate(at)

    def write(self, name: str, piece: npt.NDArray[np.uint8]) -> None:
        """Append to a tensor."""
        handle, at = self._at[name]
        if at + piece.size > self._ends[name]:
            raise RuntimeError(f"{name}: {at + piece.size - self._ends[name]} bytes too many")
        handle.seek(at)
        handle.write(piece.data)
        self._hashes[name].update(piece.data)
        self._at[name] = handle, at + piece.size

    def finish(self, values: Mapping[str, Any]) -> None:
        """Write the headers again, with the hashes and ``values`` for keys whose places were kept."""
        for name, (_, at) in self._at.items():
            if at != self._ends[name]:
                raise RuntimeError(f"{name}: {self._ends[name] - at} bytes are missing")
        for plan, handle, size in zip(self._plans, self._handles, self._header_sizes, strict=True):
            own = {HASHES: _hash_lines(plan.tensors, {n: h.hexdigest() for n, h in self._hashes.items()})}
            final = {**values, **own}
            header = _header(plan, [replace(key, value=final.get(key.name, key.value)) for key in plan.keys])
            if len(header) != size:
                raise RuntimeError(f"{plan.path}: the header has {len(header)} bytes, {size} were kept")
            handle.seek(0)
            handle.write(header)
            handle.flush()
            os.fsync(handle.fileno())


def hash_key(tensors: Sequence[TensorInfo]) -> Key:
    """The key for the tensors' hashes, with zeros that keep their place until ``finish``."""
    lines = _hash_lines(tensors, {tensor.name: "0" * 64 for tensor in tensors})
    return Key(HASHES, lines, GGUFValueType.ARRAY, GGUFValueType.STRING)


def _hash_lines(tensors: Sequence[TensorInfo], hashes: Mapping[str, str]) -> list[str]:
    return [f"{hashes[tensor.name]}  {tensor.name}" for tensor in tensors]


@contextmanager
def writing(plans: Sequence[GgufPlan]) -> Iterator[Files]:
    """Write one file or several; either all appear or none, and old files of their names stay until then.

    The block writes every tensor and then calls ``finish``. Raises OSError (a full disk, no permission).
    """
    _check_free_space(plans)
    with _atomic_files([plan.path for plan in plans]) as temporaries, ExitStack() as stack:
        handles = [stack.enter_context(path.open("r+b")) for path in temporaries]
        yield Files(plans, handles)


def write_files(plans: Sequence[GgufPlan], read_data: ReadData) -> None:
    """Write files whose tensors ``read_data`` gives, each in any number of pieces; see ``writing``."""
    with writing(plans) as files:
        for info in (info for plan in plans for info in plan.tensors):
            for piece in read_data(info):
                files.write(info.name, piece.reshape(-1).view(np.uint8))
        files.finish({})


def file_size(plan: GgufPlan) -> int:
    """Bytes of the whole file."""
    header = _aligned(len(_header(plan, plan.keys)))
    return header + sum(_aligned(tensor.nbytes) for tensor in plan.tensors)


def _header(plan: GgufPlan, keys: Iterable[Key]) -> bytes:
    """Everything before the data, without padding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = GGUFWriter(path, plan.architecture)
        for key in keys:
            writer.add_key_value(key.name, key.value, key.type, sub_type=key.item_type)
        for tensor in plan.tensors:
            # The element type does not matter: the raw type says what the data are.
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        return path.read_bytes()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _check_free_space(plans: Sequence[GgufPlan]) -> None:
    folder = plans[0].path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"No such file or directory: {folder}, the output's folder")
    needed, free = sum(file_size(plan) for plan in plans), shutil.disk_usage(folder).free
    if needed > free:
        reason = f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {reason}", str(folder))


@contextmanager
def _atomic_files(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Empty files beside the targets, which take the targets' names at the end, or vanish on an exception."""
    targets = [target.resolve() for target in targets]
    for target in targets:
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "exists and is no plain file", str(target))
    temporaries: list[Path] = []
    try:
        for target in targets:
            temporaries.append(_beside(target))
            temporaries[-1].touch(exist_ok=False)
        yield temporaries
        with _signals_held():
            _rename_all(temporaries, targets)
    except BaseException:
        with _signals_held():
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)
        raise


def _rename_all(temporaries: Sequence[Path], targets: Sequence[Path]) -> None:
    backups: dict[Path, Path] = {}
    renamed: list[Path] = []
    try:
        for temporary, target in zip(temporaries, targets, strict=True):
            if len(targets) > 1 and target.exists():
                backups[target] = _beside(target)
                os.link(target, backups[target])
            temporary.replace(target)
            renamed.append(target)
    except OSError:
        for target in renamed:
            if target in backups:
                backups.pop(target).replace(target)
            else:
                target.unlink()
        raise
    finally:
        for backup in backups.values():
            backup.unlink(missing_ok=True)
    # The new names outlast a power cut too, where the file system lets folders be synced.
    with suppress(OSError):
        folder = os.open(targets[0].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and termination wait until the end: between two renames they would leave half a pair."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
