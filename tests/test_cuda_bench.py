"""``yivl-edge bench`` on a GPU: the same stages, and kernel by kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emulated import EMULATOR
from test_cuda_split import plan, set_free_memory
from yivl_edge import Model
from yivl_edge.cli import main
from yivl_edge.measure import device_ceilings

pytestmark = pytest.mark.skipif(not EMULATOR, reason="make test-cuda-emulator runs this")

QUICK = ["--device", "cuda", "--prompt-tokens", "40", "--generate", "3", "--runs", "1", "--threads", "1"]


def test_bench_reports_the_stages_and_the_kernels(
    golden_q4_0: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", str(golden_q4_0), *QUICK, "--profile", "--json", str(out)]) == 0
    table = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["device"].startswith("cuda:0 ")
    assert result["gpu_layers"] == 3
    assert result["ceilings"]["packed_unit"] == "float16"
    rates = ("read_bytes_per_second", "float_per_second", "packed_per_second")
    assert all(result["ceilings"][rate] > 0 for rate in rates)
    assert "GB/s copied" in table
    assert "these figures say nothing" in table
    stages = {row["stage"]: row for row in result["stages"]}
    assert len(stages) == 5
    assert stages["prefill"]["unit"] == "float16"

    kernels = {stage: {k["name"]: k for k in found} for stage, found in result["profile"].items()}
    assert list(kernels) == ["image encoding", "prefill", "decoding"]
    for stage, found in kernels.items():
        assert f"kernels of {stage}" in table
        assert all(k["seconds"] > 0 and k["calls"] > 0 for k in found.values())
    # Two of attention's products and one of the MLP's for each of 3 layers, three times; and the head, with F16 weights
    # or not.
    decoding = kernels["decoding"]
    assert decoding["gated_matvec"]["calls"] == 3 * 3
    assert decoding["split_attention"]["calls"] == 3 * 3
    # 768 rows of gate and up with 256 columns at 18 bytes for 32 weights; x and the result.
    read = 2 * 768 * 256 * 18 // 32 + 256 * 4 + 2 * 768 * 4
    assert decoding["gated_matvec"]["bytes"] == 9 * read
    assert decoding["gated_matvec"]["flop"] == 9 * 2 * 2 * 768 * 256
    # The work of the prefill's kernels is what the stage says; the last layer's are those of a single row.
    prefill = kernels["prefill"]
    products = sum(prefill[name]["flop"] for name in ("gemm", "gated_gemm", "matvec", "gated_matvec"))
    attention = prefill["flash"]["flop"] + prefill["split_attention"]["flop"]
    assert products + attention == pytest.approx(stages["prefill"]["flop"], rel=0.01)


def test_every_run_of_bench_has_the_card_to_itself(
    golden_q4_0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_memory(monkeypatch, plan(golden_q4_0).on_device(3))
    out = tmp_path / "bench.json"
    assert main(["bench", str(golden_q4_0), *QUICK, "--runs", "2", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["gpu_layers"] == 3


def test_ceilings_are_measured_where_a_model_fills_the_card(
    golden_q4_0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(golden_q4_0, device="cuda")
    set_free_memory(monkeypatch, 300_000)  # for two times an eighth of what is copied elsewhere
    assert device_ceilings(model).read_bytes_per_second > 0
    set_free_memory(monkeypatch, 200_000)
    with pytest.raises(MemoryError, match="cannot allocate"):
        device_ceilings(model)


def test_bench_says_which_layers_the_gpu_runs(golden_q4_0: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(golden_q4_0), *QUICK, "--gpu-layers", "1"]) == 0
    assert "with 1 of 3 layers, 1 threads with the others" in capsys.readouterr().out
