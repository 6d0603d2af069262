"""From a source to GGUF: slices of tensors are read, encoded and written, several at a time."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from yivl_edge import _core, quantize
from yivl_edge.convert.blas import one_blas_thread
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.header import Key
from yivl_edge.convert.imatrix import read_imatrix
from yivl_edge.convert.layout import ModelKeys, plan_files
from yivl_edge.convert.metadata import general_keys, text_keys, vision_keys
from yivl_edge.convert.options import Conversion, Layout, OnProgress, PlannedTensor
from yivl_edge.convert.presets import FILE_TYPES, Choice, fitting_type
from yivl_edge.convert.reference import Work
from yivl_edge.convert.selftest import make_self_test, self_test_keys
from yivl_edge.convert.source import Source, open_source
from yivl_edge.convert.tensor_map import Part, Policy, Tensor
from yivl_edge.convert.writer import Files, check_targets, writing
from yivl_edge.hashes import damage
from yivl_edge.selftest import IMPORTANCE_KEY, TINY, rounding_limit, scale_limit

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
    _check_importance(importance, table)
    wanted = _wanted_types(source, table, choice)
    types = {tensor: fitting_type(tensor, wanted[tensor]) for tensor in table}
    late = self_test_keys(source)
    keys = ModelKeys(
        general=[
            *general_keys(source.config),
            *source.extra_keys,
            Key(IMPORTANCE_KEY, bool(importance), GGUFValueType.BOOL),
        ],
        text=text_keys(source.config, source.tokenizer),
        vision=[] if source.config.vision is None else vision_keys(source.config, _vision_blocks(table)),
        late_general=late.general,
        late_text=late.text,
        late_vision=late.vision,
    )
    plans = plan_files(
        output,
        layout if source.config.vision is not None else "single",
        keys,
        types,
        file_type=_file_type(source, types, choice, Part.DECODER),
        vision_file_type=_file_type(source, types, choice, Part.VISION),
    )
    check_targets(plans, path, mmproj, imatrix)
    by_name = {tensor.name: tensor for tensor in table}
    result = Conversion(
        files=tuple(plan.path for plan in plans),
        sizes=tuple(plan.file_size for plan in plans),
        tensors=tuple(
            PlannedTensor(
                name=info.name,
                shape=info.shape,
                source_type=source.type_of(by_name[info.name]).name,
                type=types[by_name[info.name]].name,
                nbytes=info.nbytes,
            )
            for plan in plans
            for info in plan.tensors
        ),
        notes=(*source.notes, *_notes(types, wanted, importance), *_without_effect(table, choice)),
    )
    if dry_run:
        return result
    _check_memory()
    with writing(plans) as files, _workers(n_threads) as pool, one_blas_thread():
        run = _Run(source, types, importance, files, pool, on_progress)
        values = make_self_test(source, run.visit, pool)
        for tensor in table:
            if tensor.name not in run.written:
                run.visit(tensor.source, None)
        files.finish(values)
    return result


@dataclass(frozen=True)
class _Piece:
    """A slice of a tensor in its type, what rounding to that changed, and what work made of the slice."""

    data: npt.NDArray[np.uint8]
    rounding: float
    result: Any


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
        self._tensors = {tensor.source: tensor for tensor in types}
        self._total = sum(prod(tensor.shape) for tensor in types)
        self._done = 0
        self.written: set[str] = set()

    def visit(self, published_name: str, work: Work[Any] | None) -> list[Any]:
        """What ``work`` makes of each slice of the tensor, in order; the first visit writes the tensor."""
        tensor = self._tensors[published_name]
        first_visit = tensor.name not in self.written
        results: list[Any] = []
        pending: deque[tuple[int, int, Future[_Piece]]] = deque()
        carried = self._source.stored_hash(tensor) if first_visit else None
        stored = hashlib.sha256()

        def finish() -> None:
            first, count, future = pending.popleft()
            piece = future.result()
            results.append(piece.result)
            if carried is not None and (data := self._source.stored(tensor, first, count)) is not None:
                stored.update(data.data)
            if first_visit:
                self._files.write(tensor.name, piece.data, rounding=piece.rounding)
                self._report(count * prod(tensor.shape[1:]))

        for first, count in _slices(tensor, self._source.config.decoder.head_dim):
            pending.append((first, count, self._pool.submit(self._slice, tensor, first, count, work)))
            if len(pending) > self._ahead:
                finish()
        while pending:
            finish()
        if carried is not None and stored.hexdigest() != carried[1]:
            raise damage(str(carried[0]), tensor.name, carried[1], stored.hexdigest())
        self.written.add(tensor.name)
        return results

    def _slice(self, tensor: Tensor, first: int, count: int, work: Work[Any] | None) -> _Piece:
        """Some rows."""
        source, coded_type = self._source, self._types[tensor]
        values = source.read(tensor, first, count)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{tensor.name} holds values that are no finite numbers. Its file is damaged."
            )
        rows = values
        if tensor.rule.permuted and source.published_rows:
            rows = permute_heads(values, source.config.decoder.head_dim)
        importance = self._importance.get(tensor.name)
        # What has the type already would not always come out the same once more.
        data = source.stored(tensor, first, count) if source.type_of(tensor) is coded_type else None
        if data is None:
            data = _encode(tensor, rows.reshape(count, -1), coded_type, importance)
        coded = _core.dequantize(data, coded_type, count, rows[0].size).reshape(rows.shape)
        rounding = _checked_rounding(tensor, coded_type, rows, coded, importance)
        return _Piece(data, rounding, None if work is None else work(first, values, rows, coded))

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
    return quantize(rows, coded_type.name, importance, n_threads=1).reshape(-1)


def _checked_rounding(
    tensor: Tensor,
    coded_type: GGMLQuantizationType,
    rows: FloatArray,
    coded: FloatArray,
    importance: npt.NDArray[np.float32] | None,
) -> float:
    """What rounding changed of some rows, relative to their size; CheckpointError if it is more than rounding can.

    With importance, what matters little may change more: then the weighed change is what counts.
    """
    shape = (-1, rows.size // len(rows))
    rows, error = rows.reshape(shape), (coded - rows).reshape(shape)
    if not error.any():
        return 0.0
    weighed = importance is not None and bool(importance.any())
    limit, most_off = rounding_limit(coded_type.name, weighed), scale_limit(weighed)
    for weights in (None, importance) if weighed else (None,):
        size, change, scale = _rounding(rows, error, weights)
        # Below TINY nothing is certain.
        if change <= limit * size + TINY and abs(scale - 1) * size <= most_off * size + TINY:
            return min(change / max(size, TINY), limit)
    raise CheckpointError(
        f"{tensor.name}: as {coded_type.name} its weights are not what they were: they changed by "
        f"{change / max(size, TINY):.3g} of their size, at most {limit:.3g} is expected, and by a factor of "
        f"{1 / max(scale, 1e-9):.3g}. Please report this."
    )


def _rounding(
    rows: FloatArray, error: FloatArray, weights: npt.NDArray[np.float32] | None
) -> tuple[float, float, float]:
    """Root mean squares of rows and error, and the scale with the least sum w (rows - scale coded)^2; w by column."""

    def mean(a: FloatArray, b: FloatArray) -> float:
        weighed = a if weights is None else a * (weights / weights.mean())
        found = float(np.vdot(weighed, b))
        return (found if isfinite(found) else float(np.vdot(weighed.astype(np.float64), b))) / rows.size

    of_rows, of_both, of_error = mean(rows, rows), mean(error, rows), mean(error, error)
    of_coded = of_rows + 2 * of_both + of_error
    # Where all is rounded to 0 there is nothing to fit.
    scale = (of_rows + of_both) / of_coded if of_coded > 0 else 1.0
    return sqrt(of_rows), sqrt(of_error), scale


def _check_importance(importance: Mapping[str, npt.NDArray[np.float32]], table: Sequence[Tensor]) -> None:
    """Raise CheckpointError if it is plain that another model's activations were recorded."""
    tensors = {tensor.name: tensor for tensor in table}
    for name, columns in importance.items():
        tensor = tensors.get(name)
        if tensor is not None and columns.size != prod(tensor.shape[1:]):
            found = f"{columns.size} columns for {name}, which has {prod(tensor.shape[1:])}"
        elif tensor is None and name.startswith("blk."):
            found = f"{name}, which this model does not have"
        else:
            continue
        raise CheckpointError(f"the importance matrix has {found}: it was made with another model")
    if importance and not importance.keys() & tensors.keys():
        raise CheckpointError(
            f"the importance matrix has none of this model's matrices, but e.g. {next(iter(importance))}"
        )


def _wanted_types(
    source: Source, table: Sequence[Tensor], choice: Choice | None
) -> dict[Tensor, GGMLQuantizationType]:
    decoder = source.config.decoder
    if choice is None:
        return {tensor: source.type_of(tensor) for tensor in table}
    sizes = {"blocks": decoder.blocks, "group": decoder.heads // decoder.kv_heads}
    return {tensor: choice.wanted(tensor, **sizes, tied=decoder.tied_embeddings) for tensor in table}


def _file_type(
    source: Source, types: Mapping[Tensor, GGMLQuantizationType], choice: Choice | None, part: Part
) -> int:
    """llama.cpp's number for the types of a part: of the choice; of the source; or of most of its matrices."""
    if choice is not None:
        return FILE_TYPES[choice.preset if part is Part.DECODER else choice.vision_type]
    if (number := source.file_types.get(part)) is not None:
        return number
    counts = Counter(
        type for tensor, type in types.items() if tensor.part is part and tensor.rule.policy is Policy.MATRIX
    )
    return FILE_TYPES[counts.most_common(1)[0][0].name.lower() if counts else "f32"]


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


def _without_effect(table: Sequence[Tensor], choice: Choice | None) -> Iterator[str]:
    """A line for each choice that changes nothing."""
    deciding = (
        set()
        if choice is None
        else {choice.override(tensor) for tensor in table if tensor.rule.policy is not Policy.VECTOR}
    )
    for pattern, type_name in () if choice is None else choice.overrides:
        if (pattern, type_name) not in deciding:
            yield f"{pattern}={type_name} changes nothing: no matrix has it in its name, or another pattern comes first"
