"""The sampler draws from the distribution of transformers' processors, the same ids on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from yivl_edge import ModelFileError, _core

V = 100
N_DRAWS = 100_000


def some_logits(seed: int, size: int = V, spread: float = 2.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def probabilities(
    logits: NDArray[np.float32],
    previous: Sequence[int] = (),
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> NDArray[np.float64]:
    """(V,) in the order of transformers' processors, in float64."""
    x = logits.astype(np.float64)
    for i in {i for i in previous if i >= 0}:
        x[i] = x[i] * repetition_penalty if x[i] < 0 else x[i] / repetition_penalty
    x /= temperature
    if 0 < top_k < len(x):
        x[x < np.sort(x)[-top_k]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= np.float32(top_p)]] = 0
    p[p < np.float32(min_p) * p.max()] = 0
    return p / p.sum()


def uniform_numbers(seed: int, n: int) -> NDArray[np.float64]:
    """SplitMix64's upper 53 bits as numbers in [0, 1)."""
    mask = 2**64 - 1
    numbers = []
    for i in range(1, n + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(((z ^ (z >> 31)) >> 11) * 2.0**-53)
    return np.array(numbers)


def chi_square(counts: NDArray[np.int64], p: NDArray[np.float64]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; ids expected fewer than 5 times count as one."""
    expected = p * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    some = expected > 0
    return float(((observed - expected)[some] ** 2 / expected[some]).sum()), int(some.sum()) - 1


def is_drawn_from(ids: NDArray[np.int32], p: NDArray[np.float64]) -> bool:
    """Within 5 standard deviations, sqrt(2 df), of chi-square's mean, df.

    A right sampler fails with about one seed in 10^5; the seeds are fixed.
    """
    counts = np.bincount(ids, minlength=len(p))
    if counts[p == 0].any():
        return False
    statistic, df = chi_square(counts, p)
    return statistic < df + 5 * np.sqrt(2 * max(df, 1))


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.2},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": V + 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    logits = some_logits(1)
    ids = _core.draws(logits, _core.SamplingOptions(**options, seed=5), N_DRAWS)
    assert is_drawn_from(ids, probabilities(logits, **options))


def test_the_distribution_test_can_fail() -> None:
    logits = some_logits(1)
    ids = _core.draws(logits, _core.SamplingOptions(temperature=1.0, seed=5), N_DRAWS)
    assert not is_drawn_from(ids, probabilities(logits, temperature=1.03))
    assert not is_drawn_from(ids, probabilities(logits, temperature=1.0, min_p=0.005))


def test_repetition_penalty_changes_the_distribution() -> None:
    logits = some_logits(2, size=30)
    previous = [-200, 3, 3, 3, 7, int(logits.argmax()), int(logits.argmin())]
    options: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 1.4}
    sampler = _core.Sampler(_core.SamplingOptions(**options, seed=9))
    ids = np.array([sampler.sample(logits, previous) for _ in range(20_000)], np.int32)
    assert is_drawn_from(ids, probabilities(logits, previous, **options))
    assert not is_drawn_from(ids, probabilities(logits, [], **options))


def random_options(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "temperature": float(rng.choice([0.2, 0.7, 1.0, 2.0])),
        "top_k": int(rng.choice([0, 1, 5, 50, 1000])),
        "top_p": float(rng.choice([1.0, 0.99, 0.9, 0.5])),
        "min_p": float(rng.choice([0.0, 0.02, 0.3])),
        "repetition_penalty": float(rng.choice([1.0, 1.3, 0.8])),
    }


def test_each_draw_is_the_documented_one() -> None:
    """Predicted from the seed; a rounding difference at a boundary would need a number within 1e-12 of it."""
    rng = np.random.default_rng(3)
    for seed in range(300):
        options = random_options(rng)
        logits = some_logits(seed, size=int(rng.integers(1, 600)), spread=float(rng.choice([0.1, 2.0, 8.0])))
        logits[rng.random(len(logits)) < 0.1] = -np.inf
        logits[rng.integers(len(logits))] = 0.0
        previous = rng.integers(-3, len(logits), 20).tolist()
        p = probabilities(logits, previous, **options)
        cumulated = np.cumsum(p)
        sampler = _core.Sampler(_core.SamplingOptions(**options, seed=seed))
        for u in uniform_numbers(seed, 20):
            expected = np.searchsorted(cumulated, u * cumulated[-1], side="right")
            assert sampler.sample(logits, previous) == expected, options


def test_large_vocabularies_are_cut_at_the_same_place() -> None:
    """64,000 ids, from flat to peaked: top_p sorts few of them, with the result of sorting all."""
    for spread in (0.0, 0.01, 1.0, 4.0):
        logits = some_logits(4, size=64_000, spread=spread)
        for options in ({"top_p": 0.9}, {"top_p": 0.5, "top_k": 30_000}, {"top_k": 3000}, {"min_p": 0.5}, {}):
            p = probabilities(logits, temperature=1.0, **options)
            cumulated = np.cumsum(p)
            found = _core.draws(logits, _core.SamplingOptions(temperature=1.0, **options, seed=8), 5)
            expected = np.searchsorted(cumulated, uniform_numbers(8, 5) * cumulated[-1], side="right")
            assert found.tolist() == expected.tolist(), (spread, options)


def test_filters_are_those_of_transformers() -> None:
    import torch
    from transformers.generation import logits_process as hf

    rng = np.random.default_rng(6)
    for seed in range(100):
        options = random_options(rng)
        logits = some_logits(seed)
        previous = rng.integers(0, V, 20).tolist()
        chain: list[Any] = [
            hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
            hf.TemperatureLogitsWarper(options["temperature"]),
        ]
        if options["top_k"]:
            chain.append(hf.TopKLogitsWarper(options["top_k"]))
        if options["top_p"] < 1:
            chain.append(hf.TopPLogitsWarper(options["top_p"]))
        if options["min_p"]:
            chain.append(hf.MinPLogitsWarper(options["min_p"]))
        scores = torch.from_numpy(logits)[None]
        for processor in chain:
            scores = processor(torch.tensor([previous]), scores)
        # transformers computes in float32: about 1e-6 of each probability.
        np.testing.assert_allclose(
            probabilities(logits, previous, **options), scores.softmax(-1)[0].numpy(), rtol=2e-5, atol=1e-9
        )


def test_equally_probable_ids_at_the_edge() -> None:
    """top_k keeps all that equal the k-th, as transformers does; top_p keeps the lower ids."""
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    options = {"temperature": 1.0, "seed": 1}
    assert set(_core.draws(logits, _core.SamplingOptions(**options, top_k=2), 500)) == {1, 2, 3}
    assert set(_core.draws(logits, _core.SamplingOptions(**options, top_p=0.5), 500)) == {1, 2}


def test_temperature_0_takes_the_first_maximum() -> None:
    for size in (1, 2, 15, 16, 17, 1000):
        for at in (0, size // 2, size - 1):
            logits = some_logits(size, size=size)
            logits[at:] = np.minimum(logits[at:], 9.0)
            logits[at] = logits[-1] = 9.0
            greedy = _core.Sampler(_core.SamplingOptions(temperature=0.0, top_k=3, top_p=0.5))
            assert [greedy.sample(logits), greedy.sample(logits)] == [at, at]


def test_temperature_0_respects_the_repetition_penalty() -> None:
    greedy = _core.Sampler(_core.SamplingOptions(temperature=0.0, repetition_penalty=2.0))
    logits = np.array([-1.0, 3.0, 2.0], np.float32)
    assert greedy.sample(logits, []) == 1
    assert greedy.sample(logits, [1]) == 2
    assert greedy.sample(logits, [1, 1, -200]) == 2
    assert greedy.sample(np.array([-1.0, -1.5], np.float32), [0]) == 1
    assert logits.tolist() == [-1.0, 3.0, 2.0]


def test_very_low_temperatures_are_greedy() -> None:
    logits = some_logits(3)
    for temperature in (1e-3, 1e-30, 1e-45):
        ids = _core.draws(logits, _core.SamplingOptions(temperature=temperature, top_p=0.9), 100)
        assert set(ids) == {int(logits.argmax())}


def test_the_same_seed_gives_the_same_ids() -> None:
    """The ids below were drawn once on x86-64; another machine or standard library must draw the same."""
    logits = np.linspace(-2, 2, 50, dtype=np.float32)
    nucleus = {"temperature": 1.0, "top_p": 0.95}
    first, other, again = (
        _core.draws(logits, _core.SamplingOptions(**nucleus, seed=seed), 8).tolist() for seed in (0, 1, 0)
    )
    assert first == again != other
    assert first == [48, 40, 20, 49, 27, 37, 31, 47]
    biggest = _core.draws(logits, _core.SamplingOptions(temperature=1.0, seed=2**64 - 1), 8)
    assert biggest.tolist() == [48, 48, 32, 39, 45, 47, 49, 33]


def test_greedy_draws_use_no_random_numbers() -> None:
    assert _core.SamplingOptions().temperature == pytest.approx(0.2)
    logits = some_logits(8)
    sampler = _core.Sampler(_core.SamplingOptions(temperature=1.0, seed=4))
    one_by_one = [sampler.sample(logits) for _ in range(10)]
    assert one_by_one == _core.draws(logits, _core.SamplingOptions(temperature=1.0, seed=4), 10).tolist()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": float("nan")}, "temperature: expected a finite number of at least 0, found nan"),
        ({"temperature": -0.1}, "temperature: .* found -0.1"),
        ({"temperature": float("inf")}, "temperature: .* found inf"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and up to 1, found 0"),
        ({"top_p": 1.1}, "top_p: .* found 1.1"),
        ({"top_p": float("nan")}, "top_p: .* found nan"),
        ({"min_p": -0.1}, "min_p: expected a number from 0 to 1, found -0.1$"),
        ({"min_p": -1e-9}, "min_p: expected a number from 0 to 1, found -1e-09$"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a finite number above 0, found 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"top_k": -1}, "top_k: expected a number of at least 0, found -1"),
    ],
)
def test_options_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Sampler(_core.SamplingOptions(**option))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_refused(temperature: float) -> None:
    sampler = _core.Sampler(_core.SamplingOptions(temperature=temperature, top_k=2, top_p=0.9))
    for size in (1, 5, 16, 40):
        for at in range(size):
            for bad in (np.nan, np.inf, -np.nan):
                logits = some_logits(1, size=size)
                logits[at] = bad
                with pytest.raises(ModelFileError, match="NaN or infinity"):
                    sampler.sample(logits)
    with pytest.raises(ModelFileError, match="all logits are -infinity"):
        sampler.sample(np.full(40, -np.inf, np.float32))
    with pytest.raises(ValueError, match="at least one logit"):
        sampler.sample(np.zeros(0, np.float32))
    assert sampler.sample(np.array([-np.inf, 0.0, -np.inf], np.float32)) == 1


def test_a_previous_id_above_the_vocabulary_is_refused() -> None:
    sampler = _core.Sampler(_core.SamplingOptions(repetition_penalty=1.1))
    with pytest.raises(ValueError, match="previous id 5 is not below the number of logits, 5"):
        sampler.sample(np.zeros(5, np.float32), [1, 5])
    assert sampler.sample(np.zeros(6, np.float32), [1, 5]) in range(6)
