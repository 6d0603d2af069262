"""Which file holds what: the single file, or llama.cpp's pair of text model and mmproj."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from yivl_edge.convert.header import Key, TensorInfo
from yivl_edge.convert.metadata import file_type_key
from yivl_edge.convert.options import Layout
from yivl_edge.convert.tensor_map import Part, Tensor
from yivl_edge.convert.writer import GgufPlan, tensor_keys

Keys = Sequence[Key]
Tensors = Sequence[TensorInfo]


@dataclass(frozen=True)
class ModelKeys:
    """The keys of a model: of every file, of the text half and of the vision half; late ones have values later."""

    general: Sequence[Key]
    text: Sequence[Key]
    vision: Sequence[Key]
    late_general: Sequence[Key] = ()
    late_text: Sequence[Key] = ()
    late_vision: Sequence[Key] = ()


def plan_files(
    output: Path,
    layout: Layout,
    keys: ModelKeys,
    types: Mapping[Tensor, GGMLQuantizationType],
    *,
    file_type: int,
    vision_file_type: int,
) -> list[GgufPlan]:
    """Lay a model out in one file or two, whose ``general.file_type`` are the last two arguments."""
    text, vision = (
        [
            TensorInfo(
                t.name, t.shape, type, prod(t.shape) // GGML_QUANT_SIZES[type][0] * GGML_QUANT_SIZES[type][1]
            )
            for t, type in types.items()
            if (t.part is Part.DECODER) == is_text
        ]
        for is_text in (True, False)
    )

    def plan(
        path: Path, architecture: str, file_type: int, own: Keys, late: Keys, tensors: Tensors
    ) -> GgufPlan:
        all_keys = [*keys.general, file_type_key(file_type), *own]
        all_late = [*keys.late_general, *late, *tensor_keys(tensors)]
        return GgufPlan(path, architecture, all_keys, all_late, tensors)

    if layout == "single":
        own, late = [*keys.text, *keys.vision], [*keys.late_text, *keys.late_vision]
        return [plan(output, "llama", file_type, own, late, [*text, *vision])]
    return [
        plan(output, "llama", file_type, keys.text, keys.late_text, text),
        plan(mmproj_path(output), "clip", vision_file_type, keys.vision, keys.late_vision, vision),
    ]


def mmproj_path(output: Path) -> Path:
    """The vision half's place beside a text half: ``OUT-mmproj.gguf`` for ``OUT.gguf``."""
    return output.with_name(f"{output.stem}-mmproj{output.suffix}")
