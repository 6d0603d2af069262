"""The GGUF reader: equal to the gguf package on good files, a clear ModelFileError on every other."""

from __future__ import annotations

import gc
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import Kind, array, build, key, scalar, string, tensor, u32, u64
from tiny_models import write_gguf
from weight_types import ALL_TYPES
from yivl_edge import ModelFileError
from yivl_edge._core import GgufFile

# Two tensors, F32 of 4 x 3 (48 bytes, padded to 64) and of 8 (32 bytes).
ENTRIES = [tensor("a", [3, 4], 0, 0), tensor("b", [8], 0, 64)]
DATA = bytes(range(96))
KEYS = [key("text", scalar(Kind.STRING, "hello")), key("list", array(Kind.STRING, ["x", "yz"]))]
GOOD = build(KEYS, ENTRIES, DATA)


def parse(data: bytes) -> GgufFile:
    return GgufFile.parse(data, "model.gguf")


def error(data: bytes) -> str:
    with pytest.raises(ModelFileError) as caught:
        parse(data)
    message = str(caught.value)
    assert message.startswith("model.gguf: ")
    return message.removeprefix("model.gguf: ")


# --- Good files --------------------------------------------------------------------------------------------


def test_metadata_of_every_type_reads_back_as_the_gguf_package_wrote_it(tmp_path: Path) -> None:
    keys = {
        "u8": ("uint8", 255),
        "i8": ("int8", -128),
        "u16": ("uint16", 65535),
        "i16": ("int16", -32768),
        "u32": ("uint32", 2**32 - 1),
        "i32": ("int32", -(2**31)),
        "u64": ("uint64", 2**64 - 1),
        "i64": ("int64", -(2**63)),
        "f32": ("float32", 0.1),
        "f64": ("float64", 0.1),
        "true": ("bool", True),
        "false": ("bool", False),
        "text": ("string", "héllo 你好 🙂\n\0"),
        "ints": ("array", [1, -2, 3]),
        "floats": ("array", [0.5, -1.25]),
        "bools": ("array", [True, False, True]),
        "texts": ("array", ["", "a", "é"]),
    }
    write_gguf(tmp_path / "keys.gguf", keys, {})
    metadata = GgufFile.open(tmp_path / "keys.gguf").metadata
    expected = {name: value for name, (_, value) in keys.items()}
    expected |= {"f32": float(np.float32(0.1)), "general.architecture": "llama"}
    assert metadata == expected
    assert {name: type(value) for name, value in metadata.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Kind.U8, [0, 255]),
        (Kind.I8, [-128, 127]),
        (Kind.U16, [0, 65535]),
        (Kind.I16, [-32768, 32767]),
        (Kind.U32, [0, 2**32 - 1]),
        (Kind.I32, [-(2**31), 2**31 - 1]),
        (Kind.U64, [0, 2**63 - 1]),
        (Kind.I64, [-(2**63), 2**63 - 1]),
        (Kind.F32, [0.5, math.inf]),
        (Kind.F64, [0.5, -math.inf, float(np.finfo(np.float32).max)]),
        (Kind.BOOL, [True, False]),
        (Kind.STRING, ["", "héllo"]),
    ],
)
def test_arrays_of_every_type_read_back(kind: Kind, values: list[object]) -> None:
    file = parse(build([key("full", array(kind, values)), key("empty", array(kind, []))]))
    assert file.metadata == {"full": values, "empty": []}


def test_empty_strings_are_read() -> None:
    assert parse(build([key("k", scalar(Kind.STRING, ""))])).metadata == {"k": ""}


def test_arrays_of_doubles_are_rounded_to_float32() -> None:
    assert parse(build([key("a", array(Kind.F64, [0.1]))])).metadata == {"a": [float(np.float32(0.1))]}


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
def test_tensors_of_every_type_read_back_as_the_gguf_package_wrote_them(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    type_name = kind.name
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    written = {}
    for shape in [(block,), (3, 2 * block), (2, 3, block), (2, 1, 3, 3 * block)]:
        size = math.prod(shape) // block * block_bytes
        raw = rng.integers(0, 256, size, dtype=np.uint8)
        rows = raw.reshape(*shape[:-1], shape[-1] // block * block_bytes)
        if type_name in ("F32", "F16"):
            rows = rows.view(np.dtype(type_name.replace("F", "float").lower()))
        written[f"t{len(shape)}"] = (shape, raw, rows)
    path = tmp_path / "tensors.gguf"
    write_gguf(path, {}, {name: (rows, type_name) for name, (_, _, rows) in written.items()})

    found = GgufFile.open(path).tensors
    content = path.read_bytes()
    assert [t.name for t in found] == list(written)
    for t in found:
        shape, raw, _ = written[t.name]
        assert (t.type, t.shape, t.nbytes) == (type_name, shape, raw.size)
        assert np.array_equal(t.data, raw)
        assert content[t.offset : t.offset + t.nbytes] == raw.tobytes()


def test_version_2_is_read_like_version_3() -> None:
    file = parse(build(KEYS, ENTRIES, DATA, version=2))
    assert file.metadata == {"text": "hello", "list": ["x", "yz"]}
    assert [(t.name, t.shape, t.data.tobytes()) for t in file.tensors] == [
        ("a", (4, 3), DATA[:48]),
        ("b", (8,), DATA[64:96]),
    ]


def test_alignment_of_the_file_is_used() -> None:
    keys = [key("general.alignment", scalar(Kind.U32, 256))]
    file = parse(build(keys, [tensor("a", [2], 0, 256)], bytes(256) + b"12345678", alignment=256))
    assert file.tensors[0].data.tobytes() == b"12345678"


def test_tensors_may_lie_in_any_order_with_gaps_and_no_padding_at_the_end() -> None:
    file = parse(build([], [tensor("b", [8], 0, 128), tensor("a", [1], 0, 0)], bytes(160)))
    assert [t.name for t in file.tensors] == ["b", "a"]


def test_a_file_without_keys_and_tensors_is_read() -> None:
    file = parse(build())
    assert file.metadata == {}
    assert file.tensors == []


def test_64000_pieces_parse_quickly(tmp_path: Path) -> None:
    pieces = [f"▁piece{i}" for i in range(64000)]
    keys = [
        key("tokens", array(Kind.STRING, pieces)),
        key("scores", array(Kind.F32, [-float(i) for i in range(64000)])),
    ]
    path = tmp_path / "tokens.gguf"
    path.write_bytes(build(keys))
    start = time.perf_counter()
    file = GgufFile.open(path)
    # About 2 ms here; the limit only tells a parse that copies or looks twice from one that does not.
    assert time.perf_counter() - start < 0.2
    assert file.metadata["tokens"] == pieces


def test_a_20_gb_file_opens_without_reading_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    size = 20_000_000_000
    path.write_bytes(build([], [tensor("a", [size // 4], 0, 0)]))
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("this file system holds no sparse file of 20 GB")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    file = GgufFile.open(path)
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB
    assert file.tensors[0].nbytes == size
    assert file.tensors[0].data[-1] == 0


def test_tensor_data_outlive_the_file_object_and_its_replacement_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD)
    data = GgufFile.open(path).tensors[1].data
    (tmp_path / "new.gguf").write_bytes(b"GGUF")
    os.replace(tmp_path / "new.gguf", path)
    gc.collect()
    assert data.tobytes() == DATA[64:]
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


# --- Files that cannot be opened ---------------------------------------------------------------------------


def test_missing_directory_empty_and_special_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, reason in [
        ("missing.gguf", "cannot open: No such file or directory"),
        (".", "expected a GGUF file, found a directory"),
        ("empty.gguf", "expected a GGUF file, found an empty file"),
        ("pipe.gguf", "expected a GGUF file, found something that is no regular file"),
    ]:
        with pytest.raises(ModelFileError) as caught:
            GgufFile.open(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {reason}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(ModelFileError, match="cannot open: Permission denied"):
        GgufFile.open(path)


def test_a_path_that_is_no_utf8_is_opened_and_printed_with_escapes(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf")
    with pytest.raises(ModelFileError, match=r"/m\\xff\.gguf: cannot open"):
        GgufFile.open(path)
    Path(path).write_bytes(GOOD)
    assert len(GgufFile.open(path).tensors) == 2


# --- Truncated files ---------------------------------------------------------------------------------------


def test_every_truncation_is_refused() -> None:
    for length in range(len(GOOD)):
        message = error(GOOD[:length])
        assert "the file is truncated or damaged" in message, (length, message)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (3, "header: expected 4 bytes at offset 0, found 3"),
        (7, "version: expected 4 bytes at offset 4, found 3"),
        (10, "number of tensors: expected 8 bytes at offset 8, found 2"),
        (20, "number of metadata keys: expected 8 bytes at offset 16, found 4"),
        (30, "number of metadata keys: expected at most 0, which fit the rest of the file, found 2"),
        (80, "metadata key 1: expected 8 bytes at offset 77, found 3"),
        (87, "metadata key 1: expected 4 bytes at offset 85, found 2"),
        (91, "key 'text': expected 4 bytes at offset 89, found 2"),
        (97, "key 'text': expected 8 bytes at offset 93, found 4"),
        (103, "key 'text': expected 5 bytes at offset 101, found 2"),
    ],
)
def test_truncation_names_what_is_missing(length: int, message: str) -> None:
    # The second key begins at offset 77.
    file = build([key("k" * 40, scalar(Kind.U8, 1)), key("text", scalar(Kind.STRING, "hello"))])
    assert error(file[:length]).startswith(message)


def test_truncation_in_tensor_entry_padding_and_data_names_the_tensor() -> None:
    header = build([], ENTRIES, n_tensors=2)
    entries_end = 24 + len(ENTRIES[0]) + len(ENTRIES[1])
    assert entries_end < len(header)
    assert error(header[: entries_end - 5]).startswith("tensor 'b': expected 8 bytes at offset")
    for end in (entries_end, entries_end + 1, len(header) - 1, len(header)):
        assert error(header[:end]) == (
            "tensor 'a': expected 48 bytes at offset 0 of the data, found 0 bytes of data: "
            "the file is truncated or damaged"
        )
    assert error(header + DATA[:95]) == (
        "tensor 'b': expected 32 bytes at offset 64 of the data, found 95 bytes of data: "
        "the file is truncated or damaged"
    )


# --- Damaged and hostile files -----------------------------------------------------------------------------

HUGE = 2**64 - 1
MANY_BYTES = b"\0" * 4_000_000


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (build(magic=b"GGML"), "header: expected the letters GGUF, found 'GGML': this is no GGUF file"),
        (
            build(magic=b"PK\3\4"),
            r"header: expected the letters GGUF, found 'PK\x03\x04': this is no GGUF file",
        ),
        (b"GGUF" + b"\0\0\0\3" + bytes(16), "version: expected a little-endian file, found a big-endian one"),
        (build(version=1), "version: expected GGUF version 2 or 3, found version 1; convert the model again"),
        (build(version=4), "version: expected GGUF version 2 or 3, found version 4"),
        (build(version=0), "version: expected GGUF version 2 or 3, found version 0"),
        # Counts.
        (
            build(n_tensors=1),
            "number of tensors: expected at most 0, which fit the rest of the file, found 1",
        ),
        (build(n_tensors=HUGE), "number of tensors: expected at most 65536, found 18446744073709551615"),
        (
            build(n_keys=1),
            "number of metadata keys: expected at most 0, which fit the rest of the file, found 1",
        ),
        (build(n_keys=2**63), "number of metadata keys: expected at most 65536, found 9223372036854775808"),
        (
            build(KEYS, ENTRIES, DATA, n_keys=3),
            "name of tensor 0: expected a string of at most 67108864 bytes, found 1125899906842624",
        ),
        (build(KEYS, ENTRIES, DATA, n_keys=1), "tensor 'list': expected 1 to 4 dimensions, found 9"),
        (
            build([], [], MANY_BYTES, n_keys=65537),
            "number of metadata keys: expected at most 65536, found 65537",
        ),
        (
            build([], [], MANY_BYTES, n_tensors=65537),
            "number of tensors: expected at most 65536, found 65537",
        ),
        # Keys.
        (
            build([key("", scalar(Kind.U16, 1))]),
            "metadata key 0: expected a name of 1 to 65535 bytes, found 0 bytes",
        ),
        (
            build([key("k" * 65536, scalar(Kind.U8, 1))]),
            "metadata key 0: expected a name of 1 to 65535 bytes, found 65536 bytes",
        ),
        (
            build([string("k", HUGE) + scalar(Kind.U8, 1)]),
            "metadata key 0: expected a string of at most 67108864 bytes, found 184",
        ),
        (build([key(b"\xff", scalar(Kind.U8, 1))]), r"metadata key 0: expected UTF-8 text, found '\xff'"),
        (build([key("k", scalar(Kind.U8, 1))] * 2), "key 'k': expected one key of this name, found a second"),
        # Values.
        (build([key("k", u32(13) + u64(0))]), "key 'k': expected a value type from 0 to 12, found 13"),
        (
            build([key("k", u32(HUGE >> 32) + b"v")]),
            "key 'k': expected a value type from 0 to 12, found 4294967295",
        ),
        (build([key("k", scalar(Kind.BOOL, 2))]), "key 'k': expected a bool of 0 or 1, found 2"),
        (
            build([key("k", u32(8) + string("v", HUGE))]),
            "key 'k': expected a string of at most 67108864 bytes, found 184",
        ),
        (build([key("k", u32(8) + string("v", 2))]), "key 'k': expected 2 bytes at offset 45, found 1"),
        (build([key("k", scalar(Kind.STRING, b"a\x80b"))]), r"key 'k': expected UTF-8 text, found 'a\x80b'"),
        # Arrays.
        (
            build([key("k", array(9, []))]),
            "key 'k': expected an array of scalars or strings, found an array of arrays",
        ),
        (build([key("k", array(9, [], 1))]), "key 'k': expected an array of scalars or strings"),
        (
            build([key("k", u32(9) + u32(13) + u64(0))]),
            "key 'k': expected a value type from 0 to 12, found 13",
        ),
        (build([key("k", array(0, [1, 2], 3))]), "key 'k': array length: expected at most 2, which fit"),
        (build([key("k", array(10, [], 2**61))]), "key 'k': array length: expected at most 16777216, found"),
        (build([key("k", array(8, ["a"], 2))]), "key 'k': array length: expected at most 1, which fit"),
        (build([key("k", array(8, [], HUGE))]), "key 'k': array length: expected at most 16777216, found"),
        (
            build([key("k", array(0, [], 2**24 + 1))], [], bytes(2**24 + 1)),
            "key 'k': array length: expected at most 16777216, found 16777217",
        ),
        (build([key("k", array(7, [1, 0, 3]))]), "key 'k': expected a bool of 0 or 1, found 3"),
        (build([key("k", array(8, ["a", b"\xc3"]))]), r"key 'k': expected UTF-8 text, found '\xc3'"),
        (
            build([key("k", array(10, [2**63]))]),
            "key 'k': expected integers below 2^63, found 9223372036854775808",
        ),
        (
            build([key("k", array(12, [1e300]))]),
            "key 'k': expected floats in the range of 32 bits, found 1e+300",
        ),
        # Alignment.
        *[
            (
                build([key("general.alignment", scalar(Kind.U32, n))]),
                f"key 'general.alignment': expected a power of two from 8, found {n}",
            )
            for n in (0, 1, 4, 24, 33)
        ],
        (
            build([key("general.alignment", scalar(Kind.STRING, "32"))]),
            "key 'general.alignment': expected an integer, found a string",
        ),
        (
            build([key("general.alignment", scalar(Kind.U64, 2**63))]),
            "key 'general.alignment': expected an integer below 2^63, found 9223372036854775808",
        ),
        (
            build([key("general.alignment", scalar(Kind.U64, 2**62))], [tensor("a", [1])], bytes(64)),
            "tensor 'a': expected 4 bytes at offset 0 of the data, found 0 bytes of data",
        ),
        # Tensors.
        (
            build([], [tensor("", [1])], DATA),
            "name of tensor 0: expected a name of 1 to 64 bytes, found 0 bytes",
        ),
        (
            build([], [tensor("n" * 65, [1])], DATA),
            "name of tensor 0: expected a name of 1 to 64 bytes, found 65",
        ),
        (
            build([], [tensor(b"\xed\xa0\x80", [1])], DATA),
            r"name of tensor 0: expected UTF-8 text, found '\xed\xa0",
        ),
        (
            build([], [tensor("a", [1], 0, 0), tensor("a", [1], 0, 32)], DATA),
            "tensor 'a': expected one tensor of this name, found a second",
        ),
        (build([], [tensor("a", [], rank=0)], DATA), "tensor 'a': expected 1 to 4 dimensions, found 0"),
        (build([], [tensor("a", [1] * 5)], DATA), "tensor 'a': expected 1 to 4 dimensions, found 5"),
        (
            build([], [tensor("a", [1], rank=HUGE >> 32)], DATA),
            "tensor 'a': expected 1 to 4 dimensions, found 42949",
        ),
        (build([], [tensor("a", [0])], DATA), "tensor 'a': expected dimensions from 1 to 2^63 - 1, found 0"),
        (
            build([], [tensor("a", [4, 0])], DATA),
            "tensor 'a': expected dimensions from 1 to 2^63 - 1, found 0",
        ),
        (
            build([], [tensor("a", [HUGE])], DATA),
            "tensor 'a': expected dimensions from 1 to 2^63 - 1, found 1844674",
        ),
        (
            build([], [tensor("a", [32], 9)], DATA),
            "tensor 'a': expected a weight type of F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, "
            "Q5_K, Q6_K, IQ4_NL, IQ4_XS, BF16, found type number 9",
        ),
        (build([], [tensor("a", [32], HUGE >> 32)], DATA), "tensor 'a': expected a weight type of F32"),
        (
            build([], [tensor("a", [33, 2], 8)], DATA),
            "tensor 'a': expected rows of a multiple of 32 for Q8_0, found shape (2, 33)",
        ),
        (
            build([], [tensor("a", [128, 2], 12)], DATA),
            "tensor 'a': expected rows of a multiple of 256 for Q4_K, found shape (2, 128)",
        ),
        (
            build([], [tensor("a", [2**62, 4])], DATA),
            "tensor 'a': expected data that fit a file of 192 bytes, found more than 2^64 bytes of F32 (4, ",
        ),
        (
            build([], [tensor("a", [2**32, 2**32, 2**32, 2**32])], DATA),
            "tensor 'a': expected data that fit a file of 192 bytes, found more than 2^64 bytes of F32",
        ),
        (
            build([], [tensor("a", [2**62])], DATA),
            "tensor 'a': expected data that fit a file of 160 bytes, found more than 2^64 bytes of F32",
        ),
        (
            build([], [tensor("a", [25, 1])], DATA),
            "tensor 'a': expected 100 bytes at offset 0 of the data, found 96 bytes of data",
        ),
        (
            build([], [tensor("a", [1], 0, 4)], DATA),
            "tensor 'a': expected an offset that is a multiple of 32, found 4",
        ),
        (
            build([], [tensor("a", [1], 0, 2**64 - 32)], DATA),
            "tensor 'a': expected 4 bytes at offset 18446744073709551584 of the data, found 96 bytes of data",
        ),
        (
            build([], [tensor("a", [1], 0, 96)], DATA),
            "tensor 'a': expected 4 bytes at offset 96 of the data, found 96 bytes of data",
        ),
        (
            build([], [tensor("a", [9], 0, 32), tensor("b", [8], 0, 64)], DATA),
            "tensor 'b': expected data after those of tensor 'a', which end at 68, found offset 64: they",
        ),
        (
            build([], [tensor("b", [8], 0, 64), tensor("a", [24], 0, 0)], DATA),
            "tensor 'b': expected data after those of tensor 'a', which end at 96, found offset 64: they",
        ),
        (
            build([], [tensor("a", [1], 0, 32), tensor("b", [1], 0, 32)], DATA),
            "expected data after those of tensor",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_damaged_file_is_refused_with_the_reason(file: bytes, message: str) -> None:
    assert message in error(file)


@pytest.mark.parametrize("text", ["\x00\x1b[2J", "x" * 10_000, "é" * 10_000])
def test_text_from_the_file_is_escaped_and_cut_in_errors(text: str) -> None:
    message = error(build([key(text, u32(99))]))
    assert "\x00" not in message
    assert "\x1b" not in message
    assert len(message) < 250
    assert message.endswith(": expected a value type from 0 to 12, found 99")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80",
        b"\xc0\x80",
        b"\xc1\xbf",
        b"\xe0\x9f\xbf",
        b"\xed\xbf\xbf",
        b"\xf0\x8f\xbf\xbf",
        b"\xf4\x90\x80\x80",
        b"\xf5\x80\x80\x80",
        b"\xc3",
        b"\xe2\x82",
        b"\xf0\x9f\x98",
        b"\xe2\x28\xa1",
        b"\xf0\x9f\x28\x80",
    ],
)
def test_invalid_utf8_is_refused(raw: bytes) -> None:
    assert "expected UTF-8 text" in error(build([key("k", scalar(Kind.STRING, b"ok " + raw))]))


def test_every_assigned_code_point_is_accepted() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert parse(build([key("k", scalar(Kind.STRING, text))])).metadata["k"] == text


def test_a_string_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    size = 10_000_000_000
    path.write_bytes(build([key("k", u32(Kind.STRING) + u64(size))]))
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("this file system holds no sparse file of 10 GB")
    with pytest.raises(
        ModelFileError, match=r"key 'k': expected a string of at most 67108864 bytes, found 10000000000"
    ):
        GgufFile.open(path)


def test_absurd_counts_cost_no_memory() -> None:
    """In a process that may grow by 64 MB, every hostile count is refused and the peak hardly moves."""
    script = """
import resource, sys
from gguf_bytes import *
from tiny_models import write_gguf
from weight_types import ALL_TYPES
from yivl_edge import ModelFileError
from yivl_edge._core import GgufFile
files = []
for n in [2**16, 2**20, 2**24, 2**31, 2**32 - 1, 2**40, 2**48, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 1]:
    files += [build(n_tensors=n), build(n_keys=n), build([string("k", n) + scalar(Kind.U8, 1)])]
    files += [build([key("k", u32(8) + string("v", n))])]
    files += [build([key("k", array(kind, [], n))]) for kind in range(13)]
    files += [build([], [tensor("t", [n, n], t)], bytes(64)) for t in (0, 8, 12)]
    files += [build([], [tensor("t", [1], 0, n)], bytes(64))]
try:
    GgufFile.parse(b"GGUF")
except ModelFileError:
    pass
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2**26, pages + 2**26))
refused = 0
for file in files:
    try:
        GgufFile.parse(file)
    except ModelFileError:
        refused += 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(files), refused, grown)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know the size of the process")
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    total, refused, grown_kib = map(int, result.stdout.split())
    assert refused == total
    assert grown_kib < 2048


def test_items_of_all_arrays_count_together() -> None:
    half = u32(Kind.ARRAY) + u32(Kind.U8) + u64((1 << 23) + 1) + bytes((1 << 23) + 1)
    with pytest.raises(ModelFileError, match="array length: expected at most 8388607"):
        GgufFile.parse(build([key("a", half), key("b", half)]))


def test_a_delete_character_does_not_get_into_a_message() -> None:
    with pytest.raises(ModelFileError) as error:
        GgufFile.parse(build([key("k\x7fk", u32(99))]))
    assert "\x7f" not in str(error.value)


def test_a_message_is_cut_between_characters() -> None:
    with pytest.raises(ModelFileError) as error:
        GgufFile.parse(build([key("中" * 100, u32(99))]))
    assert "中" in str(error.value)
    assert "\\x" not in str(error.value)


def test_an_open_file_holds_no_descriptor(golden_f32: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = [GgufFile.open(golden_f32) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(files) == 3
