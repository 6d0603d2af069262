"""Yi-VL weights to GGUF: ``python -m yivl_edge.convert FOLDER -o FILE.gguf``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from yivl_edge.bounds import threads
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.options import (
    LAYOUTS,
    PRESETS,
    WEIGHT_TYPES,
    Conversion,
    Layout,
    OnProgress,
    PlannedTensor,
    Preset,
    WeightType,
    check_choice,
    default_vision_type,
)

__all__ = ["CheckpointError", "Conversion", "PlannedTensor", "convert"]


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    type: Preset | None = None,
    vision_type: WeightType | None = None,
    tensor_types: Mapping[str, WeightType] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    layout: Layout = "single",
    n_threads: int | None = None,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Convert Yi-VL weights to GGUF, quantising them; docs/file-format.md describes the result.

    Args:
        source: a folder as 01.AI publishes it (``config.json``, shards, ``tokenizer.model``, the ViT's folder),
            its port to transformers' LLaVA, or a GGUF file.
        output: the file to write. With ``layout="pair"`` it is the text half, and the vision half stands
            beside it as ``OUT-mmproj.gguf`` for ``OUT.gguf``.
        mmproj: the vision half, if ``source`` is the text half of a pair. Without it a text half stays one.
        type: the mix of types of the decoder's matrices, by llama.cpp's names: ``f32``, ``f16``, ``bf16``,
            ``q8_0``, ``q6_k``, ``q5_k_m``, ``q4_k_m``, ``q4_k_s``, ``q4_0``, ``iq4_xs``, ``q3_k_m`` or ``q2_k``.
            None: ``q8_0`` for a folder; for a GGUF file, types stay as they are. Norms, biases and position
            embeddings are always f32. Where a matrix's rows are no whole number of blocks it gets another type,
            and ``notes`` says so.
        vision_type: of the ViT's and the projector's matrices, any one type; default ``q8_0``, or ``type`` if
            that is unquantised.
        tensor_types: types for tensors by regular expression on their names, before the mixes; the first that is
            found in a name counts, e.g. ``{"ffn_down": "q6_k"}``.
        imatrix: an importance matrix (``yivl-edge imatrix``, or llama.cpp's), by which quantising weighs errors.
        layout: ``single`` file, or llama.cpp's ``pair``.
        n_threads: threads to work with; None: one per physical core. The result is the same for any number.
        dry_run: only plan; nothing is written.
        on_progress: called as ``on_progress("convert", fraction)`` several times a second on the caller's
            thread; an exception that it raises ends the conversion.

    Returns:
        ``Conversion(files, sizes, tensors, notes)``: the paths, their bytes, every tensor with its types, and what
        is not as asked for.

    The files appear under their names only when complete; on any exception nothing is left and old files stay.
    Weights are read and written a few megabytes at a time, whatever the size of the model. The same source gives the
    same bytes on any number of threads (on another kind of CPU, the self-test's last bits may differ). Files carry a
    self-test for ``yivl_edge.verify``, which is computed on the way; meanwhile numpy's products are told to use one
    thread each, in the whole process.

    Raises:
        ValueError: an argument is none of the above, or the output one of the files that are read.
        CheckpointError: the source is no Yi-VL model, or damaged, or its weights would not be in the file what they
            were; the text says what to do.
        ModelFileError: likewise for GGUF files.
        ModuleNotFoundError: gguf is missing, or torch if the weights are ``.bin`` files.
        OSError: the output cannot be written, e.g. the disk is too full (asked before anything is written).
        MemoryError: the machine has too little memory to spare.
    """
    source_path = Path(source)
    if type is None and source_path.is_dir():
        type = "q8_0"
    if type is not None:
        check_choice("type", type, PRESETS)
    else:
        choices = {"vision_type": vision_type, "tensor_types": tensor_types, "imatrix": imatrix}
        if given := [name for name, value in choices.items() if value]:
            raise ValueError(
                f"{', '.join(given)} without type: the types of a GGUF file then stay as they are"
            )
    if vision_type is not None:
        check_choice("vision_type", vision_type, WEIGHT_TYPES)
    check_choice("layout", layout, LAYOUTS)
    n_threads = threads(n_threads)
    try:
        from yivl_edge.convert.converter import run_conversion
        from yivl_edge.convert.presets import Choice
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"converting needs the package {error.name}: pip install 'yivl-edge[convert]'", name=error.name
        ) from error
    choice = None
    if type is not None:
        choice = Choice(
            type,
            vision_type or default_vision_type(type),
            tuple((tensor_types or {}).items()),
            has_imatrix=imatrix is not None,
        )
    return run_conversion(
        source_path,
        Path(output),
        mmproj=None if mmproj is None else Path(mmproj),
        choice=choice,
        layout=layout,
        imatrix=None if imatrix is None else Path(imatrix),
        n_threads=n_threads,
        dry_run=dry_run,
        on_progress=on_progress,
    )
