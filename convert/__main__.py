"""The command lines ``yivl-edge convert`` (``python -m yivl_edge.convert``) and ``yivl-edge quantize``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from yivl_edge.cli.arguments import Parser, add_threads
from yivl_edge.cli.terminal import fail
from yivl_edge.convert import CheckpointError, Conversion, convert
from yivl_edge.convert.options import LAYOUTS, PRESETS, WEIGHT_TYPES, OnProgress

_CONVERT_EPILOG = """\
examples:
  python -m yivl_edge.convert Yi-VL-6B -o yi-vl-6b-q4_k_m.gguf --type q4_k_m
  yivl-edge convert text.gguf --mmproj mmproj.gguf -o one.gguf

SOURCE is a folder with config.json, tokenizer.model, the weights (safetensors or pytorch_model-*.bin, in shards or
in one file) and the ViT's folder, as published; or the folder of its port to transformers; or a GGUF file, with
--mmproj for the other half of a pair. With --layout pair, -o OUT.gguf writes the text model OUT.gguf and the vision
half OUT-mmproj.gguf. Files appear under their names only when they are complete.
"""
_QUANTIZE_EPILOG = """\
examples:
  yivl-edge quantize yi-vl-6b-f16.gguf yi-vl-6b-q4_k_m.gguf --type q4_k_m --imatrix yi-vl-6b-imatrix.gguf
  yivl-edge quantize yi-vl-6b-f16.gguf small.gguf --type q4_k_m --tensor-type attn_v=q8_0

OUT.gguf appears under its name only when it is complete.
"""


class _Args(argparse.Namespace):
    """The options of both commands."""

    source: str
    output: str
    mmproj: str | None
    type: str | None
    vision_type: str | None
    tensor_type: list[tuple[str, str]]
    imatrix: str | None
    layout: str
    threads: int | None
    dry_run: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``yivl-edge convert``; return the exit status: 0 done, 1 error, 130 interrupted. Wrong usage exits: 2."""
    return _run(_parsed(_convert_parser(), argv))


def quantize_main(argv: Sequence[str] | None = None) -> int:
    """Run ``yivl-edge quantize``; return the exit status as `main`."""
    return _run(_parsed(_quantize_parser(), argv))


def _parsed(parser: Parser, argv: Sequence[str] | None) -> _Args:
    args = parser.parse_args(argv, _Args())
    patterns = [pattern for pattern, _ in args.tensor_type]
    if len(set(patterns)) != len(patterns):
        parser.error("--tensor-type: every pattern may be given once")
    choices = {
        "--vision-type": args.vision_type,
        "--tensor-type": args.tensor_type,
        "--imatrix": args.imatrix,
    }
    given = [option for option, value in choices.items() if value]
    if given and args.type is None and not Path(args.source).is_dir():
        parser.error(f"{', '.join(given)} without --type: the types of a GGUF file then stay as they are")
    return args


def _run(args: _Args) -> int:
    try:
        with _termination_raises(), _progress() as on_progress:
            result = convert(
                args.source,
                args.output,
                mmproj=args.mmproj,
                type=args.type,  # type: ignore[arg-type]  # checked against the choices
                vision_type=args.vision_type,  # type: ignore[arg-type]
                tensor_types=dict(args.tensor_type),  # type: ignore[arg-type]
                imatrix=args.imatrix,
                layout=args.layout,  # type: ignore[arg-type]
                n_threads=args.threads,
                dry_run=args.dry_run,
                on_progress=None if args.dry_run else on_progress,
            )
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (CheckpointError, ModuleNotFoundError, ValueError, OSError, MemoryError) as error:
        return fail(str(error))
    if args.dry_run:
        print("\n".join(_plan(result)))
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    for path, size in zip(result.files, result.sizes, strict=True):
        print(f"{'would write' if args.dry_run else 'wrote'} {path} ({size / 1e6:,.1f} MB)")
    return 0


def _plan(result: Conversion) -> Iterator[str]:
    """A line for each tensor: name, shape, types and size."""
    width = max(len(tensor.name) for tensor in result.tensors)
    shapes = [" x ".join(map(str, tensor.shape)) for tensor in result.tensors]
    shape_width = max(map(len, shapes))
    for tensor, shape in zip(result.tensors, shapes, strict=True):
        types = f"{tensor.source_type:>6} -> {tensor.type:<6}"
        yield f"{tensor.name:<{width}}  {shape:>{shape_width}}  {types}  {tensor.nbytes / 1e6:>10,.3f} MB"


def _convert_parser() -> Parser:
    parser = _parser("convert", "Convert Yi-VL weights to GGUF.", _CONVERT_EPILOG)
    parser.add_argument("source", metavar="SOURCE", help="the published folder, its port, or a GGUF file")
    parser.add_argument("-o", "--output", metavar="OUT.gguf", required=True, help="the file to write")
    _add_options(parser, type_default="q8_0; of a GGUF file, as they are")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="single",
        help="one file, or OUT.gguf and OUT-mmproj.gguf for llama.cpp (default: single)",
    )
    return parser


def _quantize_parser() -> Parser:
    parser = _parser("quantize", "Quantise the weights of a model file.", _QUANTIZE_EPILOG)
    parser.add_argument("source", metavar="IN.gguf", help="the model file, best of type f16, bf16 or f32")
    parser.add_argument("output", metavar="OUT.gguf", help="the file to write")
    parser.set_defaults(layout="single")
    _add_options(parser, type_default=None)
    return parser


def _parser(command: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=f"yivl-edge {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_options(parser: Parser, *, type_default: str | None) -> None:
    parser.add_argument(
        "--type",
        choices=PRESETS,
        metavar="TYPE",
        required=type_default is None,
        help=f"of the decoder's matrices: {', '.join(PRESETS)}"
        + ("" if type_default is None else f" (default: {type_default})"),
    )
    parser.add_argument(
        "--vision-type",
        choices=WEIGHT_TYPES,
        metavar="TYPE",
        help="of the ViT's and the projector's matrices (default: q8_0, or an unquantised --type): "
        + ", ".join(WEIGHT_TYPES),
    )
    parser.add_argument(
        "--tensor-type",
        type=_tensor_type,
        metavar="PATTERN=TYPE",
        action="append",
        default=[],
        help="the type of all tensors whose name the regular expression is found in; may be repeated, the first counts",
    )
    parser.add_argument("--imatrix", metavar="FILE", help="weigh errors by this importance matrix")
    parser.add_argument("--mmproj", metavar="FILE", help="of a pair, the file with the vision tower")
    add_threads(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be written, and write nothing"
    )


def _tensor_type(text: str) -> tuple[str, str]:
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern or type_name not in WEIGHT_TYPES:
        raise argparse.ArgumentTypeError(f"expected PATTERN=TYPE with a type of {', '.join(WEIGHT_TYPES)}")
    return pattern, type_name


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar on a terminal, a line for every tenth elsewhere."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "showing progress needs the package tqdm: pip install 'yivl-edge[convert]'"
            ) from error
        bar: tqdm[NoReturn] | None = None

        def draw(stage: str, fraction: float) -> None:
            nonlocal bar
            if bar is None:
                bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
                bar = tqdm(total=100, desc=stage, bar_format=bar_format)
            bar.update(100 * fraction - bar.n)

        try:
            yield draw
        finally:
            if bar is not None:
                bar.close()
    else:
        tenths = 0

        def print_line(stage: str, fraction: float) -> None:
            nonlocal tenths
            if int(fraction * 10) > tenths:
                tenths = int(fraction * 10)
                print(f"{stage}: {10 * tenths}%", file=sys.stderr, flush=True)

        yield print_line


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as exceptions do, so that the temporary file goes."""

    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number is not None]
    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    from yivl_edge.cli import main as command_line

    sys.exit(command_line(["convert", *sys.argv[1:]]))
