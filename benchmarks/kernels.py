"""Time the CPU kernels one by one, beside what the machine can do at most.

Example:
    python benchmarks/kernels.py --threads 2 --json kernels.json

Ceilings are measured in the same run: multiply-adds on registers, and reading memory. Each figure is the median of
several runs and comes with its share of the ceiling that bounds it. With --threads 1 the clock is the thread's own
CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from yivl_edge import _core
from yivl_edge.measure import machine_name, measure_ceilings

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Where blocks keep their half-precision scales.
_SCALES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"]
_LEAST_FOR_TILES = 16  # tokens whose attention AMX computes in bfloat16


@dataclass
class Result:
    """One line of the table."""

    name: str
    seconds: float  # median
    spread: float  # (slowest - fastest) / median
    tflops: float
    gigabytes_per_second: float  # of weights, or of keys and values
    share: float  # of the ceiling named by `bound`
    bound: str  # "arithmetic" or "memory"


def random_weights(name: str, rows: int, cols: int) -> Bytes:
    """Bytes of a (rows, cols) matrix of a GGUF type, values of ordinary size."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, cols), dtype=np.float32)
    if name == "F32":
        block = values.view(np.uint8)
    elif name == "F16":
        block = values.astype(np.float16).view(np.uint8)
    elif name == "BF16":
        block = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        block = rng.integers(0, 256, (64 * cols // weights, size), dtype=np.uint8)
        for offset in _SCALES[name]:
            scales = rng.uniform(0.001, 0.01, len(block)).astype(np.float16)
            block[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return np.resize(block.reshape(-1), block.size * rows // 64)


class Benchmark:
    """Runs operations with the instruction set in use and collects results."""

    def __init__(self, threads: int, repeats: int) -> None:
        self.isa = _core.isa_name()
        self.ops = _core.KernelOps(self.isa, threads)
        self.threads = self.ops.n_threads
        self.repeats = repeats
        self.clock = time.thread_time if self.threads == 1 else time.perf_counter
        self.results: list[Result] = []
        self.ceilings = measure_ceilings(self.threads, self.clock)
        machine = _core.Ceilings(self.isa, self.threads)
        # Seconds that the threads take to begin and end an operation together, with the call from Python.
        self.barrier = statistics.median(self._measure(lambda: machine.multiply_add(1), 10_000))

    def _measure(self, run: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs, after one to warm up."""
        run()
        seconds = []
        for _ in range(repeats):
            start = self.clock()
            run()
            seconds.append(self.clock() - start)
        return seconds

    def _add(self, name: str, seconds: list[float], operations: float, moved: float, unit: str) -> None:
        median = statistics.median(seconds)
        shares = {
            "arithmetic": operations / median / self.ceilings.per_second(unit),
            "memory": moved / median / self.ceilings.read_bytes_per_second,
        }
        bound = max(shares, key=lambda key: shares[key])
        spread = (max(seconds) - min(seconds)) / median
        tflops, rate = operations / median / 1e12, moved / median / 1e9
        self.results.append(Result(name, median, spread, tflops, rate, shares[bound], bound))

    def _unit(self, name: str) -> str:
        """The unit that computes a product with such weights, as the ceilings name it."""
        return self.ceilings.packed_unit if _core.Ceilings(self.isa, 1).packs(name) else "float32"

    def prefill(self, name: str, tokens: int, cols: int, rows: int) -> None:
        """Time a matrix product for many tokens."""
        weights = random_weights(name, rows, cols)
        x = np.random.default_rng(1).standard_normal((tokens, cols), dtype=np.float32)
        y = np.zeros((tokens, rows), np.float32)
        kind = GGMLQuantizationType[name].value
        seconds = self._measure(lambda: self.ops.linear(y, x, weights, kind), self.repeats)
        label = f"linear {name}, {tokens} x {cols} x {rows}"
        self._add(label, seconds, 2.0 * tokens * cols * rows, weights.nbytes, self._unit(name))

    def decode(self, name: str, cols: int, megabytes: int) -> None:
        """Time one token against weights that no cache holds."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        rows = max((megabytes << 20) // (cols // block * size) // 64 * 64, 64)
        weights = random_weights(name, rows, cols)
        x = np.random.default_rng(1).standard_normal((1, cols), dtype=np.float32)
        y = np.zeros((1, rows), np.float32)
        kind = GGMLQuantizationType[name].value
        seconds = self._measure(lambda: self.ops.linear(y, x, weights, kind), self.repeats)
        operations = 2.0 * cols * rows
        self._add(f"linear {name}, 1 token", seconds, operations, weights.nbytes, self._unit(name))

    def attention(
        self, name: str, tokens: int, keys: int, heads: int, kv_heads: int, head_dim: int, causal: bool
    ) -> None:
        """Time attention amid rounded weights; a causal one counts only the pairs that see each other."""
        rng = np.random.default_rng(1)
        q = rng.standard_normal((tokens, heads * head_dim), dtype=np.float32)
        k = rng.standard_normal((keys, kv_heads * head_dim), dtype=np.float32)
        out = np.zeros_like(q)
        pairs = tokens * keys - (tokens * (tokens - 1) / 2 if causal else 0)
        seconds = self._measure(
            lambda: self.ops.attention(out, q, k, k, heads, kv_heads, causal, rounded=True), self.repeats
        )
        operations = 4.0 * pairs * heads * head_dim
        unit = "bfloat16" if self.isa == "amx" and tokens >= _LEAST_FOR_TILES else "float32"
        self._add(f"attention, {name}", seconds, operations, 2.0 * k.nbytes, unit)

    def print(self) -> None:
        """Print ceilings and results as a table."""
        print(f"{machine_name()}; {self.isa}, {self.threads} threads")
        print(f"at most {self.ceilings}; a barrier takes {self.barrier * 1e6:.1f} us")
        print(f"{'':34}{'ms':>10}{'spread':>8}{'TFLOP/s':>9}{'GB/s':>7}{'share':>7}")
        for r in self.results:
            figures = f"{r.seconds * 1e3:10.2f}{r.spread:8.0%}{r.tflops:9.3f}{r.gigabytes_per_second:7.1f}"
            print(f"{r.name:34}{figures}{r.share:7.0%} of {r.bound}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description="Time the CPU kernels beside the machine's ceilings.",
        epilog="example: python benchmarks/kernels.py --threads 2 --json kernels.json",
    )
    parser.add_argument("--isa", default="", help="instruction set (default: the best of this CPU)")
    parser.add_argument("--threads", type=int, default=0, help="threads (default: physical cores)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each (default 7)")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="tokens of the large products (default 1024)"
    )
    parser.add_argument(
        "--megabytes", type=int, default=512, help="weights read per single token (default 512)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there, too")
    args = parser.parse_args()

    if args.isa:
        os.environ["YIVL_ISA"] = args.isa
    bench = Benchmark(args.threads, args.repeats)
    for name in _TYPES:
        bench.prefill(name, args.tokens, 4096, 4096)
    for cols, rows in ((1280, 1280), (1280, 5120), (5120, 1280)):
        bench.prefill("F16", 1025, cols, rows)
    for name in _TYPES:
        bench.decode(name, 4096, args.megabytes)
    bench.attention("image encoder", 1025, 1025, 16, 16, 80, causal=False)
    bench.attention("prefill", 1075, 1075, 32, 4, 128, causal=True)
    bench.attention("1 token of 4000", 1, 4000, 32, 4, 128, causal=True)
    bench.print()
    if args.json:
        report = {
            "isa": bench.isa,
            "threads": bench.threads,
            "machine": machine_name(),
            "ceilings": asdict(bench.ceilings),
            "barrier": bench.barrier,
            "results": [asdict(result) for result in bench.results],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
