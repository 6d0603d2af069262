"""Attention, on every instruction set of this machine, against numpy in float64."""

import math

import numpy as np
import pytest
from test_kernels import CHUNKS, EPS, ISAS, TILE_TOKENS, Array, normal, strided, to_bfloat
from yivl_edge import _core


def exact_attention(q: Array, k: Array, v: Array, heads: int, kv_heads: int, causal: bool) -> Array:
    tokens, keys, head_dim = len(q), len(k), q.shape[1] // heads
    out = np.empty((tokens, heads, head_dim))
    hidden = np.arange(keys)[None] > np.arange(tokens)[:, None] + keys - tokens
    for h in range(heads):
        g = h // (heads // kv_heads)
        qh = q.reshape(tokens, heads, head_dim)[:, h].astype(np.float64)
        kh = k.reshape(keys, kv_heads, head_dim)[:, g].astype(np.float64)
        vh = v.reshape(keys, kv_heads, head_dim)[:, g].astype(np.float64)
        scores = qh @ kh.T / math.sqrt(head_dim)
        if causal:
            scores[hidden] = -np.inf
        p = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = p / p.sum(1, keepdims=True) @ vh
    return out.reshape(tokens, -1)


def attention(
    ops: "_core.KernelOps",
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    kv_heads: int,
    causal: bool,
    rounded: bool = False,
) -> Array:
    y = np.full_like(q, np.nan)
    ops.attention(y, q, k, v, heads, kv_heads, causal, rounded=rounded)
    return y


@pytest.mark.parametrize("head_dim", [20, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (7, 1), (16, 2)])
def test_attention(isa: str, head_dim: int, heads: int, kv_heads: int) -> None:
    ops = _core.KernelOps(isa, 2)
    for tokens, keys, causal in (
        (1, 1, True),
        (1, 127, True),
        (1, 300, True),
        (2, 2, True),
        (5, 133, True),
        (70, 70, True),
        (70, 200, True),
        (65, 65, False),
        (3, 257, False),
    ):
        q, k = normal(1, tokens, heads * head_dim), normal(2, keys, kv_heads * head_dim)
        v = normal(3, keys, kv_heads * head_dim)
        y = strided(np.zeros_like(q))
        ops.attention(y, strided(q), strided(k), strided(v), heads, kv_heads, causal)
        exact = exact_attention(q, k, v, heads, kv_heads, causal)
        # A score is a sum of head_dim products and about 1 in size; its error, sqrt(128) * EPS, becomes one
        # of the weights, and the sum over the keys adds its own.
        assert np.abs(y - exact).max() < 100 * EPS


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no AMX")
@pytest.mark.parametrize("head_dim", [20, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (7, 1), (16, 2)])
def test_attention_on_tiles_rounds_to_bfloat16(head_dim: int, heads: int, kv_heads: int) -> None:
    ops = _core.KernelOps("amx", 2)
    for tokens, keys, causal in (
        (16, 16, True),
        (70, 70, True),
        (70, 300, True),
        (65, 65, False),
        (20, 513, False),
    ):
        q, k = normal(1, tokens, heads * head_dim), normal(2, keys, kv_heads * head_dim)
        v = normal(3, keys, kv_heads * head_dim)
        y = strided(np.full_like(q, np.nan))
        ops.attention(y, strided(q), strided(k), strided(v), heads, kv_heads, causal, rounded=True)
        # Scores are exponents of 2, so that q is rounded times log2(e), too.
        scale = np.float32(math.log2(math.e)) / np.sqrt(np.float32(head_dim))
        rounded_q = to_bfloat(q * scale).astype(np.float64) / scale
        rounded_k, rounded_v = to_bfloat(k), to_bfloat(v)
        exact = exact_attention(rounded_q, rounded_k, rounded_v, heads, kv_heads, causal)
        sizes = exact_attention(rounded_q, rounded_k, np.abs(rounded_v), heads, kv_heads, causal)
        # What is left are the weights' own roundings, 2^-8 of each at most, and those of float32.
        assert (np.abs(y - exact) <= sizes * 2.0**-8 + 200 * EPS).all()
        assert np.abs(y - exact_attention(q, k, v, heads, kv_heads, causal)).max() > 200 * EPS


@pytest.mark.skipif("amx" not in ISAS, reason="this CPU has no AMX")
def test_few_tokens_have_attention_in_float32() -> None:
    ops = _core.KernelOps("amx", 2)
    q, k, v = normal(1, TILE_TOKENS - 1, 256), normal(2, 300, 128), normal(3, 300, 128)
    y = np.full_like(q, np.nan)
    ops.attention(y, q, k, v, 2, 1, True, rounded=True)
    assert np.array_equal(y, attention(ops, q, k, v, 2, 1, True))


def test_attention_with_large_and_growing_scores(isa: str) -> None:
    # Each key beats all earlier ones, so every block of keys rescales what came before.
    ops = _core.KernelOps(isa, 1)
    keys = 400
    q = np.ones((1, 64), np.float32) * 4
    k = np.linspace(-30, 30, keys, dtype=np.float32)[:, None] * np.ones((1, 64), np.float32)
    v = normal(1, keys, 64)
    y = attention(ops, q, k, v, 1, 1, False)
    exact = exact_attention(q, k, v, 1, 1, False)
    # Scores reach 960, so their rounding alone is 960 * EPS, and so is the relative error of a weight.
    assert np.abs(y - exact).max() < 4 * 960 * EPS


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_does_not_get_lost_in_attention(isa: str, value: float, rounded: bool) -> None:
    ops = _core.KernelOps(isa, 2)
    for tokens, keys in ((1, 300), (20, 300)):
        q, k, v = normal(1, tokens, 2 * 64), np.abs(normal(2, keys, 64)), normal(3, keys, 64)
        q[:, :64] = np.abs(q[:, :64])
        assert np.isfinite(attention(ops, q, k, v, 2, 1, False, rounded)).all()
        k[250, 3] = value  # an infinite score less the largest, which it is itself, is no number
        assert np.isnan(attention(ops, q, k, v, 2, 1, False, rounded)[:, :64]).all()
        k[250, 3] = 1
        q[-1, 70] = np.nan
        y = attention(ops, q, k, v, 2, 1, False, rounded)
        assert np.isnan(y[-1, 64:]).all()
        assert np.isfinite(y[:, :64]).all()


@pytest.mark.parametrize("rounded", [False, True])
def test_keys_that_are_all_infinitely_far_have_no_mean(isa: str, rounded: bool) -> None:
    ops = _core.KernelOps(isa, 1)
    for tokens in (1, 20):
        q, k, v = np.ones((tokens, 64), np.float32), normal(2, 300, 64), normal(3, 300, 64)
        k[:299, 0] = -np.inf
        assert (
            np.abs(attention(ops, q, k, v, 1, 1, False, rounded) - v[299]).max() <= np.abs(v[299]).max() / 256
        )
        k[299, 0] = -np.inf
        assert np.isnan(attention(ops, q, k, v, 1, 1, False, rounded)).all()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 1, 128), (4, 2, 80), (2, 2, 64)])
@pytest.mark.parametrize("rounded", [False, True])
def test_attention_does_not_depend_on_threads_or_chunks(
    isa: str, heads: int, kv_heads: int, head_dim: int, rounded: bool
) -> None:
    tokens, keys = 70, 300
    q = normal(1, tokens, heads * head_dim)
    k, v = normal(2, keys, kv_heads * head_dim), normal(3, keys, kv_heads * head_dim)
    whole = attention(_core.KernelOps(isa, 1), q, k, v, heads, kv_heads, True, rounded)
    few = attention(_core.KernelOps(isa, 1), q, k, v, heads, kv_heads, True)
    for threads in (2, 3):
        ops = _core.KernelOps(isa, threads)
        for chunk in CHUNKS:
            for i in range(0, tokens, chunk):
                end = min(i + chunk, tokens)
                seen = keys - tokens + end
                y = attention(ops, q[i:end], k[:seen], v[:seen], heads, kv_heads, True, rounded)
                expected = few if end - i < TILE_TOKENS else whole
                assert np.array_equal(y, expected[i:end]), (threads, chunk)
