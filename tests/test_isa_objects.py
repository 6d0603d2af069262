"""Code compiled for one instruction set must not leak: the linker could keep it for CPUs that lack it."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / "build"


def folder_of_module() -> Path | None:
    """Of the most recent build of the Python module; builds of test programs may carry sanitizers."""
    modules = [path for path in BUILD.glob("*/_core*.so") if path.parent.name != "amx"]
    modules.sort(key=lambda path: path.stat().st_mtime)
    return modules[-1].parent if modules else None


# Where objects are, the program that lists their symbols, and for which machine they are.
BUILDS = {
    "this machine": (folder_of_module(), "nm", platform.machine()),
    "make test-amx": (BUILD / "amx", "nm", platform.machine()),
    "make test-neon": (BUILD / "aarch64" / "cmake", "aarch64-linux-gnu-nm", "aarch64"),
}
ALWAYS = {"kernels_portable.cpp.o"}
BY_MACHINE = {
    "x86_64": {"kernels_avx2.cpp.o", "kernels_avx512.cpp.o", "kernels_amx.cpp.o"},
    "aarch64": {"kernels_neon.cpp.o"},
}


def symbols(path: Path, nm: str) -> dict[str, str]:
    """Symbol -> nm's letter, of symbols that the linker sees from outside the object."""
    listed = subprocess.run([nm, "--extern-only", path], capture_output=True, text=True, check=True)
    return {line.split()[-1]: line.split()[-2] for line in listed.stdout.splitlines()}


@pytest.mark.parametrize("build", BUILDS)
def test_each_instruction_set_exports_tables_and_nothing_weak(build: str) -> None:
    folder, nm, machine = BUILDS[build]
    if shutil.which(nm) is None:
        pytest.skip(f"no {nm} on this machine")
    objects = (
        [] if folder is None else [*folder.glob("**/csrc/cpu/kernels_*.o"), *folder.glob("**/quantizers_*.o")]
    )
    if not objects:
        pytest.skip("no objects: nothing was built in this checkout")
    exporting = set()
    for path in objects:
        found = symbols(path, nm)
        assert set(found.values()) <= {"U", "D", "R"}, path.name
        defined = {name for name, letter in found.items() if letter != "U"}
        assert all(name.endswith(("KernelsE", "QuantizersE")) for name in defined), f"{path.name}: {defined}"
        if defined:
            exporting.add(path.name)
    # The objects of other machines' instruction sets are empty.
    assert exporting >= ALWAYS | BY_MACHINE.get(machine, set())
