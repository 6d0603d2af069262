"""Runs in llama-cpp-python's environment: logits of token ids, and the types that llama.cpp's quantiser chooses.

python llama_logits.py logits TEXT.gguf IDS.json OUT.npy ARITHMETIC
python llama_logits.py quantize IN.gguf OUT.gguf PRESET
python llama_logits.py version
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np

PRESETS = {"q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_k_s": 14, "q4_0": 2}
PRESETS |= {"iq4_xs": 30, "q3_k_m": 12, "q2_k": 10}


F32 = 0  # ggml's number
BLAS_ROWS = 32  # of which ggml's BLAS backend takes a product, see its supports_op


def has_blas() -> bool:
    """Whether llama.cpp was built with a BLAS library."""
    find = llama_cpp.llama_cpp._lib.ggml_backend_dev_by_name
    find.restype = ctypes.c_void_p
    return find(b"BLAS") is not None


def logits(path: str, ids_path: str, out: str, arithmetic: str) -> None:
    """Write float32 (T, V).

    Of the two kinds of arithmetic, "float" widens weights and computes in float32, which llama.cpp does through BLAS
    for batches of 32 tokens and more, with keys and values in float32. "cpu" is what it does without BLAS: activations
    rounded to 8 bits in products with 8-bit weights, and to 16 with 16-bit ones; keys and values of 16 bits.
    """
    with open(ids_path, encoding="utf-8") as file:
        ids = json.load(file)
    options = {"n_ubatch": BLAS_ROWS // 2}
    if arithmetic == "float":
        if len(ids) < BLAS_ROWS or not has_blas():
            raise SystemExit("float32 arithmetic needs 32 tokens, and llama.cpp built with BLAS")
        options = {"n_ubatch": len(ids), "type_k": F32, "type_v": F32}
        # Weights in an order of the CPU's own are nothing that BLAS could read.
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        llama_cpp.llama_cpp.llama_model_default_params = lambda: params
    llama = llama_cpp.Llama(
        path, n_ctx=len(ids), n_batch=len(ids), n_threads=2, logits_all=True, verbose=False, **options
    )
    llama.eval(ids)
    np.save(out, np.asarray(llama.scores[: len(ids)], np.float32))


def quantize(source: str, target: str, preset: str) -> None:
    """Quantise a file by a preset."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = PRESETS[preset]
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if code:
        raise SystemExit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    commands = {"logits": logits, "quantize": quantize, "version": lambda: None}
    commands[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"llama_cpp_python": llama_cpp.__version__, "blas": has_blas()}))
