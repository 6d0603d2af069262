"""Weights of every type become exactly the float32 values that gguf's own code makes of them."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from yivl_edge import _core, quantize

TYPES = [GGMLQuantizationType(number) for number in (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30)]

# Where each block type keeps its half-precision scales, in bytes from the start of a block.
HALVES = {
    "F16": [0],
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}

EXTREME_HALVES = np.array(
    [
        0x0000,  # zero, and minus zero
        0x8000,
        0x0001,  # the smallest and the largest subnormal
        0x83FF,
        0x0400,  # the smallest normal
        0x7BFF,  # the largest
        0xFBFF,
        0x3C00,  # one
        0x7C00,  # infinities and a quiet NaN
        0xFC00,
        0x7E01,
    ],
    dtype=np.uint16,
)


def random_blocks(qtype: GGMLQuantizationType, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Bytes (rows, blocks * block bytes) with every bit pattern possible and finite scales of all sizes."""
    rng = np.random.default_rng(seed)
    size = GGML_QUANT_SIZES[qtype][1]
    data = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    if qtype == GGMLQuantizationType.F32:
        data = rng.standard_normal((rows * blocks, 1), dtype=np.float32).view(np.uint8)
    for offset in HALVES.get(qtype.name, []):
        halves = rng.integers(0, 0x7C00, rows * blocks, dtype=np.uint16)
        halves |= rng.integers(0, 2, rows * blocks, dtype=np.uint16) << np.uint16(15)
        data[:, offset : offset + 2] = halves[:, None].view(np.uint8)
    return data.reshape(rows, blocks * size)


def check(data: np.ndarray, qtype: GGMLQuantizationType, isa: str) -> None:
    block, size = GGML_QUANT_SIZES[qtype]
    rows, cols = data.shape[0], data.shape[1] // size * block
    with np.errstate(invalid="ignore"):
        expected = dequantize(data, qtype)
    found = _core.dequantize(data, qtype.value, rows, cols, isa)
    assert found.shape == (rows, cols)
    # Bit for bit, signs of zeros included; which NaN it is says nothing.
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ"


ISAS = ["", *_core.available_isas()]


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa or "scalar")
@pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)
class TestEveryType:
    def test_random_blocks(self, qtype: GGMLQuantizationType, isa: str) -> None:
        blocks = 200 if GGML_QUANT_SIZES[qtype][0] < 256 else 24
        check(random_blocks(qtype, 3, blocks, 1), qtype, isa)

    def test_single_and_odd_counts(self, qtype: GGMLQuantizationType, isa: str) -> None:
        for blocks in range(1, 36 if GGML_QUANT_SIZES[qtype][0] == 1 else 6):
            check(random_blocks(qtype, 2, blocks, blocks), qtype, isa)

    def test_extreme_scales(self, qtype: GGMLQuantizationType, isa: str) -> None:
        size = GGML_QUANT_SIZES[qtype][1]
        offsets = HALVES.get(qtype.name, [])
        pairs = np.array(np.meshgrid(EXTREME_HALVES, EXTREME_HALVES)).reshape(2, -1)
        data = random_blocks(qtype, 1, pairs.shape[1], 2).reshape(-1, size)
        for values, offset in zip(pairs, offsets, strict=False):
            data[:, offset : offset + 2] = values.copy()[:, None].view(np.uint8)
        check(data.reshape(1, -1), qtype, isa)

    def test_misaligned_rows(self, qtype: GGMLQuantizationType, isa: str) -> None:
        data = random_blocks(qtype, 1, 8, 3)
        shifted = np.empty(data.size + 1, dtype=np.uint8)[1:].reshape(data.shape)
        shifted[:] = data
        block, size = GGML_QUANT_SIZES[qtype]
        found = _core.dequantize(shifted, qtype.value, 1, data.shape[1] // size * block, isa)
        expected = _core.dequantize(data, qtype.value, 1, data.shape[1] // size * block)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa or "scalar")
def test_every_half_precision_number(isa: str) -> None:
    check(np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(1, -1), GGMLQuantizationType.F16, isa)


@pytest.fixture
def no_subnormals() -> Iterator[Callable[[], None]]:
    """To be called in the test: from then on the CPU takes subnormal floats of this thread for zeros, as after loading
    what GCC before 13 has linked with -ffast-math."""
    torch = pytest.importorskip("torch")

    def begin() -> None:
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU has no such mode")
        smallest = np.full(2, 2.0**-149, np.float32)
        assert not (smallest * np.float32(2.0**100)).any()

    yield begin
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa or "scalar")
def test_small_scales_count_where_the_cpu_takes_subnormal_numbers_for_zeros(
    isa: str, no_subnormals: Callable[[], None]
) -> None:
    def weights(qtype: GGMLQuantizationType) -> np.ndarray:
        block, size = GGML_QUANT_SIZES[qtype]
        data = random_blocks(qtype, 1, 8, 4).reshape(-1, size)
        for offset in HALVES[qtype.name]:
            data[:, offset : offset + 2] = np.full(8, 0x0155, np.uint16)[:, None].view(np.uint8)  # 2e-5
        return _core.dequantize(data.reshape(1, -1), qtype.value, 1, 8 * block, isa)

    types = [t for t in TYPES if HALVES.get(t.name)]
    expected = [weights(t) for t in types]
    no_subnormals()
    found = [weights(t) for t in types]
    assert all(
        np.array_equal(f.view(np.uint32), e.view(np.uint32)) for f, e in zip(found, expected, strict=True)
    )


def test_quantising_knows_small_scales_where_the_cpu_takes_subnormal_numbers_for_zeros(
    no_subnormals: Callable[[], None],
) -> None:
    small = np.random.default_rng(5).standard_normal((4, 512), np.float32) * np.float32(0.02)
    expected = {name: quantize(small, name) for name in ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q4_0")}
    no_subnormals()
    assert all(np.array_equal(quantize(small, name), data) for name, data in expected.items())


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa or "scalar")
def test_every_bfloat16_number(isa: str) -> None:
    check(np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(1, -1), GGMLQuantizationType.BF16, isa)


def test_bytes_that_do_not_match_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes do not match"):
        _core.dequantize(np.zeros(17, np.uint8), GGMLQuantizationType.Q4_0.value, 1, 32)
    with pytest.raises(ValueError, match="whole number of blocks"):
        _core.dequantize(np.zeros(18, np.uint8), GGMLQuantizationType.Q4_0.value, 1, 33)
    with pytest.raises(ValueError, match="unknown weight type 99"):
        _core.dequantize(np.zeros(18, np.uint8), 99, 1, 32)
