"""Numbers on the command line, checked before a model is opened."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Parser of an integer from `low` to `high`, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, found {text!r}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Parser of a number from `low` to `high`; with `above`, `low` itself is refused."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low < value if above else low <= value) or not value <= high:
            limits = f"above {low:g} and up to" if above else f"from {low:g} to"
            raise argparse.ArgumentTypeError(f"expected a number {limits} {high:g}, found {text!r}")
        return value

    return parse
