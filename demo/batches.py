"""What each step of training learns from: pictures, what their patches show, and conversations about them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo import model as yivl
from demo.pictures import Pool, augment
from demo.tokens import TEXT_TOKENS, Writer

WITHOUT_TOWER = ("answers", "last")  # phases in which the vision tower learns nothing


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


def ahead(batches: Batches, start: int, end: int, phase: str) -> Iterator[Batch]:
    """Batches made in a thread while the step before is learnt."""
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(batches, start, phase)
        for step in range(start, end):
            batch = coming.result()
            if step + 1 < end:
                coming = executor.submit(batches, step + 1, phase)
            yield batch
