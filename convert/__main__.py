"""The command line: ``python -m yivl_edge.convert``, which is ``yivl-edge convert``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from yivl_edge.convert import CheckpointError, convert
from yivl_edge.convert.options import LAYOUTS, TYPES, OnProgress

_EPILOG = """\
example:
  python -m yivl_edge.convert Yi-VL-6B -o yi-vl-6b-q4_0.gguf --type q4_0

FOLDER has config.json, tokenizer.model, the weights (safetensors or pytorch_model-*.bin, in shards or in one
file) and the ViT's folder, as published. With --layout pair, -o OUT.gguf writes the text model OUT.gguf and
the vision half OUT-mmproj.gguf. Files appear under their names only when they are complete.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status (0 done, 1 error, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        with _termination_raises(), _progress() as on_progress:
            result = convert(
                arguments.folder,
                arguments.output,
                type=arguments.type,
                vision_type=arguments.vision_type,
                layout=arguments.layout,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (CheckpointError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    for path in result.files:
        print(f"wrote {path} ({path.stat().st_size / 1e6:,.1f} MB)")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yivl-edge convert",
        description="Convert a published Yi-VL folder to GGUF.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the published folder")
    parser.add_argument("-o", "--output", metavar="OUT.gguf", required=True, help="the file to write")
    parser.add_argument(
        "--type", choices=TYPES, default="q8_0", help="of the decoder's matrices (default: q8_0)"
    )
    parser.add_argument(
        "--vision-type",
        choices=TYPES,
        help="of the ViT's and the projector's matrices (default: q8_0 with q4_0, otherwise as --type)",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="single",
        help="one file, or OUT.gguf and OUT-mmproj.gguf for llama.cpp (default: single)",
    )
    return parser


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
    sys.exit(main())
