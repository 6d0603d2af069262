"""Which tensor gets which type: llama.cpp's mixes, overrides, and what fits the rows."""

from __future__ import annotations

from collections import Counter

import pytest
from gguf import GGMLQuantizationType as T
from yivl_edge.convert.options import PRESETS, default_vision_type
from yivl_edge.convert.presets import Choice, fitting_type
from yivl_edge.convert.tensor_map import Policy, Tensor, tensors

SIZES_6B = {
    "V": 64000, "D": 4096, "F": 11008, "H": 32, "K": 4, "hd": 128,
    "W": 1280, "VF": 5120, "C": 3, "P": 14, "N+1": 1025,
}  # fmt: skip
TABLE = list(tensors(SIZES_6B, blocks=32, vision_blocks=31))


def chosen(
    preset: str, *overrides: tuple[str, str], has_imatrix: bool = False, tied: bool = False
) -> dict[str, T]:
    choice = Choice(preset, default_vision_type(preset), overrides, has_imatrix)
    return {
        t.name: fitting_type(t, choice.wanted(t, blocks=32, group=8, tied=tied))
        for t in TABLE
        if t.rule.policy is Policy.MATRIX
    }


# How many of the decoder's 226 matrices get which type by llama.cpp's rules, for 32 blocks and 8 heads to a KV head.
# The interoperability test holds the rules to what llama.cpp's own quantiser does.
MIXES = {
    "q8_0": {T.Q8_0: 226},
    "q6_k": {T.Q6_K: 226},
    "q5_k_m": {T.Q5_K: 193, T.Q6_K: 33},
    "q4_k_m": {T.Q4_K: 193, T.Q6_K: 33},
    "q4_k_s": {T.Q4_K: 217, T.Q5_K: 8, T.Q6_K: 1},
    "q4_0": {T.Q4_0: 225, T.Q6_K: 1},
    "iq4_xs": {T.IQ4_XS: 189, T.Q5_K: 36, T.Q6_K: 1},
    "q3_k_m": {T.Q3_K: 129, T.Q4_K: 92, T.Q5_K: 4, T.Q6_K: 1},
    "q2_k": {T.Q2_K: 129, T.Q3_K: 64, T.Q4_K: 32, T.Q6_K: 1},
    "f16": {T.F16: 226},
    "bf16": {T.BF16: 226},
    "f32": {T.F32: 226},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_mix_is_llama_cpps(preset: str) -> None:
    found = chosen(preset)
    decoder = Counter(kind for name, kind in found.items() if not name.startswith(("v.", "mm.")))
    assert dict(decoder) == MIXES[preset]


def test_more_bits_go_to_the_first_and_last_eighth_and_every_third_between() -> None:
    found = chosen("q4_k_m")
    six = [i for i in range(32) if found[f"blk.{i}.ffn_down.weight"] == T.Q6_K]
    assert six == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert six == [i for i in range(32) if found[f"blk.{i}.attn_v.weight"] == T.Q6_K]


def test_importance_changes_the_first_mlp_matrices_as_in_llama_cpp() -> None:
    assert chosen("iq4_xs")["blk.0.ffn_down.weight"] == T.Q5_K
    assert chosen("iq4_xs", has_imatrix=True)["blk.0.ffn_down.weight"] == T.IQ4_XS
    assert chosen("q4_0", has_imatrix=True)["blk.3.ffn_down.weight"] == T.Q4_1
    assert chosen("q4_0", has_imatrix=True)["blk.4.ffn_down.weight"] == T.Q4_0


def test_tied_embeddings_get_the_type_of_the_output() -> None:
    assert chosen("q4_k_m", tied=True)["token_embd.weight"] == T.Q6_K
    assert chosen("q4_k_m")["token_embd.weight"] == T.Q4_K


def test_vision_has_eight_bits_beside_any_quantised_decoder() -> None:
    for preset in PRESETS:
        expected = T.Q8_0 if preset.startswith(("q", "iq")) else T[preset.upper()]
        assert {kind for name, kind in chosen(preset).items() if name.startswith(("v.", "mm."))} == {expected}


def test_first_override_that_is_found_counts() -> None:
    found = chosen("q4_k_m", (r"blk\.[01]\.ffn_down", "q8_0"), ("ffn_down|^mm", "q5_k"))
    assert found["blk.1.ffn_down.weight"] == T.Q8_0
    assert found["blk.2.ffn_down.weight"] == T.Q5_K
    assert found["mm.0.weight"] == T.Q5_K
    assert found["blk.2.ffn_up.weight"] == T.Q4_K


@pytest.mark.parametrize(
    ("overrides", "message"), [([("x", "q9")], "for 'x' should be"), ([("(", "q8_0")], "regular")]
)
def test_wrong_overrides_are_told(overrides: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice("q8_0", "q8_0", tuple(overrides))


@pytest.mark.parametrize(
    ("wanted", "columns", "expected"),
    [
        *((T.Q4_K, 256, T.Q4_K), (T.Q4_K, 288, T.Q5_0), (T.Q5_K, 288, T.Q5_1), (T.Q6_K, 288, T.Q8_0)),
        *((T.Q3_K, 288, T.Q4_0), (T.Q2_K, 288, T.Q4_0), (T.IQ4_XS, 288, T.IQ4_NL), (T.Q4_K, 250, T.F16)),
        *((T.Q8_0, 250, T.F16), (T.BF16, 250, T.BF16)),
    ],
)
def test_rows_that_do_not_fit_fall_back_as_in_llama_cpp(wanted: T, columns: int, expected: T) -> None:
    (rule,) = {t.rule for t in TABLE if t.name == "output.weight"}
    tensor = Tensor("output.weight", "", (10, columns), rule, TABLE[0].part)
    assert fitting_type(tensor, wanted) == expected
