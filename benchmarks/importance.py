"""What an importance matrix changes on the demo model, told apart from chance.

Example, from the root of the repository:
    python -m benchmarks.importance python/yivl_edge/data/demo.gguf --copies 10 --json importance.json
    python -m benchmarks.importance python/yivl_edge/data/demo.gguf --copies 6 --spread 1 --seed 101

Which of a small model's rounding errors happen to matter is a matter of luck, so one comparison says little. Here the
model is copied with the channels of the decoder's width and of each MLP in another order: it computes the same, but
other weights share a scale. And since the model is sure of nearly every token, so that a handful would make up the mean
divergence, the conversations compared are those of many that it is least sure of. For every type of the decoder's
blocks, all else being F16, the table has the ratios, with the matrix to without, of the mean KL divergence from the F16
model and of the squared error of the logits: geometric means over the copies with their standard errors; and how many
answers are not the F16 model's, without and with the matrix, and the difference. The matrix comes from conversations
about other scenes than the comparison.

With --spread, the channels of the norms before the products are scaled too, each by a power of two, and the columns
that they are multiplied with by its inverse. That computes the same, with activations as uneven as those of large
models.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from numpy.typing import NDArray
from tqdm import tqdm
from yivl_edge import Model
from yivl_edge.cli.compare import answer_logits, predictions, read_conversations
from yivl_edge.cli.imatrix import record
from yivl_edge.cli.terminal import Progress
from yivl_edge.conversations import Conversation, Transcript
from yivl_edge.convert import convert
from yivl_edge.convert.imatrix import write_imatrix

from benchmarks.quantisation import MAX_TOKENS, conversations
from demo.evaluate import questions

TYPES = ("q4_0", "q4_1", "iq4_nl", "iq4_xs", "q4_k", "q3_k", "q2_k")
RATIOS = ("mean KL", "squared error of the logits")
CHANGED = ("other answers, %", "with imatrix", "difference")
Tensors = dict[str, NDArray[np.float32]]
Reference = list[tuple[Conversation, Transcript, NDArray[np.float32]]]


def permute(tensors: Tensors, random: np.random.Generator) -> None:
    """Puts the channels of the decoder's width, and of each MLP, into another order."""
    channels = random.permutation(tensors["output_norm.weight"].size)
    for name in list(tensors):
        w = tensors[name]
        if re.search(r"^(token_embd|output)\.|attn_[qkv]\.|ffn_(gate|up)\.", name) and not name.startswith(
            "v."
        ):
            w = w[:, channels]
        elif re.search(r"^(blk\.\d+\.(attn_output|ffn_down)|mm\.[34])\.|^(output|blk\.\d+\.\w+)_norm", name):
            w = w[channels]
        tensors[name] = w
    for gate in [name for name in tensors if name.endswith("ffn_gate.weight")]:
        inner = random.permutation(tensors[gate].shape[0])
        up, down = (gate.replace("gate", other) for other in ("up", "down"))
        tensors[gate], tensors[up] = tensors[gate][inner], tensors[up][inner]
        tensors[down] = tensors[down][:, inner]


def spread(tensors: Tensors, bits: float, random: np.random.Generator) -> None:
    """Scales the channels of the norms before products by powers of two, and undoes it in the products' columns.

    The exponents are a normal distribution's with this deviation, rounded.
    """
    for norm in [name for name in tensors if re.search(r"^blk\.\d+\.(attn|ffn)_norm", name)]:
        scale = np.exp2(np.round(bits * random.standard_normal(tensors[norm].size))).astype(np.float32)
        tensors[norm] = tensors[norm] * scale
        readers = ("attn_q", "attn_k", "attn_v") if "attn_norm" in norm else ("ffn_gate", "ffn_up")
        for reader in readers:
            name = re.sub(r"\w+_norm", reader, norm)
            tensors[name] = tensors[name] / scale


def write(source: GGUFReader, tensors: Mapping[str, NDArray[np.float32]], target: Path) -> None:
    """Writes a model file with the keys and types of another."""
    fields = {name: field for name, field in source.fields.items() if not name.startswith("GGUF.")}
    values: dict[str, Any] = {name: field.contents() for name, field in fields.items()}
    writer = GGUFWriter(target, values.pop("general.architecture"))
    for name, value in values.items():
        if not name.startswith(("yivl.sha256", "yivl.header_sha256", "yivl.selftest.", "yivl.rounding")):
            types = fields[name].types
            writer.add_key_value(name, value, types[0], sub_type=types[-1] if len(types) > 1 else None)
    for t in source.tensors:
        half = t.tensor_type == GGMLQuantizationType.F16
        w = np.ascontiguousarray(tensors[t.name])
        writer.add_tensor(t.name, w.astype(np.float16) if half else w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(source: GGUFReader) -> Tensors:
    """Tensors of a model file, row-major."""
    return {
        t.name: dequantize(t.data, t.tensor_type).astype(np.float32).reshape(t.shape.tolist()[::-1])
        for t in source.tensors
    }


def differences(file: Path, reference: Reference) -> list[float]:
    """RATIOS' figures of a file beside the reference, and the share of answers that become others."""
    model = Model(file)
    divergences = []
    squares, changed = 0.0, 0
    for conversation, transcript, expected in reference:
        logits = answer_logits(model, conversation, transcript, Progress())
        found = predictions(expected, logits, transcript.answer_ids())
        divergences.append(found.divergence)
        # The most likely token is said, so that the first other one makes another answer.
        changed += not found.agreement.all()
        # What is added to all logits of a token changes nothing.
        error = (logits - expected).astype(np.float64)
        squares += float(((error - error.mean(-1, keepdims=True)) ** 2).sum())
    kl = np.concatenate(divergences)
    return [float(kl.mean()), squares, changed / len(reference)]


def doubt(logits: NDArray[np.float32]) -> float:
    """What equal errors of all logits (A, V) would add to the divergence of a conversation, but for a factor."""
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return float((1 - (p**2).sum(-1)).sum())


def table(figures: Mapping[str, tuple[list[list[float]], list[list[float]]]]) -> str:
    """Markdown."""
    head = ("type of the decoder's blocks", *RATIOS, *CHANGED)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for type_name, both in figures.items():
        without, using = (np.array(rows) for rows in both)
        logs = np.log(using[:, :2] / without[:, :2])
        cells = [
            f"{math.exp(m):.2f} ({math.exp(m - e):.2f} to {math.exp(m + e):.2f})"
            for m, e in zip(logs.mean(0), standard_error(logs), strict=True)
        ]
        changes = 100 * (using[:, 2:] - without[:, 2:])
        cells += [f"{100 * rows[:, 2].mean():.1f}" for rows in (without, using)]
        cells.append(f"{changes.mean():+.1f} ± {standard_error(changes)[0]:.1f}")
        lines.append("| " + " | ".join([type_name, *cells]) + " |")
    return "\n".join(lines)


def standard_error(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the columns' means."""
    if len(rows) < 2:
        return np.full(rows.shape[1], np.nan)
    result: NDArray[np.float64] = rows.std(0, ddof=1) / math.sqrt(len(rows))
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the demo model: its file, or its published folder")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE")
    parser.add_argument("--copies", type=int, default=20, help="of the model, in other orders (20)")
    parser.add_argument("--seed", type=int, default=1, help="of the first copy (1)")
    parser.add_argument("--spread", type=float, default=0.0, metavar="BITS", help="scale channels too (0)")
    parser.add_argument("--asked", type=int, default=2000, help="conversations to choose from (2000)")
    parser.add_argument("--compared", type=int, default=100, help="conversations to compare logits in (100)")
    parser.add_argument("--calibration", type=int, default=100, help="conversations for the matrix (100)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    every = questions((args.asked + args.calibration) // 2 + 2)
    rest = [q for q in every if q.scene > every[args.asked - 1].scene][: args.calibration]
    figures: dict[str, tuple[list[list[float]], list[list[float]]]] = {t: ([], []) for t in args.types}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        f16, copy, file, matrix = (folder / f"{n}.gguf" for n in ("f16", "copy", "file", "imatrix"))
        convert(args.model, f16, type="f16")
        asked = conversations(every[: args.asked], folder)
        answered = read_conversations(Model(f16), asked, MAX_TOKENS, Progress())
        by_doubt = sorted(tqdm(answered, desc="asked", total=len(asked)), key=lambda c: -doubt(c[2]))
        reference: Reference = by_doubt[: args.compared]
        original = GGUFReader(f16)
        for seed in tqdm(range(args.seed, args.seed + args.copies), desc="copies"):
            random = np.random.default_rng(seed)
            tensors = read(original)
            permute(tensors, random)
            if args.spread:
                spread(tensors, args.spread, random)
            copy.unlink(missing_ok=True)
            write(original, tensors, copy)
            if differences(copy, reference[:20])[0] > 1e-8:
                raise SystemExit("a copy does not compute the same")
            columns, positions = record(Model(copy), conversations(rest, folder), MAX_TOKENS, Progress())
            write_imatrix(
                matrix,
                columns,
                datasets=["demo scenes"],
                chunk_count=len(rest),
                chunk_size=positions // len(rest),
            )
            for type_name in args.types:
                for using, importance in enumerate((None, matrix)):
                    convert(copy, file, type="f16", tensor_types={r"^blk\.": type_name}, imatrix=importance)
                    figures[type_name][using].append(differences(file, reference))
            if args.json is not None:
                args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
