"""What comes with the package: a small model, and pictures to try it on. See demo/README.md in the sources."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent

MODEL = _FOLDER / "demo.gguf"
"""The small model, in the single layout."""


def samples() -> dict[str, Path]:
    """The sample pictures by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.png"))}
