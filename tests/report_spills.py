"""Says which CUDA kernels keep registers in memory or serialise their products, from what nvcc printed with -Xptxas=-v.

python tests/report_spills.py build/cuda/build.log
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
# ptxas found that what is multiplied asynchronously (wgmma) is touched meanwhile: not even a warning of its own.
SERIALISED = re.compile(
    r"wgmma\.mma_async instructions are serialized due to (.*?) in (?:the )?function '(\S+)'"
)
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


def serialised(log: str) -> list[str]:
    """A line for each kernel that waits for each product of four warps: mangled name, why."""
    return [f"{match[2]}: {match[1]}" for match in SERIALISED.finditer(log)]


def main() -> int:
    log = Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace")
    found = [f"registers spilled: {line}" for line in spills(log)]
    found += [f"products serialised: {line}" for line in serialised(log)]
    text = "".join(f"{line}\n" for line in found)
    if shutil.which("c++filt"):
        text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    print(text, end="")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
