"""Whether a model file is what its converter wrote, and whether this machine computes with it as it should."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from yivl_edge import _core
from yivl_edge.bounds import threads
from yivl_edge.hashes import DamagedError, DamagedHeaderError, check_hashes
from yivl_edge.selftest import (
    IMPORTANCE_KEY,
    ROUNDING_KEY,
    STRUCTURE_LIMIT,
    DecoderTest,
    Expected,
    Floats,
    SelfTest,
    VisionTest,
    relative_error,
    rounding_limit,
    sample,
    sample_logits,
)

# How far the engine's outputs may be from numpy's on the same weights, relative, by arithmetic: float32 sums in another
# order differ by parts in a million and grow through the blocks, products in integers round activations to 15 bits;
# activations in half precision, as a GPU has them, have 11 bits, bfloat16 ones 8.
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 3e-3
_BFLOAT16_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found beside what is allowed, and whether that is right."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Report:
    """All checks of a file or a pair; ``passed`` is whether all of them are right."""

    backend: str
    """What computed, e.g. ``"avx512"``; empty if nothing could be computed."""
    checks: tuple[Check, ...]
    unchecked: str
    """What could not be checked, since it belongs to the other half of a pair; empty for nothing."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def verify(
    path: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    device: str = "auto",
    n_threads: int | None = None,
    on_progress: Callable[[str, float], object] | None = None,
) -> Report:
    """Check the hashes of a model file, what its conversion found, and repeat the self-test with this machine.

    A damaged file shows in the hashes; weights that a faulty converter put in the wrong place in ``structure`` and
    ``rounding``, whatever their types; and a kernel that computes wrongly in the stages.

    Args:
        path: what ``yivl-edge convert`` or ``quantize`` wrote: a single file, the text model of a pair, or the file
            with its vision tower.
        mmproj: of a pair, the file with the vision tower. Of half a pair its own part is checked, and
            ``Report.unchecked`` says what is left; a vision tower computes only with its text model.
        device: what repeats the self-test, as for `Model`: also its errors are as there.
        n_threads: threads to work with; None for one per physical core.
        on_progress: called with ``"hash"``, ``"load"``, ``"image"`` or ``"prefill"`` and the fraction done.

    Raises:
        ModelFileError: a file cannot be read, or carries no hashes or no self-test.
        ValueError, TypeError: a number of threads or a device that `Model` would not take.
    """
    n_threads = threads(n_threads)
    paths = [path] if mmproj is None else [path, mmproj]
    files = [_core.GgufFile.open(each) for each in paths]
    checks: list[Check] = []
    test: list[SelfTest] = []
    for each, file in zip(paths, files, strict=True):
        which = "" if mmproj is None else f" of {os.path.basename(os.fspath(each))}"
        try:
            count = check_hashes(each, n_threads=n_threads, on_progress=on_progress)
            checks.append(Check(f"hashes{which}", True, f"header and {count} tensors"))
        except DamagedError as error:
            checks.append(Check(f"hashes{which}", False, str(error).removeprefix(f"{os.fspath(each)}: ")))
            if isinstance(error, DamagedHeaderError):
                return Report("", tuple(checks), "the rest, for which the header would have to be sound")
        checks.append(_check_rounding(each, file, which))
        test.append(_read_self_test(each, file))
    structure = max(each.structure for each in test)
    checks.append(
        Check(
            "structure",
            structure <= STRUCTURE_LIMIT,
            f"unrounded, the file's order is {structure:.1e} from the source (at most {STRUCTURE_LIMIT:.0e})",
        )
    )
    vision = next((each.vision for each in reversed(test) if each.vision is not None), None)
    decoder = next((each.decoder for each in test if each.decoder is not None), None)
    if decoder is None:
        return Report(
            "", tuple(checks), "what the vision tower computes: that takes the text model of the pair too"
        )
    control = _core.Control(on_progress)
    encoded = b"" if mmproj is None else os.fsencode(mmproj)
    model = _core.Model.open(os.fsencode(path), encoded, n_threads or 0, control, device)
    if vision is not None:
        checks += _run_vision(model, vision, control)
    checks += _run_decoder(model, decoder, control)
    unchecked = "" if vision is not None else "a vision tower, which of a pair is in the other file (mmproj)"
    return Report(model.backend_name, tuple(checks), unchecked)


def _check_rounding(path: str | os.PathLike[str], file: _core.GgufFile, which: str) -> Check:
    found: Any = file.metadata.get(ROUNDING_KEY)
    tensors = file.tensors
    if not isinstance(found, list) or len(found) != len(tensors):
        raise _core.ModelFileError(
            f"{os.fspath(path)}: expected {ROUNDING_KEY} with a number for each tensor"
        )
    importance = bool(file.metadata.get(IMPORTANCE_KEY))
    limits = np.array([rounding_limit(tensor.type, importance) for tensor in tensors])
    shares = np.array(found) / np.maximum(limits, 1e-9)
    worst = int(shares.argmax())
    return Check(
        f"rounding{which}",
        bool((shares <= 1).all()),
        f"worst is {tensors[worst].name}, changed by {found[worst]:.1e} of its size as {tensors[worst].type} "
        f"(at most {limits[worst]:.1e})",
    )


def _read_self_test(path: str | os.PathLike[str], file: _core.GgufFile) -> SelfTest:
    try:
        test = SelfTest.read(file.metadata)
    except ValueError as error:
        raise _core.ModelFileError(f"{os.fspath(path)}: {error}") from error
    if test is None:
        raise _core.ModelFileError(
            f"{os.fspath(path)}: it carries no self-test; yivl-edge convert writes one"
        )
    return test


def _run_vision(model: _core.Model, test: VisionTest, control: _core.Control) -> Iterator[Check]:
    session = _core.Session(model, 1)
    pixels = model.preprocess(test.image, control)
    found = hashlib.sha256(pixels.tobytes()).hexdigest()
    same = found == test.pixels_sha256
    yield Check("pixels", same, "as expected, bit for bit" if same else f"SHA-256 {found}")
    yield _compare(model, "vision tower", sample(session.vision_features(pixels, control)), test.vision)
    yield _compare(model, "projector", sample(session.encode_image(pixels, control)), test.projector)


def _run_decoder(model: _core.Model, test: DecoderTest, control: _core.Control) -> Iterator[Check]:
    ids = model.tokenize(test.text)[: model.config.decoder.context_length]
    same = ids == test.ids
    yield Check("tokeniser", same, "ids as expected" if same else f"ids should be {test.ids}, found {ids}")
    logits = _core.Session(model, len(test.ids)).logits(test.ids, None, control)
    yield _compare(model, "logits", sample_logits(logits), test.logits)
    if not len(test.top_ids) == len(test.top_margins) == len(logits):
        raise _core.ModelFileError(
            f"expected a best id and a margin for each of {len(logits)} tokens in the self-test"
        )
    # Where the best two are closer than the arithmetic resolves, either may win.
    clear = np.array(test.top_margins) > 8 * _tolerance(model)
    differ = np.flatnonzero(clear & (logits.argmax(-1) != np.array(test.top_ids)))
    found = f"{int(clear.sum()) - len(differ)} of {int(clear.sum())} clear ones as expected"
    yield Check("next tokens", not len(differ), found)


def _tolerance(model: _core.Model) -> float:
    if model.backend_name.startswith("cuda"):
        return _HALF_TOLERANCE
    return _BFLOAT16_TOLERANCE if model.backend_name == "amx" else _TOLERANCE


def _compare(model: _core.Model, stage: str, found: Floats, expected: Expected) -> Check:
    if found.shape != expected.sample.shape:
        return Check(stage, False, f"{len(expected.sample)} values in the self-test, {len(found)} computed")
    difference, limit = relative_error(found, expected.sample), _tolerance(model)
    text = (
        f"{difference:.1e} from the file's weights in numpy (at most {limit:.0e}); "
        f"rounding cost {expected.error:.1e} when it was converted"
    )
    return Check(stage, difference <= limit, text)
