"""Which file holds what: the single file, or llama.cpp's pair of text model and mmproj."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType
from yivl_edge.convert.metadata import file_type_key
from yivl_edge.convert.options import Layout
from yivl_edge.convert.presets import FILE_TYPES
from yivl_edge.convert.tensor_map import Part, Tensor
from yivl_edge.convert.writer import GgufPlan, Key, TensorInfo, hash_key


@dataclass(frozen=True)
class ModelKeys:
    """The keys of a model: of every file, of the text half and of the vision half."""

    general: Sequence[Key]
    text: Sequence[Key]
    vision: Sequence[Key]


def plan_files(
    output: Path,
    layout: Layout,
    keys: ModelKeys,
    types: Mapping[Tensor, GGMLQuantizationType],
    *,
    preset: str,
    vision_type: str,
) -> list[GgufPlan]:
    """Lay a model out in one file or two; ``preset`` and ``vision_type`` name the mix in ``general.file_type``."""
    text, vision = (
        [
            TensorInfo(t.name, t.shape, type)
            for t, type in types.items()
            if (t.part is Part.DECODER) == is_text
        ]
        for is_text in (True, False)
    )
    general = [*keys.general, file_type_key(FILE_TYPES[preset])]
    if layout == "single":
        tensors = [*text, *vision]
        return [GgufPlan(output, "llama", [*general, *keys.text, *keys.vision, hash_key(tensors)], tensors)]
    vision_general = [*keys.general, file_type_key(FILE_TYPES[vision_type])]
    return [
        GgufPlan(output, "llama", [*general, *keys.text, hash_key(text)], text),
        GgufPlan(mmproj_path(output), "clip", [*vision_general, *keys.vision, hash_key(vision)], vision),
    ]


def mmproj_path(output: Path) -> Path:
    """The vision half's place beside a text half: ``OUT-mmproj.gguf`` for ``OUT.gguf``."""
    return output.with_name(f"{output.stem}-mmproj{output.suffix}")
