"""The fuzz target on a few thousand inputs; tests/cpp/run_fuzz.sh runs all 200,000."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = "#include <sanitizer/common_interface_defs.h>\nint main() {}\n"


def has_sanitizers(folder: Path) -> bool:
    (folder / "probe.cpp").write_text(PROBE)
    compiler = shutil.which("c++")
    if compiler is None or shutil.which("cmake") is None:
        return False
    command = [compiler, "-fsanitize=address,undefined", "probe.cpp", "-o", "probe"]
    built = subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    return built and subprocess.run([folder / "probe"], capture_output=True, check=False).returncode == 0


def test_damaged_files_are_read_or_refused_under_the_sanitizers(tmp_path: Path) -> None:
    if not has_sanitizers(tmp_path):
        pytest.skip("needs CMake and a compiler with AddressSanitizer and UBSan")
    run = subprocess.run(
        [ROOT / "tests/cpp/run_fuzz.sh", "5000"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5000 inputs" in run.stdout
