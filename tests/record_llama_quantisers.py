"""Records the errors of llama.cpp's quantisers in tests/data/llama_quantisers.json, for tests/test_quantize.py.

Needs llama.cpp's shared libraries, such as those in the package llama-cpp-python, e.g.

    python tests/record_llama_quantisers.py SITE_PACKAGES/llama_cpp/lib --version "llama-cpp-python 0.3.36"

With --compare it writes nothing, and prints for every matrix and type our error relative to llama.cpp's, and the speed
of both on one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from quantiser_matrices import BLOCK_TYPES, RECORD, Matrix, importance, matrices, weighted_rmse
from yivl_edge import quantize

Quantiser = Callable[[Matrix, str, "NDArray[np.float32] | None"], "NDArray[np.uint8]"]


def llama_quantiser(folder: Path) -> Quantiser:
    ggml = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows_and_columns = [ctypes.c_int64] * 3
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *rows_and_columns,
        ctypes.c_void_p,
    ]
    for name in BLOCK_TYPES:
        ggml.ggml_quantize_init(GGMLQuantizationType[name].value)

    def run(array: Matrix, name: str, weight: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        number = GGMLQuantizationType[name]
        block, size = GGML_QUANT_SIZES[number]
        rows, columns = array.shape
        out = np.zeros((rows, columns // block * size), np.uint8)
        pointer = None if weight is None else weight.ctypes.data
        args = (number.value, array.ctypes.data, out.ctypes.data, 0, rows, columns, pointer)
        if ggml.ggml_quantize_chunk(*args) != out.size:
            raise RuntimeError(f"ggml_quantize_chunk did not write {out.size} bytes for {name}")
        return out

    return run


def rmse(run: Quantiser, array: Matrix, name: str, weight: NDArray[np.float32] | None) -> float:
    found = dequantize(run(array, name, weight), GGMLQuantizationType[name])
    return weighted_rmse(found, array, weight)


def errors(run: Quantiser) -> dict[str, dict[str, list[float]]]:
    """Matrix -> type -> errors without and with importance."""
    return {
        matrix: {
            name: [rmse(run, array, name, w) for w in (None, importance(array.shape[1]))]
            for name in BLOCK_TYPES
        }
        for matrix, array in matrices().items()
    }


def million_per_second(run: Quantiser, name: str, weighted: bool, rows: int) -> float:
    array = (0.02 * np.random.default_rng(0).standard_normal((rows, 8192))).astype(np.float32)
    weight = importance(8192) if weighted else None
    run(array[:1], name, weight)
    begin = time.process_time()
    run(array, name, weight)
    return array.size / (time.process_time() - begin) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", default="unknown")
    parser.add_argument("--compare", action="store_true")
    args = parser.parse_args()
    llama = llama_quantiser(args.folder)
    theirs = errors(llama)
    if not args.compare:
        rms = {
            name: float(np.sqrt(np.mean(np.square(m, dtype=np.float64)))) for name, m in matrices().items()
        }
        record = {
            "made by": "tests/record_llama_quantisers.py: ggml_quantize_chunk on the matrices of quantiser_matrices.py",
            "version": args.version,
            "rms of the matrices": rms,
            "rmse without and with importance": theirs,
        }
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return

    def run_ours(array: Matrix, name: str, weight: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        return quantize(array, name, weight, n_threads=1)

    ours = errors(run_ours)

    def ratio(a: float, b: float) -> float:
        return a / b if b > 0 else 1.0 + a  # Q8_0 on weights that were Q8_0 has no error

    for k, title in enumerate(("without importance", "with importance")):
        print(f"our error / llama.cpp's, {title}; million weights per second, ours and llama.cpp's")
        for name in BLOCK_TYPES:
            ratios = [ratio(ours[m][name][k], theirs[m][name][k]) for m in ours]
            speeds = [
                million_per_second(run_ours, name, k == 1, 256),
                million_per_second(llama, name, k == 1, 16),
            ]
            print(f"{name:7}", *(f"{r:7.4f}" for r in ratios), *(f"{s:8.1f}" for s in speeds))


if __name__ == "__main__":
    main()
