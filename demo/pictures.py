"""The pictures of training: drawn beforehand into files, and varied a little each time they are shown."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from tqdm import tqdm

from demo import model as yivl
from demo import scenes

FIRST_SEED = 1_000_000  # of the pictures of training; evaluation uses seeds below


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
