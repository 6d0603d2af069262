"""What commands share on the command line. Numbers are checked before a model is opened."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from yivl_edge.bounds import MOST_THREADS

PROMPTS_HELP = """\
The prompts are a text file: a question per line, asked about each picture by itself; or JSON per line,
{"image": "name.jpg", "messages": [{"role": "user", "content": "What is this?"}, ...]}, where the last message may be
the assistant's. Where it is the user's, the model's most likely answer is added.
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"yivl-edge: error: {message} (see {self.prog} --help)\n")


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[Any], int],
    *,
    help: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    """Adds a command that `run` carries out to those of ``yivl-edge``."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_device(parser: argparse._ActionsContainer, default: str = "auto") -> None:
    """Adds the options that say what computes."""
    parser.add_argument(
        "--device",
        default=default,
        metavar="D",
        help=f"cpu, cuda, cuda:1, ... or auto: a GPU where the model fits (default: {default})",
    )
    parser.add_argument(
        "--gpu-layers",
        type=integer(0),
        metavar="N",
        help="of the decoder's layers, how many a GPU runs (default: with cuda as many as fit, with auto all)",
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    """Adds the option that says how many threads compute."""
    parser.add_argument(
        "--threads",
        type=integer(1, MOST_THREADS),
        metavar="N",
        help="threads (default: one per physical core)",
    )


_LARGEST = 2**31 - 1  # more of anything would not work


def integer(low: int, high: int = _LARGEST) -> Callable[[str], int]:
    """Parser of an integer from `low` to `high`, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            limits = f"of at least {low}" if high == _LARGEST and value < low else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, found {text!r}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Parser of a number from `low` to `high`; with `above`, `low` itself is refused."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low < value if above else low <= value) or not value <= high:
            limits = f"above {low:g} and up to" if above else f"from {low:g} to"
            raise argparse.ArgumentTypeError(f"expected a number {limits} {high:g}, found {text!r}")
        return value

    return parse


def add_conversation_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which conversations are read."""
    parser.add_argument("--images", metavar="DIR", required=True, help="the folder of the pictures")
    parser.add_argument(
        "--prompts", metavar="FILE", required=True, help="questions, or conversations as JSON lines"
    )
    parser.add_argument(
        "--max-tokens", type=integer(1), default=64, metavar="N", help="longest answer of the model (64)"
    )
    parser.add_argument(
        "--limit", type=integer(1), metavar="N", help="only the first N conversations (default: all)"
    )
    add_device(parser)
    add_threads(parser)
