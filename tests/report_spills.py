"""Says which CUDA kernels keep registers in memory, from what nvcc printed with -Xptxas=-v.

python tests/report_spills.py build/cuda/build.log
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads$")


def spills(log: str) -> list[str]:
    """A line for each kernel and architecture that spills: mangled name, architecture, bytes."""
    found: list[str] = []
    kernel = ""
    for line in log.splitlines():
        if match := KERNEL.search(line):
            kernel = f"{match[1]} on {match[2]}"
        # ptxas also names the bytes in a warning, before it says which kernel and architecture it is at.
        elif kernel and (match := SPILLS.search(line)):
            if match[0] != "0 bytes spill stores, 0 bytes spill loads":
                found.append(f"{kernel}: {match[0]}")
            kernel = ""
    return found


def main() -> int:
    found = spills(Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace"))
    text = "".join(f"registers spilled: {line}\n" for line in found)
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    print(text, end="")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
