"""Which file holds what: the single file, or llama.cpp's pair of text model and mmproj."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from yivl_edge.convert.config import ModelConfig
from yivl_edge.convert.metadata import general_keys, text_keys, vision_keys
from yivl_edge.convert.options import Layout
from yivl_edge.convert.tensor_map import Part, Policy, Tensor, tensors
from yivl_edge.convert.tokenizer import TokenizerTables
from yivl_edge.convert.writer import GgufPlan, TensorInfo

ChooseType = Callable[[Tensor], GGMLQuantizationType]


@dataclass(frozen=True)
class ModelPlan:
    """The files of a model, and the table's row behind each tensor's name."""

    files: list[GgufPlan]
    tensors: dict[str, Tensor]


def plan_model(
    config: ModelConfig,
    tokenizer: TokenizerTables,
    output: Path,
    *,
    layout: Layout,
    choose_type: ChooseType,
    file_type: LlamaFileType,
    vision_file_type: LlamaFileType,
) -> ModelPlan:
    """Lay a model out in one file or two.

    The single file leaves out ViT blocks behind the selected one. The pair has all of them, since llama.cpp
    runs one fewer than it is told.
    """
    vision_blocks = config.vision.blocks_run if layout == "single" else config.vision.blocks
    table = {
        tensor.name: tensor
        for tensor in tensors(
            config.sizes(),
            blocks=config.decoder.blocks,
            vision_blocks=vision_blocks,
            tied_embeddings=config.decoder.tied_embeddings,
        )
    }
    infos = {tensor: TensorInfo(tensor.name, tensor.shape, choose_type(tensor)) for tensor in table.values()}
    text = [info for tensor, info in infos.items() if tensor.part is Part.DECODER]
    vision = [info for tensor, info in infos.items() if tensor.part is not Part.DECODER]

    general = general_keys(config, file_type)
    about_text, about_vision = text_keys(config, tokenizer), vision_keys(config, vision_blocks)
    if layout == "single":
        files = [GgufPlan(output, "llama", general + about_text + about_vision, text + vision)]
    else:
        vision_general = general_keys(config, vision_file_type)
        files = [
            GgufPlan(output, "llama", general + about_text, text),
            GgufPlan(mmproj_path(output), "clip", vision_general + about_vision, vision),
        ]
    return ModelPlan(files, table)


def mmproj_path(output: Path) -> Path:
    """The vision half's place beside a text half: ``OUT-mmproj.gguf`` for ``OUT.gguf``."""
    return output.with_name(f"{output.stem}-mmproj{output.suffix}")


def fitting_type(tensor: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that the table's policy gives a tensor when ``wanted`` is asked for."""
    if tensor.rule.policy is Policy.VECTOR:
        return GGMLQuantizationType.F32
    exact = wanted in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)
    if tensor.rule.policy is Policy.PATCH:
        return GGMLQuantizationType.F32 if exact else GGMLQuantizationType.F16
    whole_blocks = tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if whole_blocks else GGMLQuantizationType.F16
