"""Quantised weights: the bytes of other programs where they are defined, small errors elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from gguf.quants import quantize as gguf_quantize
from numpy.typing import NDArray
from quantiser_matrices import BLOCK_TYPES, RECORD, Matrix, importance, matrices, weighted_rmse
from yivl_edge import _core, quantize

ALL_TYPES = ["F32", "F16", "BF16", *BLOCK_TYPES]
SCALE_ONLY = ["Q8_0", "Q4_0", "Q5_0", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"]
# Weights that share a scale, and the steps from the least index to the greatest.
GROUP = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}
STEPS = {
    **{"Q8_0": 254, "Q4_0": 15, "Q4_1": 15, "Q5_0": 31, "Q5_1": 31, "IQ4_NL": 15},
    **{"Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q5_K": 31, "Q6_K": 63, "IQ4_XS": 15},
}
HALF_MAX = 65504.0

every_type = pytest.mark.parametrize("name", ALL_TYPES)
every_block_type = pytest.mark.parametrize("name", BLOCK_TYPES)


def normal(*shape: int, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def round_trip(array: Matrix, name: str, weight: NDArray[np.float32] | None = None) -> Matrix:
    found = dequantize(quantize(array, name, weight), GGMLQuantizationType[name]).astype(np.float32)
    assert found.shape == array.shape
    assert np.isfinite(found).all()
    return found


# ---- the bytes of other programs ----


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("scale", [1e-4, 0.02, 30.0])
def test_types_without_a_search_have_the_bytes_of_gguf(name: str, scale: float) -> None:
    array = np.concatenate([normal(40, 1024), np.random.default_rng(1).standard_t(3, (40, 1024))]) * scale
    array = array.astype(np.float32)
    array[0, :64] = 0
    array[1, 32:64] = np.round(array[1, 32:64] * 4 / scale)  # ties
    expected = gguf_quantize(array, GGMLQuantizationType[name])
    assert np.array_equal(quantize(array, name), np.ascontiguousarray(expected).view(np.uint8))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_0", "Q5_1"])
def test_searched_types_are_better_than_the_bytes_of_gguf(name: str) -> None:
    for title, array in matrices().items():
        plain = dequantize(gguf_quantize(array, GGMLQuantizationType[name]), GGMLQuantizationType[name])
        assert weighted_rmse(round_trip(array, name), array, None) < weighted_rmse(plain, array, None), title


def test_q8_0_is_the_same_with_importance() -> None:
    array = normal(4, 256)
    assert np.array_equal(quantize(array, "Q8_0", importance(256)), quantize(array, "Q8_0"))


# ---- errors ----


@every_block_type
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_errors_are_at_most_those_of_llama_cpp(name: str, weighted: bool) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for title, array in matrices().items():
        # The recorded errors are of these very matrices.
        rms = np.sqrt(np.mean(np.square(array, dtype=np.float64)))
        assert rms == pytest.approx(record["rms of the matrices"][title], rel=1e-6)
        weight = importance(array.shape[1]) if weighted else None
        found = weighted_rmse(round_trip(array, name, weight), array, weight)
        theirs = record["rmse without and with importance"][title][name][weighted]
        # Equal where both round to nearest; 1e-6 is for the order of the sums.
        assert found <= theirs * (1 + 1e-6), title


@every_block_type
def test_error_is_within_that_of_rounding_to_the_range_of_each_group(name: str) -> None:
    array = normal(16, 2048, seed=2)
    groups = array.reshape(-1, GROUP.get(name, 32)).astype(np.float64)
    if name in SCALE_ONLY:
        steps = 2 * np.abs(groups).max(axis=1) / STEPS[name]
    else:
        steps = (groups.max(axis=1) - groups.min(axis=1)) / STEPS[name]
    # Rounding to multiples of a step leaves an error spread evenly over one step. Scales of few bits cost something,
    # and the search wins more than that.
    bound = np.sqrt(np.mean(steps**2) / 12)
    assert weighted_rmse(round_trip(array, name), array, None) <= bound


@every_block_type
def test_importance_lowers_the_error_that_it_weighs(name: str) -> None:
    array, weight = normal(16, 1024, seed=3), importance(1024)
    with_it = weighted_rmse(round_trip(array, name, weight), array, weight)
    without = weighted_rmse(round_trip(array, name), array, weight)
    assert with_it == without if name == "Q8_0" else with_it < 0.95 * without


@every_type
def test_all_columns_the_same_is_no_importance(name: str) -> None:
    array = normal(5, 512, seed=4)
    none = quantize(array, name)
    assert np.array_equal(quantize(array, name, np.zeros(512, np.float32)), none)
    weight = np.ones(512, np.float32)
    same = quantize(array, name, weight)
    if name == "Q4_0":  # without importance it is not searched
        assert weighted_rmse(round_trip(array, name, weight), array, None) < weighted_rmse(
            round_trip(array, name), array, None
        )
        return
    error = [weighted_rmse(dequantize(b, GGMLQuantizationType[name]), array, None) for b in (same, none)]
    assert error[0] == pytest.approx(error[1], rel=1e-3)


@every_block_type
def test_scale_of_importance_does_not_matter(name: str) -> None:
    array, weight = normal(3, 512, seed=5), importance(512)
    # Powers of two, so that nothing is rounded differently.
    expected = quantize(array, name, weight)
    assert np.array_equal(quantize(array, name, weight * np.float32(2.0**100)), expected)
    assert np.array_equal(quantize(array, name, weight * np.float32(2.0**-100)), expected)


@every_block_type
def test_columns_without_importance_still_get_sensible_weights(name: str) -> None:
    array, weight = normal(8, 1024, seed=6), np.ones(1024, np.float32)
    weight[::2] = 0
    weight[256:512] = 0
    found = round_trip(array, name, weight)
    plain = weighted_rmse(round_trip(array, name), array, None)
    assert weighted_rmse(found[:, 256:512], array[:, 256:512], None) <= 1.1 * plain
    # A part of a block has its own scale in these types.
    if name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
        weight = np.ones(1024, np.float32)
        weight[32:64] = 0
        part = round_trip(array, name, weight)[:, 32:64]
        assert weighted_rmse(part, array[:, 32:64], None) <= 1.5 * plain
    # Among columns that matter, the others may be cut off, but they are nearer than zeros would be.
    assert weighted_rmse(found[:, ::2], array[:, ::2], None) <= 0.5


# ---- unusual weights ----


@every_type
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_zeros_stay_zeros(name: str, weighted: bool) -> None:
    array = normal(3, 512)
    array[1] = 0
    array[2] = -0.0
    found = round_trip(array, name, importance(512) if weighted else None)
    assert not found[1:].any()
    assert found[0].any()


@every_type
@pytest.mark.parametrize("value", [1.0, -1.0, 0.037, -212.5])
def test_constants_are_kept(name: str, value: float) -> None:
    found = round_trip(np.full((1, 512), value, np.float32), name)
    # One index and one scale hold it. What is left is the rounding of one or two halves, each 2^-11 or, below 2^-14,
    # 2^-25 times the integers that multiply it (up to 128 * 32); and of bfloat16, 2^-8.
    limit = 2.0**-8 if name == "BF16" else 2.0**-10
    assert np.abs(found - value).max() <= limit * abs(value) + (
        2.0**-25 * 128 * 32 if name in ("Q6_K", "IQ4_XS") else 0
    )


@every_block_type
@pytest.mark.parametrize("at", [0, 15, 16, 31, 77, 255])
def test_a_single_outlier_is_kept_and_the_zeros_round_it(name: str, at: int) -> None:
    array = np.zeros((1, 256), np.float32)
    array[0, at] = -3.0
    found = round_trip(array, name)
    # The rounding of two halves; IQ4_NL and IQ4_XS have no zero, but a 1 beside the 127, so that less than 3 is best.
    limit = 3.0 / 100 if name.startswith("IQ4") else 0.0 if name in SCALE_ONLY else 3 * 2.0**-10
    assert found[0, at] == pytest.approx(-3.0, abs=max(limit, 3 * 2.0**-10))
    assert np.abs(np.delete(found, at)).max() <= limit


@every_type
@pytest.mark.parametrize("scale", [1e-38, 1e-42, 1e-45])
def test_denormals_are_as_good_as_zero(name: str, scale: float) -> None:
    array = normal(2, 256) * np.float32(scale)
    array[1, 0] = 1.0  # beside a weight that is not
    found = round_trip(array, name)
    # 2^-24 is the smallest half; a block's scale multiplies integers up to 128 * 127.
    assert np.abs(found[0]).max() <= (0 if name == "Q4_0" else 2.0**-24 * 128 * 127)
    assert found[1, 0] == pytest.approx(1.0, rel=2.0**-8)


@every_block_type
def test_weights_below_half_precision_keep_what_the_scales_allow(name: str) -> None:
    array = normal(4, 1024, seed=7) * np.float32(1e-5)
    if name in ("Q8_0", "Q4_0"):
        pytest.skip("rounded as in gguf")
    # The smallest half is 6e-8; group scales of about 1e-6 are multiples of it.
    assert weighted_rmse(round_trip(array, name), array, None) < 0.5e-5


@every_type
@pytest.mark.parametrize("scale", [1e4, 1e6, 1e12, 1e30, 3e37])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_huge_weights_are_cut_off_and_never_infinite(name: str, scale: float, weighted: bool) -> None:
    array = np.clip(normal(4, 256, seed=8), -5, 5) * np.float32(scale)
    found = round_trip(array, name, importance(256) if weighted else None)
    # The largest number of the type: 65504 times the largest integers of scale and weight.
    largest = {"F32": np.inf, "BF16": np.inf, "F16": HALF_MAX, "Q8_0": 127 * HALF_MAX, "Q4_0": 8 * HALF_MAX}
    bound = largest.get(name, 128 * 127 * HALF_MAX)
    assert np.abs(found).max() <= bound
    big = np.abs(array) > np.abs(array).max() / 2
    assert (np.sign(found[big]) == np.sign(array[big])).all()


def test_values_beyond_half_and_bfloat16_become_the_largest() -> None:
    array = np.array([1e6, -1e6, 65519.0, 65520.0, np.finfo(np.float32).max], np.float32)
    assert quantize(array, "f16").view(np.float16).tolist() == [[65504, -65504, 65504, 65504, 65504]]
    assert quantize(array, "bf16").view(np.uint16)[0, -1] == 0x7F7F


# ---- the same everywhere ----

DIGESTS = """
import hashlib, sys
import numpy as np
from yivl_edge import quantize
rng = np.random.default_rng(9)
array = (0.02 * rng.standard_t(3, (7, 2304))).astype(np.float32)
array[0, :256] = 0
array[1] *= 1e-30
array[2] *= 1e30
array[3], array[4] = abs(array[4]), -abs(array[3])
array[5, 5:] = -0.0
weight = np.exp(2 * rng.standard_normal(2304)).astype(np.float32)
weight[100:500] = 0
for name in sys.argv[1:]:
    print(name, *(hashlib.sha256(quantize(array, name, w)).hexdigest() for w in (None, weight)))
"""


def test_bytes_do_not_depend_on_the_instruction_set() -> None:
    outputs = {
        isa: subprocess.run(
            [sys.executable, "-c", DIGESTS, *ALL_TYPES],
            env={**os.environ, "YIVL_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in _core.available_isas()
    }
    assert outputs["portable"].count("\n") == len(ALL_TYPES)
    for isa, output in outputs.items():
        assert output == outputs["portable"], isa


@every_type
def test_bytes_do_not_depend_on_threads_and_rows(name: str) -> None:
    array, weight = normal(300, 768, seed=10), importance(768)
    digests = {hashlib.sha256(quantize(array, name, weight, n_threads=n)).hexdigest() for n in (1, 2, 3, 7)}
    assert len(digests) == 1
    rows = [quantize(row, name, weight) for row in array[:5]]
    assert np.array_equal(np.concatenate(rows), quantize(array, name, weight)[:5])


# ---- arguments ----


@every_type
def test_shapes_and_names(name: str) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    array = normal(3, 512)
    assert quantize(array, name).shape == (3, 512 // block * size)
    assert quantize(array[0], name.lower()).shape == (1, 512 // block * size)
    assert quantize(array[:0], name).shape == (0, 512 // block * size)
    # Any strides.
    wide = np.zeros((3, 1024), np.float32)
    wide[:, ::2] = array
    assert np.array_equal(quantize(wide[:, ::2], name), quantize(array, name))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (normal(2, 256), {"type": "q7_k"}, r'unknown weight type "Q7_K", expected one of F32, .*IQ4_XS'),
        (normal(2, 288), {"type": "q4_k"}, "Q4_K must be a multiple of 256 columns, found 288"),
        (normal(2, 40), {"type": "q8_0"}, "Q8_0 must be a multiple of 32 columns, found 40"),
        (normal(2, 0), {"type": "q8_0"}, "Q8_0 must be a multiple of 32 columns, found 0"),
        (normal(2, 2, 32), {"type": "q8_0"}, r"shape \(rows, columns\) or \(columns,\), found 3 dimensions"),
        (normal(2, 32), {"type": "q8_0", "n_threads": 0}, "n_threads must be at least 1, found 0"),
        (
            normal(2, 32),
            {"type": "q4_0", "importance": np.ones(31, np.float32)},
            r"expected the shape \(32,\), found \(31,\)",
        ),
        (
            normal(2, 32),
            {"type": "q4_0", "importance": np.ones((1, 32), np.float32)},
            r"expected the shape \(32,\), found \(1, 32\)",
        ),
    ],
)
def test_wrong_arguments_are_named(array: Matrix, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(array, **options)


@every_type
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    array = normal(3, 512)
    array[2, 300] = value
    with pytest.raises(ValueError, match=r"must be finite, found -?(nan|inf) in row 2, column 300"):
        quantize(array, name)


@pytest.mark.parametrize(
    ("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1"), (-1e-9, "-1e-09")]
)
def test_impossible_importance_is_refused(value: float, text: str) -> None:
    weight = np.ones(256, np.float32)
    weight[7] = value
    with pytest.raises(ValueError, match=f"finite and not negative, found {text} for column 7"):
        quantize(normal(2, 256), "q4_k", weight)


def test_other_types_of_array_are_refused() -> None:
    for array, found in (
        (np.zeros((1, 32)), "float64"),
        (np.ones(32, np.int64), "int64"),
        ([[1.0, 2.0]], "list"),
        ("weights", "str"),
    ):
        with pytest.raises(TypeError, match=f"^array: expected a float32 array, found {found}$"):
            quantize(array, "q8_0")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"^importance: expected a float32 array, found {found}$"):
            quantize(normal(1, 32), "q4_0", array)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^array: expected a float32 array, found NoneType$"):
        quantize(None, "q8_0")  # type: ignore[arg-type]


def test_every_piece_is_looked_at() -> None:
    array = np.zeros((8, 1 << 15), np.float32)
    array[-1, -1] = np.nan
    with pytest.raises(ValueError, match="found nan in row 7, column 32767"):
        quantize(array, "Q8_0", n_threads=2)
