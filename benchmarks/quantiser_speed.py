"""How long a whole file takes to quantise: yivl-edge's quantiser beside llama.cpp's, bf16 to q4_k_m.

Example:
    python benchmarks/random_checkpoint.py --size 6b --blocks 2 -o FOLDER
    python benchmarks/quantiser_speed.py FOLDER --llama-python LLAMA/bin/python --json quantiser-speed.json

Both read the same bf16 text model (made here from FOLDER) and write a q4_k_m file on as many threads, until it is on
the disk; they take turns, each time in a process of its own. LLAMA is a virtual environment with llama-cpp-python;
its library does the work of llama.cpp's llama-quantize. Ours makes hashes and the self-test too. Seconds are of the
clock, and in brackets of the processor, which other work on the machine changes less. Tensors' types are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from yivl_edge import _core
from yivl_edge.convert import convert

# What a process runs: source, target and number of threads are its arguments; it prints seconds of clock and processor.
_MEASURE = """
import os, sys, time
source, target, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
{prepare}
clock, processor = time.perf_counter(), time.process_time()
{work}
with open(target, "rb") as file:
    os.fsync(file.fileno())
print(time.perf_counter() - clock, time.process_time() - processor)
"""
_OURS = _MEASURE.format(
    prepare="from yivl_edge.convert import convert; import yivl_edge.convert.converter",
    work="convert(source, target, type='q4_k_m', n_threads=threads)",
)
_THEIRS = _MEASURE.format(
    prepare="""
import llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.nthread, options.ftype = threads, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
options.allow_requantize = True
""",
    work="assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), options) == 0",
)


@dataclass(frozen=True)
class Run:
    """One file quantised."""

    seconds: float
    processor_seconds: float


def measure(python: str, code: str, source: Path, target: Path, threads: int) -> Run:
    """Quantise in a process of its own."""
    command = [python, "-c", code, str(source), str(target), str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Run(*(float(word) for word in output.split()[-2:]))


def tensor_types(path: Path) -> dict[str, str]:
    """Type by tensor."""
    return {tensor.name: tensor.type for tensor in _core.GgufFile.open(path).tensors}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a published layout")
    parser.add_argument("--llama-python", required=True, metavar="PYTHON", help="has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=_core.default_thread_count(), metavar="N")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each (default: 3)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for the files (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")
    args = parser.parse_args(arguments)

    programs = {"yivl-edge": (sys.executable, _OURS), "llama.cpp": (args.llama_python, _THEIRS)}
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        source = convert(args.folder, work / "bf16.gguf", type="bf16", layout="pair").files[0]
        weights = sum(tensor.nbytes for tensor in _core.GgufFile.open(source).tensors) / 2
        types = {}
        for number in range(args.runs):
            for program, (python, code) in programs.items():
                target = work / f"{program}.gguf"
                target.unlink(missing_ok=True)
                runs[program].append(measure(python, code, source, target, args.threads))
                types[program] = tensor_types(target)
                print(
                    f"run {number + 1}, {program}: {runs[program][-1].seconds:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
        read = source.stat().st_size

    medians = {
        program: Run(
            *(
                statistics.median(getattr(run, kind) for run in found)
                for kind in ("seconds", "processor_seconds")
            )
        )
        for program, found in runs.items()
    }
    ours, theirs = medians["yivl-edge"], medians["llama.cpp"]
    print(
        f"{read / 1e9:.2f} GB of bf16 to q4_k_m, {args.threads} threads, median of {args.runs} (each run)\n"
    )
    print("| | seconds | M weights/s | each run: clock (processor) |\n|---|---|---|---|")
    for program, median in medians.items():
        each = ", ".join(f"{run.seconds:.1f} ({run.processor_seconds:.1f})" for run in runs[program])
        print(f"| {program} | {median.seconds:.1f} | {weights / median.seconds / 1e6:.1f} | {each} |")
    print(f"\n{theirs.seconds / ours.seconds:.2f} times as fast by the clock, ", end="")
    print(f"{theirs.processor_seconds / ours.processor_seconds:.2f} by the processor; types ", end="")
    print("are the same" if types["yivl-edge"] == types["llama.cpp"] else "DIFFER")
    if args.json is not None:
        figures = {
            "bytes_read": read,
            "threads": args.threads,
            "processors": os.cpu_count(),
            "runs": {program: [asdict(run) for run in found] for program, found in runs.items()},
            "same_types": types["yivl-edge"] == types["llama.cpp"],
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
