"""For a machine with a GPU: builds for the card, tests, looks for races, measures, and compares with the goals.

Examples:
    python benchmarks/gpu_check.py build
    python benchmarks/gpu_check.py test primitives sanitize
    python benchmarks/gpu_check.py suite accuracy
    python benchmarks/gpu_check.py models bench report
    python benchmarks/gpu_check.py --size 34b models bench report
    python benchmarks/gpu_check.py --limit 540 --results FOLDER all

Where there are only minutes: each step leaves what it found in --work, one that fails keeps none of
the others from going on, and before --limit is over the whole call has ended and told what it had no time for. After
each step --results gets all there is to know in one small file, gpu-check.tar.gz: logs, figures and report.json.

Nothing is downloaded: Python needs pybind11, numpy, pillow and gguf, for the tests also pytest, torch, safetensors,
sentencepiece and tqdm, for the whole suite all of `.[test]`; what is missing can be in a folder on PYTHONPATH, or
--wheels installs it from one. Needs nvcc, CMake, 10 GB of disk (34b: 25 GB), and compute-sanitizer for one step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What tells most of the card in the least time goes first.
STEPS = ("build", "primitives", "test", "models", "bench", "sanitize", "accuracy", "suite", "report")
RESERVE = 10.0  # seconds of --limit that no command gets: to end one, and to report
# Seconds that a command gets at most: a kernel that hangs is to take no time from the others.
MOST = {"primitive": 60.0, "bench": 200.0, "sanitize": 90.0, "accuracy": 150.0}
TEST_SECONDS = 90  # that a test gets
NEEDED = ("pybind11", "numpy", "PIL", "gguf")
ALSO_USED = ("pytest", "xdist", "pytest_timeout", "torch", "safetensors", "sentencepiece", "tqdm")
# What docs/cuda.md says YIVL_CUDA_WITHOUT can leave out, one after the other: which of them a fault needs.
WITHOUT = ("overlap", "overlap,graph", "overlap,graph,warpgroups")
LOG_BYTES = 1 << 20  # of each log's end go into the results: room for the names of all tests, some MB in all
LOG_LINES = 40  # of a failure's log go into the report
TYPES = {"6b": ("q4_0", "q4_k_m"), "34b": ("q4_k_m",), "demo": ("q4_0", "q4_k_m")}
CONTEXT = 4000
PROMPT_TOKENS = 1075  # a picture and a question
ACCURACY_POINTS = 0.3  # per cent of the demo model's answers that a card may give or take


@dataclass(frozen=True)
class Goal:
    """What a stage of `yivl-edge bench` is to reach on an H100 or H200."""

    stage: str
    most_seconds: float | None = None
    least_share: float | None = None
    """Of the copy bandwidth that was measured in the same run."""


GOALS_6B = (
    Goal("decoding", least_share=0.85),
    Goal(f"decoding after {CONTEXT} tokens", least_share=0.80),
    Goal("image encoding", most_seconds=0.008),
    Goal("prefill", most_seconds=0.035),
    Goal("picture and question to first token", most_seconds=0.060),
)
GOALS = {"6b": GOALS_6B, "34b": (Goal("decoding", least_share=0.85),), "demo": GOALS_6B}


# The versions of Python packages; an error if one before "--" is missing.
VERSIONS = """
import importlib, sys
needed = sys.argv[1 : sys.argv.index("--")]
missing = []
for name in sys.argv[1:]:
    if name == "--":
        continue
    try:
        print(name, getattr(importlib.import_module(name), "__version__", ""))
    except ImportError as error:
        print(name, "is missing:", error)
        missing += [name] if name in needed else []
sys.exit("expected in this Python or on PYTHONPATH: " + ", ".join(missing) if missing else 0)
"""


class NotRunError(Exception):
    """Why a step cannot go on, in one line."""


class Check:
    """The steps, and where they leave what they find."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work.resolve()
        self.build_folder: Path = (args.build or self.work / "build").resolve()
        self.emulated: bool = args.emulated
        self.size: str = args.size
        self.deadline = time.monotonic() + args.limit
        self.wheels: Path | None = args.wheels
        self.results: Path | None = args.results
        self.steps: Path = self.work / "steps"
        self.steps.mkdir(parents=True, exist_ok=True)
        self.site = self.work / "site"
        self.answers = {device: self.work / f"accuracy-{device}.json" for device in ("cpu", "cuda")}
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")]))
        # No test is skipped for want of a device.
        needs = {"YIVL_TEST_NEEDS_DEVICE": "1"}
        self.environment = os.environ | needs | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if self.emulated:
            self.environment["YIVL_CUDA_EMULATOR"] = str(self.build_folder)

    # --- Steps: each returns whether all was well

    def build(self) -> bool:
        """The native module and the test programs, for the card in the machine; the package beside it."""
        if self.wheels is not None:
            install = [sys.executable, "-m", "pip", "install", "--no-index", f"--find-links={self.wheels}"]
            if not self.run(
                "wheels", [*install, *(wheel.stem.split("-")[0] for wheel in self.wheels.glob("*.whl"))]
            ):
                return False
        if not self.run("packages", [sys.executable, "-c", VERSIONS, *NEEDED, "--", *ALSO_USED]):
            return False
        import pybind11

        native = ["-DYIVL_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"]
        kind = ["-DYIVL_CUDA=EMULATED"] if self.emulated else native
        python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT), "-B", str(self.build_folder), "-DYIVL_CPP_TESTS=ON"]
        if not self.run("configure", [*configure, *ninja, *kind, *python]):
            # Perhaps only because CMake did not find the card.
            shutil.rmtree(self.build_folder, ignore_errors=True)
            if self.emulated or not self.run("configure for all", [*configure, *ninja, native[0], *python]):
                return False
        compile_ = ["cmake", "--build", str(self.build_folder), "--parallel", str(os.cpu_count()), "--target"]
        say = "from yivl_edge import _core; print(*_core.cuda_memory('cuda')); print(_core.cuda_device())"
        return (
            self.run("compile", [*compile_, "_core"])
            and self.run("device", self.python("-c", say))
            and self.run("compile primitives", [*compile_, "cuda_primitives"])
        )

    def test(self) -> bool:
        """The tests of the CUDA backend, on the card; some again with what every card has."""
        tests = self.pytest(*map(str, sorted(ROOT.glob("tests/test_cuda*.py"))))
        well = self.run("test", tests)
        plain = ["env", f"YIVL_CUDA_WITHOUT={WITHOUT[-1]}", *tests, "-k", "many_rows or demo_model"]
        return self.run("test plain", plain) and well

    def suite(self) -> bool:
        """All tests, with the card as the device of every model that names none."""
        return self.run("suite", ["env", "YIVL_TEST_DEVICE=cuda", *self.pytest()])

    def accuracy(self) -> bool:
        """The demo model's right answers, on the CPU and on the card."""
        file = next((ROOT / "python/yivl_edge/data").glob("*.gguf"))
        scenes = ["--scenes", "2"] if self.size == "demo" else []
        well = True
        for device, out in reversed(self.answers.items()):
            if device == "cpu" and out.exists():  # it can be brought along
                continue
            out.unlink(missing_ok=True)
            evaluate = self.python("-m", "demo.evaluate", "--files", str(file), "--device", device, *scenes)
            command = [*evaluate, "--json", str(out)]
            well = self.run(f"accuracy {device}", command, MOST["accuracy"]) and well
        return well and all(row["met"] for row in compare_accuracy(*self.answers.values()))

    def primitives(self) -> bool:
        """The wrappers that kernels are made of, against plain loops."""
        program = str(self.built("tests/cpp/cuda_primitives"))
        well = self.run("primitives", [program], MOST["primitive"])
        for name in self.file("primitives", "log").read_text().split() if well else ():
            if not name.startswith("fault-"):  # those are for the emulator to find
                well = self.run(f"primitive {name}", [program, name], MOST["primitive"]) and well
        return well

    def sanitize(self) -> bool:
        """compute-sanitizer on a reply about a picture: the model that comes with the package, and the golden one."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            raise NotRunError("compute-sanitizer is not on this machine")
        data, golden = ROOT / "python/yivl_edge/data", ROOT / "tests/data/golden"
        model = self.work / "golden-q4_0.gguf"
        asked = [(next(data.glob("*.gguf")), next(data.glob("**/*.png")))]
        convert = self.python(
            "-m", "yivl_edge.convert", str(golden / "checkpoint"), "-o", str(model), "--type", "q4_0"
        )
        well = model.exists() or self.run("convert", convert)
        if well:
            asked.append((model, golden / "image.png"))
        question = ["--prompt", "What is this?", "--temperature", "0.5", "--seed", "1", "--max-tokens", "4"]
        for path, picture in asked:
            chat = self.python(
                "-m", "yivl_edge", "chat", str(path), "--device", "cuda", "--image", str(picture)
            )
            for kind in ("memcheck", "racecheck", "synccheck"):
                command = [tool, "--tool", kind, "--error-exitcode", "9", *chat, *question]
                well = self.run(f"{kind} {path.stem}", command, MOST["sanitize"]) and well
        return well

    def models(self) -> bool:
        """Files of true sizes with random weights."""
        well = True
        for t in TYPES[self.size]:
            if not self.model(t).exists():
                writer = self.python(
                    str(ROOT / "benchmarks/random_model.py"), "--size", self.size, "--type", t
                )
                well = self.run(f"write {self.size} {t}", [*writer, "-o", str(self.model(t))]) and well
        return well

    def bench(self) -> bool:
        """`yivl-edge bench` on each file, kernel by kernel too; one that fails, again without what may be at fault."""
        sizes = [
            "--prompt-tokens",
            str(PROMPT_TOKENS),
            "--generate",
            "64",
            "--context",
            str(CONTEXT),
            "--runs",
            "5",
        ]
        if self.size == "demo":
            sizes = ["--prompt-tokens", "20", "--generate", "2", "--context", "20", "--runs", "1"]
        well = True
        for t in TYPES[self.size]:
            bench = self.python(
                "-m", "yivl_edge", "bench", str(self.model(t)), "--device", "cuda", "--profile"
            )
            out = self.result(self.size, t)
            out.unlink(missing_ok=True)
            if self.run(f"bench {self.size} {t}", [*bench, *sizes, "--json", str(out)], MOST["bench"]):
                continue
            well = False
            for without in WITHOUT:
                # To find the fault: its figures are no card's, and stay in the log.
                again = ["env", f"YIVL_CUDA_WITHOUT={without}", *bench, *sizes]
                if self.run(f"bench {self.size} {t} without {without}", again, MOST["bench"]):
                    break
        return well

    def report(self) -> bool:
        """The goals beside what was measured, and what failed or was not run."""
        found = self.findings()
        codes = {name: step["exit_code"] for name, step in found["steps"].items()}
        failed = [name for name, code in codes.items() if code]
        not_run = [name for name, code in codes.items() if code is None]
        print(table(found["goals"]))
        print(f"steps that failed: {', '.join(failed) or 'none'} of {len(codes)}")
        print(f"steps that were not run: {', '.join(not_run) or 'none'}")
        return bool(found["goals"]) and not failed and not not_run

    # --- How

    def step(self, name: str) -> bool:
        """Runs a step; whether all was well. What it raises is its own failure: the steps after it go on."""
        log = self.file(name, "log")
        for earlier in (log, self.file(name, "json")):
            earlier.unlink(missing_ok=True)
        began = time.perf_counter()
        try:
            well = bool(getattr(self, name)())
        except NotRunError as error:
            log.write_text(f"{error}\n")
            well = self.record(name, None, time.perf_counter() - began)
        except Exception:
            log.write_text(traceback.format_exc())
            well = self.record(name, 1, time.perf_counter() - began)
        finally:  # and what there is when this script is ended
            self.keep()
        return well

    def file(self, name: str, kind: str) -> Path:
        """The log of a step or of one of its commands, or how it ended (json)."""
        return self.steps / f"{name.replace(' ', '-').replace('/', '-')}.{kind}"

    def result(self, size: str, type_name: str) -> Path:
        """What `yivl-edge bench` finds with a file."""
        return self.work / f"bench-{size}-{type_name}.json"

    def model(self, type_name: str) -> Path:
        """The file of a type."""
        return self.work / f"{self.size}-{type_name}.gguf"

    def built(self, pattern: str) -> Path:
        """What the step build leaves."""
        for path in self.build_folder.glob(pattern):
            return path
        raise NotRunError(f"no {pattern} in {self.build_folder}: run the step build first")

    def pytest(self, *tests: str) -> list[str]:
        """Tests that are named as they end, so that a run without time to finish leaves those that failed."""
        # Eight at a time: each process takes its share of the card's memory.
        together = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        # By a thread: a process that waits for a card gets no signal.
        timeout = ["-o", f"timeout={TEST_SECONDS}", "-o", "timeout_method=thread"]
        in_time = timeout if importlib.util.find_spec("pytest_timeout") else []
        return self.python("-m", "pytest", "-v", "--tb=short", *together, *in_time, *tests)

    def python(self, *arguments: str) -> list[str]:
        """A command that sees the package with this build's native module."""
        module = self.built("_core*.so")
        package = self.site / "yivl_edge"
        package.mkdir(parents=True, exist_ok=True)
        for path in [*(ROOT / "python/yivl_edge").iterdir(), ROOT / "convert", module]:
            link = package / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path)
        return [sys.executable, *arguments]

    def run(self, name: str, command: Sequence[str], most: float = float("inf")) -> bool:
        """Runs a command until the time is up, or `most` seconds; its output into a file; whether it succeeded."""
        left = min(self.deadline - RESERVE - time.monotonic(), most)
        if left <= 0:
            raise NotRunError(f"no time was left for {name}")
        began = time.perf_counter()
        with self.file(name, "log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            # Its children too: nvcc, or a program under compute-sanitizer, would disturb what is timed next.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A card that hangs can keep a process from ending.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(RESERVE / 2)
        well = self.record(name, code, time.perf_counter() - began)
        self.keep()
        return well

    def record(self, name: str, code: int | None, seconds: float) -> bool:
        """How a step or one of its commands ended (None: not run), the end of its log onto the screen."""
        well = code == 0
        outcome = {0: "ok", 124: "ended, its time was up", None: "not run"}.get(code, f"exit code {code}")
        lines = last_lines(self.file(name, "log"))
        shown = lines if well and name.startswith(("bench", "device")) else lines[-(1 if well else 20) :]
        print(f"== {name}: {outcome}, {seconds:.1f} s", *shown, sep="\n", flush=True)
        ended = {"exit_code": code, "seconds": seconds}
        replace(self.file(name, "json"), json.dumps(ended).encode())
        return well

    def findings(self) -> dict[str, Any]:
        """All that was found so far."""
        rows: list[dict[str, Any]] = []
        bench: dict[str, Any] = {}
        steps: dict[str, Any] = {}
        for path in sorted(self.steps.glob("*.json")):
            with unreadable_fails(path.name, steps):
                step = steps[path.stem] = json.loads(path.read_text())
                if step["exit_code"] != 0:
                    step["log"] = last_lines(path.with_suffix(".log"))[-LOG_LINES:]
        for size, types in TYPES.items():
            for t in types:
                if (path := self.result(size, t)).exists():
                    with unreadable_fails(path.name, steps):
                        found = json.loads(path.read_text())
                        rows += compare(size, t, found)
                        bench[f"{size} {t}"] = found
        with unreadable_fails("accuracy-*.json", steps):
            rows += compare_accuracy(*self.answers.values())
        return {"goals": rows, "steps": steps, "bench": bench}

    def keep(self) -> None:
        """Writes the report, and --results: all that is to outlast the machine, as one small file."""
        replace(self.work / "report.json", (json.dumps(self.findings(), indent=2) + "\n").encode())
        if self.results is None:
            return
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path in sorted(
                [*self.work.glob("*.json"), *self.steps.glob("*.json"), *self.steps.glob("*.log")]
            ):
                content = end(path) if path.suffix == ".log" else path.read_bytes()
                member = tarfile.TarInfo(str(path.relative_to(self.work)))
                member.size, member.mtime = len(content), int(path.stat().st_mtime)
                archive.addfile(member, io.BytesIO(content))
        self.results.mkdir(parents=True, exist_ok=True)
        replace(self.results / "gpu-check.tar.gz", packed.getvalue())


def end(log: Path) -> bytes:
    """The last LOG_BYTES of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return file.read()


def last_lines(log: Path) -> list[str]:
    """The lines at the end of a log."""
    return end(log).decode(errors="replace").splitlines()


def replace(path: Path, content: bytes) -> None:
    """Writes a file that is whole at any time, whenever the machine is taken away."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


@contextlib.contextmanager
def unreadable_fails(name: str, steps: dict[str, Any]) -> Iterator[None]:
    """A file that cannot be understood, half a one say, is among the steps as a failure."""
    try:
        yield
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        steps[f"read {name}"] = {"exit_code": 1, "seconds": 0.0, "log": [problem]}


def compare(size: str, type_name: str, bench: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of a bench's stages, and whether they are met."""
    stages = {row["stage"]: row for row in bench["stages"]}
    rows = []
    for goal in GOALS[size]:
        if goal.stage not in stages:
            continue
        stage = stages[goal.stage]
        seconds = stage["median"]
        share = stage["bytes"] / seconds / bench["ceilings"]["read_bytes_per_second"]
        met = seconds <= goal.most_seconds if goal.most_seconds else share >= (goal.least_share or 0)
        rows.append(
            {
                "model": f"{size} {type_name}",
                "stage": goal.stage,
                "goal": f"{goal.most_seconds * 1e3:.0f} ms"
                if goal.most_seconds
                else f"{goal.least_share:.0%}",
                "measured": f"{seconds * 1e3:.2f} ms" if goal.most_seconds else f"{share:.0%}",
                "met": met,
                "device": bench["device"],
            }
        )
    return rows


def compare_accuracy(on_cpu: Path, on_gpu: Path) -> list[dict[str, Any]]:
    """What `accuracy` found on the card beside what it found on the CPU; nothing before both are there."""
    if not (on_cpu.exists() and on_gpu.exists()):
        return []
    (cpu,), (gpu,) = (json.loads(path.read_text()).values() for path in (on_cpu, on_gpu))
    return [
        {
            "model": "demo",
            "stage": f"right answers within {ACCURACY_POINTS} points of the CPU's",
            "goal": f"{cpu:.2%}",
            "measured": f"{gpu:.2%}",
            "met": round(100 * abs(gpu - cpu), 6) <= ACCURACY_POINTS,
            "device": "cuda",
        }
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person."""
    if not rows:
        return "nothing was measured: run the step bench first"
    lines = [rows[0]["device"], f"{'':12} {'stage':45} {'goal':>8} {'measured':>12}"]
    for row in rows:
        verdict = "met" if row["met"] else "missed"
        lines.append(f"{row['model']:12} {row['stage']:45} {row['goal']:>8} {row['measured']:>12}  {verdict}")
    return "\n".join(lines)


def main() -> int:
    """Runs the steps that the command line names; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "steps", nargs="+", choices=(*STEPS, "all"), metavar="STEP", help=", ".join((*STEPS, "all"))
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/gpu-check", help="where everything goes (build/gpu-check)"
    )
    parser.add_argument("--build", type=Path, metavar="DIR", help="a build folder that there is already")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install all wheels of this folder before building"
    )
    parser.add_argument(
        "--limit", type=float, default=570, metavar="SECONDS", help="for the whole call (570)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="keep gpu-check.tar.gz there, rewritten after each step"
    )
    parser.add_argument(
        "--size", choices=("6b", "34b", "demo"), default="6b", help="of the models to measure (6b)"
    )
    parser.add_argument("--emulated", action="store_true", help="without a card: to try this script")
    args = parser.parse_args()
    check = Check(args)
    well = [check.step(step) for step in (STEPS if "all" in args.steps else args.steps)]
    return 0 if all(well) else 1


if __name__ == "__main__":
    # A command is in a session of its own: it ends with this script only if this script ends it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
