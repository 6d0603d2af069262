"""The first session with a GPU: builds for the card, tests, looks for races, measures, and compares with the goals.

Examples:
    python benchmarks/gpu_check.py build
    python benchmarks/gpu_check.py test primitives sanitize
    python benchmarks/gpu_check.py suite accuracy
    python benchmarks/gpu_check.py models bench report
    python benchmarks/gpu_check.py --size 34b models bench report
    python benchmarks/gpu_check.py all

Each step is a command of its own and leaves what it found in --work, so that a machine which is lent for minutes can
be used piece by piece. Nothing is downloaded: Python needs pybind11, numpy, pillow and gguf, for the tests also
pytest, torch, safetensors, sentencepiece and tqdm, for the whole suite all of `.[test]`; --wheels installs what is
missing from a folder. Needs nvcc, CMake, 10 GB of disk (34b: 25 GB), and compute-sanitizer for one step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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


class Check:
    """The steps, and where they leave what they find."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work: Path = args.work.resolve()
        self.build_folder: Path = (args.build or self.work / "build").resolve()
        self.emulated: bool = args.emulated
        self.size: str = args.size
        self.limit: float = args.limit
        self.wheels: Path | None = args.wheels
        self.work.mkdir(parents=True, exist_ok=True)
        self.site = self.work / "site"
        self.answers = {device: self.work / f"accuracy-{device}.json" for device in ("cpu", "cuda")}
        self.environment = os.environ | {"PYTHONPATH": str(self.site), "PYTHONUNBUFFERED": "1"}
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
        import pybind11

        kind = (
            ["-DYIVL_CUDA=EMULATED"]
            if self.emulated
            else ["-DYIVL_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"]
        )
        python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure = ["cmake", "-S", str(ROOT), "-B", str(self.build_folder), "-DYIVL_CPP_TESTS=ON"]
        compile_ = ["cmake", "--build", str(self.build_folder), "--target", "_core", "cuda_primitives"]
        return (
            self.run("configure", [*configure, *kind, *python])
            and self.run("build", [*compile_, "--parallel", str(os.cpu_count())])
            and self.run(
                "device", self.python("-c", "from yivl_edge import _core; print(*_core.cuda_memory('cuda'))")
            )
        )

    def test(self) -> bool:
        """The tests of the CUDA backend, on the card."""
        return self.run(
            "test", self.python("-m", "pytest", "-q", *map(str, sorted(ROOT.glob("tests/test_cuda*.py"))))
        )

    def suite(self) -> bool:
        """All tests, with the card as the device of every model that names none."""
        return self.run("suite", ["env", "YIVL_TEST_DEVICE=cuda", *self.python("-m", "pytest", "-q")])

    def accuracy(self) -> bool:
        """The demo model's right answers, on the CPU and on the card."""
        file = next((ROOT / "python/yivl_edge/data").glob("*.gguf"))
        scenes = ["--scenes", "2"] if self.size == "demo" else []
        well = True
        for device, out in self.answers.items():
            evaluate = self.python("-m", "demo.evaluate", "--files", str(file), "--device", device, *scenes)
            well = self.run(f"accuracy {device}", [*evaluate, "--json", str(out)]) and well
        return well and all(row["met"] for row in compare_accuracy(*self.answers.values()))

    def primitives(self) -> bool:
        """The wrappers that kernels are made of, against plain loops."""
        program = str(self.build_folder / "tests/cpp/cuda_primitives")
        names = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
        well = True
        for name in names:
            if not name.startswith("fault-"):  # those are for the emulator to find
                well = self.run(f"primitive {name}", [program, name]) and well
        return well

    def sanitize(self) -> bool:
        """compute-sanitizer on a reply about a picture: the model that comes with the package, and the golden one."""
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not Path(tool).exists():
            print("sanitize: compute-sanitizer is not on this machine")
            return False
        data, golden = ROOT / "python/yivl_edge/data", ROOT / "tests/data/golden"
        model = self.work / "golden-q4_0.gguf"
        asked = [(next(data.glob("*.gguf")), next(data.glob("**/*.png")))]
        convert = self.python(
            "-m", "yivl_edge.convert", str(golden / "checkpoint"), "-o", str(model), "--type", "q4_0"
        )
        if model.exists() or self.run("convert", convert):
            asked.append((model, golden / "image.png"))
        question = ["--prompt", "What is this?", "--temperature", "0.5", "--seed", "1", "--max-tokens", "4"]
        well = True
        for path, picture in asked:
            chat = self.python(
                "-m", "yivl_edge", "chat", str(path), "--device", "cuda", "--image", str(picture)
            )
            for kind in ("memcheck", "racecheck", "synccheck"):
                command = [tool, "--tool", kind, "--error-exitcode", "9", *chat, *question]
                well = self.run(f"{kind} {path.stem}", command) and well
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
        """`yivl-edge bench` on each file, kernel by kernel too."""
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
            out = ["--json", str(self.result(self.size, t))]
            well = self.run(f"bench {self.size} {t}", [*bench, *sizes, *out]) and well
        return well

    def report(self) -> bool:
        """The goals beside what was measured; writes report.json."""
        rows, found = [], {}
        for size, types in TYPES.items():
            for t in types:
                if (path := self.result(size, t)).exists():
                    bench = found[f"{size} {t}"] = json.loads(path.read_text())
                    rows += compare(size, t, bench)
        rows += compare_accuracy(*self.answers.values())
        steps = {
            path.stem: json.loads(path.read_text()) for path in sorted((self.work / "steps").glob("*.json"))
        }
        print(table(rows))
        failed = [name for name, step in steps.items() if step["exit_code"] != 0]
        print(f"steps that failed: {', '.join(failed) or 'none'} of {len(steps)}")
        result = {"goals": rows, "steps": steps, "bench": found}
        (self.work / "report.json").write_text(json.dumps(result, indent=2) + "\n")
        return bool(rows) and not failed

    # --- How

    def result(self, size: str, type_name: str) -> Path:
        """What `yivl-edge bench` finds with a file."""
        return self.work / f"bench-{size}-{type_name}.json"

    def model(self, type_name: str) -> Path:
        """The file of a type."""
        return self.work / f"{self.size}-{type_name}.gguf"

    def python(self, *arguments: str) -> list[str]:
        """A command that sees the package with this build's native module."""
        package = self.site / "yivl_edge"
        package.mkdir(parents=True, exist_ok=True)
        module = next(self.build_folder.glob("_core*.so"))
        for path in [*(ROOT / "python/yivl_edge").iterdir(), ROOT / "convert", module]:
            link = package / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path)
        return [sys.executable, *arguments]

    def run(self, name: str, command: Sequence[str]) -> bool:
        """Runs a command, its output into a file and its end onto the screen; whether it succeeded."""
        steps = self.work / "steps"
        steps.mkdir(exist_ok=True)
        file = steps / name.replace(" ", "-").replace("/", "-")
        began = time.perf_counter()
        with file.with_suffix(".log").open("w") as log:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=self.environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=self.limit,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        seconds = time.perf_counter() - began
        print(f"== {name}: {'ok' if code == 0 else f'exit code {code}'}, {seconds:.1f} s", flush=True)
        lines = file.with_suffix(".log").read_text(errors="replace").splitlines()
        print(
            "\n".join(
                lines if code == 0 and name.startswith(("bench", "device")) else lines[-(20 if code else 1) :]
            )
        )
        file.with_suffix(".json").write_text(json.dumps({"exit_code": code, "seconds": seconds}))
        return code == 0


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
    steps = (
        "build",
        "test",
        "suite",
        "accuracy",
        "primitives",
        "sanitize",
        "models",
        "bench",
        "report",
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "steps", nargs="+", choices=(*steps, "all"), metavar="STEP", help=", ".join((*steps, "all"))
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/gpu-check", help="where everything goes (build/gpu-check)"
    )
    parser.add_argument("--build", type=Path, metavar="DIR", help="a build folder that there is already")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install all wheels of this folder before building"
    )
    parser.add_argument(
        "--limit", type=float, default=570, metavar="SECONDS", help="end each command then (570)"
    )
    parser.add_argument(
        "--size", choices=("6b", "34b", "demo"), default="6b", help="of the models to measure (6b)"
    )
    parser.add_argument("--emulated", action="store_true", help="without a card: to try this script")
    args = parser.parse_args()
    check = Check(args)
    chosen = steps if "all" in args.steps else args.steps
    run: dict[str, Callable[[], bool]] = {step: getattr(check, step) for step in steps}
    well = [run[step]() for step in chosen]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
