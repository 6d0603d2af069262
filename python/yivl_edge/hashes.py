"""The SHA-256 hashes that a model file carries: of every tensor, and of all that stands before them."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from yivl_edge import _core
from yivl_edge.bounds import threads

TENSORS_KEY = "yivl.sha256"
HEADER_KEY = "yivl.header_sha256"
NO_HASH = "0" * 64

# How GGUF writes the key: its name, the type string, 64 characters.
_HEADER_MARK = struct.pack("<Q", len(HEADER_KEY)) + HEADER_KEY.encode() + struct.pack("<IQ", 8, len(NO_HASH))


class DamagedError(_core.ModelFileError):
    """Bytes that are not those that were hashed."""


class DamagedHeaderError(DamagedError):
    """The same, before the first tensor: all else that the file says of itself is in doubt."""


def header_hash(header: bytes) -> str:
    """The SHA-256 of a file's bytes before its first tensor, with zeros for the digits of this hash itself."""
    before, mark, after = header.partition(_HEADER_MARK)
    if not mark:
        raise ValueError(f"expected the key {HEADER_KEY}")
    return hashlib.sha256(before + mark + NO_HASH.encode() + after[len(NO_HASH) :]).hexdigest()


def recorded_hashes(path: str | os.PathLike[str]) -> dict[str, str]:
    """The SHA-256 that a file carries of each tensor, by name, once its header is found to be the one that was hashed.

    Raises:
        DamagedHeaderError: it is not: damage, or another program changed it.
        ModelFileError: the file cannot be read, carries no hashes, or has other tensors than they say.
    """
    file, name = _core.GgufFile.open(path), os.fspath(path)
    lines, header = file.metadata.get(TENSORS_KEY), file.metadata.get(HEADER_KEY)
    if not isinstance(lines, list) or not isinstance(header, str):
        missing = HEADER_KEY if isinstance(lines, list) else TENSORS_KEY
        raise _core.ModelFileError(f"{name}: it carries no hashes ({missing}); yivl-edge convert writes them")
    tensors = file.tensors
    if not tensors:
        raise _core.ModelFileError(f"{name}: expected tensors, found none")
    with open(path, "rb") as stream:
        found = header_hash(stream.read(min(tensor.offset for tensor in tensors)))
    if found != header:
        raise DamagedHeaderError(
            f"{name}: its header is damaged, or another program changed it: its SHA-256 should be {header}, "
            f"found {found}"
        )
    hashes = {tensor_name: digest for digest, _, tensor_name in (str(line).partition("  ") for line in lines)}
    if unhashed := [tensor.name for tensor in tensors if tensor.name not in hashes]:
        raise _core.ModelFileError(f"{name}: {unhashed[0]} and {len(unhashed) - 1} more tensors have no hash")
    if absent := hashes.keys() - {tensor.name for tensor in tensors}:
        raise _core.ModelFileError(f"{name}: {min(absent)} has a hash, but is not in the file")
    return hashes


def damage(name: str, tensor: str, expected: str, found: str) -> DamagedError:
    """The error of a tensor in the file `name` whose bytes have another SHA-256 than the file says."""
    return DamagedError(f"{name}: {tensor} is damaged: its SHA-256 should be {expected}, found {found}")


def check_hashes(
    path: str | os.PathLike[str],
    *,
    n_threads: int | None = None,
    on_progress: Callable[[str, float], object] | None = None,
) -> int:
    """Compare a file's header, and the bytes of every tensor, with the SHA-256 that the file carries.

    Args:
        path: a model file, or either half of a pair.
        n_threads: threads to work with; None for one per physical core.
        on_progress: called with ``"hash"`` and the fraction done.

    Returns:
        The number of tensors.

    Raises:
        ModelFileError: the file cannot be read, carries no hashes, or is damaged.
        ValueError, TypeError: a number of threads that `Model` would not take.
    """
    n_threads = threads(n_threads)
    hashes, name = recorded_hashes(path), os.fspath(path)
    tensors = _core.GgufFile.open(path).tensors
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with ThreadPoolExecutor(n_threads or _core.default_thread_count()) as pool:
        try:
            for tensor, found in zip(tensors, pool.map(_tensor_hash, tensors), strict=True):
                if found != hashes[tensor.name]:
                    raise damage(name, tensor.name, hashes[tensor.name], found)
                done += tensor.nbytes
                if on_progress is not None:
                    on_progress("hash", done / total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(tensors)


def _tensor_hash(tensor: _core.GgufTensor) -> str:
    return hashlib.sha256(tensor.data.data).hexdigest()
