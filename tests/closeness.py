"""How far results are from what they should be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def relative_l2(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
