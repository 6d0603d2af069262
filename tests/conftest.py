"""Models that many tests share, converted once per run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import emulated  # noqa: F401  before yivl_edge
import numpy as np
import pytest
from yivl_edge import DeviceError, Model, _core
from yivl_edge.convert import convert

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"

# What every model computes with that names no device, so that a GPU can run all tests (docs/cuda.md).
if DEVICE := os.environ.get("YIVL_TEST_DEVICE"):
    for opens in (Model.__init__, Model.demo.__func__):
        opens.__kwdefaults__["device"] = DEVICE

# A shell that runs the tests in the background has Ctrl-C ignored, and so would every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """A process that lost its GPU, as by an illegal access, fails every test after it: another takes its place."""
    result = yield
    if os.environ.get("YIVL_TEST_NEEDS_DEVICE") and os.environ.get("PYTEST_XDIST_WORKER"):
        try:
            _core.cuda_memory("cuda")
        except DeviceError:
            os._exit(70)
    return result


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of this machine."""
    return str(request.param)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """What the reference implementation recorded."""
    with np.load(GOLDEN / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def golden_image() -> Path:
    return GOLDEN / "image.png"


@pytest.fixture(scope="session")
def golden_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint as one F32 file; a ready one where there is no PyTorch to read the checkpoint with."""
    if ready := os.environ.get("YIVL_GOLDEN_F32"):
        return Path(ready)
    path = tmp_path_factory.mktemp("golden") / "golden-f32.gguf"
    convert(GOLDEN / "checkpoint", path, type="f32")
    return path


@pytest.fixture(scope="session")
def golden_q8_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint as one Q8_0 file."""
    path = tmp_path_factory.mktemp("golden-q8_0") / "golden-q8_0.gguf"
    convert(GOLDEN / "checkpoint", path, type="q8_0")
    return path


@pytest.fixture(scope="session")
def golden_q4_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint as one Q4_0 file."""
    path = tmp_path_factory.mktemp("golden-q4_0") / "golden-q4_0.gguf"
    convert(GOLDEN / "checkpoint", path, type="q4_0")
    return path


@pytest.fixture(scope="session")
def golden_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The golden checkpoint as an F32 pair: (text model, mmproj)."""
    path = tmp_path_factory.mktemp("golden-pair") / "golden.gguf"
    convert(GOLDEN / "checkpoint", path, type="f32", layout="pair")
    return path, path.with_name("golden-mmproj.gguf")


@pytest.fixture(scope="session")
def golden_model(golden_f32: Path) -> Model:
    return Model(golden_f32)
