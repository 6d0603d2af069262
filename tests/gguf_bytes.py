"""GGUF files byte by byte, valid or not: what the reader's tests and the fuzz corpus are made of."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum


class Kind(IntEnum):
    """The type numbers of metadata values."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


_FORMATS = {
    Kind.U8: "<B",
    Kind.I8: "<b",
    Kind.U16: "<H",
    Kind.I16: "<h",
    Kind.U32: "<I",
    Kind.I32: "<i",
    Kind.F32: "<f",
    Kind.BOOL: "<B",
    Kind.U64: "<Q",
    Kind.I64: "<q",
    Kind.F64: "<d",
}

Text = str | bytes


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def string(text: Text, length: int | None = None) -> bytes:
    """A length and the bytes; `length` replaces the true one."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def item(kind: Kind, value: int | float | Text) -> bytes:
    if isinstance(value, str | bytes):
        return string(value)
    return struct.pack(_FORMATS[kind], value)


def scalar(kind: Kind, value: int | float | Text) -> bytes:
    return u32(kind) + item(kind, value)


def array(kind: int, values: Sequence[int | float | Text], length: int | None = None) -> bytes:
    """`length` replaces the true number of items."""
    items = b"".join(item(Kind(kind), value) for value in values)
    return u32(Kind.ARRAY) + u32(kind) + u64(len(values) if length is None else length) + items


def key(name: Text, value: bytes) -> bytes:
    return string(name) + value


def tensor(
    name: Text, dims: Sequence[int], type_number: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    """A tensor's entry; `dims` in the file's order, innermost first; `rank` replaces their true number."""
    rank = len(dims) if rank is None else rank
    return string(name) + u32(rank) + b"".join(map(u64, dims)) + u32(type_number) + u64(offset)


def pad(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def build(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `n_tensors` and `n_keys` replace the true counts."""
    header = magic + u32(version)
    header += u64(len(tensors) if n_tensors is None else n_tensors)
    header += u64(len(keys) if n_keys is None else n_keys)
    header += b"".join(keys) + b"".join(tensors)
    return pad(header, alignment) + data if tensors else header + data
