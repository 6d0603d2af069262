"""What the commands share for a person at a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TextIO

_STAGES = {
    "hash": "Comparing hashes",
    "load": "Opening the model",
    "image": "Looking at the picture",
    "prefill": "Reading the question",
}
_SECONDS_BETWEEN = 0.1
_WIPE = "\r\x1b[K"

# Control characters that a model may write, and a terminal would obey, and what is shown in their place.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def visible(text: str) -> str:
    """Text that cannot steer the terminal it is printed on."""
    return text.translate(_VISIBLE)


def note(message: str) -> None:
    """Something said by the program, not by the model, on a line of its own."""
    # The terminal itself may have written "^C" at the beginning of the line.
    wipe = _WIPE if is_terminal(sys.stderr) else ""
    print(f"{wipe}({message})", file=sys.stderr, flush=True)


def read_line(prompt: str) -> str:
    """A line that a person types. Where standard output is no terminal, the prompt goes to standard error.

    Raises:
        EOFError: The input has ended.
    """
    # Readline, which edits the line, has to know the prompt; input() gives it to it, or to standard output.
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input("")


def fail(message: str) -> int:
    """Says on one line what is wrong; returns the exit code."""
    print("yivl-edge: error:", " ".join(message.split()), file=sys.stderr)
    return 1


class Progress:
    """One line on standard error while an answer is on its way; nothing if that is not a terminal."""

    prefix = ""
    """Stands before the stage."""

    def __init__(self) -> None:
        self._terminal = is_terminal(sys.stderr)
        self._shown = False
        self._last = ("", 0.0)

    def __call__(self, stage: str, fraction: float) -> None:
        """Shows how far a stage is, a few times a second."""
        label = _STAGES.get(stage)
        if not self._terminal or label is None:
            return
        now = time.monotonic()
        last_stage, last_time = self._last
        if stage == last_stage and now - last_time < _SECONDS_BETWEEN:
            return
        self._last = (stage, now)
        line = f"{self.prefix}{label} {fraction:4.0%}"[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write(_WIPE + line)
        sys.stderr.flush()
        self._shown = True

    def wipe(self) -> None:
        """Leaves the line empty for what comes next."""
        if self._shown:
            sys.stderr.write(_WIPE)
            sys.stderr.flush()
            self._shown = False
