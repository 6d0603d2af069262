"""Protocol buffers field by field: SentencePiece models, which the package itself cannot edit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def blob(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field, int or bytes) of each entry."""
    at = 0

    def read_varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = read_varint()
        if tag & 7 == 0:
            yield tag >> 3, read_varint()
        else:
            length = {1: 8, 5: 4}.get(tag & 7) or read_varint()
            yield tag >> 3, message[at : at + length]
            at += length
