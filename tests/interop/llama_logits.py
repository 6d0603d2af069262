"""Runs in llama-cpp-python's environment: logits of token ids, and the types that llama.cpp's quantiser chooses.

python llama_logits.py logits TEXT.gguf IDS.json OUT.npy
python llama_logits.py quantize IN.gguf OUT.gguf PRESET
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np

PRESETS = {"q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_k_s": 14, "q4_0": 2}
PRESETS |= {"iq4_xs": 30, "q3_k_m": 12, "q2_k": 10}


def logits(path: str, ids_path: str, out: str) -> None:
    """Write float32 (T, V)."""
    with open(ids_path, encoding="utf-8") as file:
        ids = json.load(file)
    llama = llama_cpp.Llama(
        path, n_ctx=len(ids), n_batch=len(ids), n_threads=2, logits_all=True, verbose=False
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
    {"logits": logits, "quantize": quantize}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"llama_cpp_python": llama_cpp.__version__}))
