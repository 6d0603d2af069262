"""Whether a model file is what its converter wrote, and whether this machine computes with it as it should."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from yivl_edge import _core
from yivl_edge.selftest import (
    IMAGE_ROWS,
    Expected,
    Floats,
    SelfTest,
    error_limit,
    relative_error,
    sample,
    sample_logits,
    spread,
)

# How far the engine's outputs may be from numpy's on the same weights, relative, by arithmetic: float32 sums in another
# order differ by parts in a hundred thousand and grow through the blocks; bfloat16 activations have 8 bits.
_TOLERANCE = 1e-3
_BFLOAT16_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found beside what is allowed, and whether that is right."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Report:
    """All checks of a file; ``passed`` is whether all of them are right."""

    backend: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


class _DamagedError(_core.ModelFileError):
    """A tensor whose bytes are not those that were hashed."""


def check_hashes(
    path: str | os.PathLike[str], on_progress: Callable[[str, float], object] | None = None
) -> int:
    """Compare the bytes of every tensor with the SHA-256 that the file carries; return how many there are.

    Raises:
        ModelFileError: the file cannot be read, carries no hashes, or a tensor's bytes are others.
    """
    file = _core.GgufFile.open(path)
    return _check_hashes(file, os.fspath(path), on_progress)


def _check_hashes(file: _core.GgufFile, path: str, on_progress: Callable[[str, float], object] | None) -> int:
    lines = file.metadata.get("yivl.sha256")
    if not isinstance(lines, list):
        raise _core.ModelFileError(
            f"{path}: it carries no hashes (yivl.sha256); yivl-edge convert writes them"
        )
    parts = (str(line).partition("  ") for line in lines)
    hashes = {tensor_name: digest for digest, _, tensor_name in parts}
    tensors = file.tensors
    if missing := [tensor.name for tensor in tensors if tensor.name not in hashes]:
        raise _core.ModelFileError(f"{path}: {missing[0]} and {len(missing) - 1} more tensors have no hash")
    if absent := hashes.keys() - {tensor.name for tensor in tensors}:
        raise _core.ModelFileError(f"{path}: {min(absent)} has a hash, but is not in the file")
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with ThreadPoolExecutor(_core.default_thread_count()) as pool:
        try:
            for tensor, found in zip(tensors, pool.map(_sha256, tensors), strict=True):
                if found != hashes[tensor.name]:
                    raise _DamagedError(
                        f"{path}: {tensor.name} is damaged: its SHA-256 should be {hashes[tensor.name]}, found {found}"
                    )
                done += tensor.nbytes
                if on_progress is not None:
                    on_progress("hash", done / max(total, 1))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(tensors)


def _sha256(tensor: _core.GgufTensor) -> str:
    return hashlib.sha256(tensor.data.data).hexdigest()


def verify(
    path: str | os.PathLike[str],
    *,
    n_threads: int | None = None,
    on_progress: Callable[[str, float], object] | None = None,
) -> Report:
    """Check the hashes of a model file, then repeat with this machine the self-test that it carries.

    Each stage's outputs are compared twice: with what the file's own weights should give (a wrong kernel shows
    there), and with what the source's weights gave (a faulty conversion shows there).

    Args:
        path: a single file that ``yivl-edge convert`` or ``quantize`` wrote.
        n_threads: threads to compute with; None for one per physical core.
        on_progress: called with ``"hash"``, ``"load"``, ``"image"`` or ``"prefill"`` and the fraction done.

    Raises:
        ModelFileError: the file cannot be read, or carries no hashes or no self-test.
    """
    name = os.fspath(path)
    file = _core.GgufFile.open(path)
    checks: list[Check] = []
    try:
        count = _check_hashes(file, name, on_progress)
        checks.append(Check("hashes", True, f"{count} tensors"))
    except _DamagedError as error:
        checks.append(Check("hashes", False, str(error).removeprefix(f"{name}: ")))
    try:
        test = SelfTest.read(file.metadata)
    except ValueError as error:
        raise _core.ModelFileError(f"{name}: {error}") from error
    if test is None:
        raise _core.ModelFileError(
            f"{name}: it carries no self-test; yivl-edge convert writes one into single files"
        )
    control = _core.Control(on_progress)
    model = _core.Model.open(os.fsencode(path), b"", n_threads or 0, control)
    checks += _run(model, test, file, control)
    return Report(model.backend_name, tuple(checks))


def _run(model: _core.Model, test: SelfTest, file: _core.GgufFile, control: _core.Control) -> Iterable[Check]:
    session = _core.Session(
        model, max(len(test.ids), model.config.vision.n_patches if model.config.vision else 1)
    )
    tolerance = _BFLOAT16_TOLERANCE if model.backend_name == "amx" else _TOLERANCE
    types = {tensor.name: tensor.type for tensor in file.tensors}
    rows = np.zeros((0, model.config.decoder.width), np.float32)
    if test.image is not None:
        pixels = model.preprocess(test.image, control)
        found = hashlib.sha256(pixels.tobytes()).hexdigest()
        same = found == test.pixels_sha256
        yield Check("pixels", same, "as expected, bit for bit" if same else f"SHA-256 {found}")
        assert test.vision is not None
        assert test.projector is not None
        vision = {type for name, type in types.items() if name.startswith("v.")}
        features = session.vision_features(pixels, control)
        yield _compare("vision tower", sample(features), test.vision, vision, tolerance)
        embeddings = session.encode_image(pixels, control)
        vision |= {type for name, type in types.items() if name.startswith("mm.")}
        yield _compare("projector", sample(embeddings), test.projector, vision, tolerance)
        rows = embeddings[spread(IMAGE_ROWS, len(embeddings))]
    logits = session.logits_of_rows(test.ids, rows, control)
    yield _compare("logits", sample_logits(logits), test.logits, set(types.values()), tolerance)
    # Where the best two are closer than the arithmetic resolves, either may win.
    clear = np.array(test.top_margins) > 8 * tolerance
    differ = np.flatnonzero(clear & (logits.argmax(-1) != np.array(test.top_ids)))
    found = f"{int(clear.sum()) - len(differ)} of {int(clear.sum())} clear ones as expected"
    yield Check("next tokens", not len(differ), found)


def _compare(stage: str, found: Floats, expected: Expected, types: set[str], tolerance: float) -> Check:
    difference = relative_error(found, expected.file)
    error, limit = relative_error(found, expected.source), error_limit(types)
    bound = min(1.1 * expected.error + tolerance, limit + tolerance)
    text = (
        f"{difference:.1e} from the file's weights in numpy (at most {tolerance:.0e}), "
        f"{error:.1e} from the source's (at most {bound:.1e})"
    )
    return Check(stage, difference <= tolerance and error <= bound, text)
