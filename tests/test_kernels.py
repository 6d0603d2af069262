"""Every operation, on every instruction set of this machine, against numpy in float64."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from yivl_edge import _core

Array = np.ndarray

ISAS: list[str] = _core.available_isas()
F32 = GGMLQuantizationType.F32.value

# float32 rounds to one part in 2^24.
EPS = 2.0**-24


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def strided(values: Array) -> Array:
    """The same values in rows that lie further apart than they are long, with NaN between them."""
    wide = np.full((values.shape[0], values.shape[1] + 5), np.nan, dtype=np.float32)
    wide[:, 2 : 2 + values.shape[1]] = values
    return wide[:, 2 : 2 + values.shape[1]]


def relative_error(found: Array, expected: Array) -> float:
    scale = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / max(scale, 1e-30)


def as_bytes(weights: Array) -> Array:
    return np.ascontiguousarray(weights).view(np.uint8).reshape(-1)


def linear(ops: "_core.KernelOps", x: Array, weights: Array, bias: Array | None = None) -> Array:
    y = np.full((x.shape[0], weights.shape[0]), np.nan, dtype=np.float32)
    ops.linear(y, x, as_bytes(weights), F32, bias)
    return y


# ---- which instruction set ----


def test_best_instruction_set_comes_first_and_portable_is_always_there() -> None:
    assert ISAS[-1] == "portable"
    order = ["amx", "avx512", "avx2", "neon", "portable"]
    assert sorted(ISAS, key=order.index) == ISAS


def isa_name_with(value: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: v for name, v in os.environ.items() if name != "YIVL_ISA"}
    if value is not None:
        env["YIVL_ISA"] = value
    code = "from yivl_edge import _core; print(_core.isa_name())"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_environment_variable_forces_each_available_instruction_set() -> None:
    for name in ISAS:
        assert isa_name_with(name).stdout.strip() == name
    assert isa_name_with(None).stdout.strip() == ISAS[0]
    assert isa_name_with("").stdout.strip() == ISAS[0]


def test_unknown_or_missing_instruction_set_is_an_error() -> None:
    assert 'instruction set "sse9" is unknown' in isa_name_with("sse9").stderr
    missing = sorted({"amx", "avx512", "avx2", "neon"} - set(ISAS))
    for name in missing:
        failed = isa_name_with(name)
        assert failed.returncode != 0
        assert (
            f'YIVL_ISA: this CPU or its operating system lacks instruction set "{name}"' in failed.stderr
            or (f'YIVL_ISA: instruction set "{name}" is not in this build' in failed.stderr)
        )
        assert "portable" in failed.stderr  # it says what there is


# ---- linear ----


@pytest.mark.parametrize("cols", [1, 3, 17, 32, 100, 588, 1024, 1029, 2304])
def test_linear_at_awkward_sizes(isa: str, cols: int) -> None:
    ops = _core.KernelOps(isa, 2)
    for rows in (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 66):
        for tokens in (1, 2, 3, 5, 6, 7, 12, 13):
            x, w, b = normal(1, tokens, cols), normal(2, rows, cols), normal(3, rows)
            y = strided(np.zeros((tokens, rows), np.float32))
            ops.linear(y, strided(x), as_bytes(w), F32, b)
            exact = x.astype(np.float64) @ w.T.astype(np.float64) + b
            # A sum of n products of standard normals: each rounding is at most EPS of a partial sum, whose
            # size is sqrt(n); they add up like a random walk.
            assert np.abs(y - exact).max(initial=0.0) <= 8 * EPS * cols + 8 * EPS


QUANTISED = [GGMLQuantizationType(number) for number in (1, 2, 3, 6, 7, 8, 30)]
RANDOM_BYTES = [GGMLQuantizationType(number) for number in (10, 11, 12, 13, 14, 20, 23)]
SCALE_OFFSETS = {
    3: [0, 2],
    7: [0, 2],
    10: [80, 82],
    11: [108],
    12: [0, 2],
    13: [0, 2],
    14: [208],
    20: [0],
    23: [0],
}


def random_weights(qtype: GGMLQuantizationType, rows: int, cols: int, seed: int) -> tuple[Array, Array]:
    """Bytes of a (rows, cols) matrix, and the float32 values they stand for, about 1 in size."""
    block, size = GGML_QUANT_SIZES[qtype]
    rng = np.random.default_rng(seed)
    if qtype in QUANTISED:
        data = quantize(rng.standard_normal((rows, cols), dtype=np.float32), qtype)
        data = data.view(np.uint8).reshape(rows, -1)
    else:
        data = rng.integers(0, 256, (rows * cols // block, size), dtype=np.uint8)
        for offset in SCALE_OFFSETS[qtype.value]:
            scales = rng.uniform(0.001, 0.01, len(data)).astype(np.float16)
            data[:, offset : offset + 2] = scales[:, None].view(np.uint8)
        data = data.reshape(rows, -1)
    return data, dequantize(data, qtype)


def to_bfloat(values: Array) -> Array:
    """Rounded to bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32)


INTEGER_ISAS = ("amx", "avx512", "avx2", "neon", "cuda")
INTEGER_TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")
CUDA_INTEGER_TYPES = (*INTEGER_TYPES, "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")
# From so many tokens on, AMX multiplies on tiles of bfloat16; fewer it leaves to the kernels of AVX-512.
TILE_TOKENS = 16


def to_integers(x: Array) -> Array:
    """Rounded to 15-bit integers with a scale for every 32 columns."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    factor = np.divide(np.float32(16383), largest, out=np.zeros_like(largest), where=largest > 0)
    return (np.rint(blocks * factor) * (largest / np.float32(16383))).reshape(x.shape)


def product(isa: str, x: Array, w: Array, qtype: GGMLQuantizationType) -> tuple[Array, Array]:
    """x w^T for weights that are not F32, and the sums of the products' sizes.

    AMX multiplies many tokens as bfloat16 numbers: both operands are rounded first, and their products are exact in
    float32. Else AMX, AVX-512, AVX2, NEON and CUDA multiply the file's integers by rounded x.
    """
    if isa == "amx" and len(x) >= TILE_TOKENS:
        x, w = to_bfloat(x), to_bfloat(w)
    elif isa in INTEGER_ISAS and qtype.name in (CUDA_INTEGER_TYPES if isa == "cuda" else INTEGER_TYPES):
        x = to_integers(x)
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    return wide_x @ wide_w.T, np.abs(wide_x) @ np.abs(wide_w.T)


@pytest.mark.parametrize("qtype", QUANTISED + RANDOM_BYTES, ids=lambda t: t.name)
def test_linear_with_every_weight_type(isa: str, qtype: GGMLQuantizationType) -> None:
    ops = _core.KernelOps(isa, 2)
    cols = 1280
    for rows, tokens in ((37, 1), (37, 5), (70, 19)):
        data, w = random_weights(qtype, rows, cols, 4)
        x = normal(5, tokens, cols)
        y = np.zeros((tokens, rows), np.float32)
        ops.linear(y, x, data.reshape(-1), qtype.value)
        # The weights are exactly the dequantised ones, so only the sums round: sqrt(1280) * EPS = 2e-6.
        assert relative_error(y, product(isa, x, w, qtype)[0]) < 2e-6


@pytest.mark.parametrize("integer_isa", [isa for isa in ISAS if isa in INTEGER_ISAS])
@pytest.mark.parametrize("name", INTEGER_TYPES)
def test_linear_in_integers_at_awkward_sizes(integer_isa: str, name: str) -> None:
    ops = _core.KernelOps(integer_isa, 2)
    qtype = GGMLQuantizationType[name]
    # Of d q - m, the weight, one part can be larger than their difference: m is at most 63 times a scale of 0.01.
    minimum = 0.63 if name in ("Q4_K", "Q5_K") else 0.0
    for blocks in (1, 2, 7, 8, 9, 17):
        cols = blocks * GGML_QUANT_SIZES[qtype][0]
        for rows in (1, 2, 3, 4, 5, 8, 17, 33):
            data, w = random_weights(qtype, rows, cols, rows)
            for tokens in (1, 2, 4, 5, 6, 7, 9, 13):
                x, bias = normal(tokens, tokens, cols), normal(3, rows)
                y = strided(np.full((tokens, rows), np.nan, np.float32))
                ops.linear(y, strided(x), data.reshape(-1), qtype.value, bias)
                x = to_integers(x).astype(np.float64)
                exact = x @ w.T.astype(np.float64) + bias
                sizes = np.abs(x) @ (np.abs(w.T.astype(np.float64)) + 2 * minimum) + np.abs(bias)
                # A step of 32 columns is exact but for the rounding of its sum to float32, of three scales and of the
                # expected x; then it is added, and the minimum. The bias comes last.
                assert np.all(np.abs(y - exact) <= (cols // 32 * 2 + 6) * EPS * sizes), (blocks, rows, tokens)


def check_largest_integers(integer_isa: str, name: str, most_tokens: int) -> None:
    """Weights and x at the ends of their ranges, so that a block's sum is as large as it can be."""
    ops = _core.KernelOps(integer_isa, 2)
    qtype = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[qtype]
    cols, ends = 512, np.array([0x00, 0x7F, 0x80, 0xFF], np.uint8)
    data = np.repeat(ends, cols // block * size).reshape(-1, size)  # a row for each end
    for offset in SCALE_OFFSETS.get(qtype.value, [0]):
        data[:, offset : offset + 2] = np.array([0.01], np.float16).view(np.uint8)
    data = data.reshape(len(ends), -1)
    minimum = {"Q4_K": 0.63, "Q5_K": 0.63, "Q2_K": 0.15, "Q4_1": 0.01, "Q5_1": 0.01}.get(name, 0.0)
    w = np.abs(dequantize(data, qtype).T.astype(np.float64)) + 2 * minimum
    for tokens in (1, 5, most_tokens):
        x = np.ones((tokens, cols), np.float32)
        x[1::3] = -1
        x[2::3, ::2] = -1
        y = np.zeros((tokens, len(ends)), np.float32)
        ops.linear(y, x, data.reshape(-1), qtype.value)
        exact = x @ dequantize(data, qtype).T.astype(np.float64)
        # As above.
        assert np.all(np.abs(y - exact) <= (cols // 32 * 2 + 6) * EPS * (np.abs(x) @ w)), tokens


@pytest.mark.parametrize("integer_isa", [isa for isa in ISAS if isa in INTEGER_ISAS])
@pytest.mark.parametrize("name", INTEGER_TYPES)
def test_the_largest_integers_do_not_overflow(integer_isa: str, name: str) -> None:
    check_largest_integers(integer_isa, name, 13)


@pytest.mark.parametrize("qtype", [GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0], ids=lambda t: t.name)
def test_linear_can_add_its_output_or_take_its_gelu(isa: str, qtype: GGMLQuantizationType) -> None:
    ops = _core.KernelOps(isa, 2)
    for rows, tokens in ((70, 1), (70, 19), (300, 300)):
        data, _ = random_weights(qtype, rows, 256, 4)
        x, bias = normal(5, tokens, 256), normal(6, rows)
        plain, added, curved = (strided(normal(7, tokens, rows)) for _ in range(3))
        before = added.copy()
        for y, then in ((plain, "store"), (added, "add"), (curved, "gelu")):
            ops.linear(y, strided(x), data.reshape(-1), qtype.value, bias, then=then)
        assert np.array_equal(added, before + plain)
        ops.gelu(plain)
        assert np.array_equal(curved, plain)


def test_gated_linear_is_the_gated_product_of_two(isa: str) -> None:
    ops = _core.KernelOps(isa, 2)
    kinds = [GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K]
    for gate_type, up_type in itertools.product(kinds, kinds):
        for rows, tokens in ((70, 1), (300, 19), (40, 300)):
            (gate, _), (up, _) = (
                random_weights(gate_type, rows, 256, 1),
                random_weights(up_type, rows, 256, 2),
            )
            x = normal(5, tokens, 256)
            y = strided(np.zeros((tokens, rows), np.float32))
            ops.gated_linear(y, strided(x), gate.reshape(-1), gate_type.value, up.reshape(-1), up_type.value)
            g, u = np.zeros((2, tokens, rows), np.float32)
            ops.linear(g, x, gate.reshape(-1), gate_type.value)
            ops.linear(u, x, up.reshape(-1), up_type.value)
            wide = g.astype(np.float64)
            exact = wide / (1 + np.exp(-wide)) * u
            # As in test_swiglu.
            assert np.all(np.abs(y - exact) <= 10 * EPS * np.abs(exact) + 1e-30)


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no AMX")
class TestBfloatTiles:
    """Linear on AMX: many tokens against exact sums of rounded operands, fewer against AVX-512."""

    def check(self, qtype: GGMLQuantizationType, rows: int, tokens: int, cols: int) -> None:
        assert tokens >= TILE_TOKENS
        data, w = random_weights(qtype, rows, cols, rows)
        x, bias = normal(tokens, tokens, cols), normal(3, rows)
        y = strided(np.full((tokens, rows), np.nan, np.float32))
        _core.KernelOps("amx", 2).linear(y, strided(x), data.reshape(-1), qtype.value, bias)
        exact, sizes = product("amx", x, w, qtype)
        # Each step of 32 columns adds 16 products twice and those two sums (17 roundings), then its sum goes
        # to the accumulator; the bias is added last. A rounding is at most EPS of a partial sum, which never
        # exceeds the sum of sizes.
        roundings = 17 + -(-cols // 32) + 1
        assert np.all(np.abs(y - (exact + bias)) <= roundings * EPS * (sizes + np.abs(bias)))

    @pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 40, 300])
    def test_rows_and_tokens(self, rows: int) -> None:
        for tokens in (16, 17, 31, 32, 33, 47, 48, 49, 70):
            self.check(GGMLQuantizationType.Q4_0, rows, tokens, 96)

    @pytest.mark.parametrize("cols", [1, 2, 20, 31, 32, 33, 100, 256, 257, 588, 2048, 2049, 2304])
    @pytest.mark.parametrize(
        "qtype", [GGMLQuantizationType.F16, GGMLQuantizationType.BF16], ids=lambda t: t.name
    )
    def test_columns_of_half_precision(self, qtype: GGMLQuantizationType, cols: int) -> None:
        for rows, tokens in ((1, 16), (17, 19), (40, 16), (33, 33)):
            self.check(qtype, rows, tokens, cols)

    @pytest.mark.parametrize("blocks", [1, 2, 3, 7, 9, 10, 17])
    @pytest.mark.parametrize("qtype", QUANTISED[1:-1] + RANDOM_BYTES, ids=lambda t: t.name)
    def test_whole_blocks(self, qtype: GGMLQuantizationType, blocks: int) -> None:
        for rows, tokens in ((1, 16), (35, 18), (33, 33)):
            self.check(qtype, rows, tokens, blocks * GGML_QUANT_SIZES[qtype][0])

    @pytest.mark.parametrize("qtype", QUANTISED + RANDOM_BYTES, ids=lambda t: t.name)
    def test_few_tokens_give_the_bits_of_avx512(self, qtype: GGMLQuantizationType) -> None:
        data, _ = random_weights(qtype, 45, 2304, 1)
        for tokens in (1, 2, TILE_TOKENS - 1):
            x, bias = normal(tokens, tokens, 2304), normal(3, 45)
            found, expected = np.zeros((2, tokens, 45), np.float32)
            for isa, y in (("amx", found), ("avx512", expected)):
                _core.KernelOps(isa, 2).linear(y, x, data.reshape(-1), qtype.value, bias)
            assert np.array_equal(found, expected), tokens

    def test_weights_at_an_odd_address(self) -> None:
        for qtype in QUANTISED + RANDOM_BYTES:
            data, _ = random_weights(qtype, 33, 512, 1)
            padded = np.zeros(data.size + 1, np.uint8)
            padded[1:] = data.reshape(-1)
            x = normal(2, 20, 512)
            results = []
            for weights in (data.reshape(-1), padded[1:]):
                y = np.zeros((20, 33), np.float32)
                _core.KernelOps("amx", 1).linear(y, x, weights, qtype.value)
                results.append(y)
            assert np.array_equal(*results), qtype.name

    def test_no_rows(self) -> None:
        for rows, tokens in ((0, 3), (3, 0), (0, 40)):
            w = normal(1, rows, 64).astype(np.float16)
            y = np.zeros((tokens, rows), np.float32)
            _core.KernelOps("amx", 2).linear(
                y, normal(2, tokens, 64), as_bytes(w), GGMLQuantizationType.F16.value
            )

    def test_float32_weights_stay_exact(self) -> None:
        x, w = normal(1, 20, 1100), normal(2, 45, 1100)
        exact = linear(_core.KernelOps("avx512", 1), x, w)
        assert np.array_equal(linear(_core.KernelOps("amx", 1), x, w), exact)


# ---- norms, activations ----

WIDTHS = [1, 2, 5, 15, 16, 17, 31, 33, 160, 1280, 4097]


@pytest.mark.parametrize("cols", WIDTHS)
def test_layer_norm(isa: str, cols: int) -> None:
    ops = _core.KernelOps(isa, 2)
    for rows in (0, 1, 3, 40):
        x = normal(1, rows, cols) * 3 + 5
        weight, bias = normal(2, cols), normal(3, cols)
        exact = x.astype(np.float64)
        exact = exact - exact.mean(1, keepdims=True)
        exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * weight + bias
        y = strided(x)
        ops.layer_norm(y, y, weight, bias, 1e-5)
        # The mean (5 against a spread of 3) is subtracted first, which costs its size over the spread in
        # roundings; the variance of one or two columns can be 0, so that 1/sqrt(eps) = 316 multiplies them.
        assert np.abs(y - exact).max(initial=0.0) < (64 if cols > 2 else 20000) * EPS


@pytest.mark.parametrize("cols", WIDTHS)
def test_rms_norm(isa: str, cols: int) -> None:
    ops = _core.KernelOps(isa, 2)
    for rows in (0, 1, 3, 40):
        x, weight = normal(1, rows, cols), normal(2, cols)
        exact = x.astype(np.float64)
        exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6) * weight
        y = strided(np.zeros_like(x))
        ops.rms_norm(y, strided(x), weight, 1e-6)
        assert np.all(np.abs(y - exact) <= 16 * EPS * np.abs(exact) + 1e-30)


@pytest.mark.parametrize("qtype", [GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0], ids=lambda t: t.name)
@pytest.mark.parametrize("has_bias", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_products_of_a_norm_are_the_norms_products(
    isa: str, qtype: GGMLQuantizationType, has_bias: bool
) -> None:
    ops = _core.KernelOps(isa, 2)
    for rows, tokens, cols in ((70, 1, 256), (33, 7, 512), (300, 37, 256), (40, 1200, 64)):
        (gate, _), (up, _) = random_weights(qtype, rows, cols, 1), random_weights(qtype, rows, cols, 2)
        x, weight, bias = normal(3, tokens, cols), normal(4, cols), normal(5, cols) if has_bias else None
        normalised = np.zeros_like(x)
        if bias is None:
            ops.rms_norm(normalised, x, weight, 1e-5)
        else:
            ops.layer_norm(normalised, x, weight, bias, 1e-5)
        y, fused, gated, fused_gated = (np.zeros((tokens, rows), np.float32) for _ in range(4))
        norm = (weight, bias, 1e-5)
        ops.linear(y, normalised, gate.reshape(-1), qtype.value)
        ops.linear(fused, strided(x), gate.reshape(-1), qtype.value, norm=norm)
        assert np.array_equal(fused, y)
        pair = (gate.reshape(-1), qtype.value, up.reshape(-1), qtype.value)
        ops.gated_linear(gated, normalised, *pair)
        ops.gated_linear(fused_gated, strided(x), *pair, norm=norm)
        assert np.array_equal(fused_gated, gated)


def test_gelu_is_the_erf_form_to_float32_accuracy(isa: str) -> None:
    ops = _core.KernelOps(isa, 2)
    x = np.concatenate([np.linspace(-14, 14, 100003), [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]]).astype(
        np.float32
    )[None]
    y = strided(x)
    ops.gelu(y)
    wide = x.astype(np.float64)
    exact = wide / 2 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
    # Of x, not of the result: for negative x the 1 + erf cancels, in the reference as here.
    assert np.all(np.abs(y - exact) <= 3 * EPS * np.abs(wide))


def test_swiglu(isa: str) -> None:
    ops = _core.KernelOps(isa, 2)
    gate = np.concatenate([np.linspace(-80, 80, 100003), [0.0, 1e3, -1e3, 1e30, -1e30, -3e38]]).astype(
        np.float32
    )[None]
    up = normal(1, *gate.shape)
    y = strided(gate.T)
    # Products that only take gate and up apart: float32 weights of 1 and 0.
    first, second = (as_bytes(row) for row in np.eye(2, dtype=np.float32)[:, None])
    ops.gated_linear(y, strided(np.concatenate([gate, up]).T), first, F32, second, F32)
    y = y.T
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = wide / (1 + np.exp(-wide)) * up
    # exp to 1.5 ulp, and the rounding of sum, quotient and product. Beyond -80 the result is 0 but for e^-80
    # of the gate.
    ordinary = np.abs(wide) <= 80
    assert np.all(np.abs(y - exact)[ordinary] <= 10 * EPS * np.abs(exact)[ordinary])
    assert np.all(np.abs(y - exact)[~ordinary] <= np.maximum(3 * EPS * np.abs(exact)[~ordinary], 1e-8))


@pytest.mark.parametrize("cols", WIDTHS)
def test_add(isa: str, cols: int) -> None:
    ops = _core.KernelOps(isa, 2)
    x, y = normal(1, 40, cols), normal(2, 40, cols)
    out = strided(y)
    ops.add(out, strided(x))
    assert np.array_equal(out, x + y)


@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 128])
def test_rope_follows_the_references_float32_angles(isa: str, head_dim: int) -> None:
    ops = _core.KernelOps(isa, 2)
    theta, first, heads = 5e6, 3990, 3
    x = normal(1, 70, heads * head_dim)
    y = strided(x)
    ops.rope(y, head_dim, first, theta)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq = np.float32(1) / (theta ** exponent.astype(np.float64)).astype(np.float32)
    angle = (np.arange(first, first + 70, dtype=np.float32)[:, None] * inv_freq).astype(np.float64)[:, None]
    pairs = x.astype(np.float64).reshape(70, heads, head_dim // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    exact = np.stack([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)
    # Two products and a sum of values up to 4, cos and sin rounded once.
    assert np.abs(y - exact.reshape(x.shape)).max() < 4 * 4 * EPS


@pytest.mark.parametrize(
    "qtype", [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0]
)
def test_embed_copies_rows(isa: str, qtype: GGMLQuantizationType) -> None:
    ops = _core.KernelOps(isa, 2)
    data = quantize(normal(1, 50, 96), qtype).view(np.uint8).reshape(-1)
    table = dequantize(quantize(normal(1, 50, 96), qtype), qtype)
    ids = [0, 49, 7, 7, 23]
    y = strided(np.zeros((5, 96), np.float32))
    ops.embed(y, data, qtype.value, 50, ids)
    assert np.array_equal(y, table[ids])


# ---- the same bits for any number of threads and any company of rows ----


CHUNKS = (1, 2, 3, 5, 6, 7, 16, 33, 64)


# Those with a path of their own for one row, and one without.
FAST_TYPES = [GGMLQuantizationType(number) for number in (0, 1, 30, 8, 2, 12, 13, 14, 7)]


@pytest.mark.parametrize("qtype", FAST_TYPES, ids=lambda t: t.name)
def test_linear_does_not_depend_on_threads_or_chunks(isa: str, qtype: GGMLQuantizationType) -> None:
    tokens, cols, rows = 70, 2304, 67
    if qtype == GGMLQuantizationType.F32:
        data = as_bytes(normal(1, rows, cols))
    else:
        data = random_weights(qtype, rows, cols, 1)[0].reshape(-1)
    x, bias = normal(2, tokens, cols), normal(3, rows)
    whole = np.zeros((tokens, rows), np.float32)
    _core.KernelOps(isa, 1).linear(whole, x, data, qtype.value, bias)
    few = whole
    if isa == "amx":
        few = np.zeros_like(whole)
        _core.KernelOps("avx512", 1).linear(few, x, data, qtype.value, bias)
    for threads, chunks in ((1, (1,)), (2, CHUNKS), (3, (1, 7))):
        ops = _core.KernelOps(isa, threads)
        for chunk in chunks:
            for i in range(0, tokens, chunk):
                part = slice(i, min(i + chunk, tokens))
                expected = (few if part.stop - i < TILE_TOKENS else whole)[part]
                y = np.zeros_like(expected)
                ops.linear(y, x[part], data, qtype.value, bias)
                assert np.array_equal(y, expected), (threads, chunk)


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize(
    "qtype",
    [GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_0],
    ids=lambda t: t.name,
)
def test_linear_does_not_depend_on_neighbouring_weight_rows(
    isa: str, qtype: GGMLQuantizationType, tokens: int
) -> None:
    ops = _core.KernelOps(isa, 2)
    x = normal(1, tokens, 1120)
    w = quantize(normal(2, 45, 1120), qtype).view(np.uint8).reshape(45, -1)

    def rows(begin: int, end: int) -> Array:
        y = np.zeros((tokens, end - begin), np.float32)
        ops.linear(y, x, w[begin:end].reshape(-1), qtype.value)
        return y

    whole = rows(0, 45)
    for begin, end in ((0, 1), (3, 5), (1, 8), (10, 45)):
        assert np.array_equal(rows(begin, end), whole[:, begin:end])


def test_row_operations_do_not_depend_on_threads(isa: str) -> None:
    x, w = normal(1, 300, 1280), normal(3, 1280)
    results = []
    for threads in (1, 2, 3):
        ops = _core.KernelOps(isa, threads)
        norm, gelu, rope = (x.copy() for _ in range(3))
        ops.layer_norm(norm, x, w, w, 1e-5)
        ops.gelu(gelu)
        ops.rope(rope, 80, 5, 1e4)
        results.append(np.stack([norm, gelu, rope]))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_more_tokens_than_are_computed_at_once(isa: str) -> None:
    ops = _core.KernelOps(isa, 2)
    x, w = normal(1, 1160, 64), normal(2, 40, 64)
    assert np.array_equal(linear(ops, x, w)[1150:], linear(ops, x[1150:], w))
