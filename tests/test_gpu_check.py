"""The script for the first session with a GPU, as far as it goes without one."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from emulated import EMULATOR, missing_device
from test_random_model import ROOT, load

Main = Callable[..., int]


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


@pytest.fixture
def script() -> ModuleType:
    return load("gpu_check")


@pytest.fixture
def main(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """The script's main function, with a folder to work in."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--work", str(tmp_path / "work"), *arguments])
        return int(script.main())

    return run


def set_step(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, step: str, **commands: str | list[str]
) -> None:
    """Makes a step run commands of a name each: lines for a shell, or a program and its arguments."""

    def run(check: Any) -> bool:
        well = [check.run(n, ["sh", "-c", c] if isinstance(c, str) else c) for n, c in commands.items()]
        return all(well)

    monkeypatch.setattr(script.Check, step, run)


def fake_build(folder: Path, program: str) -> Path:
    """A build folder with an empty native module, and a shell script for the primitives."""
    primitives = folder / "tests/cpp/cuda_primitives"
    primitives.parent.mkdir(parents=True)
    primitives.write_text(f"#!/bin/sh\n{program}\n")
    primitives.chmod(0o755)
    (folder / "_core.so").touch()
    return folder


def steps(tmp_path: Path) -> dict[str, Any]:
    """What the report says of the steps."""
    report: dict[str, Any] = json.loads((tmp_path / "work/report.json").read_text())
    return dict(report["steps"])


def open_fifo(path: Path) -> int:
    os.mkfifo(path)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def wait_until_closed(fifo: int) -> bool:
    """Whether all who wrote into it are gone, soon; False too if there never was one."""
    return bool(select.select([fifo], [], [], 10)[0]) and os.read(fifo, 1) == b""


def test_the_limit_is_for_all_steps_together(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESERVE", 3.0)
    set_step(script, monkeypatch, "build", quick="true")
    set_step(script, monkeypatch, "test", slow="echo begun; sleep 100", next="true")
    set_step(script, monkeypatch, "suite", late="true")
    began = time.monotonic()
    assert main("--limit", "5", "build", "test", "suite", "report") == 1
    assert 1.9 < time.monotonic() - began < 50
    found = steps(tmp_path)
    assert {name: step["exit_code"] for name, step in found.items()} == {
        "quick": 0,
        "slow": 124,
        "test": None,
        "suite": None,
    }
    assert found["slow"]["log"] == ["begun"]
    assert found["slow"]["seconds"] < 4
    assert found["test"]["log"] == ["no time was left for next"]
    assert found["suite"]["log"] == ["no time was left for late"]


def test_what_was_not_run_is_forgotten_when_it_is(
    script: ModuleType,
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_step(script, monkeypatch, "suite", command="true")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/bench-6b-q4_0.json").write_text(json.dumps(bench({"decoding": 2e-3}, 2.2e12)))
    assert main("--limit", "0", "suite") == 1
    assert main("report") == 1
    assert "steps that were not run: suite\n" in capsys.readouterr().out
    assert main("suite", "report") == 0
    assert {name: step["exit_code"] for name, step in steps(tmp_path).items()} == {"command": 0}


def test_the_results_are_one_small_file_after_each_step(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, work = tmp_path / "results", tmp_path / "work"
    build = fake_build(
        tmp_path / "build", 'case "$1" in "") echo copies; echo fault-lane;; *) echo "ran $1";; esac'
    )
    before: set[str] = set()

    def models(check: Any) -> bool:
        with tarfile.open(results / "gpu-check.tar.gz") as archive:
            before.update(archive.getnames())
        check.python()  # links to the package
        check.model("q4_0").write_bytes(bytes(1000))
        return bool(check.run("noise", ["head", "-c", "3000000", "/dev/urandom"]))

    monkeypatch.setattr(script.Check, "models", models)
    work.mkdir()
    (work / "bench-6b-q4_0.json").write_text(json.dumps(bench({"decoding": 2e-3}, 2.2e12)))
    assert main("--results", str(results), "--build", str(build), "primitives", "models") == 0

    primitives = {
        f"steps/{name}.{kind}" for name in ("primitives", "primitive-copies") for kind in ("json", "log")
    }
    assert before == {"report.json", "bench-6b-q4_0.json", *primitives}
    assert [path.name for path in results.iterdir()] == ["gpu-check.tar.gz"]
    assert (results / "gpu-check.tar.gz").stat().st_size < 2_000_000
    with tarfile.open(results / "gpu-check.tar.gz") as archive:
        assert set(archive.getnames()) == before | {"steps/noise.json", "steps/noise.log"}
        assert all(member.isfile() for member in archive)
        content = {member.name: archive.extractfile(member) for member in archive}
        texts = {name: file.read() for name, file in content.items() if file is not None}
    assert texts["steps/primitive-copies.log"] == b"ran copies\n"
    report = json.loads(texts["report.json"])
    assert set(report["steps"]) == {"primitives", "primitive-copies", "noise"}
    assert [row["met"] for row in report["goals"]] == [True]


def test_the_report_has_the_end_of_what_failed(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_step(script, monkeypatch, "test", good="seq 3", bad="seq 1000; echo the reason >&2; exit 3")
    assert main("test") == 1
    found = steps(tmp_path)
    assert found["bad"]["exit_code"] == 3
    assert found["bad"]["log"][-2:] == ["1000", "the reason"]
    assert len(found["bad"]["log"]) == script.LOG_LINES
    assert "log" not in found["good"]


@pytest.mark.parametrize("xdist", [False, True])
def test_tests_are_named_as_they_end(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xdist: bool
) -> None:
    commands = {}

    def run(_: Any, name: str, command: list[str]) -> bool:
        commands[name] = command
        return True

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if xdist else None)
    monkeypatch.setattr(script.Check, "run", run)
    assert main("--build", str(fake_build(tmp_path / "build", "")), "test", "suite") == 0
    for name in ("test", "suite"):
        assert {"-v", "--tb=short"} < set(commands[name])
        assert "-q" not in commands[name]
        assert ("-n" in commands[name]) == xdist
    assert str(ROOT / "tests/test_cuda.py") in commands["test"]


def test_a_bench_that_fails_is_run_again_without_what_may_be_at_fault(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, tuple[list[str], float]] = {}

    def run(_: Any, name: str, command: list[str], most: float) -> bool:
        ran[name] = command, most
        return name != "bench 34b q4_k_m" and not name.endswith(" overlap")

    monkeypatch.setattr(script.Check, "run", run)
    assert main("--build", str(fake_build(tmp_path / "build", "")), "--size", "34b", "bench") == 1
    first, *others = ran.values()
    assert list(ran)[1:] == [f"bench 34b q4_k_m without {names}" for names in ("overlap", "overlap,graph")]
    assert "--json" in first[0]
    for (command, most), names in zip(others, script.WITHOUT, strict=False):
        assert command[:2] == ["env", f"YIVL_CUDA_WITHOUT={names}"]
        assert "--json" not in command  # the figures of a card are those of the first
        assert most == script.MOST["bench"]


def test_a_command_may_have_less_time_than_there_is(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.MOST, "primitive", 1.0)
    build = fake_build(tmp_path / "build", 'case "$1" in "") echo hangs good;; hangs) sleep 100;; esac')
    assert main("--build", str(build), "primitives") == 1
    found = steps(tmp_path)
    assert found["primitive-hangs"]["exit_code"] == 124
    assert found["primitive-good"]["exit_code"] == 0


@pytest.mark.skipif(not missing_device(), reason="for machines without a device")
def test_tests_that_need_a_device_are_not_skipped_without_one() -> None:
    environment = os.environ | {"YIVL_TEST_NEEDS_DEVICE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/test_cuda_split.py"),
    ]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode not in (0, 5)
    assert "DeviceError" in run.stdout


def test_steps_without_a_build_say_what_to_do(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["test", "suite", "accuracy", "primitives", "models", "bench"]
    assert main(*chosen, "report") == 1
    out = capsys.readouterr().out
    assert "Traceback" not in out
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith("== ")] == [
        f"== {step}: not run" for step in chosen
    ]
    assert all(step["exit_code"] is None for step in steps(tmp_path).values())
    build = tmp_path / "work/build"
    assert steps(tmp_path)["test"]["log"] == [f"no _core*.so in {build}: run the step build first"]
    assert out.count("run the step build first") == len(chosen)


def test_a_step_that_raises_ends_no_other(
    script: ModuleType,
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(_: Any) -> bool:
        raise StopIteration("no wheel")

    monkeypatch.setattr(script.Check, "build", build)
    set_step(script, monkeypatch, "test", absent=[str(tmp_path / "absent")])
    set_step(script, monkeypatch, "suite", command="true")
    assert main("build", "test", "suite", "report") == 1
    found = steps(tmp_path)
    assert {name: step["exit_code"] for name, step in found.items()} == {"build": 1, "test": 1, "command": 0}
    assert found["build"]["log"][-1] == "StopIteration: no wheel"
    assert found["test"]["log"][-1].startswith("FileNotFoundError: ")
    assert "steps that failed: build, test of 3\n" in capsys.readouterr().out


def test_half_a_file_is_a_failure_beside_the_others(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    whole = json.dumps(bench({"decoding": 2e-3}, 2.2e12))
    (work / "bench-6b-q4_0.json").write_text(whole[:30])
    (work / "bench-6b-q4_k_m.json").write_text(whole)
    (work / "accuracy-cpu.json").write_text('{"demo": 0.9')
    (work / "accuracy-cuda.json").write_text('{"demo": 0.979}')
    assert main("report") == 1
    report = json.loads((work / "report.json").read_text())
    assert [(row["model"], row["met"]) for row in report["goals"]] == [("6b q4_k_m", True)]
    assert list(report["bench"]) == ["6b q4_k_m"]
    assert all(step["log"][0].startswith("JSONDecodeError: ") for step in report["steps"].values())
    assert (
        "steps that failed: read bench-6b-q4_0.json, read accuracy-*.json of 2\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize("end", ["wait", "exit 1"], ids=["in time", "by itself"])
def test_what_a_command_started_ends_with_it(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    fifo = open_fifo(tmp_path / "fifo")
    monkeypatch.setattr(script, "RESERVE", 1.0)
    set_step(script, monkeypatch, "test", command=f"exec 3> {tmp_path / 'fifo'}; sleep 100 & {end}")
    assert main("--limit", "3", "test") == 1
    assert wait_until_closed(fifo)
    os.close(fifo)


def test_what_runs_ends_with_the_script_and_its_log_is_kept(tmp_path: Path) -> None:
    fifo = open_fifo(tmp_path / "fifo")
    build = fake_build(
        tmp_path / "build", f"exec 3> {tmp_path / 'fifo'}; echo begun; sleep 0.3; echo >&3; sleep 100"
    )
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--build", str(build), "primitives"]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    process = subprocess.Popen([*command, *folders], stderr=subprocess.DEVNULL)
    assert select.select([fifo], [], [], 30)[0]  # it has begun
    assert os.read(fifo, 1) == b"\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    assert wait_until_closed(fifo)
    os.close(fifo)
    with tarfile.open(tmp_path / "results/gpu-check.tar.gz") as archive:
        log = archive.extractfile("steps/primitives.log")
        assert log is not None
        assert log.read() == b"begun\n"


def test_commands_find_the_callers_packages_after_the_build(
    script: ModuleType, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought, site = tmp_path / "brought", tmp_path / "work/site"
    for folder, modules in ((brought, ("carried", "both")), (site, ("both",))):
        folder.mkdir(parents=True)
        for module in modules:
            (folder / f"{module}.py").touch()
    say = "import carried, both; print(carried.__file__, both.__file__)"
    set_step(script, monkeypatch, "test", device=[sys.executable, "-c", say])
    monkeypatch.setenv("PYTHONPATH", str(brought))
    assert main("test") == 0
    log = (tmp_path / "work/steps/device.log").read_text()
    assert log.split() == [str(brought / "carried.py"), str(site / "both.py")]
    monkeypatch.delenv("PYTHONPATH")
    set_step(script, monkeypatch, "test", path=[sys.executable, "-c", "import sys; print(sys.path)"])
    assert main("test") == 0
    assert str(brought) not in (tmp_path / "work/steps/path.log").read_text()
