"""Writes the fuzz corpus, the .gguf files beside this script.

PYTHONPATH=tests python tests/data/fuzz/make_corpus.py
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
from gguf_bytes import Kind, array, build, key, scalar, tensor
from tiny_models import write_gguf, write_pair, write_single
from weight_types import ALL_TYPES


def every_value_type() -> bytes:
    integers = [Kind.U8, Kind.I8, Kind.U16, Kind.I16, Kind.U32, Kind.I32, Kind.U64, Kind.I64]
    keys = [key(f"scalar.{kind.name}", scalar(kind, 7)) for kind in integers]
    keys += [key(f"scalar.{kind.name}", scalar(kind, 0.5)) for kind in (Kind.F32, Kind.F64)]
    keys += [key("scalar.BOOL", scalar(Kind.BOOL, 1)), key("scalar.STRING", scalar(Kind.STRING, "héllo"))]
    keys += [key("nan", scalar(Kind.F32, math.nan)), key("empty", scalar(Kind.STRING, ""))]
    keys += [key(f"array.{kind.name}", array(kind, [1, 2, 3])) for kind in integers]
    keys += [key(f"array.{kind.name}", array(kind, [0.5, math.inf])) for kind in (Kind.F32, Kind.F64)]
    keys += [key("array.BOOL", array(Kind.BOOL, [1, 0])), key("array.STRING", array(Kind.STRING, ["", "你"]))]
    keys += [key(f"empty.{kind.name}", array(kind, [])) for kind in Kind if kind != Kind.ARRAY]
    return build(keys)


def main() -> None:
    folder = Path(__file__).parent
    write_single(folder / "single.gguf")
    write_pair(folder / "text.gguf", folder / "mmproj.gguf")
    (folder / "values.gguf").write_bytes(every_value_type())

    rng = np.random.default_rng(0)
    tensors = {}
    for kind in ALL_TYPES:
        values = rng.integers(0, 256, (2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        tensors[kind.name] = (
            values.view({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)),
            kind.name,
        )
    write_gguf(folder / "types.gguf", {}, tensors)

    alignment = [key("general.alignment", scalar(Kind.U32, 64))]
    entries = [tensor("b", [2, 1, 2], 0, 64), tensor("a", [3, 1, 1, 2], 1, 0)]
    version2 = build(alignment, entries, bytes(80), version=2, alignment=64)
    (folder / "version2.gguf").write_bytes(version2)


if __name__ == "__main__":
    main()
