"""``yivl-edge imatrix``: what goes into a model's matrices while it talks about pictures, for the quantiser."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from yivl_edge import Model, _core
from yivl_edge.cli.arguments import PROMPTS_HELP, add_command, add_conversation_options
from yivl_edge.cli.terminal import Progress, note
from yivl_edge.conversations import Conversation, answer_logits, load_conversations, transcribe
from yivl_edge.convert.imatrix import write_imatrix
from yivl_edge.files import check_apart, check_output

_EXAMPLE = f"""\
example:
  yivl-edge convert Yi-VL-6B -o yi-vl-6b-f16.gguf --type f16
  yivl-edge imatrix yi-vl-6b-f16.gguf --images photos --prompts questions.txt -o yi-vl-6b.imatrix.gguf

{PROMPTS_HELP}"""

# What the rows that predict an answer's tokens count together, all others the rest. On those rows stands most of what
# rounding a decoder's matrix changes in the answers: with the demo model 0.6 to 1.0 of the squared gradient of their
# logits, though they are a fifteenth of the rows (docs/quantisation.md).
ANSWER_SHARE = 0.75


class _Args(argparse.Namespace):
    model: str
    mmproj: str | None
    images: str
    prompts: str
    output: str
    max_tokens: int
    limit: int | None
    device: str
    gpu_layers: int | None
    threads: int | None


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``yivl-edge``."""
    parser = add_command(
        commands,
        "imatrix",
        run,
        help="record which weights matter, for a better conversion to few bits",
        description="Records the mean square of every matrix's input columns while a model works through "
        "conversations about pictures, in llama.cpp's format.",
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="the model file, of 16 or 32 bits; of a pair, the text model"
    )
    parser.add_argument("--mmproj", metavar="FILE", help="of a pair, the file with the vision tower")
    add_conversation_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE.gguf", required=True, help="the file to write")


def run(args: _Args) -> int:
    """Works through the conversations, then writes the file."""
    check_output(args.output, args.model, args.mmproj, args.prompts)
    conversations = load_conversations(args.images, args.prompts, args.limit)
    check_apart(args.output, *{conversation.image for conversation in conversations})
    model = Model(
        args.model,
        mmproj=args.mmproj,
        device=args.device,
        n_gpu_layers=args.gpu_layers,
        n_threads=args.threads,
    )
    columns, positions = record(model, conversations, args.max_tokens, Progress())
    write_imatrix(
        args.output,
        columns,
        datasets=[args.prompts],
        chunk_count=len(conversations),
        chunk_size=positions // len(conversations),
    )
    note(f"{len(columns)} matrices, {len(conversations)} conversations, {positions} tokens: {args.output}")
    return 0


def record(
    model: Model, conversations: Sequence[Conversation], max_tokens: int, progress: Progress
) -> tuple[Mapping[str, tuple[NDArray[np.float64], int]], int]:
    """What goes into a model's matrices in some conversations, image tokens and answers included.

    Args:
        model: The model.
        conversations: What it reads. Where the last turn is the user's, it answers.
        max_tokens: Longest answer.
        progress: Shows how far this is.

    Returns:
        By tensor name the sums of squares of the input columns, (I,), and the number of rows; and how many tokens were
        read. In the decoder's blocks, rows that predict an answer's tokens are weighed: they count `ANSWER_SHARE`.
    """
    statistics = _core.ActivationStatistics(model._model)
    positions = 0
    try:
        for number, conversation in enumerate(conversations, 1):
            progress.prefix = f"{number}/{len(conversations)} "
            transcript = transcribe(model, conversation, max_tokens, progress)
            # Of the output head what an answer needs counts, as in use, and nothing else is computed.
            answer_logits(model, conversation, transcript, progress, statistics)
            positions += model._model.n_positions(transcript.ids)
    finally:
        progress.wipe()
    return {name: _weighed(*sums) for name, sums in statistics.columns.items()}, positions


def _weighed(
    sums: NDArray[np.float64], rows: int, marked: NDArray[np.float64], marked_rows: int
) -> tuple[NDArray[np.float64], int]:
    """Sums of all rows as they would be if those marked were `ANSWER_SHARE` of them."""
    if marked_rows in (0, rows):
        return sums, rows
    other = (sums - marked) / (rows - marked_rows)
    return rows * (ANSWER_SHARE * marked / marked_rows + (1 - ANSWER_SHARE) * other), rows
