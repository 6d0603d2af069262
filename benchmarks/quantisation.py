"""What each quantisation costs the demo model: the table of docs/quantisation.md.

Example, from the root of the repository:
    yivl-edge convert python/yivl_edge/data/demo.gguf -o demo-f16.gguf --type f16
    python -m benchmarks.quantisation demo-f16.gguf --json quantisation.json

Every preset, and every type for all of the decoder's blocks, is converted, without and with an importance matrix, from
the published folder if there is one and else from the F16 file, and compared with the F16 file: KL divergence and
agreement over the assistant's tokens, where the F16 model's own answers are the text, as `yivl-edge compare` does it;
and answers that are word for word right, as demo/evaluate.py counts them. The importance matrix comes from
conversations about other scenes than the comparison.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from yivl_edge import Model
from yivl_edge.cli.compare import Comparison, answer_logits, predictions, read_conversations, summarise
from yivl_edge.cli.imatrix import record
from yivl_edge.cli.inspect import inspect
from yivl_edge.cli.terminal import Progress
from yivl_edge.conversations import Conversation, Transcript
from yivl_edge.convert import convert
from yivl_edge.convert.imatrix import write_imatrix
from yivl_edge.convert.options import PRESETS

from demo.evaluate import Question, engine_answers, picture, questions

# Presets by their names, then plain types for every matrix of the decoder's blocks.
TYPES = ("bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "q3_k_m", "q2_k")
PLAIN_TYPES = ("q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "iq4_nl", "q3_k")
MAX_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One file, beside the F16 one."""

    type: str
    imatrix: bool
    bytes: int
    bits_per_weight: float
    accuracy: float
    """Share of the questions answered word for word right, 0 to 1."""
    comparison: Comparison

    def markdown(self) -> str:
        """A line of the table."""
        c = self.comparison
        cells = (
            self.type,
            "yes" if self.imatrix else "",
            f"{self.bytes / 1e6:.2f}",
            f"{self.bits_per_weight:.2f}",
            f"{c.kl_mean:.5f}",
            f"{c.kl_p99:.4f}",
            f"{100 * c.top1_agreement:.2f}",
            f"{100 * self.accuracy:.1f}",
        )
        return "| " + " | ".join(cells) + " |"


HEADER = """\
| type | imatrix | size, MB | bits per weight | KL mean | KL 99% | same token, % | right answers, % |
|---|---|---:|---:|---:|---:|---:|---:|"""


class Benchmark:
    """The F16 model's side of the comparison, computed once."""

    def __init__(self, f16: Path, compared: Sequence[Conversation], asked: Sequence[Question]) -> None:
        self.asked = asked
        self.reference: list[tuple[Conversation, Transcript, np.ndarray]] = list(
            tqdm(
                read_conversations(Model(f16), compared, MAX_TOKENS, Progress()),
                total=len(compared),
                desc="reference",
            )
        )

    def row(self, file: Path, type_name: str, imatrix: bool) -> Row:
        """Measures a file."""
        model = Model(file)
        progress = Progress()
        comparison = summarise(
            predictions(logits, answer_logits(model, c, transcript, progress), transcript.answer_ids())
            for c, transcript, logits in self.reference
        )
        progress.wipe()
        answers = engine_answers(file, self.asked)
        right = sum(answer == q.answer for answer, q in zip(answers, self.asked, strict=True))
        contents = inspect(str(file))
        return Row(
            type_name,
            imatrix,
            file.stat().st_size,
            contents["bits_per_weight"],
            right / len(self.asked),
            comparison,
        )


def conversations(asked: Sequence[Question], folder: Path) -> list[Conversation]:
    """Questions as conversations about pictures in a folder."""
    found = []
    for q in asked:
        path = folder / f"{q.scene}.png"
        if not path.exists():
            picture(q.scene).save(path)
        found.append(Conversation(path, tuple((m["role"], m["content"]) for m in q.messages())))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("f16", type=Path, help="the demo model as an F16 file")
    parser.add_argument("folder", type=Path, nargs="?", help="its published folder (default: the F16 file)")
    parser.add_argument("--types", nargs="+", default=[*TYPES, *PLAIN_TYPES], metavar="TYPE")
    parser.add_argument("--questions", type=int, default=1000, help="to count right answers of (1000)")
    parser.add_argument("--compared", type=int, default=200, help="conversations to compare logits in (200)")
    parser.add_argument("--calibration", type=int, default=100, help="conversations for the matrix (100)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    source = args.folder or args.f16

    # Two questions about each scene.
    count = max(args.questions, args.compared)
    every = questions((count + args.calibration) // 2 + 2)
    rest = [q for q in every if q.scene > every[count - 1].scene][: args.calibration]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        matrix = folder / "imatrix.gguf"
        columns, positions = record(Model(args.f16), conversations(rest, folder), MAX_TOKENS, Progress())
        write_imatrix(
            matrix,
            columns,
            datasets=["demo scenes"],
            chunk_count=len(rest),
            chunk_size=positions // len(rest),
        )
        benchmark = Benchmark(
            args.f16, conversations(every[: args.compared], folder), every[: args.questions]
        )
        print(HEADER, flush=True)
        rows = [benchmark.row(args.f16, "f16", False)]
        print(rows[-1].markdown(), flush=True)
        eight_bit_eyes = folder / "eyes.gguf"
        convert(source, eight_bit_eyes, type="f16", vision_type="q8_0")
        rows.append(benchmark.row(eight_bit_eyes, "f16, vision q8_0", False))
        print(rows[-1].markdown(), flush=True)
        for type_name in args.types:
            for imatrix in (None, matrix):
                file = folder / f"{type_name}.gguf"
                if type_name in PRESETS:
                    convert(source, file, type=type_name, imatrix=imatrix)
                else:
                    plain = {r"^blk\.": type_name}
                    convert(source, file, type="q8_0", tensor_types=plain, imatrix=imatrix)
                rows.append(benchmark.row(file, type_name, imatrix is not None))
                if args.json is not None:
                    args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
                print(rows[-1].markdown(), flush=True)


if __name__ == "__main__":
    main()
