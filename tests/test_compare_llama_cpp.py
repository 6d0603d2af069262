"""The comparison with llama.cpp: how that is built, how both are measured, what the table says; without llama.cpp."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from yivl_edge import _core

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "avx2" not in _core.available_isas(), reason="for Linux on x86-64 with AVX2"
)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# Stands for llama_cpp_worker.py: answers at once, with times that the test knows.
STAND_IN = """
import sys
sys.path.insert(0, {benchmarks!r})
from worker import serve
serve({{
    "about": lambda: {{"version": "0.3.36", "system_info": {info!r}}},
    "open": lambda **_: 3.0,
    "warm_up": lambda **_: None,
    "answer": lambda **_: {{"image": 10.0, "prefill": 40.0, "first_token": 51.0, "tokens": {tokens}}},
    "decode": lambda context, tokens, runs: [2.0] * runs,
    "peak": lambda: 5_000_000_000,
}})
"""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare_llama_cpp

    return compare_llama_cpp


@pytest.fixture
def worker_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import worker

    return worker


def stand_in(folder: Path, *, info: str = "AVX2 = 1 | FMA = 1", tokens: int = 113) -> Path:
    """An environment whose python answers whatever script it is given as above."""
    (folder / "bin").mkdir(parents=True)
    script = folder / "stand_in.py"
    script.write_text(STAND_IN.format(benchmarks=str(BENCHMARKS), info=info, tokens=tokens))
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))}\n")
    python.chmod(0o755)
    return folder


def run(compare: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, Any]:
    arguments = ["--isa", "avx2", "--size", "demo", "--threads", "1", "--work", str(folder / "work")]
    arguments += ["--json", str(folder / "out.json"), "--llama", str(folder / "llama"), *more]
    monkeypatch.setattr(sys, "argv", ["compare_llama_cpp.py", *arguments])
    compare.main()
    return json.loads((folder / "out.json").read_text())


# --- Both sides


def test_figures_of_both_sides_go_into_table_and_file(compare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "LONG_CONTEXT", 40)
    stand_in(tmp_path / "llama")
    figures = run(compare, monkeypatch, tmp_path, "--types", "q4_0", "--rounds", "2")
    rows = {row["stage"]: row for row in figures["rows"]}
    assert set(rows) == {"load", "image", "prefill", "first token", "decode", "decode, long"}
    assert all(len(row["ours"]) == 2 and min(row["ours"]) > 0 for row in rows.values())
    assert {stage: row["theirs"] for stage, row in rows.items()} == {
        "load": [3.0, 3.0],
        "image": [10.0, 10.0],
        "prefill": [40.0, 40.0],
        "first token": [51.0, 51.0],
        "decode": [2.0, 2.0],
        "decode, long": [],
    }
    parts = zip(rows["image"]["ours"], rows["prefill"]["ours"], rows["first token"]["ours"], strict=True)
    assert all(image + prefill < first for image, prefill, first in parts)
    assert figures["peak"]["q4_0"]["theirs"] == 5_000_000_000
    assert figures["prompt_tokens"] == 113
    table = capsys.readouterr().out
    assert "prefill of 113 tokens, q4_0" in table
    assert "peak memory, q4_0 | 5.00 GB" in table

    # The second piece goes on from the first.
    again = run(
        compare, monkeypatch, tmp_path, "--types", "q4_0", "--rounds", "1", "--stages", "decode", "--add"
    )
    decode = next(row for row in again["rows"] if row["stage"] == "decode")
    assert decode["ours"][:2] == rows["decode"]["ours"]
    assert len(decode["ours"]) == len(decode["theirs"]) == 3


def test_prompts_of_two_lengths_are_not_compared(compare, monkeypatch, tmp_path):
    stand_in(tmp_path / "llama", tokens=114)
    with pytest.raises(SystemExit, match="expected the same prompt on both sides, found 113 and 114 tokens"):
        run(compare, monkeypatch, tmp_path, "--types", "q4_0", "--quick", "--stages", "answer")


@pytest.mark.parametrize("info", ["AVX2 = 1 | AVX512 = 1", "SSE3 = 1"])
def test_a_build_for_another_instruction_set_is_refused(compare, monkeypatch, tmp_path, info):
    stand_in(tmp_path / "llama", info=info)
    with pytest.raises(SystemExit, match="expected a build with AVX2 and without AVX512, found"):
        run(compare, monkeypatch, tmp_path)


def test_an_instruction_set_that_the_cpu_lacks_is_refused_before_anything_is_built(
    compare, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(compare._core, "available_isas", lambda: ["avx512", "portable"])
    with pytest.raises(SystemExit):
        run(compare, monkeypatch, tmp_path)
    assert "--isa: expected one that this CPU has (avx512, portable), found avx2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rounds", ["0", "-1"])
def test_no_rounds_are_refused(compare, monkeypatch, tmp_path, capsys, rounds):
    with pytest.raises(SystemExit):
        run(compare, monkeypatch, tmp_path, "--rounds", rounds)
    assert f"--rounds: expected at least 1, found {rounds}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- llama.cpp's build


@pytest.mark.parametrize(
    ("isa", "flags", "on", "off"),
    [
        ("avx2", "avx2 avx512_vnni", {"AVX2", "FMA"}, {"NATIVE"}),
        ("avx2", "avx2 avx_vnni avx512_vnni", {"AVX2", "AVX_VNNI"}, {"NATIVE"}),
        ("avx512", "avx512_vnni", {"AVX512", "AVX512_VNNI"}, {"NATIVE"}),
        ("avx512", "avx512_vnni avx512_bf16 amx_int8", {"AVX512", "AVX512_VNNI", "AVX512_BF16"}, {"NATIVE"}),
        ("amx", "amx_int8", {"NATIVE"}, set()),
    ],
)
def test_llama_cpp_is_built_for_just_the_column(compare, monkeypatch, tmp_path, isa, flags, on, off):
    ran = []
    monkeypatch.setattr(compare, "cpu_info", lambda key: flags)

    def call(command: list[str], env: dict[str, str], **_: Any) -> int:
        (tmp_path / f"llama-{isa}").mkdir(exist_ok=True)
        ran.append((command, env["CMAKE_ARGS"]))
        return 0

    monkeypatch.setattr(compare.subprocess, "call", call)
    folder = compare.llama_environment(isa, tmp_path)
    (_, (install, settings)) = ran
    # A wheel in pip's cache may be of another column.
    assert "--no-cache-dir" in install
    options = dict(option.removeprefix("-D").split("=", 1) for option in shlex.split(settings))
    said = {name.removeprefix("GGML_"): value for name, value in options.items()}
    assert {name for name, value in said.items() if value == "OFF"} == off
    assert on <= {name for name, value in said.items() if value == "ON"}
    assert not any(name.startswith("AVX512") for name in said) or isa == "avx512"
    assert ("AVX512_BF16" in said) == ("avx512_bf16" in flags)
    assert ("AVX_VNNI" in said) == ("avx_vnni" in flags)
    assert ("CMAKE_CXX_FLAGS" in said) == (isa == "amx")
    # Built once.
    assert compare.llama_environment(isa, tmp_path) == folder
    assert len(ran) == 2


def test_a_failed_build_is_told_and_made_again(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(compare.subprocess, "call", lambda *_, **__: 1)
    for _ in range(2):
        with pytest.raises(compare.WorkerError, match=r"failed: see .*llama-avx2\.log"):
            compare.llama_environment("avx2", tmp_path)


# --- Measurements and table


def test_the_calmest_of_three_measurements_counts(compare):
    class Noisy:
        others = 0.0

    worker, row = Noisy(), compare.Row("decode", "q4_0")
    shares = iter([0.5, 0.2, 0.3, 0.04])

    def measure() -> float:
        worker.others = next(shares)
        return worker.others * 10

    comparison = object.__new__(compare.Comparison)
    assert comparison._calm(row, measure, worker) == 2.0
    assert comparison._calm(row, measure, worker) == 0.4  # calm: not made again
    assert row.others == [0.2, 0.04]


def figures(compare: ModuleType, isa: str, others: float = 0.0) -> Any:
    row = compare.Row("decode", "q4_k_m", [0.2, 0.25, 0.21], [0.4, 0.42, 0.5], [others], work=2e9)
    about = {"version": "0.3.36", "flash": True, "image_flash": False, "ubatch": 512}
    ceilings = compare.Ceilings(12.5e9, 0.5e12, 1e12, "int16")
    return compare.Figures(isa, "a machine", 2, "6b", 32, "abc", about, ceilings, 1075, [row])


def test_the_table_gives_medians_ratio_share_and_the_columns_goals(compare):
    cells = "| decode after 100 tokens, q4_k_m | 420 ms (400 to 500) | 210 ms (200 to 250) | 2.00x |"
    table = compare.table(figures(compare, "avx512"))
    assert f"{cells} 1.3x | 9.5 GB/s | 76% | 90% |" in table
    assert "flash attention on, in the vision tower off, batches of 512" in table
    assert f"{cells} 1.2x | 9.5 GB/s | 76% | 85% |" in compare.table(figures(compare, "avx2"))
    assert f"{cells} 1.8x |" in compare.table(figures(compare, "amx"))


def test_shares_are_of_the_unit_that_computes(compare):
    found = figures(compare, "avx512")
    for unit, share in (("float32", "80%"), ("int16", "40%")):
        found.rows = [compare.Row("image", "q4_0", [1.0], [2.0], [0.0], 0.4e12, unit)]
        assert f"| 2.00x | 4x | 0.400 TFLOP/s | {share} |" in compare.table(found)


def test_a_disturbed_row_is_marked(compare):
    assert "\\*" not in compare.table(figures(compare, "avx2", others=0.04))
    assert "q4_k_m\\* |" in compare.table(figures(compare, "avx2", others=0.06))


def test_figures_survive_their_file(compare, tmp_path):
    written = figures(compare, "amx")
    compare.write_json(tmp_path / "figures.json", compare.asdict(written))
    assert compare.Figures.read(tmp_path / "figures.json") == written


def test_a_worker_answers_tells_errors_and_says_why_it_ended(worker_module, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from worker import serve\n"
        "def fail(): raise ValueError('expected more')\n"
        "def end(): print('the reason', file=sys.stderr); sys.stderr.flush(); os._exit(3)\n"
        "def loud(): print('noise'); return 1\n"
        "serve({'double': lambda x: 2 * x, 'fail': fail, 'loud': loud, 'end': end})\n"
    )
    with worker_module.Worker([sys.executable, str(script)], tmp_path / "log", {}) as worker:
        assert worker.ask("double", x=21) == 42
        assert worker.ask("loud") == 1  # what is printed does not get between the answers
        with pytest.raises(worker_module.WorkerError, match="fail: ValueError: expected more"):
            worker.ask("fail")
        assert 0 <= worker.others <= 1
        with pytest.raises(worker_module.WorkerError, match=r"(?s)ended with code 3.*the reason"):
            worker.ask("end")
