"""Trains the demo model from nothing: python -m demo.train --out FOLDER (goes on from a checkpoint there).

First the vision tower alone learns to say what each patch shows, then the decoder learns to answer from what the
tower sees, then the whole model learns together, and at last the decoder learns to count and to compare. All use
pictures drawn beforehand into FOLDER and questions written as they are needed. At the end the model lies in
FOLDER/export in the layout of a published Yi-VL folder.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm import tqdm

from demo import conversations, scenes
from demo import model as yivl

FIRST_SEED = 1_000_000  # of the pictures of training; evaluation uses seeds below
TEXT_TOKENS = 192  # of conversations about one picture
WITHOUT_TOWER = ("answers", "last")  # phases in which the vision tower learns nothing
WATCHED = (1, 2)  # blocks of the decoder with heads that are told where to look
FAMILY_WEIGHTS = {  # how often each is asked
    "what": 1.0, "describe": 1.2, "colour": 1.0, "shape": 1.0, "count": 1.2, "where": 1.0, "compare": 2.0,
    "yesno": 1.6, "read": 1.0, "followup": 2.0, "absent": 1.3,
}  # fmt: skip
# At the end, what is learnt last: to count, to compare.
LAST_WEIGHTS = FAMILY_WEIGHTS | {
    "count": 8.0,
    "compare": 4.0,
    "where": 0.5,
    "colour": 0.5,
    "followup": 1.0,
    "absent": 0.7,
}
# What a patch shows: shape, colour, size, place in reading order, character, its place, word, cell or row of text.
LABEL_CLASSES = (
    len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, 3, 5, len(scenes.CHARACTERS) + 1, 3, len(scenes.WORDS) + 1, 13,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------
# Tokeniser


def train_tokenizer(vocab: int, seed: int) -> bytes:
    """A SentencePiece BPE with Yi's settings, from the demo's own texts and the system text."""
    rng = random.Random(seed)
    lines = []
    for i in range(4000):
        scene = scenes.make_scene(FIRST_SEED + i)
        for family in conversations.FAMILIES:
            for language in conversations.LANGUAGES:
                for question, answer in conversations.ask(scene, family, language, rng.random()) or []:
                    lines += [question, " " + answer]
    # Every printed word becomes one piece, after a space and after Chinese.
    lines += [line for word in scenes.WORDS for line in (f" The word is {word}.", f" 单词是{word}。")] * 1000
    lines += ["### Human:", "### Assistant:"] * 5000 + [yivl.SYSTEM] * 2000
    characters = "".join(chr(c) for c in range(33, 127))
    rng.shuffle(lines)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        required_chars=characters,
        max_sentence_length=20000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece="<unk>",
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


# ----------------------------------------------------------------------------------------------------------
# Pictures


@dataclass
class Pool:
    """Pictures drawn beforehand: pixels (count, S, S, 3), labels (count, N, 7) and scenes, by index.

    A quarter as many pages of text, with eight labels, are there to learn reading from.
    """

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.uint8]]
    page_pixels: np.ndarray[Any, np.dtype[np.uint8]]
    page_labels: np.ndarray[Any, np.dtype[np.uint8]]

    def scene(self, index: int) -> scenes.Scene:
        """What picture `index` shows."""
        return scenes.make_scene(FIRST_SEED + index)


def _draw(job: tuple[Path, str, int, int, int]) -> int:
    folder, kind, start, end, size = job
    pixels = np.load(folder / f"{kind}pixels.npy", mmap_mode="r+")
    labels = np.load(folder / f"{kind}labels.npy", mmap_mode="r+")
    for i in range(start, end):
        if kind:
            image, labels[i] = scenes.render_page(FIRST_SEED + i)
        else:
            image, labels[i] = scenes.render(scenes.make_scene(FIRST_SEED + i), FIRST_SEED + i)
        pixels[i] = yivl.preprocess(image, size)
    return end - start


def make_pool(folder: Path, count: int, size: int, patches: int) -> Pool:
    """Draws the pictures of training, once, with one process per core (two at most)."""
    arrays = []
    for kind, number, columns in (("", count, 7), ("page-", count // 4, 8)):
        done = folder / f"{kind}pool.json"
        key = {"count": number, "size": size}
        if not done.exists() or json.loads(done.read_text()) != key:
            for name, shape in (("pixels", (number, size, size, 3)), ("labels", (number, patches, columns))):
                np.lib.format.open_memmap(folder / f"{kind}{name}.npy", "w+", np.uint8, shape).flush()
            jobs = [(folder, kind, i, min(i + 500, number), size) for i in range(0, number, 500)]
            workers = min(2, os.cpu_count() or 1)
            with (
                multiprocessing.Pool(workers) as pool,
                tqdm(total=number, desc=f"{kind}pictures", mininterval=5) as bar,
            ):
                for drawn in pool.imap_unordered(_draw, jobs):
                    bar.update(drawn)
            done.write_text(json.dumps(key))
        arrays += [np.load(folder / f"{kind}{name}.npy", mmap_mode="r") for name in ("pixels", "labels")]
    return Pool(*arrays)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(B, S, S, 3) uint8 -> float: moved by up to 2 pixels, a little brighter or darker, a little noise."""
    b = len(pixels)
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    images = F.pad(pixels.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="replicate")
    size = pixels.shape[1]
    images = images[:, :, 2 + dy : 2 + dy + size, 2 + dx : 2 + dx + size].permute(0, 2, 3, 1)
    gain = 0.93 + 0.14 * torch.rand(b, 1, 1, 1, generator=generator)
    strength = 3 * torch.rand(b, 1, 1, 1, generator=generator)
    # One field of noise for the batch: drawing it costs more than using it.
    noise = torch.randn(1, *images.shape[1:], generator=generator)
    return (images * gain + noise * strength).clamp(0, 255)


# ----------------------------------------------------------------------------------------------------------
# Conversations


def _words(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


# A thing by colour, shape or both; a place, which is not what follows "的" (the left of something).
THING = re.compile(
    rf"\b(?:({_words(scenes.COLOURS)}) )?({_words(scenes.SHAPES)})(?:e?s)?\b|\b({_words(scenes.COLOURS)})\b"
    rf"|(?:({_words(conversations.COLOUR_ZH.values())})的)?({_words(conversations.SHAPE_ZH.values())})"
    rf"|({_words(conversations.COLOUR_ZH.values())})"
)
PLACE = re.compile(
    rf"({_words([*conversations.PLACE_EN, 'in the middle'])})|(?<![的左右])({_words(conversations.PLACE_ZH)})"
)
ONE = re.compile(r"\bone\b|有一个")
COLOUR_NUMBER = {
    w: i + 1 for words in (scenes.COLOURS, conversations.COLOUR_ZH.values()) for i, w in enumerate(words)
}
SHAPE_NUMBER = {
    w: i + 1 for words in (scenes.SHAPES, conversations.SHAPE_ZH.values()) for i, w in enumerate(words)
}
PLACE_NUMBER = {
    w: i + 1 for words in (conversations.PLACE_EN, conversations.PLACE_ZH) for i, w in enumerate(words)
}
PLACE_NUMBER["in the middle"] = 5
Words = tuple[
    int, int, int, int
]  # what a token speaks of: shape, colour, place; the character that comes next


class Writer:
    """Turns conversations about a picture into token ids, in the form that inference sees."""

    def __init__(self, tokenizer: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        self.prefix: list[int] = self.processor.encode(yivl.PREFIX)
        self.encode = lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str, printed: str = "") -> tuple[tuple[int, ...], tuple[Words, ...]]:
        """Ids and what each speaks of; `printed` is the text in the picture."""
        ids = self.processor.encode(text)
        owner: list[int] = []  # of each character: its token
        for i, token in enumerate(ids):
            owner += [i] * (1 if self.processor.is_byte(token) else len(self.processor.id_to_piece(token)))
        assert len(owner) == len(text), text
        words = np.zeros((len(ids), 4), np.int64)
        for match in THING.finditer(text):
            colour, shape, colour_alone, zh_colour, zh_shape, zh_colour_alone = match.groups()
            words[owner[match.end() - 1], :2] = (
                SHAPE_NUMBER.get(shape or zh_shape, 0),
                COLOUR_NUMBER.get(colour or colour_alone or zh_colour or zh_colour_alone, 0),
            )
        for match in PLACE.finditer(text):
            words[owner[match.end() - 1], 2] = PLACE_NUMBER[match[0]]
        at = text.rfind(printed) if printed else -1
        if at > 0:
            for i in range(len(printed) if printed.isdigit() else 1):
                words[owner[at + i] - 1, 3] = i + 1
        return tuple(ids), tuple(tuple(row) for row in words.tolist())

    def conversation(
        self, turns: list[conversations.Turn], rng: random.Random, printed: str = ""
    ) -> tuple[list[int], list[bool], list[Words]]:
        """Ids after the picture, which of them the model should have written, and what they speak of."""
        ids: list[int] = []
        ours: list[bool] = []
        words: list[Words] = []
        lead = "\n"
        for question, answer in turns:
            if rng.random() < 0.08:  # people write sloppily
                question = (
                    question.rstrip("?？.。") if rng.random() < 0.5 else question[0].lower() + question[1:]
                )
            asked, asked_words = self.encode(f"{lead}{question}\n{yivl.STOP} Assistant:")
            written, written_words = self.encode(f" {answer}\n{yivl.STOP}", printed)
            ids += asked + written
            words += asked_words + written_words
            ours += [False] * len(asked) + [True] * len(written)
            lead = " Human: "
        return ids, ours, words

    def about(
        self, scene: scenes.Scene, rng: random.Random, last: bool
    ) -> tuple[list[int], list[bool], list[int], list[int], list[Words]]:
        """As many conversations as fit: ids, whether ours, places in the conversation, its number, words.

        `last`: those of the last phase.
        """
        ids: list[int] = []
        ours: list[bool] = []
        places: list[int] = []
        numbers: list[int] = []
        words: list[Words] = []
        weights = LAST_WEIGHTS if last else FAMILY_WEIGHTS
        for number in range(16):
            turns = None
            while turns is None:
                family = rng.choices(list(weights), list(weights.values()))[0]
                turns = conversations.ask(
                    scene, family, rng.choice(conversations.LANGUAGES), rng.getrandbits(40)
                )
                if last and family == "count" and turns and ONE.search(turns[0][1]) and rng.random() < 0.5:
                    turns = None  # or nearly all would be counted as one
            new, mine, spoken = self.conversation(turns, rng, scene.text or "")
            if len(ids) + len(new) <= TEXT_TOKENS:
                ids += new
                ours += mine
                places += range(len(new))
                numbers += [number] * len(new)
                words += spoken
        return ids, ours, places, numbers, words


@dataclass
class Batch:
    """Pictures, their labels, and conversations (letters as in model.py; -2 numbers padding).

    Pages follow the B pictures: P of them, half of B.
    """

    images: Tensor  # (B + P, 3, S, S)
    labels: Tensor  # (B + P, N, 8)
    ids: Tensor  # (B, T)
    targets: Tensor  # (B, T), -100 where nothing is to be learnt
    places: Tensor  # (B, T)
    numbers: Tensor  # (B, T)
    words: Tensor  # (B, T, 4)

    def to(self, device: str) -> Batch:
        """The same on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Batches:
    """The batch of each step, whatever came before: training can stop and go on."""

    def __init__(self, pool: Pool, writer: Writer, size: int, seed: int, rank: int, processes: int) -> None:
        self.pool, self.writer, self.size, self.seed = pool, writer, size, seed
        self.rank, self.processes = rank, processes

    def __call__(self, step: int, phase: str) -> Batch:
        """The batch of a step."""
        count = len(self.pool.pixels)
        per_epoch = count // self.size
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(count)
        chosen = np.sort(order[at * self.size : (at + 1) * self.size])[self.rank :: self.processes]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 16 + self.rank)
        pages = np.random.default_rng((self.seed, step, self.rank)).integers(
            0, len(self.pool.page_pixels), 0 if phase in WITHOUT_TOWER else len(chosen) // 2
        )
        pixels = np.concatenate([self.pool.pixels[chosen], self.pool.page_pixels[pages]])
        images = yivl.normalise(augment(torch.from_numpy(pixels), generator))
        shown = [*(self.labels(int(i)) for i in chosen), *self.pool.page_labels[pages]]
        labels = torch.from_numpy(np.stack(shown)).long()
        arrays = np.zeros((4, len(chosen), TEXT_TOKENS), np.int64)
        arrays[1], arrays[3] = -100, -2
        words = np.zeros((len(chosen), TEXT_TOKENS, 4), np.int64)
        if phase != "vision":
            rng = random.Random(f"text/{self.seed}/{step}/{self.rank}")
            for row, index in enumerate(chosen):
                scene = self.pool.scene(int(index))
                ids, ours, places, numbers, spoken = self.writer.about(scene, rng, phase == "last")
                n = len(ids)
                words[row, :n] = spoken
                arrays[0, row, :n], arrays[2, row, :n], arrays[3, row, :n] = ids, places, numbers
                # A position learns the next token of its own conversation, where that is the model's.
                arrays[1, row, : n - 1] = [t if o else -100 for t, o in zip(ids[1:], ours[1:], strict=True)]
        return Batch(images, labels, *(torch.from_numpy(a) for a in (*arrays, words)))

    def labels(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The labels of picture `index`, and an eighth: the cell of a thing or the row of the text."""
        labels, scene = self.pool.labels[index], self.pool.scene(index)
        cells = np.array([0, *(thing.cell + 1 for thing in scene.things)], np.uint8)[labels[:, 3]]
        cells[labels[:, 4] > 0] = 10 + scene.row
        return np.concatenate([labels, cells[:, None]], 1)


# ----------------------------------------------------------------------------------------------------------
# Optimiser


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are made orthogonal (Jordan et al., 2024), for matrices inside blocks.

    `pieces` gives for each parameter the rows of the matrices that it is made of.
    """

    def __init__(self, matrices: list[nn.Parameter], pieces: list[list[int]], weight_decay: float) -> None:
        super().__init__(matrices, {"lr": 0.0, "share": 1.0, "weight_decay": weight_decay})
        self.pieces = pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update."""
        assert closure is None
        group = self.param_groups[0]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, rows in zip(group["params"], self.pieces, strict=True):
            if p.grad is None:  # the decoder, while the tower learns alone
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 0.05)
            update = p.grad.lerp(state["momentum"], 0.95)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            for part, new in zip(p.split(rows), update.split(rows), strict=True):
                wide = new.shape[0] <= new.shape[1]
                shape = (new.shape[0], new.shape[1]) if wide else (new.shape[1], new.shape[0])
                by_shape.setdefault(shape, []).append((part if wide else part.T, new if wide else new.T))
        for items in by_shape.values():
            steps = _orthogonal(torch.stack([new for _, new in items]))
            for (part, _), new in zip(items, steps, strict=True):
                # An entry's size is about 1 / sqrt(longer side): scale to 0.2 times Adam's at the same rate.
                part.add_(new, alpha=-group["lr"] * max(part.shape) ** 0.5 / 16)


def arithmetic(device: str) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32."""
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz iteration: (n, rows, columns), rows <= columns."""
    x = x.to(arithmetic(x.device.type))
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.float()


# ----------------------------------------------------------------------------------------------------------
# Learning


class Learner(nn.Module):
    """The model with the heads that only training uses."""

    def __init__(self, sizes: yivl.Sizes, prefix: list[int]) -> None:
        super().__init__()
        self.model = yivl.YiVL(sizes)
        for i in WATCHED:
            self.model.decoder.blocks[i].watched = True
        self.look = nn.Sequential(
            nn.LayerNorm(sizes.vit_width), nn.Linear(sizes.vit_width, sum(LABEL_CLASSES))
        )
        self.prefix: Tensor
        self.register_buffer("prefix", torch.tensor([prefix]), persistent=False)

    def patch_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of saying what patches show, and the share right in all of those that show something.

        Patches that show something count as much as all the others, which are many more.
        """
        logits = self.look(features).float().split(LABEL_CLASSES, -1)
        total = torch.zeros((), device=labels.device)
        for i, g in enumerate(logits):
            loss = F.cross_entropy(g.mT, labels[..., i], reduction="none")
            shows = (labels[..., i] > 0).float()
            for part in (shows, 1 - shows):
                total = total + 0.5 * (loss * part).sum() / part.sum().clamp(min=1)
        right = torch.stack([g.argmax(-1) == labels[..., i] for i, g in enumerate(logits)]).all(0)
        return total, right[labels.any(-1)].float().mean()

    def attention_loss(self, seen: list[Tensor], batch: Batch) -> Tensor:
        """How far words are from looking at the patches that show what they speak of.

        One head of the first watched block looks from a thing's name at the thing, one from a place's name at
        what is there, one of the second block from before a printed word or digit at it. Where the
        picture has nothing of the kind they look at the first token. Left alone, they take long to learn it.
        """
        s, p = self.model.sizes, self.prefix.shape[1]
        shape, colour, place, character = (w.unsqueeze(2) for w in batch.words.unbind(-1))  # (B, T, 1)
        labels = batch.labels[: len(batch.ids)].unsqueeze(1)
        shapes, colours, _, _, _, characters, _, cells = labels.unbind(-1)  # (B, 1, N)
        thing = ((shape == 0) | (shapes == shape)) & ((colour == 0) | (colours == colour))
        row = torch.where((place == 2) | (place == 5) | (place == 8), 10 + place // 3, -1)  # text fills a row
        total, count = torch.zeros((), device=shape.device), 0
        for weights, speaks, shown in (
            (seen[0][:, 0], (shape + colour) > 0, thing),
            (seen[0][:, 1], place > 0, (cells == place) | (cells == row)),
            (seen[1][:, 0], character > 0, characters == character),
        ):
            b, t = speaks[..., 0].nonzero(as_tuple=True)
            looks = weights[b, s.patches + t].float()  # (M, S)
            target = shown[b, t]
            there = (looks[:, p : p + s.patches] * target).sum(-1)
            right = torch.where(target.any(-1), there, looks[:, 0])
            total, count = total - (right + 1e-3).log().sum(), count + len(b)
        return total / max(count, 1)

    def forward(self, batch: Batch, tower: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Text loss, patch loss, attention loss, share of right tokens, share of right patches.

        Without `tower` the vision tower learns nothing, and the batch has no pages.
        """
        s = self.model.sizes
        with torch.set_grad_enabled(tower):
            features = self.model.vision(batch.images)
            patch_loss, patch_right = self.patch_loss(features, batch.labels)
        decoder = self.model.decoder
        # All conversations begin with the same system text: its keys and values are made once for the batch.
        p = self.prefix.shape[1]
        _, past = decoder(decoder.embed(self.prefix), torch.arange(p, device=features.device)[None])
        rows = self.model.projector(features[: len(batch.ids)])
        x = torch.cat([rows, decoder.embed(batch.ids)], 1)
        b, t = len(x), x.shape[1]
        image_numbers = batch.numbers.new_full((b, s.patches), -1)
        numbers = torch.cat([image_numbers, batch.numbers], 1)
        image_places = torch.arange(p, p + s.patches, device=x.device).expand(b, -1)
        places = torch.cat([image_places, batch.places + p + s.patches], 1)
        # Everyone sees the picture; a conversation sees itself.
        seen = (numbers[:, None, :] == numbers[:, :, None]) | (numbers == -1)[:, None, :]
        seen &= torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        mask = torch.cat([seen.new_ones(b, t, p), seen], 2).unsqueeze(1)
        seen_by: list[Tensor] = []
        hidden, _ = decoder(x, places, mask, past, seen_by)
        wanted = batch.targets >= 0
        logits = decoder.head(hidden[:, s.patches :][wanted]).float()
        targets = batch.targets[wanted]
        right = (logits.argmax(-1) == targets).float().mean()
        attention_loss = self.attention_loss(seen_by, batch)
        return F.cross_entropy(logits, targets), patch_loss, attention_loss, right, patch_right


def make_optimisers(learner: Learner, names: Sequence[str]) -> list[torch.optim.Optimizer]:
    """For the named parameters: Muon for the matrices of blocks and projector, AdamW for the rest.

    `share` is what a group takes of the rate of its step.
    """
    rows = {ours: r for ours, (_, _, r) in yivl.published_names(learner.model.sizes).items()}
    matrices: list[nn.Parameter] = []
    pieces: list[list[int]] = []
    others: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    for name in names:
        p = learner.get_parameter(name)
        ours = name.removeprefix("model.")
        if p.ndim == 2 and (".blocks." in name or "projector." in name):
            matrices.append(p)
            pieces.append(rows.get(ours) or [p.shape[0]])
        else:
            (embeddings if "embed.weight" in name else others).append(p)
    adam = [
        {"params": others, "share": 0.2},
        # Few of the rows of the embedding have a gradient at any step.
        {"params": embeddings, "share": 0.6},
    ]
    return [
        Muon(matrices, pieces, weight_decay=0.02),
        torch.optim.AdamW([g for g in adam if g["params"]], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, total: int, decay: float) -> float:
    """Warm up over 60 steps, stay, and fall to nothing over the last `decay` share."""
    left = (total - step) / (decay * total) if decay else 1.0
    return min(1.0, (step + 1) / 60, left)


@dataclass
class Team:
    """Processes that learn together: weights and gradients lie in memory that all of them see.

    On a busy machine two processes of one thread get more done than one process of two threads, which wait
    for each other in every operation.
    """

    learner: Learner
    gradients: Tensor  # (processes, parameters)
    barrier: Any
    size: int


def split_parameters(learner: Learner, size: int) -> list[list[str]]:
    """Names of the parameters that each process updates: about equal work, matrices being most of it."""
    shares: list[list[str]] = [[] for _ in range(size)]
    work = [0] * size
    for name, p in sorted(learner.named_parameters(), key=lambda item: -item[1].numel()):
        least = work.index(min(work))
        shares[least].append(name)
        work[least] += p.numel()
    return shares


def exchange(team: Team, rank: int) -> None:
    """Replaces the gradients of this process's own parameters by their mean over all processes."""
    mine = set(split_parameters(team.learner, team.size)[rank])
    at = 0
    slices = []
    for name, p in team.learner.named_parameters():
        if p.grad is not None:
            team.gradients[rank, at : at + p.numel()] = p.grad.flatten()
            if name in mine:
                slices.append((p, at))
        at += p.numel()
    team.barrier.wait()
    for p, at in slices:
        p.grad = team.gradients[:, at : at + p.numel()].mean(0).view_as(p)
    nn.utils.clip_grad_norm_([p for p, _ in slices], 1.0)


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    sizes = yivl.Sizes()
    spm = out / "tokenizer.model"
    if not spm.exists():
        spm.write_bytes(train_tokenizer(sizes.vocab, args.seed))
    make_pool(out, args.pictures, sizes.image, sizes.patches)
    learner = Learner(sizes, Writer(spm.read_bytes()).prefix)
    if (out / "checkpoint.pt").exists():
        learner.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["learner"])
    if torch.cuda.is_available():
        team = Team(learner.to("cuda"), torch.zeros(1, 0), None, 1)
        learn(0, team, args)
    else:
        context = torch.multiprocessing.get_context("spawn")
        count = sum(p.numel() for p in learner.parameters())
        gradients = torch.zeros(args.processes, count).share_memory_()
        team = Team(learner.share_memory(), gradients, context.Barrier(args.processes), args.processes)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it the processes
        torch.multiprocessing.spawn(learn, (team, args), args.processes, daemon=True)
    yivl.export_folder(learner.model, spm.read_bytes(), out / "export")


def learn(rank: int, team: Team, args: argparse.Namespace) -> None:
    """What each process does."""
    out: Path = args.out
    learner, device = team.learner, "cuda" if torch.cuda.is_available() else "cpu"
    if team.size > 1:
        torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    sizes = learner.model.sizes
    writer = Writer((out / "tokenizer.model").read_bytes())
    pool = make_pool(out, args.pictures, sizes.image, sizes.patches)
    for block in [*learner.model.vision.blocks, *learner.model.decoder.blocks]:
        block.compile()  # four times as fast on a CPU: most operations are small and bound by memory
    mine = split_parameters(learner, team.size)[rank]
    optimisers = make_optimisers(learner, mine)
    checkpoint, state_file = out / "checkpoint.pt", out / f"optimiser-{rank}.pt"
    start_phase, start_step, elapsed = 0, 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start_phase, start_step, elapsed = saved["phase"], saved["step"], saved["elapsed"]
        states = torch.load(state_file, weights_only=True) if state_file.exists() else {}
        if states.get("at") == (start_phase, start_step, team.size):
            for optimiser, state in zip(optimisers, states["optimisers"], strict=True):
                optimiser.load_state_dict(state)
    log = (out / "log.txt").open("a", buffering=1)
    # Name, steps, pictures in a step, rate, and over which share of the steps the rate falls to nothing.
    phases = [
        ("vision", args.vision_steps, args.vision_batch, args.vision_lr, 0.5),
        ("answers", args.answer_steps, args.batch, args.lr, 0.0),
        ("all", args.steps, args.batch, args.lr, 1.0),
        ("last", args.last_steps, args.batch, args.lr / 2, 1.0),
    ]
    dtype = arithmetic(device)

    for phase in range(start_phase, len(phases)):
        name, total, size, lr, decay = phases[phase]
        if phase != start_phase:
            start_step, elapsed = 0, 0.0
            optimisers = make_optimisers(learner, mine)
        batches = Batches(pool, writer, size, args.seed + phase, rank, team.size)
        sums: dict[str, float] = {}
        began, last_save = time.monotonic() - elapsed, start_step
        steps = range(start_step, total)
        bar = tqdm(steps, name, initial=start_step, total=total, mininterval=10, disable=rank > 0)
        for step, batch in zip(bar, _ahead(batches, start_step, total, name), strict=True):
            batch = batch.to(device)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = lr * group["share"] * rate(step, total, decay)
            learner.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                if name == "vision":
                    patch_loss, patch_right = learner.patch_loss(
                        learner.model.vision(batch.images), batch.labels
                    )
                    loss, now = patch_loss, {"patch": patch_loss, "patch_right": patch_right}
                else:
                    text_loss, patch_loss, look_loss, right, patch_right = learner(
                        batch, name not in WITHOUT_TOWER
                    )
                    loss = text_loss + args.patch_weight * patch_loss + args.look_weight * look_loss
                    now = {"text": text_loss, "patch": patch_loss, "look": look_loss}
                    now |= {"right": right, "patch_right": patch_right}
            loss.backward()
            if team.size > 1:
                exchange(team, rank)
            else:
                nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            if team.size > 1:
                team.barrier.wait()
            for key, value in now.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            if (step + 1) % args.log_every == 0 and rank == 0:
                line = " ".join(f"{k} {v / args.log_every:.4f}" for k, v in sums.items())
                log.write(f"{name} {step + 1}/{total} {time.monotonic() - began:.0f}s {line}\n")
                sums = {}
            finished = step + 1 == total
            if step + 1 - last_save == args.save_every or finished:
                at = (phase + finished, 0 if finished else step + 1, team.size)
                last_save = step + 1
                _save(state_file, {"at": at, "optimisers": [o.state_dict() for o in optimisers]})
                if rank == 0:
                    state = {"learner": learner.state_dict(), "phase": at[0], "step": at[1]}
                    _save(checkpoint, state | {"elapsed": time.monotonic() - began})
                if team.size > 1:
                    team.barrier.wait()


def _save(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _ahead(batches: Batches, start: int, end: int, phase: str) -> Iterator[Batch]:
    """Batches made in a thread while the step before is learnt."""
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(batches, start, phase)
        for step in range(start, end):
            batch = coming.result()
            if step + 1 < end:
                coming = executor.submit(batches, step + 1, phase)
            yield batch


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log and export")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="on a CPU")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--vision-batch", type=int, default=64)
    parser.add_argument("--answer-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--last-steps", type=int, default=430)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vision-lr", type=float, default=0.02, help="while the tower learns alone")
    parser.add_argument("--lr", type=float, default=0.008)
    parser.add_argument("--patch-weight", type=float, default=0.3)
    parser.add_argument("--look-weight", type=float, default=0.2)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
