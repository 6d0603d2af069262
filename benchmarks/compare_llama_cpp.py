"""yivl-edge side by side with llama.cpp: a full-size random Yi-VL-6B, a picture and a question, on this machine.

Example:
    python benchmarks/compare_llama_cpp.py --isa avx512 --work /tmp/compare --json avx512.json

The first run builds llama-cpp-python for the instruction set in an environment of its own (30 minutes on two cores),
writes 13 GB of model files and tries llama.cpp's settings; later runs find all that in the folder --work. Both sides
read the same files with the same number of threads, in turns, each in its own process; the one that waits sleeps.
benchmarks/README.md says more.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from random_model import SIZES, write_random_model
from worker import Worker, WorkerError
from yivl_edge import _core
from yivl_edge.files import check_output, write_whole
from yivl_edge.measure import Ceilings, cpu_info, machine_name

LLAMA_CPP = "llama-cpp-python==0.3.36"
SYSTEM = "You are a helpful assistant. Look at the picture carefully, then answer the question in a few short words."
QUESTION = "What is in this picture?"
PLACEHOLDER = "<image_placeholder>"
CONTEXT, LONG_CONTEXT = 100, 4000
TYPES = {"q4_0": "f16", "q4_k_m": "q8_0"}  # of the decoder: of the vision tower
STAGES = ("load", "answer", "decode", "long")
HERE = Path(__file__).parent

# More than this share of all cores used by other programs, and a measurement is made again, but not for ever.
_DISTURBED = 0.05
_TRIES = 3
# Flash attention and batch, of which llama.cpp gets the best.
_SETTINGS = ((True, 512), (False, 512), (True, 1024), (False, 1024))


# --- The columns of the table


@dataclass(frozen=True)
class Column:
    """An instruction set: how llama.cpp is built for just that, and what we mean to reach."""

    cmake: tuple[str, ...]
    has: str  # what llama.cpp must say that it is built for
    lacks: str | None  # and must not
    times: dict[str, tuple[float, float]]  # stage -> llama.cpp's time over ours, for each of TYPES
    shares: dict[str, float]  # stage -> share of the ceiling


_AVX2 = tuple(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C"))
_IF_PRESENT = {  # column -> the CPU's flag -> option
    "amx": {},
    "avx512": {
        "avx512_vnni": "-DGGML_AVX512_VNNI=ON",
        "avx512_bf16": "-DGGML_AVX512_BF16=ON",
        "avx512vbmi": "-DGGML_AVX512_VBMI=ON",
    },
    "avx2": {"avx_vnni": "-DGGML_AVX_VNNI=ON"},
}

COLUMNS = {
    "amx": Column(
        # Without the two compiler flags GCC 12 drops stores that configure the tiles, and llama.cpp crashes.
        ("-DGGML_NATIVE=ON", "-DCMAKE_CXX_FLAGS=-fno-dse -fno-tree-dse"),
        "AMX_INT8",
        None,
        {"image": (15, 15), "prefill": (8, 8), "first token": (10, 10), "decode": (1.0, 1.8)},
        {"image": 0.45, "prefill": 0.5, "decode": 0.9},
    ),
    "avx512": Column(
        ("-DGGML_NATIVE=OFF", *_AVX2, "-DGGML_AVX512=ON"),
        "AVX512",
        "AMX_INT8",
        {"image": (4, 4), "prefill": (2.5, 2.5), "first token": (3, 3), "decode": (1.5, 1.3)},
        {"decode": 0.9},
    ),
    "avx2": Column(
        ("-DGGML_NATIVE=OFF", *_AVX2),
        "AVX2",
        "AVX512",
        {"image": (2, 2), "prefill": (1.5, 1.5), "first token": (1.7, 1.7), "decode": (1.2, 1.2)},
        {"decode": 0.85},
    ),
}
_QUICK_BLOCKS = 8
LONG_SHARE = 0.85  # of the speed after a short context
LOAD_SECONDS = 1.0


# --- What is made once


def llama_environment(isa: str, work: Path) -> Path:
    """An environment with llama.cpp built for this instruction set."""
    folder, log = work / f"llama-{isa}", work / f"llama-{isa}.log"
    done = folder / "installed"
    if done.exists():
        return folder
    options = list(COLUMNS[isa].cmake)
    options += [option for flag, option in _IF_PRESENT[isa].items() if flag in cpu_info("flags").split()]
    settings = shlex.join(options)
    say(f"building {LLAMA_CPP} with CMAKE_ARGS={settings!r}; log: {log}")
    # pip would otherwise take the wheel that it has built before, perhaps for another instruction set.
    install = ["install", "--no-cache-dir", "--no-binary", "llama-cpp-python", LLAMA_CPP]
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [_python(folder), "-m", "pip", *install],
    ]
    with log.open("w") as output:
        for command in commands:
            environment = {**os.environ, "CMAKE_ARGS": settings}
            if subprocess.call(command, env=environment, stdout=output, stderr=subprocess.STDOUT):
                raise WorkerError(f"{shlex.join(command)} failed: see {log}")
    done.touch()
    return folder


def model_files(size: str, blocks: int, type_name: str, work: Path) -> dict[str, str]:
    """The text model and its mmproj file, both in the page cache."""
    name = f"{size}-{blocks}-{type_name}"
    files = {"text": work / f"{name}.gguf", "mmproj": work / f"{name}-mmproj.gguf"}
    if not all(path.exists() for path in files.values()):
        say(f"writing {files['text']} and {files['mmproj']}")
        write_random_model(
            files["text"],
            size=size,
            type_name=type_name,
            vision_type=TYPES[type_name],
            blocks=blocks,
            layout="pair",
        )
    for path in files.values():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return {name: str(path) for name, path in files.items()}


class Pictures:
    """Pictures of which no two are the same, so that nobody can remember the last one."""

    def __init__(self, work: Path) -> None:
        self._path = work / "picture.png"
        rows, columns = np.mgrid[0:480, 0:640]
        self._pixels = np.stack([rows // 2, columns // 3, (rows + columns) // 5], axis=-1).astype(np.uint8)
        self._random = np.random.default_rng()

    def next(self) -> str:
        """The path of a new one, which takes the last one's place."""
        self._pixels[200:280, 280:360] = self._random.integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(self._pixels).save(self._path)
        return str(self._path)


def say(text: str) -> None:
    """Tell what goes on."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file that changes at once or not at all."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def _commit() -> str:
    """Of this repository, with a "+" for changes that are in no commit."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


# --- Measuring


@dataclass
class Row:
    """One stage with one type of weights."""

    stage: str
    type: str
    ours: list[float] = field(default_factory=list)  # seconds
    theirs: list[float] = field(default_factory=list)
    others: list[float] = field(
        default_factory=list
    )  # of each of both: share of all cores used by other programs
    work: float = 0.0  # operations; bytes for decoding
    unit: str = ""  # that computes the operations, as the ceilings name it


@dataclass
class Figures:
    """All that is measured: what --json holds."""

    isa: str
    machine: str
    threads: int
    size: str
    blocks: int  # of the decoder
    commit: str
    llama_cpp: dict[str, Any]  # version, what it is built for, settings
    ceilings: Ceilings
    prompt_tokens: int = 0
    rows: list[Row] = field(default_factory=list)
    peak: dict[str, dict[str, int]] = field(default_factory=dict)  # type -> side -> bytes

    def row(self, stage: str, type_name: str) -> Row:
        """That row; a new one if there is none yet."""
        for row in self.rows:
            if (row.stage, row.type) == (stage, type_name):
                return row
        self.rows.append(Row(stage, type_name))
        return self.rows[-1]

    @classmethod
    def read(cls, path: Path) -> Figures:
        """Of an earlier run."""
        found = json.loads(path.read_text())
        found["ceilings"] = Ceilings(**found["ceilings"])
        found["rows"] = [Row(**row) for row in found["rows"]]
        return cls(**found)


class Comparison:
    """Both sides on one machine."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.json: Path = arguments.json
        self.isa: str = arguments.isa
        self.size: str = arguments.size
        self.threads: int = arguments.threads
        decoder, _ = SIZES[self.size]
        self.blocks = min(decoder.blocks, _QUICK_BLOCKS) if arguments.quick else decoder.blocks
        self.rounds = 1 if arguments.quick else arguments.rounds
        self.tokens = 16 if arguments.quick else 32
        self.llama: Path = arguments.llama or llama_environment(self.isa, self.work)
        self.pictures = Pictures(self.work)
        with self._theirs() as theirs:
            about = self._checked(theirs.ask("about"))
        with self._ours() as ours:
            ceilings = Ceilings(**ours.ask("ceilings", n_threads=self.threads))
            self._open_ours(ours, "q4_0")
            prompt = ours.ask("prompt", system=SYSTEM, question=QUESTION)
            self.before, self.after = prompt.split(PLACEHOLDER)
        self.settings = self._best_settings()
        self.figures = Figures(
            self.isa,
            machine_name(),
            self.threads,
            self.size,
            self.blocks,
            _commit(),
            about | self.settings,
            ceilings,
        )
        if arguments.add:
            self.figures = self._continued(Figures.read(self.json))

    def run(self, stages: list[str], types: list[str]) -> Figures:
        """Measure these stages with these types."""
        for type_name in types:
            with self._ours() as ours, self._theirs() as theirs:
                self._run_type(type_name, stages, ours, theirs)
                peak = self.figures.peak.setdefault(type_name, {"ours": 0, "theirs": 0})
                peak["ours"] = max(peak["ours"], ours.ask("peak"))
                peak["theirs"] = max(peak["theirs"], theirs.ask("peak"))
            self._save()
        return self.figures

    def _run_type(self, type_name: str, stages: list[str], ours: Worker, theirs: Worker) -> None:
        for i in range(self.rounds if "load" in stages else 1):
            seconds = self._open_ours(ours, type_name), self._open_theirs(theirs, type_name, self.settings)
            if "load" in stages:
                say(f"{type_name}: load {i + 1}/{self.rounds}")
                row = self.figures.row("load", type_name)
                row.ours.append(seconds[0])
                row.theirs.append(seconds[1])
                self._save()
        if set(stages) - {"load"}:
            for side in (ours, theirs):
                side.ask("warm_up", picture=self.pictures.next() if "answer" in stages else None)
        for i in range(self.rounds):
            if "answer" in stages:
                say(f"{type_name}: picture and question {i + 1}/{self.rounds}")
                self._answers(type_name, ours, theirs)
            if "decode" in stages:
                say(f"{type_name}: decoding {i + 1}/{self.rounds}")
                self._decoding(type_name, ours, theirs)
        if "long" in stages:
            say(f"{type_name}: decoding after {LONG_CONTEXT} tokens")
            row = self.figures.row("decode, long", type_name)
            asked = {"context": LONG_CONTEXT - self.tokens, "tokens": self.tokens, "runs": self.rounds}
            found = self._calm(row, lambda: ours.ask("decode", **asked), ours)
            row.ours += found["seconds"]
            row.work = found["bytes"]
            self._save()

    def _answers(self, type_name: str, ours: Worker, theirs: Worker) -> None:
        rows = {
            key: self.figures.row(key.replace("_", " "), type_name)
            for key in ("image", "prefill", "first_token")
        }
        first = rows["first_token"]
        mine = self._calm(
            first,
            lambda: ours.ask("answer", picture=self.pictures.next(), system=SYSTEM, question=QUESTION),
            ours,
        )
        other = self._calm(first, lambda: self._their_answer(theirs), theirs)
        if mine["tokens"] != other["tokens"]:
            raise WorkerError(
                f"expected the same prompt on both sides, found {mine['tokens']} and {other['tokens']} tokens"
            )
        self.figures.prompt_tokens = mine["tokens"]
        units = ours.ask("units")
        for key, row in rows.items():
            row.unit = units.get(key, "")
            row.ours.append(mine[key])
            row.theirs.append(other[key])
            row.work = mine.get(f"{key}_flop", 0.0)
        self._save()

    def _decoding(self, type_name: str, ours: Worker, theirs: Worker) -> None:
        row = self.figures.row("decode", type_name)
        asked = {"context": CONTEXT, "tokens": self.tokens, "runs": 1}
        found = self._calm(row, lambda: ours.ask("decode", **asked), ours)
        other = self._calm(row, lambda: theirs.ask("decode", **asked), theirs)
        row.ours += found["seconds"]
        row.theirs += other
        row.work = found["bytes"]
        self._save()

    def _save(self) -> None:
        write_json(self.json, asdict(self.figures))

    def _calm(self, row: Row, measure: Callable[[], Any], worker: Worker) -> Any:
        """The measurement in which other programs used least of the machine."""
        found: list[tuple[float, int, Any]] = []
        while not found or (min(found)[0] > _DISTURBED and len(found) < _TRIES):
            answer = measure()
            found.append((worker.others, len(found), answer))
            if worker.others > _DISTURBED:
                say(f"  other programs used {worker.others:.0%} of the cores during {answer}")
        others, _, answer = min(found)
        row.others.append(others)
        return answer

    # --- Processes

    def _ours(self) -> Worker:
        command = [sys.executable, str(HERE / "yivl_edge_worker.py")]
        return Worker(command, self.work / "yivl-edge-worker.log", {"YIVL_ISA": self.isa})

    def _theirs(self) -> Worker:
        command = [_python(self.llama), str(HERE / "llama_cpp_worker.py")]
        return Worker(command, self.work / "llama-cpp-worker.log", {})

    def _open_ours(self, worker: Worker, type_name: str) -> float:
        files = model_files(self.size, self.blocks, type_name, self.work)
        seconds: float = worker.ask("open", **files, n_threads=self.threads)
        return seconds

    def _open_theirs(self, worker: Worker, type_name: str, settings: dict[str, Any]) -> float:
        files = model_files(self.size, self.blocks, type_name, self.work)
        seconds: float = worker.ask("open", **files, n_threads=self.threads, **settings)
        return seconds

    def _their_answer(self, worker: Worker) -> dict[str, float]:
        found: dict[str, float] = worker.ask(
            "answer", picture=self.pictures.next(), before=self.before, after=self.after
        )
        return found

    def _checked(self, about: dict[str, str]) -> dict[str, str]:
        """What llama.cpp says of itself, if it is what this column is about."""
        column, info = COLUMNS[self.isa], about["system_info"]
        if f"llama-cpp-python=={about['version']}" != LLAMA_CPP:
            raise WorkerError(f"{self.llama}: expected {LLAMA_CPP}, found {about['version']}")
        if f"{column.has} = 1" not in info or (column.lacks and f"{column.lacks} = 1" in info):
            without = f" and without {column.lacks}" if column.lacks else ""
            raise WorkerError(f"{self.llama}: expected a build with {column.has}{without}, found {info}")
        return about

    def _best_settings(self) -> dict[str, Any]:
        """Flash attention in vision tower and decoder, and the batch: what is fastest for llama.cpp here."""
        # Fewer blocks of the same sizes give the same order, in less time.
        files = model_files(self.size, min(self.blocks, _QUICK_BLOCKS), "q4_0", self.work)
        path = self.work / f"llama-{self.isa}-{self.size}-{self.threads}-threads.json"
        tried: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        for flash, ubatch in _SETTINGS[len(tried) :]:
            say(f"trying llama.cpp with flash attention {_on(flash)} and batches of {ubatch}")
            with self._theirs() as theirs:
                settings = {"flash": flash, "image_flash": flash, "ubatch": ubatch}
                theirs.ask("open", **files, n_threads=self.threads, **settings)
                theirs.ask("warm_up", picture=None)
                trial = Row("settings", "q4_0")
                found = [self._calm(trial, lambda: self._their_answer(theirs), theirs) for _ in range(2)]
            tried.append(settings | {stage: min(f[stage] for f in found) for stage in ("image", "prefill")})
            write_json(path, tried)
        decoder = min(tried, key=lambda t: t["prefill"])
        image = min(tried, key=lambda t: t["image"])
        return {"flash": decoder["flash"], "ubatch": decoder["ubatch"], "image_flash": image["image_flash"]}

    def _continued(self, earlier: Figures) -> Figures:
        """Figures of an earlier run of the same two programs on this machine, to which this run adds."""
        for name in ("isa", "machine", "threads", "size", "blocks", "commit", "llama_cpp"):
            now, then = getattr(self.figures, name), getattr(earlier, name)
            if now != then:
                raise WorkerError(f"--add: {name}: expected {now}, found {then} in the earlier figures")
        best = {
            name: max(rate, getattr(earlier.ceilings, name))
            for name, rate in asdict(self.figures.ceilings).items()
        }
        earlier.ceilings = Ceilings(**best)
        return earlier


# --- The table


def table(figures: Figures) -> str:
    """Markdown: llama.cpp's times, ours and their ratio; what ours is of the ceilings; the goals."""
    column, ceilings = COLUMNS[figures.isa], figures.ceilings
    settings = figures.llama_cpp
    lines = [
        f"Random Yi-VL-{figures.size.upper()} with {figures.blocks} decoder blocks; "
        f"{figures.machine}; {figures.threads} threads; "
        f"YIVL_ISA={figures.isa}; commit {figures.commit}; "
        f"llama-cpp-python {settings['version']}: flash attention {_on(settings['flash'])}, in the vision tower "
        f"{_on(settings['image_flash'])}, batches of {settings['ubatch']}.",
        "",
        f"Ceilings in the same run: {ceilings}.",
        "",
        "| | llama.cpp | yivl-edge | times | goal | yivl-edge moves or computes | of the ceiling | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(figures.rows, key=lambda row: (_ORDER.index(row.stage), row.type)):
        lines.append("| " + " | ".join(_cells(row, figures, column)) + " |")
    for type_name, peak in figures.peak.items():
        ours, theirs = peak["ours"] / 1e9, peak["theirs"] / 1e9
        lines.append(f"| peak memory, {type_name} | {theirs:.2f} GB | {ours:.2f} GB | | | | | |")
    if any(share > _DISTURBED for row in figures.rows for share in row.others):
        lines += [
            "",
            f"\\* Other programs used more than {_DISTURBED:.0%} of the cores during a measurement.",
        ]
    return "\n".join(lines)


_ORDER = ["image", "prefill", "first token", "decode", "decode, long", "load"]


def _cells(row: Row, figures: Figures, column: Column) -> list[str]:
    median = statistics.median(row.ours)
    times = goal = rate = share = share_goal = ""
    if row.theirs:
        times = f"{statistics.median(row.theirs) / median:.2f}x"
    if row.stage in column.times:
        goal = f"{column.times[row.stage][list(TYPES).index(row.type)]:g}x"
    if row.work:
        bytes_bound = row.stage.startswith("decode")
        ceiling = (
            figures.ceilings.read_bytes_per_second if bytes_bound else figures.ceilings.per_second(row.unit)
        )
        rate = (
            f"{row.work / median / 1e9:.1f} GB/s"
            if bytes_bound
            else f"{row.work / median / 1e12:.3f} TFLOP/s"
        )
        share = f"{row.work / median / ceiling:.0%}"
    if row.stage in column.shares:
        share_goal = f"{column.shares[row.stage]:.0%}"
    names = {
        "image": f"image encoding, {TYPES[row.type]} tower",
        "prefill": f"prefill of {figures.prompt_tokens} tokens, {row.type}",
        "first token": f"picture and question to first token, {row.type}",
        "decode": f"decode after {CONTEXT} tokens, {row.type}",
        "decode, long": f"decode up to {LONG_CONTEXT} tokens, {row.type}",
        "load": f"load from the page cache, {row.type}",
    }
    if row.stage == "load":
        goal = f"< {LOAD_SECONDS:g} s"
    if row.stage == "decode, long" and (short := figures.row("decode", row.type)).ours:
        times = f"{statistics.median(short.ours) / median:.0%} of the speed after {CONTEXT}"
        goal = f"{LONG_SHARE:.0%}"
    star = "\\*" if any(share > _DISTURBED for share in row.others) else ""
    return [names[row.stage] + star, _time(row.theirs), _time(row.ours), times, goal, rate, share, share_goal]


def _time(seconds: list[float]) -> str:
    """Median, fastest and slowest."""
    if not seconds:
        return ""
    unit, scale = ("ms", 1e3) if statistics.median(seconds) < 1 else ("s", 1.0)
    median, least, most = (
        f"{scale * x:.3g}" for x in (statistics.median(seconds), min(seconds), max(seconds))
    )
    return f"{median} {unit} ({least} to {most})"


# --- Command line


def main() -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--isa", choices=tuple(COLUMNS), required=True, help="the column: ours forced, theirs built for it"
    )
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="folder of what is made once (13 GB)"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="where the figures go")
    parser.add_argument(
        "--llama", type=Path, metavar="ENV", help="an environment that has llama.cpp for this column"
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="6b", help="of the random model (default: 6b)"
    )
    parser.add_argument(
        "--threads", type=int, default=_core.default_thread_count(), help="(default: physical cores)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="one round with 8 of the decoder's blocks, for a first look"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="(default: all)")
    parser.add_argument(
        "--types", nargs="+", choices=tuple(TYPES), default=tuple(TYPES), help="(default: both)"
    )
    parser.add_argument(
        "--add", action="store_true", help="add to the figures in OUT, to measure piece by piece"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {arguments.rounds}")
    if arguments.isa not in (available := _core.available_isas()):
        parser.error(f"--isa: expected one that this CPU has ({', '.join(available)}), found {arguments.isa}")
    # As Ctrl-C does: what is measured so far is in the file, and no process stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_output(arguments.json)
        figures = Comparison(arguments).run(arguments.stages, arguments.types)
    except (WorkerError, OSError) as error:
        sys.exit(f"compare_llama_cpp.py: error: {error}")
    print(table(figures))


if __name__ == "__main__":
    main()
