"""Code compiled for one instruction set must not leak: the linker could keep it for CPUs that lack it."""

import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / "build"


def kernel_objects() -> list[Path]:
    """The objects of the most recent build of the Python module; builds of test programs may carry sanitizers."""
    modules = sorted(BUILD.glob("*/_core*.so"), key=lambda path: path.stat().st_mtime)
    if not modules:
        return []
    core = modules[-1].parent
    return sorted([*core.glob("**/csrc/cpu/kernels_*.o"), *core.glob("**/csrc/quantize/quantizers_*.o")])


def symbols(path: Path) -> dict[str, str]:
    """Symbol -> nm's letter, of symbols that the linker sees from outside the object."""
    listed = subprocess.run(["nm", "--extern-only", path], capture_output=True, text=True, check=True)
    return {line.split()[-1]: line.split()[-2] for line in listed.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on this machine")
@pytest.mark.skipif(not kernel_objects(), reason="no objects: the package was not built in this checkout")
def test_each_instruction_set_exports_tables_and_nothing_weak() -> None:
    for path in kernel_objects():
        defined = {name for name, letter in symbols(path).items() if letter != "U"}
        assert defined, path.name
        assert all(name.endswith(("KernelsE", "QuantizersE")) for name in defined), f"{path.name}: {defined}"
        assert set(symbols(path).values()) <= {"U", "D", "R"}, path.name
