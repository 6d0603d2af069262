#!/usr/bin/env bash
# The sdist holds the checkout and nothing else and builds the wheel; the wheel needs numpy and pillow only, and its import
# is light.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

.venv/bin/python -m pip install --quiet build
.venv/bin/python -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
tar tzf "$work"/dist/*.tar.gz | cut -d/ -f2- | grep -vx PKG-INFO | LC_ALL=C sort >"$work/sdist"
git ls-files --cached --others --exclude-standard | LC_ALL=C sort | diff - "$work/sdist" ||
  { echo "error: the sdist (>) differs from the checkout (<)" >&2; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/pip" list --format=freeze | cut -d= -f1 | sort | tr '\n' ' '
"$work/venv/bin/python" - <<'PYTHON'
import subprocess, sys


def loaded(importing: str) -> set[str]:
    command = [sys.executable, "-c", f"import sys{importing}; print(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


modules = loaded(", yivl_edge") - loaded("")
allowed = {"numpy", "PIL", "yivl_edge"} | sys.stdlib_module_names
foreign = {module.split(".")[0] for module in modules} - allowed
assert not foreign, f"import yivl_edge imports {foreign}"
late = [m for m in modules if m.startswith(("yivl_edge.convert", "yivl_edge.cli"))]
assert not late, f"import yivl_edge imports {late}"

import resource


def processor_seconds() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import yivl_edge"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


print(f"import yivl_edge: {min(processor_seconds() for _ in range(3)):.2f} s of the processor")

import importlib.metadata as metadata

needs = [r for r in metadata.requires("yivl-edge") if "extra ==" not in r]
assert sorted(r.split(">")[0] for r in needs) == ["numpy", "pillow"], needs
print("wheel: needs", needs)
PYTHON
"$work/venv/bin/yivl-edge" --version
