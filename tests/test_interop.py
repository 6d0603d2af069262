"""Files in llama.cpp itself: run with `make test-interop`, which builds llama-cpp-python in an environment of its own.

`tests/data/interop.json` records the last run. Text only: for pictures llama.cpp computes something else than the
reference (README).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN, write_checkpoint
from closeness import relative_l2
from gguf import GGMLQuantizationType, GGUFReader
from twin import Twin
from weight_types import rewrite
from yivl_edge import Model, data
from yivl_edge.convert import convert

RECORD = Path(__file__).parent / "data" / "interop.json"
PRESETS = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q3_k_m", "q2_k")
PYTHON = os.environ.get("YIVL_INTEROP_PYTHON")
QUESTION = "What is in the picture? 图中有什么？"
TOLERANCE = 1e-2
# From float32 arithmetic on the same weights: ours, whose sums have another order, and which in products with 8-bit
# weights rounds activations to 15 bits; the golden model's random weights make some ten times more of that than a
# trained model's.
OURS_TO_FLOAT32 = {"f16": 1e-4, "q8_0": 5e-4}
# llama.cpp's, through BLAS: so near that it is float32 arithmetic too.
THEIRS_TO_FLOAT32 = 1e-4
# What llama.cpp computes without BLAS. It rounds activations to 8 bits in products with 8-bit weights, and with the
# golden model's random weights is by that much further from float32 arithmetic than a hundredth: its doing, not ours.
CPU_TOLERANCE = {("golden", "q8_0"): 5e-2}

needs_llama = pytest.mark.skipif(not PYTHON, reason="llama-cpp-python is not asked for: make test-interop")


def run(*arguments: str | Path) -> dict[str, Any]:
    assert PYTHON is not None
    script = Path(__file__).parent / "interop" / "llama_logits.py"
    result = subprocess.run([PYTHON, script, *arguments], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def has_blas() -> bool:
    return bool(run("version")["blas"])


def record(name: str, value: Any) -> None:
    found = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(found | {name: value}, indent=1, sort_keys=True) + "\n")


def demo_text(folder: Path, type_name: str) -> Path:
    """The text half of the model in the package: its single file holds more tensors than llama.cpp allows."""
    text = rewrite(
        data.MODEL,
        folder / "demo-f32.gguf",
        keys=lambda keys: {
            name: value for name, value in keys.items() if not name.startswith(("clip.", "yivl."))
        },
        tensor=lambda name, values: (
            None if name.startswith(("v.", "mm.")) else (name, values, GGMLQuantizationType.F32)
        ),
    )
    convert(text, folder / "demo.gguf", type=type_name)
    return folder / "demo.gguf"


@needs_llama
@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
@pytest.mark.parametrize("model_name", ["golden", "demo"])
def test_text_logits_agree_with_llama_cpp(tmp_path: Path, model_name: str, type_name: str) -> None:
    if model_name == "golden":
        convert(GOLDEN, tmp_path / "golden.gguf", type=type_name, layout="pair")
        path = tmp_path / "golden.gguf"
    else:
        path = demo_text(tmp_path, type_name)
    model = Model(path)
    ids = model.prompt_ids(QUESTION, image=False)
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    ours, exact = model.logits(None, QUESTION), Twin(path).logits(ids)
    assert relative_l2(ours, exact) <= OURS_TO_FLOAT32[type_name]

    def compare(arithmetic: str) -> dict[str, float]:
        version = run("logits", path, tmp_path / "ids.json", tmp_path / "logits.npy", arithmetic)
        theirs = np.load(tmp_path / "logits.npy")
        assert ours.shape == theirs.shape
        figures = {
            "relative_l2": relative_l2(ours, theirs),
            "ours_to_float32": relative_l2(ours, exact),
            "theirs_to_float32": relative_l2(theirs, exact),
        }
        rounded = {n: round(x, 7) for n, x in figures.items()}
        record(f"logits, {model_name}, {type_name}, {arithmetic}", {"tokens": len(ids)} | rounded | version)
        return figures

    assert compare("cpu")["relative_l2"] <= CPU_TOLERANCE.get((model_name, type_name), TOLERANCE)
    if not has_blas():
        pytest.skip("llama.cpp was built without BLAS: compared with its 8-bit activations only")
    figures = compare("float")
    assert figures["theirs_to_float32"] <= THEIRS_TO_FLOAT32
    assert figures["relative_l2"] <= TOLERANCE


@needs_llama
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_choose_llama_cpps_types(tmp_path: Path, preset: str) -> None:
    # 16 blocks, so that every rule of the mixes shows; 8 heads to a KV head, as in Yi-VL-6B.
    sizes = {"decoder_layers": 16, "heads": 8, "kv_heads": 1, "head_dim": 64, "mlp": 256}
    folder = write_checkpoint(
        tmp_path / "folder", vit_layers=2, vit_hidden=64, vit_heads=1, vit_mlp=64, **sizes
    )
    convert(folder, tmp_path / "f32.gguf", type="f32", layout="pair")
    version = run("quantize", tmp_path / "f32.gguf", tmp_path / "theirs.gguf", preset)
    convert(tmp_path / "f32.gguf", tmp_path / "ours.gguf", type=preset)
    theirs, ours = (
        {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / name).tensors}
        for name in ("theirs.gguf", "ours.gguf")
    )
    assert ours == theirs
    record(f"types, {preset}", {"tensors": len(ours), "same": True, **version})


def test_record_of_the_last_run_is_complete_and_good() -> None:
    found = json.loads(RECORD.read_text())
    for model_name in ("golden", "demo"):
        for type_name in ("f16", "q8_0"):
            cpu, floats = (found.pop(f"logits, {model_name}, {type_name}, {a}") for a in ("cpu", "float"))
            assert cpu["relative_l2"] <= CPU_TOLERANCE.get((model_name, type_name), TOLERANCE)
            assert floats["relative_l2"] <= TOLERANCE
            assert floats["theirs_to_float32"] <= THEIRS_TO_FLOAT32
            assert floats["ours_to_float32"] <= OURS_TO_FLOAT32[type_name]
            assert floats["blas"]
    assert set(found) == {f"types, {preset}" for preset in PRESETS}
    assert all(figures["same"] and figures["tensors"] == 147 for figures in found.values())
