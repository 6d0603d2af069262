"""What a caller chooses and gets back; free of heavy imports, so that ``--help`` needs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

TypeName = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
Layout = Literal["single", "pair"]
OnProgress = Callable[[str, float], None]

TYPES: tuple[str, ...] = get_args(TypeName)
LAYOUTS: tuple[str, ...] = get_args(Layout)


@dataclass(frozen=True)
class Conversion:
    """What was written: the file or the pair, and what is not as asked for (types that did not fit)."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def default_vision_type(type_name: TypeName) -> TypeName:
    """The type of the ViT's and the projector's matrices beside a decoder of ``type_name``.

    They are a tenth of the 6B model's weights, so that eight bits instead of four add little to a file.
    """
    return "q8_0" if type_name == "q4_0" else type_name


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{what} should be one of {', '.join(choices)}, found {value!r}")
