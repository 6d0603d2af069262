"""From a published folder to GGUF, one slice of one tensor at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize
from yivl_edge.convert.checkpoint import FloatArray, Weights
from yivl_edge.convert.config import JsonFile, ModelConfig, find_vision_folder, read_config
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.layout import fitting_type, plan_model
from yivl_edge.convert.options import Conversion, Layout, OnProgress, TypeName
from yivl_edge.convert.tensor_map import IGNORED_IN_SHARDS, IGNORED_IN_VIT, Part, Policy, Tensor
from yivl_edge.convert.tokenizer import read_tokenizer
from yivl_edge.convert.writer import TensorInfo, write_files

_FILE_TYPES: dict[TypeName, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}

# Weights in flight: small against any model, large enough for numpy; a cancel waits for one such slice.
_CHUNK = 1 << 20


def convert_folder(
    folder: Path,
    output: Path,
    type_name: TypeName,
    vision_type_name: TypeName,
    layout: Layout,
    on_progress: OnProgress | None,
) -> Conversion:
    """See ``yivl_edge.convert.convert``."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder. FOLDER should be a published Yi-VL folder, e.g. Yi-VL-6B."
        )
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config.decoder.vocab_size)

    def wanted_type(tensor: Tensor) -> GGMLQuantizationType:
        name = type_name if tensor.part is Part.DECODER else vision_type_name
        return GGMLQuantizationType[name.upper()]

    plan = plan_model(
        config,
        tokenizer,
        output,
        layout=layout,
        choose_type=lambda tensor: fitting_type(tensor, wanted_type(tensor)),
        file_type=_FILE_TYPES[type_name],
        vision_file_type=_FILE_TYPES[vision_type_name],
    )
    sources = _open_sources(folder, config, plan.tensors)
    total = sum(file.data_bytes for file in plan.files)
    done = 0

    def read_data(info: TensorInfo) -> Iterator[npt.NDArray[Any]]:
        nonlocal done
        tensor = plan.tensors[info.name]
        for values in _read(sources[tensor.part], tensor, config.decoder.head_dim):
            data = _encode(info, values)
            yield data
            done += data.nbytes
            if on_progress is not None:
                on_progress("convert", done / total)

    write_files(plan.files, read_data)
    infos = [info for file in plan.files for info in file.tensors]
    return Conversion(
        files=tuple(file.path for file in plan.files),
        notes=_notes(
            [(info, plan.tensors[info.name], wanted_type(plan.tensors[info.name])) for info in infos]
        ),
    )


def _open_sources(folder: Path, config: ModelConfig, table: dict[str, Tensor]) -> dict[Part, Weights]:
    """Open both folders; check every tensor and refuse what would be left out silently."""
    shards = Weights(folder)
    vit = Weights(find_vision_folder(folder, JsonFile(folder / "config.json", "")))
    sources = {Part.DECODER: shards, Part.PROJECTOR: shards, Part.VISION: vit}
    for tensor in table.values():
        sources[tensor.part].check(tensor.source, tensor.shape)
    ignored_in_shards = (
        (*IGNORED_IN_SHARDS, r"lm_head\.weight") if config.decoder.tied_embeddings else IGNORED_IN_SHARDS
    )
    for weights, ignored in ((shards, ignored_in_shards), (vit, IGNORED_IN_VIT)):
        used = {tensor.source for tensor in table.values() if sources[tensor.part] is weights}
        pattern = re.compile("|".join(ignored))
        if unknown := sorted(name for name in weights.names() - used if not pattern.fullmatch(name)):
            raise CheckpointError(
                f"{weights.folder} has {len(unknown)} tensors that Yi-VL does not have, e.g. {unknown[0]}. "
                "config.json is another model's, or the model has parts that the engine cannot compute."
            )
    return sources


def _read(weights: Weights, tensor: Tensor, head_dim: int) -> Iterator[FloatArray]:
    """The tensor in slices, its rows in the order of the file."""
    rows = max(1, _CHUNK // prod(tensor.shape[1:]))
    if not tensor.rule.permuted:
        yield from weights.read(tensor.source, rows)
        return
    for values in weights.read(tensor.source, max(rows // head_dim, 1) * head_dim):
        yield permute_heads(values, head_dim)


def permute_heads(rows: FloatArray, head_dim: int) -> FloatArray:
    """Reorder the rows of whole heads, (n hd, D), so that RoPE rotates adjacent pairs.

    Row 2j of a head is the published row j, row 2j + 1 the published row j + hd/2.
    """
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    permuted: FloatArray = heads.swapaxes(1, 2).reshape(rows.shape)
    return permuted


def _encode(info: TensorInfo, values: FloatArray) -> npt.NDArray[Any]:
    """Rows of float32 as the bytes of the tensor's type."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"{info.name} holds values that are no finite numbers. The shard is damaged.")
    with np.errstate(all="ignore"):
        data = np.ascontiguousarray(quantize(values, info.type))
    if info.type is GGMLQuantizationType.F16 and not np.isfinite(data).all():
        raise CheckpointError(f"{info.name} holds values too large for f16. Use --type bf16, f32 or q8_0.")
    return data


def _notes(chosen: Sequence[tuple[TensorInfo, Tensor, GGMLQuantizationType]]) -> tuple[str, ...]:
    """One line for each row of the table whose tensors could not have the type asked for."""
    fallbacks = Counter(
        (tensor.rule.name, tensor.shape[-1], wanted, info.type)
        for info, tensor, wanted in chosen
        if tensor.rule.policy is Policy.MATRIX and info.type != wanted
    )
    return tuple(
        f"{name.replace('{i}', 'N')} ({count} of them): rows of {width} are no whole number of {wanted.name} "
        f"blocks of {GGML_QUANT_SIZES[wanted][0]}, written as {used.name}"
        for (name, width, wanted, used), count in fallbacks.items()
    )
