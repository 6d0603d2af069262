"""What stands before the data in a GGUF file, byte by byte (ggml's docs/gguf.md, version 3)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 32

# GGUF's numbers for types of values, and how struct packs those of a fixed size.
UINT32, STRING, ARRAY = 4, 8, 9
_FORMATS = {0: "B", UINT32: "I", 5: "i", 6: "f", 7: "?"}


@dataclass(frozen=True)
class Key:
    """A metadata value; ``type`` is GGUF's number, ``item_type`` that within an array."""

    name: str
    value: Any
    type: int
    item_type: int | None = None

    def encoded(self) -> bytes:
        """The key in the file."""
        return _string(self.name) + struct.pack("<I", self.type) + self._encoded_value()

    def _encoded_value(self) -> bytes:
        if self.type == STRING:
            return _string(self.value)
        if self.type != ARRAY:
            return struct.pack("<" + _FORMATS[self.type], self.value)
        assert self.item_type is not None
        if self.item_type == STRING:
            items = b"".join(map(_string, self.value))
        else:
            items = struct.pack(f"<{len(self.value)}{_FORMATS[self.item_type]}", *self.value)
        return struct.pack("<IQ", self.item_type, len(self.value)) + items


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file declares it: shape row-major, outermost first; type as GGUF's number."""

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int


def header_start(keys: Sequence[Key], more_keys: int, n_tensors: int) -> bytes:
    """A header up to these keys, which so many more and then `tensor_table` follow."""
    start = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(keys) + more_keys)
    return start + b"".join(key.encoded() for key in keys)


def tensor_table(tensors: Iterable[TensorInfo]) -> bytes:
    """What a header says of tensors whose data stand in this order, each padded."""
    entries, offset = [], 0
    for info in tensors:
        numbers = (len(info.shape), *reversed(info.shape), info.type, offset)
        entries.append(_string(info.name) + struct.pack(f"<I{len(info.shape)}QIQ", *numbers))
        offset += aligned(info.nbytes)
    return b"".join(entries)


def aligned(size: int) -> int:
    """Bytes with padding."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def padded(content: bytes) -> bytes:
    """Content with padding."""
    return content + bytes(aligned(len(content)) - len(content))


def _string(text: str) -> bytes:
    raw = text.encode(errors="replace")
    return struct.pack("<Q", len(raw)) + raw
