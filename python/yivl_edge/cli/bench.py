"""``yivl-edge bench``: how fast a model answers here, beside what this machine could do at most."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from yivl_edge import _core
from yivl_edge.cli.arguments import integer

_EXAMPLE = """\
example:
  yivl-edge bench yi-vl-6b-q4_0.gguf
  yivl-edge bench yi-vl-6b-q4_0.gguf --image photo.jpg --prompt-tokens 512 --generate 64 --json result.json

Other programs that run at the same time make every figure worse, the ceilings too: compare the shares.
"""

_QUESTION = "What is in this picture?"
_WARM_UP_TOKENS = 4
_READ_BYTES = 1 << 28  # far more than the caches hold
_MULTIPLY_ADD_ROUNDS = 1 << 22


class _Args(Protocol):
    file: str
    mmproj: str | None
    image: str | None
    prompt_tokens: int
    generate: int
    runs: int
    threads: int | None
    json: str | None


@dataclass
class Row:
    """One stage: seconds of every run, and the work that one run is."""

    stage: str
    seconds: list[float]
    flop: float = 0.0
    bytes: float = 0.0
    tokens: int = 0

    @property
    def median(self) -> float:
        """The median run, in seconds."""
        return statistics.median(self.seconds)


@dataclass
class Ceilings:
    """What this machine reached in this run, on as many threads as the model uses."""

    read_bytes_per_second: float
    flop_per_second: float
    """float32 multiply-adds of the instruction set in use."""


def add_parser(commands: Any) -> None:
    """Adds ``bench`` to the commands of ``yivl-edge``."""
    parser = commands.add_parser(
        "bench",
        help="measure loading, image encoding, prefill and decoding",
        description="Measures the stages of an answer, beside this machine's own ceilings.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="the model file; of a pair, the text model")
    parser.add_argument("--mmproj", metavar="FILE", help="of a pair, the file with the vision tower")
    parser.add_argument("--image", metavar="PICTURE", help="the picture to encode (default: noise)")
    parser.add_argument(
        "--prompt-tokens", type=integer(1), default=512, metavar="N", help="length of the text prompt (512)"
    )
    parser.add_argument(
        "--generate", type=integer(2), default=32, metavar="N", help="tokens to decode per run (32)"
    )
    parser.add_argument("--runs", type=integer(1), default=3, metavar="N", help="runs of each stage (3)")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="threads (one per physical core)")
    parser.add_argument("--json", metavar="OUT", help="also write the figures to this file")


def run(args: _Args) -> int:
    """Measures and prints the table; writes JSON if asked."""
    bench = _Bench(args)
    rows = bench.rows()
    peak = _peak_resident_bytes()  # of the model alone: the ceilings take memory of their own
    ceilings = bench.ceilings()
    print(_table(bench, rows, ceilings, peak))
    if args.json is not None:
        result = {
            "file": args.file,
            "device": bench.core.backend_name,
            "threads": bench.core.n_threads,
            "ceilings": asdict(ceilings),
            "stages": [asdict(row) | {"median": row.median} for row in rows],
            "peak_resident_bytes": peak,
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return 0


class _Bench:
    def __init__(self, args: _Args) -> None:
        from yivl_edge.model import Model

        self.args = args

        self.load_seconds: list[float] = []
        for i in range(args.runs):
            self._say(f"loading {i + 1}/{args.runs}")
            begin = time.perf_counter()
            self.model = Model(args.file, mmproj=args.mmproj, n_threads=args.threads)
            self.load_seconds.append(time.perf_counter() - begin)
        self.core = self.model._model
        decoder = self.core.config.decoder
        if args.prompt_tokens + args.generate + _WARM_UP_TOKENS > decoder.context_length:
            raise ValueError(
                f"--prompt-tokens and --generate: expected at most {decoder.context_length} tokens together, "
                f"found {args.prompt_tokens} + {args.generate}"
            )
        self.random = np.random.default_rng(0)

    def _say(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[Kmeasuring {text}", end="", file=sys.stderr, flush=True)

    def ceilings(self) -> Ceilings:
        """The best of several tries each."""
        machine = _core.Ceilings("", self.core.n_threads)
        values = np.ones(_READ_BYTES // 4, np.float32)
        reads, flops = [], []
        for _ in range(5):
            begin = time.perf_counter()
            machine.read(values)
            reads.append(_READ_BYTES / (time.perf_counter() - begin))
            begin = time.perf_counter()
            operations = machine.multiply_add(_MULTIPLY_ADD_ROUNDS)
            flops.append(operations / (time.perf_counter() - begin))
        return Ceilings(max(reads), max(flops))

    def rows(self) -> list[Row]:
        """All stages that this model has."""
        rows = [Row("load", self.load_seconds)]
        with self.model._borrowed_session() as session:
            if self.model.config.vision is not None:
                rows.append(self._image(session))
            rows.append(self._prefill(session))
            rows.append(self._decode(session))
        if self.model.config.vision is not None:
            rows.append(self._first_token())
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return rows

    def _picture(self) -> NDArray[np.uint8]:
        """The picture with one pixel changed, so that nothing is kept from the last run."""
        from yivl_edge.image import load_image

        picture: NDArray[np.uint8] = (
            self.random.integers(0, 256, (448, 448, 3), dtype=np.uint8)
            if self.args.image is None
            else load_image(self.args.image).copy()
        )
        height, width = picture.shape[:2]
        picture[height // 2, width // 2, :3] = self.random.integers(0, 256, 3, dtype=np.uint8)
        return picture

    def _image(self, session: _core.Session) -> Row:
        vision, decoder = self.core.config.vision, self.core.config.decoder
        assert vision is not None
        seconds = []
        for i in range(self.args.runs):
            self._say(f"image encoding {i + 1}/{self.args.runs}")
            pixels = self.model.preprocess(self._picture())
            begin = time.perf_counter()
            session.encode_image(pixels, _core.Control())
            seconds.append(time.perf_counter() - begin)
        n, w, d = vision.n_patches, vision.width, decoder.width
        per_block = 2 * (n + 1) * (4 * w * w + 2 * w * vision.mlp_width) + 4 * (n + 1) ** 2 * w
        flop = vision.n_blocks * per_block + 2 * n * (3 * vision.patch_size**2 * w + w * d + d * d)
        return Row("image encoding", seconds, flop=flop)

    def _ids(self, count: int) -> list[int]:
        """Random ids of ordinary pieces."""
        vocab = self.core.config.decoder.vocab_size
        return [int(i) for i in self.random.integers(min(259, vocab - 1), vocab, count)]

    def _generate(self, session: _core.Session, prompt: list[int], tokens: int) -> tuple[float, float, int]:
        """Seconds of prefill and of decoding, and how many tokens the latter were."""
        sampling = _core.SamplingOptions(temperature=0.0)
        session.begin(prompt, None, tokens, sampling, [])
        while session.next(_core.Control()) is not None:
            pass
        _, prefill, _, decode = session.timings
        return prefill, decode, session.usage[2] - 1

    def _prefill(self, session: _core.Session) -> Row:
        c, count = self.core.config.decoder, self.args.prompt_tokens
        seconds = []
        for i in range(self.args.runs):
            self._say(f"prefill {i + 1}/{self.args.runs}")
            seconds.append(self._generate(session, self._ids(count), 1)[0])
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        per_layer = 2 * count * (2 * c.width * (q + kv) + 3 * c.width * c.mlp_width) + 2 * count**2 * q
        return Row("prefill", seconds, flop=c.n_layers * per_layer + 2 * c.width * c.vocab_size, tokens=count)

    def _decode(self, session: _core.Session) -> Row:
        c = self.core.config.decoder
        wanted = self.args.generate
        seconds = []
        for i in range(self.args.runs):
            self._say(f"decoding {i + 1}/{self.args.runs}")
            self._generate(session, self._ids(_WARM_UP_TOKENS), 2)
            spent, tokens = 0.0, 0
            while tokens < wanted:  # a model may end its reply early
                _, decode, count = self._generate(session, self._ids(_WARM_UP_TOKENS), wanted - tokens + 1)
                spent, tokens = spent + decode, tokens + count
            seconds.append(spent / tokens)
        weights = sum(
            t.nbytes
            for t in _core.GgufFile.open(self.args.file).tensors
            if t.name.startswith(("blk.", "output"))
        )
        kv = 2 * c.n_layers * c.n_kv_heads * c.head_dim * 4 * (_WARM_UP_TOKENS + wanted // 2)
        return Row("decoding", seconds, bytes=weights + kv, tokens=1)

    def _first_token(self) -> Row:
        seconds = []
        tokens = 0
        for i in range(self.args.runs):
            self._say(f"first token {i + 1}/{self.args.runs}")
            reply = self.model.chat(self._picture(), _QUESTION, max_tokens=1, temperature=0.0)
            seconds.append(reply.timings.first_token)
            tokens = reply.usage.prompt_tokens - reply.usage.cached_tokens
        return Row("picture and question to first token", seconds, tokens=tokens)


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _table(bench: _Bench, rows: list[Row], ceilings: Ceilings, peak: int) -> str:
    lines = [
        f"{os.path.basename(bench.args.file)}, {bench.core.n_threads} threads, {bench.core.backend_name}",
        f"ceilings: {ceilings.read_bytes_per_second / 1e9:.1f} GB/s read, "
        f"{ceilings.flop_per_second / 1e12:.3f} TFLOP/s float32",
        "",
        f"{'stage':36} {'median':>10} {'fastest':>10} {'slowest':>10} {'rate':>14} {'of ceiling':>10}",
    ]
    for row in rows:
        rate, share = "", ""
        if row.flop:
            rate = f"{row.flop / row.median / 1e12:.3f} TFLOP/s"
            share = f"{row.flop / row.median / ceilings.flop_per_second:.0%}"
        elif row.bytes:
            rate = f"{row.bytes / row.median / 1e9:.1f} GB/s"
            share = f"{row.bytes / row.median / ceilings.read_bytes_per_second:.0%}"
        times = " ".join(f"{s:>9.3f}s" for s in (row.median, min(row.seconds), max(row.seconds)))
        lines.append(f"{row.stage:36} {times} {rate:>14} {share:>10}")
        if row.tokens and row.stage in ("prefill", "decoding"):
            lines[-1] += f"   {row.tokens / row.median:.1f} tokens/s"
    lines += ["", f"peak resident memory {peak / 1e9:.2f} GB"]
    return "\n".join(lines)
