"""GGUF files that appear under their names only when they are complete."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType
from yivl_edge.convert.header import Key, TensorInfo, aligned, header_start, padded, tensor_table
from yivl_edge.files import beside, check_output, resolved
from yivl_edge.hashes import HEADER_KEY, NO_HASH, TENSORS_KEY, header_hash
from yivl_edge.selftest import ROUNDING_KEY


@dataclass(frozen=True)
class GgufPlan:
    """Everything about a file but the data of its tensors; the values of ``late_keys`` come when these are written."""

    path: Path
    architecture: str
    keys: Sequence[Key]
    late_keys: Sequence[Key]
    tensors: Sequence[TensorInfo]

    def header(self, values: Mapping[str, Any]) -> bytes:
        """Everything before the data, padded, with these values of late keys."""
        late = b"".join(
            replace(key, value=values.get(key.name, key.value)).encoded() for key in self.late_keys
        )
        before, after = self._fixed_parts
        return padded(before + late + after)

    @cached_property
    def header_size(self) -> int:
        """Bytes of the header."""
        return len(self.header({}))

    @cached_property
    def _fixed_parts(self) -> tuple[bytes, bytes]:
        """What stands before the late keys, and behind them."""
        keys = [Key("general.architecture", self.architecture, GGUFValueType.STRING), *self.keys]
        return header_start(keys, len(self.late_keys), len(self.tensors)), tensor_table(self.tensors)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return self.header_size + sum(aligned(tensor.nbytes) for tensor in self.tensors)


class Files:
    """Files being written: tensors in any order, each from its beginning, in any number of pieces."""

    def __init__(self, plans: Sequence[GgufPlan], handles: Sequence[BinaryIO]) -> None:
        self._plans, self._handles = plans, handles
        self._at: dict[str, tuple[BinaryIO, int]] = {}  # where each tensor's next piece goes
        self._ends: dict[str, int] = {}
        self._hashes = {info.name: hashlib.sha256() for plan in plans for info in plan.tensors}
        self._rounding = dict.fromkeys(self._hashes, 0.0)
        for plan, handle in zip(plans, handles, strict=True):
            at = plan.header_size
            for info in plan.tensors:
                self._at[info.name] = handle, at
                self._ends[info.name] = at + info.nbytes
                at += aligned(info.nbytes)
            handle.truncate(at)

    def write(self, name: str, piece: npt.NDArray[np.uint8], *, rounding: float = 0.0) -> None:
        """Append to a tensor; ``rounding`` is what its type changed of the piece, relative."""
        handle, at = self._at[name]
        if at + piece.size > self._ends[name]:
            raise RuntimeError(f"{name}: {at + piece.size - self._ends[name]} bytes too many")
        handle.seek(at)
        handle.write(piece.data)
        self._hashes[name].update(piece.data)
        self._rounding[name] = max(self._rounding[name], rounding)
        self._at[name] = handle, at + piece.size

    def finish(self, values: Mapping[str, Any]) -> None:
        """Write the headers, with `tensor_keys` and these values of other late keys."""
        for name, (_, at) in self._at.items():
            if at != self._ends[name]:
                raise RuntimeError(f"{name}: {self._ends[name] - at} bytes are missing")
        for plan, handle in zip(self._plans, self._handles, strict=True):
            digests = {tensor.name: self._hashes[tensor.name].hexdigest() for tensor in plan.tensors}
            rounding = [self._rounding[tensor.name] for tensor in plan.tensors]
            final = {**values, TENSORS_KEY: _hash_lines(digests), ROUNDING_KEY: rounding}
            final[HEADER_KEY] = header_hash(plan.header(final))
            header = plan.header(final)
            if len(header) != plan.header_size:
                raise RuntimeError(
                    f"{plan.path}: the header has {len(header)} bytes, {plan.header_size} were kept"
                )
            handle.seek(0)
            handle.write(header)
            handle.flush()
            os.fsync(handle.fileno())


def tensor_keys(tensors: Sequence[TensorInfo]) -> list[Key]:
    """The late keys that every file has: its hashes, and what rounding changed in each tensor."""
    lines, rounding = _hash_lines({tensor.name: NO_HASH for tensor in tensors}), [0.0] * len(tensors)
    return [
        Key(ROUNDING_KEY, rounding, GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        Key(TENSORS_KEY, lines, GGUFValueType.ARRAY, GGUFValueType.STRING),
        Key(HEADER_KEY, NO_HASH, GGUFValueType.STRING),
    ]


def _hash_lines(digests: Mapping[str, str]) -> list[str]:
    return [f"{digest}  {name}" for name, digest in digests.items()]


@contextmanager
def writing(plans: Sequence[GgufPlan]) -> Iterator[Files]:
    """Write one file or several; either all appear or none, and old files of their names stay until then.

    The block writes every tensor and then calls ``finish``. Raises OSError (a full disk, no permission).
    """
    check_targets(plans)
    _check_free_space(plans)
    with _atomic_files([plan.path for plan in plans]) as temporaries, ExitStack() as stack:
        handles = [stack.enter_context(path.open("r+b")) for path in temporaries]
        yield Files(plans, handles)


def check_targets(plans: Sequence[GgufPlan], *inputs: Path | None) -> None:
    """Raise OSError for a place where the files cannot be put, ValueError for one of the inputs or what is in them."""
    sources = [path for path in inputs if path is not None]
    # All that a published folder holds is of the model, but not what was converted into it.
    parts = [
        part
        for folder in sources
        for part in folder.rglob("*")
        if part.is_file() and part.suffix.lower() != ".gguf"
    ]
    for plan in plans:
        check_output(plan.path, *sources, *parts)


def _check_free_space(plans: Sequence[GgufPlan]) -> None:
    folder = resolved(plans[0].path).parent
    needed, free = sum(plan.file_size for plan in plans), shutil.disk_usage(folder).free
    if needed > free:
        reason = f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {reason}", str(folder))


@contextmanager
def _atomic_files(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Empty files beside the targets, which take the targets' names at the end, or vanish on an exception."""
    targets = [resolved(target) for target in targets]
    temporaries: list[Path] = []
    try:
        for target in targets:
            temporaries.append(beside(target))
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
                backups[target] = beside(target)
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


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and termination wait until the end: between two renames they would leave half a pair.

    To block them would not do: a thread of a library's would take them, and what Python does of it comes to the main
    thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)):
            if number is not None and (handler := signal.getsignal(number)) is not None:
                before[number] = handler
                signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
