"""Draws the sample pictures that come with the package: python -m demo.samples FOLDER."""

from __future__ import annotations

import argparse
from pathlib import Path

from demo import scenes
from demo.scenes import Scene, Thing

# File name -> scene and the seed of its drawing.
SAMPLES: dict[str, tuple[Scene, int]] = {
    "star-and-moon": (Scene((Thing("moon", "yellow", 2, False), Thing("star", "red", 3, True)), None, 0), 9),
    "four-shapes": (
        Scene(
            (
                Thing("heart", "red", 0, True),
                Thing("square", "green", 2, True),
                Thing("circle", "blue", 4, False),
                Thing("triangle", "purple", 7, True),
            ),
            None,
            0,
        ),
        4,
    ),
    "stop": (Scene((Thing("cross", "white", 0, True), Thing("circle", "red", 2, True)), "STOP", 2), 6),
    "number": (Scene((Thing("heart", "purple", 8, True),), "42", 1), 21),
    "three-stars": (
        Scene(
            (
                Thing("star", "yellow", 1, True),
                Thing("star", "blue", 3, False),
                Thing("moon", "white", 5, True),
                Thing("star", "yellow", 6, False),
            ),
            None,
            0,
        ),
        3,
    ),
    "cafe": (Scene((), "CAFE", 0), 13),
    "empty": (Scene((), None, 0), 5),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, (scene, seed) in SAMPLES.items():
        scenes.render(scene, seed)[0].save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
