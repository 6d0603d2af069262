"""``yivl-edge demo``: the small model that comes with the package, and pictures to try it on."""

from __future__ import annotations

import argparse
from pathlib import Path

from yivl_edge.cli.chat import INTERRUPTED, Conversation, Options, add_options, converse
from yivl_edge.cli.terminal import note, read_line
from yivl_edge.data import MODEL, samples
from yivl_edge.model import Model

_EXAMPLE = """\
examples:
  yivl-edge demo
  yivl-edge demo --sample four-shapes
  yivl-edge demo --once

The model is small and knows drawings of coloured shapes, and short printed words and numbers, in English and Chinese.
It shows how the engine behaves; the published Yi-VL models are what sees photographs.
"""

# What --once asks, each for itself.
_QUESTIONS = ("What is in the picture?", "图中有几个图形？", "Is there a star in the picture?")


class _Args(Options):
    sample: str | None
    once: bool


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``yivl-edge``."""
    parser = commands.add_parser(
        "demo",
        help="try the small model that comes with the package",
        description="Talks about a picture with the small model that comes with the package.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, model=str(MODEL))
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--sample", choices=sorted(samples()), help="the sample picture to talk about")
    pictures.add_argument("--image", metavar="PICTURE", help="a picture of your own")
    parser.add_argument(
        "--once",
        action="store_true",
        help="ask three prepared questions, print answers and timings, and exit",
    )
    add_options(parser, temperature=0.0)  # its answers are short and certain


def run(args: _Args) -> int:
    """Three prepared questions with --once, a conversation otherwise."""
    picture = _picture(args)
    note(f"the picture is {picture}")
    model = Model.demo(
        device=args.device,
        n_gpu_layers=args.gpu_layers,
        n_ctx=args.n_ctx,
        n_threads=args.threads,
        max_image_pixels=args.max_image_pixels,
    )
    args.timings = args.timings or args.once
    conversation = Conversation(model, args)
    conversation.show(str(picture))
    if not args.once:
        return converse(conversation)
    for question in _QUESTIONS:
        conversation.reset()
        print(f"> {question}", flush=True)
        if not conversation.ask(question):
            return INTERRUPTED
    return 0


def _picture(args: _Args) -> Path:
    """The picture asked for; without one, the person's choice, or the first where there is nobody to ask."""
    if args.image is not None:
        return Path(args.image)
    pictures = samples()
    names = sorted(pictures)
    if args.sample is not None:
        return pictures[args.sample]
    if args.once:
        return pictures[names[0]]
    for number, name in enumerate(names, 1):
        note(f"{number} {name}: {pictures[name]}")
    while True:
        try:
            answer = read_line(f"Which picture, 1 to {len(names)}? ").strip() or "1"
        except EOFError:
            raise ValueError(
                f"expected a picture, 1 to {len(names)}, found the end of the input: give it with --sample or --image"
            ) from None
        if answer in names:
            return pictures[answer]
        if answer.isdecimal() and 1 <= int(answer) <= len(names):
            return pictures[names[int(answer) - 1]]
