"""GGUF files that appear under their names only when they are complete."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

_ALIGNMENT = 32


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

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


# The data of a tensor, in any number of pieces.
ReadData = Callable[[TensorInfo], Iterable[npt.NDArray[Any]]]


def write_files(plans: Sequence[GgufPlan], read_data: ReadData) -> None:
    """Write one file or several; either all appear or none, and old files of their names stay until then.

    Raises OSError (a full disk, no permission) and whatever ``read_data`` raises.
    """
    _check_free_space(plans)
    with _atomic_files([plan.path for plan in plans]) as temporaries:
        for plan, temporary in zip(plans, temporaries, strict=True):
            _write_header(temporary, plan)
            with temporary.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                _pad(file)
                for tensor in plan.tensors:
                    written = 0
                    for piece in read_data(tensor):
                        written += file.write(piece.reshape(-1).view(np.uint8).data)
                    if written != tensor.nbytes:
                        raise RuntimeError(f"{tensor.name}: {written} bytes written of {tensor.nbytes}")
                    _pad(file)
                file.flush()
                os.fsync(file.fileno())


def _write_header(path: Path, plan: GgufPlan) -> None:
    writer = GGUFWriter(path, plan.architecture)
    for key in plan.keys:
        writer.add_key_value(key.name, key.value, key.type, sub_type=key.item_type)
    for tensor in plan.tensors:
        # The element type does not matter: the raw type says what the data are.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pad(file: Any) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _check_free_space(plans: Sequence[GgufPlan]) -> None:
    folder = plans[0].path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"No such file or directory: {folder}, the output's folder")
    needed, free = sum(plan.data_bytes for plan in plans), shutil.disk_usage(folder).free
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
