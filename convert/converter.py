"""From a source to GGUF: slices of tensors are read, encoded and written, several at a time."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from yivl_edge import _core, quantize
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.imatrix import read_imatrix
from yivl_edge.convert.layout import ModelKeys, plan_files
from yivl_edge.convert.metadata import general_keys, text_keys, vision_keys
from yivl_edge.convert.options import Conversion, Layout, OnProgress, PlannedTensor
from yivl_edge.convert.presets import Choice, fitting_type
from yivl_edge.convert.reference import Work
from yivl_edge.convert.selftest import make_self_test, self_test_keys
from yivl_edge.convert.source import Source, open_source
from yivl_edge.convert.tensor_map import Part, Policy, Tensor
from yivl_edge.convert.writer import Files, file_size, writing

# Weights in flight: small against any model, large enough for numpy; a cancel waits for one such slice.
_CHUNK = 1 << 20
# What the self-test's activations and the interpreter with numpy take beside that, with room to spare.
_MEMORY = 1 << 30


def run_conversion(
    path: Path,
    output: Path,
    *,
    mmproj: Path | None,
    choice: Choice | None,
    layout: Layout,
    imatrix: Path | None,
    n_threads: int | None,
    dry_run: bool,
    on_progress: OnProgress | None,
) -> Conversion:
    """See ``yivl_edge.convert.convert``; without a ``choice`` types stay as they are."""
    source = open_source(path, mmproj)
    table = source.tensors(all_vision_blocks=layout == "pair")
    source.check(table)
    importance = {} if imatrix is None else read_imatrix(imatrix)
    wanted = _wanted_types(source, table, choice)
    types = {tensor: fitting_type(tensor, wanted[tensor]) for tensor in table}
    keys = ModelKeys(
        general=[*general_keys(source.config), *source.extra_keys],
        text=text_keys(source.config, source.tokenizer),
        vision=[] if source.config.vision is None else vision_keys(source.config, _vision_blocks(table)),
    )
    if layout == "single":
        keys = ModelKeys(keys.general, [*keys.text, *self_test_keys(source)], keys.vision)
    plans = plan_files(
        output,
        layout if source.config.vision is not None else "single",
        keys,
        types,
        preset=choice.preset if choice else _commonest(types, Part.DECODER),
        vision_type=choice.vision_type if choice else _commonest(types, Part.VISION),
    )
    by_name = {tensor.name: tensor for tensor in table}
    result = Conversion(
        files=tuple(plan.path for plan in plans),
        sizes=tuple(file_size(plan) for plan in plans),
        tensors=tuple(
            PlannedTensor(
                info.name, info.shape, source.type_of(by_name[info.name]).name, info.type.name, info.nbytes
            )
            for plan in plans
            for info in plan.tensors
        ),
        notes=_notes(types, wanted, importance),
    )
    if dry_run:
        return result
    _check_memory()
    with writing(plans) as files, _workers(n_threads) as pool:
        run = _Run(source, types, importance, files, pool, on_progress)
        values: Mapping[str, Any] = {}
        if layout == "single":
            values = make_self_test(source, run.visit, types)
        for tensor in table:
            if tensor.name not in run.written:
                run.visit(tensor.name, None)
        files.finish(values)
    return result


class _Run:
    """Encodes and writes tensors, each when it is first visited."""

    def __init__(
        self,
        source: Source,
        types: Mapping[Tensor, GGMLQuantizationType],
        importance: Mapping[str, npt.NDArray[np.float32]],
        files: Files,
        pool: ThreadPoolExecutor,
        on_progress: OnProgress | None,
    ) -> None:
        self._source, self._types, self._importance, self._files = source, types, importance, files
        self._pool, self._on_progress = pool, on_progress
        self._ahead = 2 * pool._max_workers
        self._tensors = {tensor.name: tensor for tensor in types}
        self._total = sum(prod(tensor.shape) for tensor in types)
        self._done = 0
        self.written: set[str] = set()

    def visit(self, name: str, work: Work[Any] | None) -> list[Any]:
        """What ``work`` makes of each slice of the tensor, in order; the first visit writes the tensor."""
        tensor = self._tensors[name]
        first_visit = name not in self.written
        results: list[Any] = []
        pending: deque[tuple[int, Future[tuple[npt.NDArray[np.uint8], Any]]]] = deque()

        def finish() -> None:
            count, future = pending.popleft()
            data, result = future.result()
            results.append(result)
            if first_visit:
                self._files.write(name, data)
                self._report(count * prod(tensor.shape[1:]))

        for first, count in _slices(tensor, self._source.config.decoder.head_dim):
            pending.append((count, self._pool.submit(self._slice, tensor, first, count, work)))
            if len(pending) > self._ahead:
                finish()
        while pending:
            finish()
        self.written.add(name)
        return results

    def _slice(
        self, tensor: Tensor, first: int, count: int, work: Work[Any] | None
    ) -> tuple[npt.NDArray[np.uint8], Any]:
        """The bytes of some rows, and what ``work`` makes of them."""
        source, coded_type = self._source, self._types[tensor]
        values = source.read(tensor, first, count)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{tensor.name} holds values that are no finite numbers. The shard is damaged."
            )
        rows = values
        if tensor.rule.permuted and source.published_rows:
            rows = permute_heads(values, source.config.decoder.head_dim)
        data = _encode(tensor, rows.reshape(count, -1), coded_type, self._importance.get(tensor.name))
        if work is None:
            return data, None
        coded = _core.dequantize(data, coded_type, count, rows[0].size).reshape(rows.shape)
        return data, work(first, values, coded)

    def _report(self, weights: int) -> None:
        self._done += weights
        if self._on_progress is not None:
            self._on_progress("convert", self._done / self._total)


@contextmanager
def _workers(n_threads: int | None) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(n_threads or _core.default_thread_count(), "convert")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _slices(tensor: Tensor, head_dim: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each slice; heads stay whole."""
    rows = max(1, _CHUNK // prod(tensor.shape[1:]))
    if tensor.rule.permuted:
        rows = max(rows // head_dim, 1) * head_dim
    for first in range(0, tensor.shape[0], rows):
        yield first, min(rows, tensor.shape[0] - first)


def permute_heads(rows: FloatArray, head_dim: int) -> FloatArray:
    """Reorder the rows of whole heads, (n hd, D), so that RoPE rotates adjacent pairs.

    Row 2j of a head is the published row j, row 2j + 1 the published row j + hd/2.
    """
    heads = rows.reshape(-1, 2, head_dim // 2, rows.shape[-1])
    permuted: FloatArray = heads.swapaxes(1, 2).reshape(rows.shape)
    return permuted


def _encode(
    tensor: Tensor,
    rows: FloatArray,
    coded_type: GGMLQuantizationType,
    importance: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.uint8]:
    """Rows of float32 as the bytes of a type, flat."""
    if coded_type is GGMLQuantizationType.F16 and np.abs(rows).max() >= 65520:
        raise CheckpointError(f"{tensor.name} holds values too large for f16. Use --type bf16, f32 or q8_0.")
    if importance is not None and len(importance) != rows.shape[-1]:
        raise CheckpointError(
            f"the importance matrix has {len(importance)} columns for {tensor.name}, which has {rows.shape[-1]}: "
            "it was made with another model"
        )
    return quantize(rows, coded_type.name, importance, n_threads=1).reshape(-1)


def _wanted_types(
    source: Source, table: Sequence[Tensor], choice: Choice | None
) -> dict[Tensor, GGMLQuantizationType]:
    decoder = source.config.decoder
    if choice is None:
        return {tensor: source.type_of(tensor) for tensor in table}
    sizes = {"blocks": decoder.blocks, "group": decoder.heads // decoder.kv_heads}
    return {tensor: choice.wanted(tensor, **sizes, tied=decoder.tied_embeddings) for tensor in table}


def _commonest(types: Mapping[Tensor, GGMLQuantizationType], part: Part) -> str:
    """The type that most matrices of a part have, for ``general.file_type``."""
    counts = Counter(
        type for tensor, type in types.items() if tensor.part is part and tensor.rule.policy is Policy.MATRIX
    )
    return counts.most_common(1)[0][0].name.lower() if counts else "f32"


def _vision_blocks(table: Sequence[Tensor]) -> int:
    return sum(tensor.rule.name == "v.blk.{i}.ln1.weight" for tensor in table)


def _check_memory() -> None:
    """Raise MemoryError if the machine says that it has too little to spare."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return  # no Linux: nobody to ask
    free = int(line.split()[1]) * 1024
    if free < _MEMORY:
        raise MemoryError(
            f"converting needs {_MEMORY / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available"
        )


def _notes(
    types: Mapping[Tensor, GGMLQuantizationType],
    wanted: Mapping[Tensor, GGMLQuantizationType],
    importance: Mapping[str, object],
) -> tuple[str, ...]:
    """A line for each row of the table whose tensors could not have the type asked for, or lack importances."""
    matrices = [tensor for tensor in types if tensor.rule.policy is Policy.MATRIX]
    fallbacks = Counter(
        (tensor.rule.name, tensor.shape[-1], wanted[tensor], types[tensor])
        for tensor in matrices
        if types[tensor] != wanted[tensor]
    )
    notes = [
        f"{name.replace('{i}', 'N')} ({count} of them): rows of {width} are no whole number of {asked.name} "
        f"blocks of {GGML_QUANT_SIZES[asked][0]}, written as {used.name}"
        for (name, width, asked, used), count in fallbacks.items()
    ]
    unquantised = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    if importance:
        missing = [
            tensor.name
            for tensor in matrices
            if types[tensor] not in unquantised
            and tensor.name not in importance
            and tensor.rule.name != "token_embd.weight"  # a lookup: no activations to weigh by
        ]
        if missing:
            notes.append(
                f"the importance matrix has nothing on {len(missing)} quantised matrices, e.g. {missing[0]}"
            )
    return tuple(notes)
