"""Pictures of coloured shapes and printed words.

Everything follows from seeds. A `Scene` says what is in a picture, `render` draws it. A picture is thought of as a
3 x 3 grid of cells, counted in reading order; a printed word takes a whole row of it.
"""

from __future__ import annotations

import importlib.util
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (246, 138, 20),
    "yellow": (250, 222, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 214),
    "purple": (132, 50, 172),
    "black": (18, 18, 18),
    "white": (252, 252, 252),
}
WORDS = (
    "STOP", "GO", "EXIT", "OPEN", "TAXI", "BUS", "CAFE", "HOTEL", "BANK", "SHOP", "SALE", "FREE", "PARK",
    "ZOO", "MILK", "BREAD", "TEA", "FISH", "RICE", "SOUP", "CAKE", "LEMON", "ICE", "SNOW", "RAIN", "SUN",
    "SEA", "LAKE", "TREE", "BIRD", "CAT", "DOG", "COW", "DUCK", "FOX", "LION", "BOOK", "KEY", "LAMP",
    "MUSIC", "GAME", "QUIZ", "HELLO", "BYE", "YES", "NO", "NEW", "HOT",
)  # fmt: skip
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Thing:
    """One shape: its kind, colour, cell (0 to 8 in reading order) and whether it is one of the large ones."""

    shape: str
    colour: str
    cell: int
    large: bool


@dataclass(frozen=True)
class Scene:
    """What a picture shows: shapes in reading order, perhaps a word or number printed in one row of cells."""

    things: tuple[Thing, ...]
    text: str | None
    row: int  # of the text; 0 without text

    @property
    def is_number(self) -> bool:
        """Whether the printed text is a number."""
        return self.text is not None and self.text.isdigit()


# ----------------------------------------------------------------------------------------------------------
# What is in a scene


def is_held_out(thing: Thing) -> bool:
    """Whether this combination of shape, colour and cell never occurs in training (about one in ten)."""
    return zlib.crc32(f"{thing.shape}/{thing.colour}/{thing.cell}".encode()) % 10 == 0


def make_scene(seed: int, held_out: bool = False) -> Scene:
    """The scene of a seed; with `held_out`, at least one thing is a held-out combination, else none."""
    rng = random.Random(f"scene/{seed}")
    text = _make_text(rng) if rng.random() < 0.45 else None
    row = rng.randrange(3) if text else 0
    cells = [c for c in range(9) if not text or c // 3 != row]
    count = rng.choices(range(5), (6, 20, 30, 26, 18) if not text else (18, 30, 30, 22, 0))[0]
    if held_out:
        count = max(count, 1)
    things: list[Thing] = []
    for cell in sorted(rng.sample(cells, count)):
        while True:
            # Repeated kinds and colours make counting and telling apart worth asking about.
            twin = rng.choice(things) if things else None
            shape = twin.shape if twin and rng.random() < 0.2 else rng.choice(SHAPES)
            colour = twin.colour if twin and rng.random() < 0.2 else rng.choice(tuple(COLOURS))
            thing = Thing(shape, colour, cell, rng.random() < 0.5)
            if not is_held_out(thing):
                break
        things.append(thing)
    if held_out:
        index = rng.randrange(count)
        choices = [
            candidate
            for shape in SHAPES
            for colour in COLOURS
            if is_held_out(candidate := replace(things[index], shape=shape, colour=colour))
        ]
        things[index] = rng.choice(choices)
    return Scene(tuple(things), text, row)


def _make_text(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return str(rng.randrange(100))
    return rng.choice(WORDS)


# ----------------------------------------------------------------------------------------------------------
# Drawing

BACKGROUNDS = (
    (225, 225, 225), (238, 228, 204), (205, 225, 242), (210, 236, 210), (245, 216, 222), (250, 250, 250),
    (128, 128, 128), (60, 70, 82), (84, 58, 42), (25, 35, 72), (25, 62, 42), (30, 30, 32), (200, 170, 122),
    (92, 160, 162), (180, 170, 210),
)  # fmt: skip
FONT_FILES = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf", "STIXGeneralBol.ttf",
)  # fmt: skip
Labels = np.ndarray[Any, np.dtype[np.uint8]]


@lru_cache(maxsize=1)
def _font_folder() -> Path:
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the demo draws with the fonts in matplotlib: pip install -r demo/requirements.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=4096)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "pillow":
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(_font_folder() / name), size)


def _outline(shape: str, x: float, y: float, r: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius r round (x, y), turned by `angle` radians."""
    corners: list[tuple[float, float]]
    if shape == "square":
        corners = [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
    elif shape == "triangle":
        corners = [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
    elif shape == "star":
        corners = []
        for i in range(10):
            radius = 1.05 if i % 2 == 0 else 0.44
            corners.append((radius * math.sin(i * math.pi / 5), -radius * math.cos(i * math.pi / 5)))
    elif shape == "cross":
        a, b = 0.32, 0.95
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        corners += [(a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    elif shape == "heart":
        corners = []
        for i in range(32):
            t = i * math.pi / 16
            up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            corners.append((16 * math.sin(t) ** 3 / 16.5, -(up + 2.5) / 16.5))
    elif shape == "moon":
        # The outer arc from horn to horn round the left, then the inner arc back.
        outer = [math.radians(a) for a in range(60, 301, 10)]
        inner = [math.radians(a) for a in range(270, 89, -10)]
        corners = [(math.cos(a) + 0.15, math.sin(a)) for a in outer]
        corners += [(0.65 + 0.5 * math.cos(a), 0.866 * math.sin(a)) for a in inner]
    else:
        corners = [(math.cos(i * math.pi / 24), math.sin(i * math.pi / 24)) for i in range(48)]
    c, s = math.cos(angle), math.sin(angle)
    return [(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in corners]


def _jitter(rng: random.Random, colour: Sequence[int], amount: int) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return r, g, b


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return math.dist(a, b)


def _background(rng: random.Random, width: int, height: int, used: list[tuple[int, int, int]]) -> Image.Image:
    fitting = [b for b in BACKGROUNDS if all(_distance(b, u) > 95 for u in used)]
    if not fitting:
        fitting = [max(BACKGROUNDS, key=lambda b: min(_distance(b, u) for u in used))]
    base = rng.choice(fitting)
    image = Image.new("RGB", (width, height), _jitter(rng, base, 6))
    kind = rng.random()
    draw = ImageDraw.Draw(image)
    if kind < 0.2:  # gradient
        other = _jitter(rng, base, 22)
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
        image.paste(Image.new("RGB", (width, height), other), mask=ramp)
    elif kind < 0.35:  # stripes
        step = rng.randint(10, 40)
        other = _jitter(rng, base, 14)
        for at in range(0, max(width, height), 2 * step):
            if kind < 0.27:
                draw.rectangle((at, 0, at + step, height), other)
            else:
                draw.rectangle((0, at, width, at + step), other)
    elif kind < 0.45:  # checks
        step = rng.randint(14, 50)
        other = _jitter(rng, base, 12)
        for at_y in range(0, height, step):
            for at_x in range(at_y // step % 2 * step, width, 2 * step):
                draw.rectangle((at_x, at_y, at_x + step, at_y + step), other)
    return image


def render(scene: Scene, seed: int, patches: int = 8) -> tuple[Image.Image, Labels]:
    """Draws a scene: the picture (RGB, sides 127 to 300) and labels of its patches after padding to a square.

    The labels, (patches * patches, 7) uint8, are 0 for none, else one more than the index of: shape, colour,
    size (small, large), place in reading order, printed character, its place (of a digit in its number; the
    first for every letter), printed word. They are only a help in training.
    """
    rng = random.Random(f"draw/{seed}")
    side = rng.randint(170, 300)
    width = height = side
    if rng.random() < 0.2:
        shorter = int(side * rng.uniform(0.75, 0.95))
        width, height = (side, shorter) if rng.random() < 0.5 else (shorter, side)
    small_side = min(width, height)
    shades = [_jitter(rng, COLOURS[t.colour], 10) for t in scene.things]
    ink = _jitter(rng, rng.choice(tuple(COLOURS.values())), 10) if rng.random() < 0.6 else (20, 20, 20)
    used = shades + ([ink] if scene.text else [])
    image = _background(rng, width, height, used)
    draw = ImageDraw.Draw(image)

    # Pixels of the drawing to patches of the padded square.
    scale = patches / max(width, height)
    off_x, off_y = (max(width, height) - width) / 2, (max(width, height) - height) / 2
    labels: Labels = np.zeros((patches * patches, 7), np.uint8)
    centres = (np.arange(patches) + 0.5) / scale
    grid_x, grid_y = (g.ravel() for g in np.meshgrid(centres - off_x, centres - off_y))

    for order, (thing, shade) in enumerate(zip(scene.things, shades, strict=True)):
        r = small_side * (rng.uniform(0.138, 0.158) if thing.large else rng.uniform(0.082, 0.095))
        room_x, room_y = width / 6 - r, height / 6 - r
        x = (thing.cell % 3 + 0.5) * width / 3 + rng.uniform(-1, 1) * max(0, room_x) * 0.8
        y = (thing.cell // 3 + 0.5) * height / 3 + rng.uniform(-1, 1) * max(0, room_y) * 0.8
        draw.polygon(_outline(thing.shape, x, y, r, math.radians(rng.uniform(-10, 10))), shade)
        reach = np.hypot(grid_x - x, grid_y - y)
        mine = (reach < 0.9 * r) | (reach == reach.min())
        labels[mine, :4] = (
            SHAPES.index(thing.shape) + 1,
            list(COLOURS).index(thing.colour) + 1,
            1 + thing.large,
            order + 1,
        )
    if scene.text:
        _print(image, scene, rng, ink, labels, grid_x, grid_y)
    return _speckle(image, rng), labels


def render_page(seed: int, patches: int = 8) -> tuple[Image.Image, Labels]:
    """Draws three rows of words and numbers, to learn reading from, and labels as `render` does.

    An eighth label is 10 and more for the row.
    """
    rng = random.Random(f"page/{seed}")
    side = rng.randint(170, 300)
    ink = _jitter(rng, rng.choice(tuple(COLOURS.values())), 10) if rng.random() < 0.6 else (20, 20, 20)
    image = _background(rng, side, side, [ink])
    labels: Labels = np.zeros((patches * patches, 8), np.uint8)
    grid_x, grid_y = (g.ravel() for g in np.meshgrid(*[(np.arange(patches) + 0.5) * side / patches] * 2))
    for row in range(3):
        part: Labels = np.zeros((patches * patches, 7), np.uint8)
        _print(image, Scene((), _make_text(rng), row), rng, ink, part, grid_x, grid_y)
        shows = part[:, 4] > 0
        labels[shows, :7], labels[shows, 7] = part[shows], 10 + row
    return _speckle(image, rng), labels


def _speckle(image: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() >= 0.4:
        return image
    noise = _noise(rng.randrange(16))[: image.height, : image.width]
    pixels = np.asarray(image).astype(np.int16) + noise * rng.choice((1, 1, 2))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _print(
    image: Image.Image,
    scene: Scene,
    rng: random.Random,
    ink: tuple[int, int, int],
    labels: Labels,
    grid_x: np.ndarray[Any, Any],
    grid_y: np.ndarray[Any, Any],
) -> None:
    """Prints the scene's text in its row, letter by letter, turned by a few degrees."""
    assert scene.text
    width, height = image.size
    name = rng.choice(("pillow", *FONT_FILES))
    size = int(min(width, height) * rng.uniform(0.2, 0.3))
    spacing = rng.uniform(0.02, 0.14)
    while True:
        font = _font(name, size)
        advances = [font.getlength(c) + spacing * size for c in scene.text]
        total = sum(advances)
        if total < 0.88 * width:
            break
        size = int(size * 0.93)
    layer = Image.new("L", image.size)
    draw = ImageDraw.Draw(layer)
    _, top, _, bottom = font.getbbox("H")
    x = (width - total) / 2 + rng.uniform(-1, 1) * (0.92 * width - total) / 2
    y = (scene.row + 0.5) * height / 3 + rng.uniform(-0.025, 0.025) * height
    angle = math.radians(rng.uniform(-6, 6))
    middle = (x + total / 2, y)
    c, s = math.cos(angle), math.sin(angle)
    nearest = np.full(grid_x.shape, np.inf)
    for order, (char, advance) in enumerate(zip(scene.text, advances, strict=True)):
        draw.text((x, y - (top + bottom) / 2), char, 255, font)
        # The layer is turned round the middle of the text: where this letter goes, and what it covers.
        u = x + advance / 2 - middle[0]
        at_x, at_y = middle[0] + c * u, middle[1] + s * u
        away_x, away_y = np.abs(grid_x - at_x), np.abs(grid_y - at_y)
        reach = np.hypot(away_x, away_y)
        mine = (away_x < advance / 2) & (away_y < (bottom - top) / 2) | (reach == reach.min())
        mine &= reach < nearest
        nearest[mine] = reach[mine]
        word = 0 if scene.is_number else WORDS.index(scene.text) + 1
        labels[mine, 4:] = CHARACTERS.index(char) + 1, order + 1 if scene.is_number else 1, word
        x += advance
    layer = layer.rotate(-math.degrees(angle), Image.Resampling.BILINEAR, center=middle)
    image.paste(ink, mask=layer)


@lru_cache(maxsize=16)
def _noise(seed: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.random.default_rng(seed).normal(0, 6, (300, 300, 3)).astype(np.int16)
