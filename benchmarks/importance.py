"""What an importance matrix changes on the demo model, told apart from chance.

Example, from the root of the repository:
    python -m benchmarks.importance FOLDER/export --copies 10

Which of a small model's rounding errors happen to matter is a matter of luck, so one comparison says little. Here the
model is copied with the channels of the decoder's width and of each MLP in another order: it computes the same, but
other weights share a scale. For every type the table has the ratios, with the matrix to without, of the mean KL
divergence from the float16 model, of its 99th percentile, and of the squared error of the logits: geometric means over
the copies with their standard errors. The matrix comes from conversations about other scenes than the comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from yivl_edge import Model
from yivl_edge.cli.compare import answer_logits, predictions, read_conversations
from yivl_edge.cli.imatrix import record
from yivl_edge.cli.terminal import Progress
from yivl_edge.conversations import Conversation, Transcript
from yivl_edge.convert import convert
from yivl_edge.convert.imatrix import write_imatrix

from benchmarks.quantisation import MAX_TOKENS, conversations
from demo.evaluate import questions

TYPES = ("q4_0", "q4_1", "iq4_nl", "q4_k", "q3_k", "q2_k")
FIGURES = ("KL mean", "KL 99%", "squared error of logits")
Reference = list[tuple[Conversation, Transcript, NDArray[np.float32]]]


def permuted(source: Path, copy: Path, seed: int) -> None:
    """Copies a published folder; the copy computes the same with the decoder's channels in another order."""
    shutil.copytree(source, copy)
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        width = tensors["model.embed_tokens.weight"].shape[1]
        channels = torch.from_numpy(np.random.default_rng(seed).permutation(width))
        for name, w in tensors.items():
            words = name.split(".")
            if name.startswith("model.vision_tower.") or not name.startswith(("model.", "lm_head.")):
                continue
            kind = words[-2] if words[1] != "mm_projector" else f"mm_projector.{words[2]}"
            mlp = None
            if kind in ("gate_proj", "up_proj", "down_proj"):
                inner = w.shape[0] if kind != "down_proj" else w.shape[1]
                mlp = torch.from_numpy(np.random.default_rng([seed, int(words[2])]).permutation(inner))
            if kind in ("gate_proj", "up_proj"):
                w = w[mlp]
            elif kind == "down_proj":
                w = w[:, mlp]
            if kind in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                w = w[:, channels]
            elif kind not in ("mm_projector.0", "mm_projector.1"):
                w = w[channels]
            tensors[name] = w.contiguous()
        save_file(tensors, path, metadata={"format": "pt"})


def differences(file: Path, reference: Reference) -> list[float]:
    """FIGURES of a file beside the reference."""
    model = Model(file)
    divergences = []
    squares = 0.0
    for conversation, transcript, expected in reference:
        logits = answer_logits(model, conversation, transcript, Progress())
        divergences.append(predictions(expected, logits, transcript.answer_ids()).divergence)
        # What is added to all logits of a token changes nothing.
        error = (logits - expected).astype(np.float64)
        squares += float(((error - error.mean(-1, keepdims=True)) ** 2).sum())
    kl = np.concatenate(divergences)
    return [float(kl.mean()), float(np.quantile(kl, 0.99)), squares]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the demo model's published folder")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE")
    parser.add_argument("--copies", type=int, default=10, help="of the model, in other orders (10)")
    parser.add_argument("--compared", type=int, default=300, help="conversations to compare logits in (300)")
    parser.add_argument("--calibration", type=int, default=150, help="conversations for the matrix (150)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    every = questions((args.compared + args.calibration) // 2 + 2)
    rest = [q for q in every if q.scene > every[args.compared - 1].scene][: args.calibration]
    figures: dict[str, list[list[list[float]]]] = {t: [[], []] for t in args.types}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        f16 = folder / "f16.gguf"
        convert(args.folder, f16, type="f16")
        compared = conversations(every[: args.compared], folder)
        reference = list(read_conversations(Model(f16), compared, MAX_TOKENS, Progress()))
        for copy in range(args.copies):
            source, file, matrix = folder / "copy", folder / "copy.gguf", folder / "imatrix.gguf"
            permuted(args.folder, source, copy + 1)
            convert(source, f16, type="f16")
            if differences(f16, reference)[0] > 1e-9:
                raise SystemExit("a permuted copy does not compute the same")
            columns, positions = record(Model(f16), conversations(rest, folder), MAX_TOKENS, Progress())
            write_imatrix(
                matrix,
                columns,
                datasets=["demo scenes"],
                chunk_count=len(rest),
                chunk_size=positions // len(rest),
            )
            for type_name in args.types:
                for with_matrix in (False, True):
                    convert(
                        source,
                        file,
                        type="q8_0",
                        tensor_types={r"^blk\.": type_name},
                        imatrix=matrix if with_matrix else None,
                    )
                    figures[type_name][with_matrix].append(differences(file, reference))
            shutil.rmtree(source)
            if args.json is not None:
                args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print("| type | " + " | ".join(FIGURES) + " |\n|---|" + "---:|" * len(FIGURES))
    for type_name, (without, using) in figures.items():
        logs = np.log(np.array(using) / np.array(without))
        means = logs.mean(0)
        errors = logs.std(0, ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else np.full(len(means), np.nan)
        cells = (
            f"{math.exp(m):.2f} ({math.exp(m - e):.2f} to {math.exp(m + e):.2f})"
            for m, e in zip(means, errors, strict=True)
        )
        print(f"| {type_name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
