"""Numbers that callers pass, checked."""

from __future__ import annotations

import numbers
import operator
from typing import SupportsIndex

MOST_THREADS = 1024


def integer(name: str, value: SupportsIndex, least: int, most: int) -> int:
    """The value, or TypeError if it is no integer, ValueError if it is not from `least` to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, found {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, found {number}")
    return number


def real(name: str, value: float) -> float:
    """The value as a float, or TypeError if it is no number."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, found {value!r}")
    return float(value)


def threads(n_threads: SupportsIndex | None) -> int | None:
    """How many threads were asked for; None for one per physical core. Raises as `integer`."""
    return None if n_threads is None else integer("n_threads", n_threads, 1, MOST_THREADS)
