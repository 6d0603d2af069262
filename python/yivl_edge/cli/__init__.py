"""The command line: ``yivl-edge chat|demo|inspect|bench|verify|imatrix|compare|convert|quantize``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import yivl_edge
from yivl_edge._core import DeviceError
from yivl_edge.cli import bench, chat, compare, demo, imatrix, inspect, verify
from yivl_edge.cli.arguments import Parser
from yivl_edge.cli.terminal import fail

_DESCRIPTION = "Talk with 01.AI's Yi-VL vision-language models about pictures, on this machine."
_EXAMPLE = """\
example:
  yivl-edge convert Yi-VL-6B -o yi-vl-6b-q4_k_m.gguf --type q4_k_m
  yivl-edge chat yi-vl-6b-q4_k_m.gguf --image photo.jpg --prompt "What is written on the sign?"

'yivl-edge COMMAND --help' describes a command.
"""

# 128 + the signal's number, as a shell reports it.
_INTERRUPTED = 130
_BROKEN_PIPE = 141


class _Version(argparse.Action):
    """Prints the version; reads the package's metadata only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"yivl-edge {yivl_edge.__version__}")
        parser.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = Parser(
        prog="yivl-edge",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chat.add_parser(commands)
    demo.add_parser(commands)
    inspect.add_parser(commands)
    bench.add_parser(commands)
    imatrix.add_parser(commands)
    compare.add_parser(commands)
    verify.add_parser(commands)
    # Only for the list in --help: their arguments are parsed where they are defined.
    commands.add_parser(
        "convert", help="make a model file from a published Yi-VL folder, or from a pair of files"
    )
    commands.add_parser("quantize", help="quantise the weights of a model file")
    return parser


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["convert"]:
        from yivl_edge.convert.__main__ import main as convert

        return convert(arguments[1:])
    if arguments[:1] == ["quantize"]:
        from yivl_edge.convert.__main__ import quantize_main

        return quantize_main(arguments[1:])
    args = _parser().parse_args(arguments)
    code: int = args.run(args)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command of ``yivl-edge``.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0 for success, 1 for an error, 2 for wrong usage, 130 after Ctrl-C, 141 when nobody
        reads the output any more.
    """
    # Of streams that are closed Python has none.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a "?" in its place, not the end of the answer.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    try:
        try:
            code = _run(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as end:  # argparse, after --help or a usage error
            code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer has nowhere to go; the interpreter would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except MemoryError as error:
        return fail(f"not enough memory: {error}")
    except (ValueError, OSError, DeviceError) as error:
        return fail(str(error))
    return code
