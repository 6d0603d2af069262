"""What a caller chooses and gets back; free of heavy imports, so that ``--help`` needs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

# Mixes of weight types under llama.cpp's names; presets.py says which tensor gets what.
Preset = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q3_k_m", "q2_k"
]
# Types of one tensor.
WeightType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
    "q3_k", "q2_k",
]  # fmt: skip
Layout = Literal["single", "pair"]
OnProgress = Callable[[str, float], None]

PRESETS: tuple[str, ...] = get_args(Preset)
WEIGHT_TYPES: tuple[str, ...] = get_args(WeightType)
LAYOUTS: tuple[str, ...] = get_args(Layout)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result: its name, shape (row-major), types before and after, and bytes after."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """What was written, or with ``dry_run`` what would be.

    ``files`` are the file or the pair, ``sizes`` their bytes, ``tensors`` all of their tensors, and ``notes``
    what is not as asked for (types that did not fit).
    """

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]


def default_vision_type(preset: str) -> WeightType:
    """The type of the ViT's and the projector's matrices beside a decoder of ``preset``.

    Eight bits cost nothing that can be measured (docs/quantisation.md); unquantised models stay so throughout.
    """
    unquantised: dict[str, WeightType] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}
    return unquantised.get(preset, "q8_0")


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{what} should be one of {', '.join(choices)}, found {value!r}")
