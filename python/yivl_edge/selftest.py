"""The self-test that a model file carries: what its weights should make of a small picture and a few words.

The converter computes it from the source's weights and from the converted ones, in plain numpy, and
`yivl_edge.verify` repeats it with the engine. docs/file-format.md lists the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

PREFIX = "yivl.selftest."
ROUNDING_KEY = "yivl.rounding"
IMPORTANCE_KEY = "yivl.importance"
TEXT = "\n\n### Human: What is in the picture? 图中有什么？\n### Assistant:"
_SAMPLE = (16, 32)  # rows and columns kept of a stage's output
_LOGITS_SAMPLE = 64  # columns kept of every position's logits

# How far the source's weights and the same, unrounded, in the file's order may be apart in what they compute,
# relative: float32 sums in another order.
STRUCTURE_LIMIT = 1e-4

# What rounding to a type may change, as a root mean square relative to the weights': half as much again as the most
# that was seen on normal, Laplace, t, uniform, sparse and one-sided weights, with wide rows and columns among them and
# with importance. Weights that are not where they belong are at 1 and more.
_ROUNDING_LIMITS = {
    "F32": 0.0, "BF16": 0.003, "F16": 0.0005, "Q8_0": 0.03, "Q6_K": 0.075, "Q5_K": 0.075, "Q5_1": 0.075, "Q5_0": 0.14,
    "Q4_K": 0.15, "Q4_1": 0.15, "Q4_0": 0.2, "IQ4_NL": 0.16, "IQ4_XS": 0.16, "Q3_K": 0.3, "Q2_K": 0.45,
}  # fmt: skip
# With importance what matters little may change more; the most seen, of Q2_K with columns that differ by a thousand
# times and importance as the inverse square of their size, was 0.72. Zeros in their place would change them by 1.
_IMPORTANCE_LIMIT = 0.85
# Least squares keep the size of weights: how far the factor that fits the rounded ones best may be from 1.
_SCALE_LIMIT, _IMPORTANCE_SCALE_LIMIT = 0.03, 0.15
# Weights near this are below what the half-precision scales of blocks resolve, and may be lost.
TINY = 1e-5


def rounding_limit(type_name: str, importance: bool) -> float:
    """What rounding to a type may change, relative."""
    weighed = importance and type_name not in ("F32", "F16", "BF16", "Q8_0")
    return _IMPORTANCE_LIMIT if weighed else _ROUNDING_LIMITS[type_name]


def scale_limit(importance: bool) -> float:
    """How far the factor between weights and rounded ones may be from 1."""
    return _IMPORTANCE_SCALE_LIMIT if importance else _SCALE_LIMIT


def spread(count: int, n: int) -> NDArray[np.intp]:
    """``count`` indices evenly spread over ``range(n)``; all of them if there are fewer."""
    return np.unique(np.linspace(0, n - 1, min(count, n)).astype(np.intp))


def sample(rows: Floats) -> Floats:
    """(rows, columns) -> the values that the self-test keeps, flat."""
    kept: Floats = rows[np.ix_(spread(_SAMPLE[0], len(rows)), spread(_SAMPLE[1], rows.shape[1]))].ravel()
    return kept


def sample_logits(logits: Floats) -> Floats:
    """(T, V) -> the values that the self-test keeps, flat."""
    kept: Floats = logits[:, spread(_LOGITS_SAMPLE, logits.shape[1])].ravel()
    return kept


def relative_error(values: Floats, reference: Floats) -> float:
    """||values - reference|| / ||reference||, of 2-norms."""
    difference = values.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference)), 1e-30))


def picture() -> NDArray[np.uint8]:
    """(32, 48, 3): slopes, an edge, checks and noise, so that every step of preprocessing matters."""
    y, x = np.mgrid[0:32, 0:48]
    image = np.stack([5 * x, 7 * y, 120 + 60 * ((x // 6 + y // 6) % 2)], -1)
    image[8:20, 10:26] = (230, 30, 60)
    noise = np.random.default_rng(1).integers(-20, 21, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Expected:
    """What a stage should give by the weights in the file, and how far the source's weights were from that."""

    sample: Floats
    error: float


@dataclass(frozen=True)
class VisionTest:
    """Of the vision tower and the projector."""

    image: NDArray[np.uint8]  # (H, W, 3)
    pixels_sha256: str
    vision: Expected
    projector: Expected


@dataclass(frozen=True)
class DecoderTest:
    """Of tokeniser and decoder."""

    text: str
    ids: list[int]  # of the text, as many as the context holds
    logits: Expected
    top_ids: list[int]  # of each position
    top_margins: list[float]  # how far ahead the top id is, in root mean squares of the logits


@dataclass(frozen=True)
class SelfTest:
    """The contents of the keys ``yivl.selftest.*``; in a half of a pair only its own part."""

    structure: (
        float  # how far the source's weights and the same in the file's order were apart at most, relative
    )
    vision: VisionTest | None
    decoder: DecoderTest | None

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> SelfTest | None:
        """Out of a file's keys; None if it carries no self-test, ValueError if it is incomplete."""
        values = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
        if not values:
            return None

        def expected(stage: str) -> Expected:
            return Expected(np.array(values[stage], np.float32), float(values[f"{stage}.error"]))

        vision = decoder = None
        try:
            if "picture" in values:
                width, height = values["picture_size"]
                vision = VisionTest(
                    image=np.array(values["picture"], np.uint8).reshape(height, width, 3),
                    pixels_sha256=values["pixels_sha256"],
                    vision=expected("vision"),
                    projector=expected("projector"),
                )
            if "ids" in values:
                decoder = DecoderTest(
                    text=values["text"],
                    ids=list(values["ids"]),
                    logits=expected("logits"),
                    top_ids=list(values["top_ids"]),
                    top_margins=list(values["top_margins"]),
                )
            return cls(float(values["structure"]), vision, decoder)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"the file's self-test is incomplete or damaged: {error!r}") from error
