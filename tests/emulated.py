"""Puts the native module of a build with an emulated CUDA device (docs/cuda.md) in the place of the package's.

To be imported before yivl_edge. Any other build of the native module does as well.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# The folder of the build; None without one.
EMULATOR = os.environ.get("YIVL_CUDA_EMULATOR")

if EMULATOR and "yivl_edge._core" not in sys.modules:
    spec = importlib.util.spec_from_file_location("yivl_edge._core", next(Path(EMULATOR).glob("_core*.so")))
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    sys.modules["yivl_edge._core"] = core


def missing_device() -> str:
    """Why no CUDA device can be used; empty if one can. An error where YIVL_TEST_NEEDS_DEVICE says that one must."""
    from yivl_edge import DeviceError, _core

    try:
        _core.cuda_device()
    except DeviceError as error:
        if os.environ.get("YIVL_TEST_NEEDS_DEVICE"):
            raise
        return str(error)
    return ""
