"""The emulated AMX tiles themselves (tests/amx_emulator): their arithmetic, and that wrong use does not pass."""

from __future__ import annotations

import os
import subprocess

import pytest

EMULATOR = os.environ.get("YIVL_AMX_EMULATOR")

pytestmark = pytest.mark.skipif(not EMULATOR, reason="needs the AMX emulator: make test-amx runs this")


def tiles(case: str) -> subprocess.CompletedProcess[str]:
    program = f"{EMULATOR}/tests/cpp/amx_tiles"
    return subprocess.run([program, case], capture_output=True, text=True, timeout=60, check=False)


def test_products_are_rounded_as_the_manual_defines() -> None:
    run = tiles("numbers")
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "unconfigured": "tileloadd, tile 0: no tiles are configured",
        "released": "tilestored, tile 0: no tiles are configured",
        "unreleased": "ldtilecfg, tile 0: the tiles in use were not released",
        "reserved": "ldtilecfg, tile 0: a shape that tiles do not have",
        "rows": "ldtilecfg, tile 0: a shape that tiles do not have",
        "bytes": "ldtilecfg, tile 0: a shape that tiles do not have",
        "shapes": "tdpbf16ps, tile 0: shapes do not match",
        "unused": "tileloadd, tile 3: it has no rows",
        "unwritten": "tilestored, tile 0: nothing came into it since it was configured",
        "unread": "tdpbf16ps, tile 2: nothing came into it since it was configured",
    }.items(),
)
def test_wrong_use_ends_the_program(case: str, message: str) -> None:
    run = tiles(case)
    assert run.returncode < 0
    assert run.stderr == f"AMX emulator: {message}\n"


def test_right_use_passes() -> None:
    assert tiles("right").returncode == 0
