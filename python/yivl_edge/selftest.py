"""The self-test that a model file carries: what its weights should make of a small picture and a few words.

The converter computes it from the source's weights and from the converted ones, in plain numpy, and
`yivl_edge.verify` repeats it with the engine. docs/file-format.md lists the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

IMAGE_ID = -200  # stands for an image row among the ids
IMAGE_ROWS = 8  # of the projector's rows, how many the decoder's part sees
TEXTS = ("\n\n### Human: ", "\nWhat is in the picture? 图中有什么？\n### Assistant:")
_SAMPLE = (16, 32)  # rows and columns kept of a stage's output
_LOGITS_SAMPLE = 64  # columns kept of every position's logits

# Relative root mean square error of weights rounded to a type, for bell-shaped weights (measured).
NOISE = {
    "F32": 0.0, "BF16": 0.0017, "F16": 0.0003, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04, "Q5_1": 0.04, "Q5_0": 0.05,
    "Q4_K": 0.08, "Q4_1": 0.09, "Q4_0": 0.1, "IQ4_NL": 0.09, "IQ4_XS": 0.09, "Q3_K": 0.17, "Q2_K": 0.33,
}  # fmt: skip


def error_limit(types: Iterable[str]) -> float:
    """The relative error beyond which a stage's weights, of these types, cannot be those of the source.

    Rounding errors of weights grow a few times on their way through the blocks. A matrix that is not where it belongs,
    or has its rows in the wrong order, changes outputs by up to as much as they are: below six bits, the limit is
    too wide to tell every such fault.
    """
    return max(0.02, 12 * max(NOISE[name] for name in types))


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
    """What a stage should give: by the source's weights, and by the weights in the file."""

    source: Floats
    file: Floats

    @property
    def error(self) -> float:
        """What the file's types cost."""
        return relative_error(self.file, self.source)


@dataclass(frozen=True)
class SelfTest:
    """The contents of the keys ``yivl.selftest.*``; ``vision`` and ``projector`` are None in a text model."""

    image: NDArray[np.uint8] | None  # (H, W, 3)
    pixels_sha256: str
    ids: list[int]  # of TEXTS with IMAGE_ROWS image rows between them
    vision: Expected | None
    projector: Expected | None
    logits: Expected
    top_ids: list[int]  # of each position, by the file's weights
    top_margins: list[float]  # how far ahead the top id is, in root mean squares of the logits

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> SelfTest | None:
        """Out of a file's keys; None if it carries no self-test, ValueError if it is incomplete."""
        prefix = "yivl.selftest."
        values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
        if not values:
            return None

        def expected(stage: str) -> Expected:
            pair = (np.array(values[f"{stage}.{kind}"], np.float32) for kind in ("source", "file"))
            return Expected(*pair)

        try:
            has_vision = "picture" in values
            image = None
            if has_vision:
                width, height = values["picture_size"]
                image = np.array(values["picture"], np.uint8).reshape(height, width, 3)
            return cls(
                image=image,
                pixels_sha256=values.get("pixels_sha256", ""),
                ids=list(values["ids"]),
                vision=expected("vision") if has_vision else None,
                projector=expected("projector") if has_vision else None,
                logits=expected("logits"),
                top_ids=list(values["top_ids"]),
                top_margins=list(values["top_margins"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"the file's self-test is incomplete or damaged: {error!r}") from error
