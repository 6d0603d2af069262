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


def check_output(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Say before the work what would go wrong after it.

    Raises:
        OSError: `write_whole` could put nothing there.
        ValueError: it would take the place of one of the inputs.
    """
    target, name = resolved(path), os.fspath(path) or "''"
    if target.is_dir() or not target.parent.is_dir():
        raise FileNotFoundError(f"{name}: expected a file's name in a folder that exists")
    if target.exists() and not target.is_file():
        raise OSError(f"{name}: expected a file, found a pipe or a device, which a file would replace")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: expected a folder that may be written to, found {target.parent}")
    check_apart(path, *inputs)


def check_apart(path: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Raise ValueError if a file that is to be written is one of those that are read; None stands for none."""
    if not os.path.exists(path):
        return
    for source in inputs:
        if source is not None and os.path.exists(source) and os.path.samefile(path, source):
            name, other = os.fspath(path), os.fspath(source)
            raise ValueError(f"{name}: expected another file than {other}, which it would replace")


def beside(target: Path) -> Path:
    """A new name in the folder of ``target``, for what will take its place."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
