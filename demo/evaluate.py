"""How well the demo model answers about 2,000 scenes that it never saw, in torch and in our engine.

    python -m demo.evaluate --checkpoint FOLDER --files demo-f16.gguf demo-q8_0.gguf demo-q4_0.gguf

Each scene gets an English and a Chinese question; an answer counts when it is word for word the right one.
Earlier turns of a conversation hold the right answers. Every eighth scene has a combination of shape, colour
and place that training never showed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from PIL import Image
from tqdm import tqdm

from demo import conversations, scenes
from demo import model as yivl

MAX_TOKENS = 96


@dataclass(frozen=True)
class Question:
    """The last question of a conversation about scene number `scene`."""

    scene: int
    family: str
    language: str
    turns: tuple[conversations.Turn, ...]

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.turns[-1][1]

    def messages(self) -> list[dict[str, str]]:
        """As the engine takes them."""
        flat = [
            {"role": role, "content": text}
            for turn in self.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return flat[:-1]

    def text(self) -> str:
        """The prompt after the picture."""
        text = ""
        for i, (question, answer) in enumerate(self.turns):
            text += f"{' Human: ' if i else chr(10)}{question}\n{yivl.STOP} Assistant:"
            if i < len(self.turns) - 1:
                text += f" {answer}\n{yivl.STOP}"
        return text


def is_held_out_scene(index: int) -> bool:
    """Whether evaluation scene `index` holds a combination that training never showed."""
    return index % 8 == 0


def picture(index: int) -> Image.Image:
    """Evaluation picture number `index`."""
    return scenes.render(scenes.make_scene(index, is_held_out_scene(index)), index)[0]


def questions(count: int) -> list[Question]:
    """One English and one Chinese question about each of the first `count` scenes, all families in turn."""
    found = []
    for index in range(count):
        scene = scenes.make_scene(index, is_held_out_scene(index))
        for shift, language in enumerate(conversations.LANGUAGES):
            for attempt in range(len(conversations.FAMILIES)):
                family = conversations.FAMILIES[(index + 5 * shift + attempt) % len(conversations.FAMILIES)]
                if turns := conversations.ask(scene, family, language, f"evaluate/{index}"):
                    found.append(Question(index, family, language, tuple(turns)))
                    break
    return found


@torch.inference_mode()
def torch_answers(
    model: yivl.YiVL, tokenizer: bytes, asked: Sequence[Question], batch: int = 64, progress: bool = True
) -> list[str]:
    """Greedy answers in float32."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    prefix = torch.tensor([processor.encode(yivl.PREFIX)])
    decoder, n, p = model.decoder, model.sizes.patches, prefix.shape[1]
    _, shared = decoder(decoder.embed(prefix), torch.arange(p)[None])
    answers: list[str] = []
    # Questions of like length go together, so that little is padding.
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].text()))
    for start in tqdm(range(0, len(order), batch), desc="torch", disable=not progress, mininterval=5):
        some = [asked[i] for i in order[start : start + batch]]
        pixels = torch.stack(
            [torch.tensor(yivl.preprocess(picture(q.scene), model.sizes.image)) for q in some]
        )
        ids = [processor.encode(q.text()) for q in some]
        lengths = torch.tensor([len(i) for i in ids])
        t = int(lengths.max())
        padded = torch.zeros(len(some), t, dtype=torch.long)
        for row, i in enumerate(ids):
            padded[row, : len(i)] = torch.tensor(i)
        x = torch.cat([model.encode(yivl.normalise(pixels)), decoder.embed(padded)], 1)
        keys = torch.arange(p + n + t)
        real = (keys < p + n) | (keys - p - n < lengths[:, None])  # (B, S)
        places = torch.arange(p, p + n + t)
        mask = (keys <= places[:, None])[None] & real[:, None]
        hidden, past = decoder(x, places.expand(len(some), -1), mask.unsqueeze(1), shared)
        last = hidden[torch.arange(len(some)), n + lengths - 1]
        written: list[list[int]] = [[] for _ in some]
        texts = [""] * len(some)
        done = [False] * len(some)
        for step in range(MAX_TOKENS):
            chosen = decoder.head(last).argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if not done[row]:
                    written[row].append(token)
                    texts[row] = processor.decode(written[row])
                    done[row] = token == 2 or yivl.STOP in texts[row]
            if all(done):
                break
            real = torch.cat([real, real.new_ones(len(some), 1)], 1)
            place = (p + n + lengths + step)[:, None]
            hidden, past = decoder(decoder.embed(chosen[:, None]), place, real[:, None, None], past)
            last = hidden[:, 0]
        answers += [t.split(yivl.STOP)[0].strip() for t in texts]
    result = [""] * len(asked)
    for i, answer in zip(order, answers, strict=True):
        result[i] = answer
    return result


def engine_answers(file: Path, asked: Sequence[Question], device: str = "auto") -> list[str]:
    """Greedy answers of our engine."""
    from yivl_edge import Model

    model = Model(file, device=device)
    answers = []
    for q in tqdm(asked, desc=file.name, mininterval=5):
        reply = model.chat(picture(q.scene), q.messages(), temperature=0.0, max_tokens=MAX_TOKENS)
        answers.append(reply.text)
    return answers


def accuracy(asked: Sequence[Question], answers: Sequence[str]) -> float:
    """The share of right answers."""
    return sum(answer == q.answer for q, answer in zip(asked, answers, strict=True)) / max(1, len(asked))


def report(asked: Sequence[Question], columns: dict[str, list[str]]) -> str:
    """A table of accuracies in per cent: by family, by language, on combinations never shown, and overall."""
    rows: list[tuple[str, list[int]]] = []
    for family in conversations.FAMILIES:
        for language in conversations.LANGUAGES:
            which = [i for i, q in enumerate(asked) if (q.family, q.language) == (family, language)]
            rows.append((f"{family} {language}", which))
    for language in conversations.LANGUAGES:
        rows.append((f"all {language}", [i for i, q in enumerate(asked) if q.language == language]))
    rows.append(("held-out combinations", [i for i, q in enumerate(asked) if is_held_out_scene(q.scene)]))
    rows.append(("all", list(range(len(asked)))))
    lines = [
        "| questions | number | " + " | ".join(columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for name, which in rows:
        cells = [
            f"{100 * accuracy([asked[i] for i in which], [answers[i] for i in which]):.1f}"
            for answers in columns.values()
        ]
        lines.append(f"| {name} | {len(which)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="published-layout folder: torch's own answers")
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="GGUF files for our engine")
    parser.add_argument(
        "--device", default="auto", help="what our engine computes with: auto, cpu, cuda, ..."
    )
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers of each column")
    parser.add_argument("--json", type=Path, help="also write the share of right answers of each column")
    args = parser.parse_args()
    if not args.checkpoint and not args.files:
        parser.error("nobody to ask: expected --checkpoint, --files or both")
    asked = questions(args.scenes)
    columns: dict[str, list[str]] = {}
    if args.checkpoint:
        began = time.monotonic()
        tokenizer = (args.checkpoint / "tokenizer.model").read_bytes()
        columns["torch"] = torch_answers(yivl.load_folder(args.checkpoint), tokenizer, asked)
        print(f"torch: {time.monotonic() - began:.0f} s")
    for file in args.files:
        began = time.monotonic()
        columns[file.stem] = engine_answers(file, asked, args.device)
        print(f"{file.stem}: {time.monotonic() - began:.0f} s")
    print(report(asked, columns))
    if args.json:
        args.json.write_text(json.dumps({name: accuracy(asked, a) for name, a in columns.items()}) + "\n")
    for name, answers in columns.items():
        if name != "torch" and "torch" in columns:
            same = sum(a == b for a, b in zip(answers, columns["torch"], strict=True))
            print(f"{name} answers as torch does: {100 * same / len(asked):.2f} %")
        wrong = [i for i, q in enumerate(asked) if answers[i] != q.answer][: args.show]
        for i in wrong:
            q = asked[i]
            print(f"{name}, scene {q.scene}, {q.family}: {q.turns[-1][0]}\n  {q.answer}\n  {answers[i]}")


if __name__ == "__main__":
    main()
