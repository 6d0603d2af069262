"""``yivl-edge bench``: how fast a model answers here, beside what this machine could do at most."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from yivl_edge import _core
from yivl_edge.cli.arguments import add_device, add_threads, integer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from yivl_edge.measure import Ceilings, Kernel
    from yivl_edge.model import Model

_EXAMPLE = """\
example:
  yivl-edge bench yi-vl-6b-q4_0.gguf
  yivl-edge bench yi-vl-6b-q4_0.gguf --image photo.jpg --prompt-tokens 512 --generate 64 --json result.json
  yivl-edge bench yi-vl-6b-q4_0.gguf --context 4000
  yivl-edge bench yi-vl-6b-q4_k_m.gguf --device cuda --profile

Other programs that run at the same time make every figure worse, the ceilings too: compare the shares.
"""

_QUESTION = "What is in this picture?"
_SHORT_CONTEXT = 4


class _Args(Protocol):
    file: str
    mmproj: str | None
    image: str | None
    prompt_tokens: int
    generate: int
    context: int | None
    runs: int
    threads: int | None
    device: str
    gpu_layers: int | None
    profile: bool
    json: str | None


@dataclass
class Row:
    """One stage: seconds of every run, and the work that one run is."""

    stage: str
    seconds: list[float]
    flop: float = 0.0
    unit: str = ""  # that computes them, as the ceilings name it
    bytes: float = 0.0
    tokens: int = 0

    @property
    def median(self) -> float:
        """The median run, in seconds."""
        return statistics.median(self.seconds)


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
        "--generate", type=integer(1), default=32, metavar="N", help="tokens to decode per run (32)"
    )
    parser.add_argument(
        "--context", type=integer(1), metavar="N", help="also measure decoding after N tokens of text"
    )
    parser.add_argument("--runs", type=integer(1), default=3, metavar="N", help="runs of each stage (3)")
    add_threads(parser)
    add_device(parser)
    parser.add_argument(
        "--profile",
        action="store_true",
        help="on a GPU: also time its kernels, stage by stage, in runs of their own",
    )
    parser.add_argument("--json", metavar="OUT", help="also write the figures to this file")


def run(args: _Args) -> int:
    """Measures and prints the table; writes JSON if asked."""
    from yivl_edge.files import check_output, write_whole
    from yivl_edge.measure import device_ceilings, machine_name, measure_ceilings, peak_resident_bytes

    if args.json is not None:
        check_output(args.json, args.file, args.mmproj, args.image)
    bench = _Bench(args)
    on_gpu = bench.stages.on_gpu
    if args.profile and not on_gpu:
        raise ValueError(f"--profile: expected a GPU, found {bench.model.device}")
    rows = list(bench.rows())
    peak = peak_resident_bytes()  # of the model alone: the ceilings take memory of their own
    ceilings = device_ceilings(bench.model) if on_gpu else measure_ceilings(bench.model.n_threads)
    print(_table(bench, rows, ceilings, peak))
    result = {
        "file": args.file,
        "machine": machine_name(),
        "computes": _computes(bench),
        "device": bench.model.device,
        "threads": bench.model.n_threads,
        "gpu_layers": bench.model.n_gpu_layers,
        "ceilings": asdict(ceilings),
        "stages": [asdict(row) | {"median": row.median} for row in rows],
        "peak_resident_bytes": peak,
    }

    def write() -> None:
        if args.json is not None:
            write_whole(args.json, (json.dumps(result, indent=2) + "\n").encode())

    write()
    if args.profile:  # of which a failure leaves the figures before it
        profile = bench.profile()
        for stage, kernels in profile.items():
            print(_profile_table(stage, kernels, ceilings))
        result["profile"] = {stage: [asdict(k) for k in kernels] for stage, kernels in profile.items()}
        write()
    return 0


class _Bench:
    model: Model

    def __init__(self, args: _Args) -> None:
        import numpy as np

        from yivl_edge.image import load_image
        from yivl_edge.measure import Stages
        from yivl_edge.model import Model

        self.args = args
        self.random = np.random.default_rng(0)
        self.picture: NDArray[np.uint8] = (
            self.random.integers(0, 256, (448, 448, 3), dtype=np.uint8)
            if args.image is None
            else load_image(args.image).copy()
        )
        self.load_seconds: list[float] = []
        for i in range(args.runs):
            self._say("loading", i)
            if i > 0:
                del self.model  # a GPU may not have room for two
            begin = time.perf_counter()
            self.model = Model(
                args.file,
                mmproj=args.mmproj,
                device=args.device,
                n_gpu_layers=args.gpu_layers,
                n_threads=args.threads,
            )
            self.load_seconds.append(time.perf_counter() - begin)
        if args.image is not None and self.model.config.vision is None:
            raise ValueError(
                f"{args.file} has no vision tower for --image: give the file of its pair with --mmproj"
            )
        self.stages = Stages(self.model, args.file, args.mmproj)
        limit = self.model.config.decoder.context_length
        for option, tokens, generated in (
            ("--prompt-tokens", args.prompt_tokens, 1),
            ("--generate", _SHORT_CONTEXT, args.generate + 1),
            ("--context and --generate", args.context or 0, args.generate + 1),
        ):
            if tokens + generated > limit:
                raise ValueError(
                    f"{option}: expected at most {limit} tokens with the reply, found {tokens} + {generated}"
                )

    def _say(self, stage: str, run: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\r\033[Kmeasuring {stage} {run + 1}/{self.args.runs}", end="", file=sys.stderr, flush=True
            )

    def rows(self) -> Iterator[Row]:
        """All stages that this model has. Where no one watches, each is told at once: what follows may fail."""
        for row in self._measured():
            if not sys.stderr.isatty():
                print(f"{row.stage}: {_time(row.median)}", file=sys.stderr, flush=True)
            yield row
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _measured(self) -> Iterator[Row]:
        sees = self.model.config.vision is not None
        yield Row("load", self.load_seconds)
        if sees:
            yield self._image()
        yield self._prefill()
        yield self._decode("decoding", _SHORT_CONTEXT)
        if self.args.context is not None:
            yield self._decode(f"decoding after {self.args.context} tokens", self.args.context)
        if sees:
            yield self._first_token()

    def profile(self) -> dict[str, list[Kernel]]:
        """The kernels of each stage, the longest first."""
        found = {}
        self.stages.kernels()  # from now on
        if self.model.config.vision is not None:
            self._say("kernels of image encoding", 0)
            self.stages.encode_image(self._next_picture())
            found["image encoding"] = self.stages.kernels()
        self._say("kernels of prefill", 0)
        self.stages.prefill(self.args.prompt_tokens)
        found["prefill"] = self.stages.kernels()
        context = self.args.context or _SHORT_CONTEXT
        self._say("kernels of decoding", 0)
        found["decoding"] = self.stages.decode_kernels(context, self.args.generate)
        return found

    def _next_picture(self) -> NDArray[np.uint8]:
        """The picture with a spot of another colour, so that nothing is kept from the last run."""
        height, width = self.picture.shape[:2]
        size = max(height, width) // 16 + 1  # what the model sees of it is more than a pixel
        spot = self.picture[height // 2 :, width // 2 :, :3][:size, :size]
        spot[:] = self.random.integers(0, 256, 3, dtype="uint8")
        return self.picture

    def _image(self) -> Row:
        seconds = []
        for i in range(self.args.runs):
            self._say("image encoding", i)
            seconds.append(self.stages.encode_image(self._next_picture()))
        return Row("image encoding", seconds, flop=self.stages.image_flop, unit=self.stages.image_unit)

    def _prefill(self) -> Row:
        count = self.args.prompt_tokens
        seconds = []
        for i in range(self.args.runs):
            self._say("prefill", i)
            seconds.append(self.stages.prefill(count))
        flop, unit = self.stages.prefill_flop(count), self.stages.prefill_unit
        return Row("prefill", seconds, flop=flop, unit=unit, tokens=count)

    def _decode(self, stage: str, context: int) -> Row:
        tokens, runs = self.args.generate, self.args.runs
        self._say(stage, runs - 1)
        seconds = self.stages.decode(context, tokens, runs)
        return Row(stage, seconds, bytes=self.stages.decode_bytes(context, tokens), tokens=1)

    def _first_token(self) -> Row:
        seconds, tokens = [], 0
        for i in range(self.args.runs):
            self._say("first token", i)
            reply = self.stages.answer(self._next_picture(), _QUESTION)
            seconds.append(reply.timings.first_token)
            tokens = reply.usage.prompt_tokens
        return Row("picture and question to first token", seconds, tokens=tokens)


def _profile_table(stage: str, kernels: list[Kernel], ceilings: Ceilings) -> str:
    total = sum(k.seconds for k in kernels)
    lines = [
        "",
        f"{'kernels of ' + stage:36} {'calls':>6} {'time':>10} {'':>5} {'GB/s':>9} {'':>5} {'TFLOP/s':>9} {'':>5}",
    ]
    for k in kernels:
        line = f"{k.name:36} {k.calls:>6} {k.seconds * 1e3:>8.3f}ms {k.seconds / total:>5.0%}"
        if k.bytes:
            rate = k.bytes / k.seconds
            line += f" {rate / 1e9:>9.1f} {rate / ceilings.read_bytes_per_second:>5.0%}"
        if k.flop:
            rate = k.flop / k.seconds
            line += f" {rate / 1e12:>9.2f} {rate / ceilings.packed_per_second:>5.0%}"
        lines.append(line)
    lines.append(f"{'together':43} {total * 1e3:>8.3f}ms")
    return "\n".join(lines)


def _table(bench: _Bench, rows: list[Row], ceilings: Ceilings, peak: int) -> str:
    from yivl_edge.measure import machine_name

    lines = [
        f"{os.path.basename(bench.args.file)}, {_computes(bench)}; {machine_name()}",
        f"ceilings: {ceilings}",
        "",
        f"{'stage':36} {'median':>10} {'fastest':>10} {'slowest':>10} {'rate':>14} {'of ceiling':>10}",
    ]
    for row in rows:
        rate, share = "", ""
        if row.flop:
            rate = f"{row.flop / row.median / 1e12:.3f} TFLOP/s"
            share = f"{row.flop / row.median / ceilings.per_second(row.unit):.0%}"
        elif row.bytes:
            rate = f"{row.bytes / row.median / 1e9:.1f} GB/s"
            share = f"{row.bytes / row.median / ceilings.read_bytes_per_second:.0%}"
        times = " ".join(f"{_time(s):>10}" for s in (row.median, min(row.seconds), max(row.seconds)))
        lines.append(f"{row.stage:36} {times} {rate:>14} {share:>10}")
        if row.flop or row.bytes:
            lines[-1] += f"   {row.tokens / row.median:.1f} tokens/s" if row.tokens else ""
    lines += ["", f"peak resident memory {peak / 1e9:.2f} GB"]
    if "emulated" in bench.model.device:
        lines.append("the device is emulated: these figures say nothing about any card")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"


def _computes(bench: _Bench) -> str:
    """What computes, in words."""
    model = bench.model
    layers = model.config.decoder.n_layers
    if not bench.stages.on_gpu:
        variant = _core.isa_variant(model.device)
        return f"{model.n_threads} threads, {model.device}" + (f" ({variant})" if variant else "")
    if model.n_gpu_layers == layers:
        return model.device
    return f"{model.device} with {model.n_gpu_layers} of {layers} layers, {model.n_threads} threads with the others"
