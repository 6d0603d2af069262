"""The script for the first session with a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from emulated import EMULATOR
from test_random_model import load


def bench(seconds: dict[str, float], read: float) -> dict[str, object]:
    stages = [
        {"stage": s, "median": t, "bytes": 4e9 if s.startswith("decoding") else 0} for s, t in seconds.items()
    ]
    return {"device": "cuda:0 a card", "stages": stages, "ceilings": {"read_bytes_per_second": read}}


def test_goals_are_those_of_the_model() -> None:
    script = load("gpu_check")
    measured = bench({"decoding": 11e-3, "prefill": 200e-3}, 0.42e12)
    rows = script.compare("34b", "q4_k_m", measured)
    assert [(row["model"], row["stage"], row["measured"], row["met"]) for row in rows] == [
        ("34b q4_k_m", "decoding", "87%", True)
    ]
    assert script.TYPES["34b"] == ("q4_k_m",)


@pytest.mark.parametrize(("right", "met"), [(0.976, True), (0.9755, False), (0.982, True), (0.9825, False)])
def test_a_card_answers_as_well_as_the_cpu(right: float, met: bool, tmp_path: Path) -> None:
    script = load("gpu_check")
    on_cpu, on_gpu = tmp_path / "cpu.json", tmp_path / "gpu.json"
    on_cpu.write_text(json.dumps({"demo": 0.979}))
    assert script.compare_accuracy(on_cpu, on_gpu) == []
    on_gpu.write_text(json.dumps({"demo": right}))
    (row,) = script.compare_accuracy(on_cpu, on_gpu)
    assert row["met"] == met
    assert "97.90%" in script.table([row])


def test_goals_are_held_against_what_was_measured() -> None:
    script = load("gpu_check")
    measured = bench(
        {"decoding": 2e-3, "decoding after 4000 tokens": 3e-3, "image encoding": 9e-3, "prefill": 30e-3},
        2.2e12,
    )
    rows = script.compare("6b", "q4_0", measured)
    assert [(row["stage"], row["measured"], row["met"]) for row in rows] == [
        ("decoding", "91%", True),
        ("decoding after 4000 tokens", "61%", False),
        ("image encoding", "9.00 ms", False),
        ("prefill", "30.00 ms", True),
    ]
    text = script.table(rows)
    assert text.count("met") == 2
    assert text.count("missed") == 2
    assert "nothing was measured" in script.table([])


@pytest.mark.skipif(not EMULATOR, reason="needs the emulator's test program")
def test_steps_leave_what_they_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("gpu_check")
    arguments = ["--emulated", "--build", str(EMULATOR), "--work", str(tmp_path), "--size", "demo"]

    def main(*steps: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, *steps])
        return script.main()

    assert main("report") == 1  # nothing yet
    assert main("primitives", "models") == 0
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"demo-q4_0.gguf", "demo-q4_k_m.gguf"}
    (tmp_path / "bench-demo-q4_0.json").write_text(json.dumps(bench({"decoding": 2e-3}, 2.2e12)))
    assert main("report") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"]["primitive-mma_half"]["exit_code"] == 0
    assert [row["met"] for row in report["goals"]] == [True]
    assert "steps that failed: none" in capsys.readouterr().out
