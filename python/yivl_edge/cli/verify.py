"""``yivl-edge verify``: whether a model file is sound, and this machine computes with it as it should."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from yivl_edge.cli.arguments import add_command, add_threads
from yivl_edge.cli.terminal import Progress, visible
from yivl_edge.verify import verify

_EXAMPLE = """\
example:
  yivl-edge verify yi-vl-6b-q4_k_m.gguf
  yivl-edge verify text.gguf --mmproj text-mmproj.gguf

Compares the file's bytes with the hashes that it carries, looks at what the converter found when it compared them with
the source's weights, and has this machine repeat the self-test. Exit status 1 if anything is not as it should be.
"""


class _Args(argparse.Namespace):
    """The options of this command."""

    file: str
    mmproj: str | None
    device: str
    threads: int | None
    json: bool


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``yivl-edge``."""
    parser = add_command(
        commands,
        "verify",
        run,
        help="check that a model file is sound and computes what it should here",
        description="Checks a model file's hashes and repeats the self-test that it carries.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("file", metavar="FILE", help="a file written by yivl-edge convert or quantize")
    parser.add_argument(
        "--mmproj",
        metavar="FILE",
        help="of a pair, the file with the vision tower; either half can be checked alone",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="what repeats the self-test, as for chat (default: auto)",
    )
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: _Args) -> int:
    """Prints the checks; 1 if one failed."""
    progress = Progress()
    try:
        report = verify(
            args.file, mmproj=args.mmproj, device=args.device, n_threads=args.threads, on_progress=progress
        )
    finally:
        progress.wipe()
    if args.json:
        print(json.dumps({"passed": report.passed, **asdict(report)}, indent=2))
    else:
        for check in report.checks:
            print(visible(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.found}"))
        if report.unchecked:
            print(f"not checked: {report.unchecked}")
        verdict = "is sound" + (" as far as it was checked" if report.unchecked else "")
        if not report.passed:
            verdict = "is NOT as it should be, or this machine computes wrongly"
        print(visible(f"{args.file} {verdict}" + (f" (backend: {report.backend})" if report.backend else "")))
    return 0 if report.passed else 1
