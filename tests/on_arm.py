"""What test_arm.py compares: computed there on this machine, and by this program on an emulated CPU.

python on_arm.py products RESULTS.npz
python on_arm.py logits RESULTS.npz ISA,ISA IMAGE MODEL...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from test_kernels import INTEGER_TYPES, normal, random_weights
from yivl_edge import Model, _core

QUESTION = "What is this? 这是什么？"


def products(isa: str) -> dict[str, np.ndarray]:
    """Of each weight type that is multiplied in integers, with one token and with many."""
    ops = _core.KernelOps(isa, 1)
    results = {}
    for name in INTEGER_TYPES:
        qtype = GGMLQuantizationType[name]
        data, _ = random_weights(qtype, 37, 1280, 4)
        for tokens in (1, 19):
            y = np.zeros((tokens, 37), np.float32)
            ops.linear(y, normal(5, tokens, 1280), data.reshape(-1), qtype.value)
            results[f"{name}-{tokens}"] = y
    return results


def logits(isas: str, image: str, *models: str) -> dict[str, np.ndarray]:
    """Of every model on every instruction set."""
    results = {}
    for isa in isas.split(","):
        os.environ["YIVL_ISA"] = isa
        results |= {f"{isa} {Path(path).stem}": Model(path).logits(image, QUESTION) for path in models}
    return results


if __name__ == "__main__":
    what, target, *arguments = sys.argv[1:]
    np.savez(target, **(products("neon") if what == "products" else logits(*arguments)))
