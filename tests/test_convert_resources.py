"""How the converter works does not show in the file: slices, threads, and memory whatever the model's size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GOLDEN, write_checkpoint
from gguf import GGUFReader
from gguf_contents import keys
from yivl_edge.convert import convert
from yivl_edge.convert import converter as converter_module


def test_slices_of_a_tensor_do_not_show(
    tmp_path: Path, golden_q8_0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter_module, "_CHUNK", 10_000)
    convert(GOLDEN, tmp_path / "out.gguf")
    sliced, whole = GGUFReader(tmp_path / "out.gguf"), GGUFReader(golden_q8_0)
    assert keys(sliced)["yivl.sha256"] == keys(whole)["yivl.sha256"]
    # The self-test's sums are in another order.
    for name, values in keys(whole).items():
        if name.startswith("yivl.selftest.") and isinstance(np.ravel(values)[0], float):
            np.testing.assert_allclose(keys(sliced)[name], values, atol=1e-4)


@pytest.mark.parametrize("layout", ["single", "pair"])
def test_same_folder_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Whatever the number of threads, of the converter and of numpy's products."""
    monkeypatch.setattr(converter_module, "_CHUNK", 20_000)  # so that there are more pieces than threads
    convert(GOLDEN, tmp_path / "a.gguf", type="q4_k_m", layout=layout)
    command = "import sys, yivl_edge.convert.converter as c; c._CHUNK = 20_000\n"
    command += "from yivl_edge.convert import convert\n"
    command += (
        "convert(sys.argv[1], sys.argv[2], type='q4_k_m', layout=sys.argv[3], n_threads=int(sys.argv[4]))"
    )
    for blas, threads in (("1", "3"), ("3", "1")):
        arguments = [str(GOLDEN), str(tmp_path / "b.gguf"), layout, threads]
        environment = os.environ | dict.fromkeys(
            ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), blas
        )
        subprocess.run([sys.executable, "-c", command, *arguments], env=environment, check=True)
        for half in ("", "-mmproj") if layout == "pair" else ("",):
            assert (tmp_path / f"a{half}.gguf").read_bytes() == (tmp_path / f"b{half}.gguf").read_bytes()


def test_products_stay_on_their_thread() -> None:
    """By the measure of the processor's time that other threads took."""
    code = (
        "import time, numpy as np; from yivl_edge.convert.blas import one_blas_thread\n"
        "x = np.ones((1500, 1500), np.float32); x @ x\n"
        # The threads that shared this product go on looking for work for a while, before they sleep.
        "others = lambda: time.process_time() - time.thread_time()\n"
        "before = -1\n"
        "while (now := others()) - before > 1e-3: before = now; time.sleep(0.05)\n"
        "with one_blas_thread():\n"
        "    mine = time.thread_time()\n"
        "    for _ in range(5): x @ x\n"
        "    print((others() - now) / (time.thread_time() - mine))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(output) < 0.1  # 1 where two threads share the work, 0 and a little where they do not


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, file_format: str) -> None:
    sizes: dict[str, Any] = {"decoder_layers": 1, "vit_layers": 2, "vit_hidden": 32, "vit_mlp": 32}
    formats: dict[str, Any] = {"file_format": file_format, "vit_format": file_format, "shards": 1}
    # Three matrices of 32 MiB each in float32.
    large = write_checkpoint(tmp_path / "large", mlp=1 << 15, dtype="float16", **sizes, **formats)
    small = write_checkpoint(tmp_path / "small", mlp=256, **sizes, **formats)
    code = (
        "import resource, sys; from yivl_edge.convert import convert\n"
        "for folder in sys.argv[2:]:\n"
        "    convert(folder, sys.argv[1], type='f16')\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out.gguf"), str(small), str(large)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    small_peak, large_peak = (int(line) / 1024 for line in output.splitlines())
    # A slice of 2^20 weights takes 10 MiB in its three forms. A PyTorch file's pages count while they are
    # mapped, up to the whole file here (48 MiB).
    assert large_peak - small_peak < (24 if file_format == "safetensors" else 72)
