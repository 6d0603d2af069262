"""Checkpoint folder to GGUF: ``python -m yivl_edge.convert FOLDER -o FILE.gguf``."""

from __future__ import annotations

import os
from pathlib import Path

from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.options import (
    LAYOUTS,
    TYPES,
    Conversion,
    Layout,
    OnProgress,
    TypeName,
    check_choice,
    default_vision_type,
)

__all__ = ["CheckpointError", "Conversion", "convert"]


def convert(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    type: TypeName = "q8_0",
    vision_type: TypeName | None = None,
    layout: Layout = "single",
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Convert a published Yi-VL folder to GGUF; docs/file-format.md describes the result.

    Args:
        folder: the published layout: ``config.json``, shards, ``tokenizer.model`` and the ViT's folder.
        output: the file to write. With ``layout="pair"`` it is the text half, and the vision half stands
            beside it as ``OUT-mmproj.gguf`` for ``OUT.gguf``.
        type: of the decoder's matrices: ``f32``, ``f16``, ``bf16``, ``q8_0`` or ``q4_0``. Norms, biases and
            position embeddings are always f32. A matrix whose rows are no whole number of blocks becomes
            f16, and ``notes`` says so.
        vision_type: of the ViT's and the projector's matrices; default ``q8_0`` if ``type`` is ``q4_0``,
            otherwise the same.
        layout: ``single`` file, or llama.cpp's ``pair``.
        on_progress: called as ``on_progress("convert", fraction)`` several times a second on the caller's
            thread; an exception that it raises ends the conversion.

    Returns:
        ``Conversion(files, notes)``: the paths written, and what is not as asked for.

    The files appear under their names only when complete; on any exception nothing is left and old files
    stay. Weights are read and written a few megabytes at a time, whatever the size of the model. The same
    folder gives the same bytes.

    Raises:
        ValueError: ``type``, ``vision_type`` or ``layout`` is none of the above.
        CheckpointError: the folder is no Yi-VL model, or damaged; the text says what to do.
        ModuleNotFoundError: gguf is missing, or torch if the weights are ``.bin`` files.
        OSError: the output cannot be written, e.g. the disk is full.
    """
    if vision_type is None:
        vision_type = default_vision_type(type)
    check_choice("type", type, TYPES)
    check_choice("vision_type", vision_type, TYPES)
    check_choice("layout", layout, LAYOUTS)
    try:
        from yivl_edge.convert.converter import convert_folder
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"converting needs the package {error.name}: pip install 'yivl-edge[convert]'", name=error.name
        ) from error
    return convert_folder(Path(folder), Path(output), type, vision_type, layout, on_progress)
