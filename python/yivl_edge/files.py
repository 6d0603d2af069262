"""Writing files that are there complete or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file under its name only when it is complete; an old one stays until then.

    Raises:
        OSError: it cannot be written.
    """
    target = resolved(path)
    temporary = beside(target)
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def resolved(path: str | os.PathLike[str]) -> Path:
    """Where a path leads, through symbolic links; OSError if it leads round in a circle."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    return target


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise OSError for a place where `write_whole` could put nothing, which is better said before the work."""
    target = resolved(path)
    if target.is_dir() or not target.parent.is_dir():
        name = os.fspath(path) or "''"
        raise FileNotFoundError(f"{name}: expected a file's name in a folder that exists")


def beside(target: Path) -> Path:
    """A new name in the folder of ``target``, for what will take its place."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
