"""``yivl-edge compare``: how far a model's predictions are from those of another, such as its quantised form."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yivl_edge import Model, _core
from yivl_edge.cli.arguments import PROMPTS_HELP, add_command, add_conversation_options
from yivl_edge.cli.inspect import inspect
from yivl_edge.cli.terminal import Progress
from yivl_edge.conversations import (
    Conversation,
    Transcript,
    answer_logits,
    load_conversations,
    transcribe,
)
from yivl_edge.files import check_apart, check_output, write_whole

_EXAMPLE = f"""\
example:
  yivl-edge compare yi-vl-6b-f16.gguf yi-vl-6b-q4_k_m.gguf --images photos --prompts questions.txt

{PROMPTS_HELP}"""

# Rows of logits that are widened to float64 at a time.
_ROWS = 32


class _Args(argparse.Namespace):
    a: str
    b: str
    mmproj_a: str | None
    mmproj_b: str | None
    images: str
    prompts: str
    max_tokens: int
    limit: int | None
    device: str
    gpu_layers: int | None
    threads: int | None
    json: str | None


@dataclass(frozen=True)
class Predictions:
    """What two models make of the same tokens; natural logarithms."""

    divergence: NDArray[np.float64]
    """(A,): of each token's distributions, KL(A||B)."""
    agreement: NDArray[np.bool_]
    """(A,): whether both find the same token the most likely."""
    log_a: NDArray[np.float64]
    """(A,): log probability of the token that stands there, by A."""
    log_b: NDArray[np.float64]
    """(A,): the same by B."""


@dataclass(frozen=True)
class Comparison:
    """Predictions summed up."""

    tokens: int
    kl_mean: float
    """nats per token, as the next three."""
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    """0 to 1."""
    perplexity_a: float
    perplexity_b: float


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``yivl-edge``."""
    parser = add_command(
        commands,
        "compare",
        run,
        help="measure how far a quantised model is from its original",
        description="Compares what two models predict for the assistant's tokens in the same conversations: "
        "Kullback-Leibler divergence, agreement on the most likely token, perplexity; file sizes beside them.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("a", metavar="A", help="the original's file")
    parser.add_argument("b", metavar="B", help="the file to compare with it")
    parser.add_argument(
        "--mmproj-a", metavar="FILE", help="if A is of a pair, the file with the vision tower"
    )
    parser.add_argument("--mmproj-b", metavar="FILE", help="the same of B")
    add_conversation_options(parser)
    parser.add_argument("--json", metavar="OUT", help="also write the figures to this file")


def run(args: _Args) -> int:
    """Compares and prints the table; writes JSON if asked."""
    files = (args.a, args.mmproj_a), (args.b, args.mmproj_b)
    contents = [inspect(path, mmproj) for path, mmproj in files]
    if args.json is not None:
        check_output(args.json, args.a, args.mmproj_a, args.b, args.mmproj_b, args.prompts)
    conversations = load_conversations(args.images, args.prompts, args.limit)
    if args.json is not None:
        check_apart(args.json, *{conversation.image for conversation in conversations})
    a, b = (
        Model(path, mmproj=mmproj, device=args.device, n_gpu_layers=args.gpu_layers, n_threads=args.threads)
        for path, mmproj in files
    )
    check_same_vocabulary(args.a, args.b)
    progress = Progress()
    try:
        reference = read_conversations(a, conversations, args.max_tokens, progress)
        result = summarise(
            predictions(a_logits, answer_logits(b, c, t, progress), t.answer_ids())
            for c, t, a_logits in reference
        )
    finally:
        progress.wipe()

    sizes = {
        name: {
            "files": [file["path"] for file in found["files"]],
            "bytes": sum(file["bytes"] for file in found["files"]),
            "bits_per_weight": found["bits_per_weight"],
        }
        for name, found in zip("ab", contents, strict=True)
    }
    print(_table(sizes, result, len(conversations)))
    if args.json is not None:
        figures = sizes | {"conversations": len(conversations)} | _json_figures(result)
        write_whole(args.json, (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())
    return 0


def _json_figures(result: Comparison) -> dict[str, Any]:
    """JSON has no infinity, which perplexity may be: null."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(result).items()}


def check_same_vocabulary(a: str, b: str) -> None:
    """Raises ValueError unless the token ids of two files mean the same."""
    pieces_a, pieces_b = (_core.read_tokenizer_config(_core.GgufFile.open(path)).pieces for path in (a, b))
    if len(pieces_a) != len(pieces_b):
        raise ValueError(
            f"expected two models with one vocabulary, found {len(pieces_a)} pieces in {a}, {len(pieces_b)} in {b}"
        )
    for i, (piece_a, piece_b) in enumerate(zip(pieces_a, pieces_b, strict=True)):
        if piece_a != piece_b:
            raise ValueError(
                "expected two models with one vocabulary, "
                f"found that token {i} is {piece_a!r} in {a} and {piece_b!r} in {b}"
            )


def read_conversations(
    model: Model, conversations: Sequence[Conversation], max_tokens: int, progress: Progress
) -> Iterator[tuple[Conversation, Transcript, NDArray[np.float32]]]:
    """Of each conversation its transcript, answered by the model where it ends with a question, and `answer_logits`."""
    for number, conversation in enumerate(conversations, 1):
        progress.prefix = f"{number}/{len(conversations)} "
        transcript = transcribe(model, conversation, max_tokens, progress)
        yield conversation, transcript, answer_logits(model, conversation, transcript, progress)


def predictions(a: NDArray[np.float32], b: NDArray[np.float32], ids: NDArray[np.int64]) -> Predictions:
    """Compares the logits of two models for the same tokens, in float64.

    With p = softmax(a) and q = softmax(b), row by row: KL(A||B) = sum_v p_v (log p_v - log q_v), 0 where both agree
    (Kullback and Leibler, "On Information and Sufficiency", 1951).

    Args:
        a: Logits of the one model, (A, V).
        b: Logits of the other, (A, V).
        ids: The tokens that they predict, (A,).
    """
    divergence, log_a, log_b = (np.empty(len(ids)) for _ in range(3))
    for begin in range(0, len(ids), _ROWS):
        rows = slice(begin, begin + _ROWS)
        log_p, log_q = _log_softmax(a[rows]), _log_softmax(b[rows])
        divergence[rows] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        chosen = ids[rows, None]
        log_a[rows] = np.take_along_axis(log_p, chosen, axis=1)[:, 0]
        log_b[rows] = np.take_along_axis(log_q, chosen, axis=1)[:, 0]
    return Predictions(divergence, a.argmax(axis=1) == b.argmax(axis=1), log_a, log_b)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def summarise(parts: Iterable[Predictions]) -> Comparison:
    """One figure of each kind for all conversations.

    Perplexity is exp(-mean log p(token)) (Jelinek et al., "Perplexity - a measure of the difficulty of speech
    recognition tasks", 1977).

    Raises:
        ValueError: There is no token to compare.
    """
    found = list(parts)
    divergence, agreement, log_a, log_b = (
        np.concatenate([getattr(part, name) for part in found])
        for name in ("divergence", "agreement", "log_a", "log_b")
    )
    if not len(divergence):
        raise ValueError("expected something that the assistant says, found only empty answers")
    if not (np.isfinite(divergence).all() and np.isfinite(log_a).all() and np.isfinite(log_b).all()):
        raise ValueError("expected finite logits, found others: a model's weights are damaged")
    with np.errstate(over="ignore"):  # infinite then
        perplexity_a, perplexity_b = (float(np.exp(-logs.mean())) for logs in (log_a, log_b))
    return Comparison(
        tokens=len(divergence),
        kl_mean=float(divergence.mean()),
        kl_median=float(np.median(divergence)),
        kl_p99=float(np.percentile(divergence, 99)),
        kl_max=float(divergence.max()),
        top1_agreement=float(agreement.mean()),
        perplexity_a=perplexity_a,
        perplexity_b=perplexity_b,
    )


def _table(sizes: dict[str, Any], result: Comparison, conversations: int) -> str:
    rows = [
        ("", "A", "B"),
        ("size, MB", *(f"{sizes[name]['bytes'] / 1e6:,.1f}" for name in "ab")),
        ("bits per weight", *(f"{sizes[name]['bits_per_weight']:.2f}" for name in "ab")),
        ("perplexity", f"{result.perplexity_a:.4f}", f"{result.perplexity_b:.4f}"),
    ]
    width = max(len(cell) for row in rows for cell in row[1:])
    lines = [f"{label:16}  {a:>{width}}  {b:>{width}}" for label, a, b in rows]
    lines += [
        "",
        "KL(A||B), nats per token",
        f"  mean {result.kl_mean:.6f}, median {result.kl_median:.6f}, "
        f"99% {result.kl_p99:.6f}, max {result.kl_max:.6f}",
        f"same most likely token: {result.top1_agreement:.2%}",
        f"({result.tokens} tokens of the assistant in {conversations} conversations)",
    ]
    return "\n".join(lines)
