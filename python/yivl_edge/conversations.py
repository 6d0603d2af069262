"""Conversations about pictures, read from files: what a model is calibrated on, and what two models are compared on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yivl_edge import _core
from yivl_edge._core import ImageError
from yivl_edge.image import load_image
from yivl_edge.messages import normalise
from yivl_edge.model import Model
from yivl_edge.replies import Progress


@dataclass(frozen=True)
class Conversation:
    """A picture and what is said about it."""

    image: Path
    turns: tuple[tuple[str, str], ...]
    """(role, text) each; the last is the user's, or the assistant's."""


@dataclass(frozen=True)
class Transcript:
    """A whole conversation as a model reads it."""

    ids: list[int]
    """Token ids, with -200 where the picture goes."""
    answers: NDArray[np.bool_]
    """(len(ids),): which of them the assistant said; never the first, nor the picture."""

    def answer_ids(self) -> NDArray[np.int64]:
        """(A,): the ids that the assistant said."""
        return np.array(self.ids, np.int64)[self.answers]

    def answer_rows(self, model: Model) -> NDArray[np.int64]:
        """(A,): for each of them the row of the model's logits that predicts it."""
        lengths = np.ones(len(self.ids), np.int64)
        if model.config.vision is not None:
            lengths[np.array(self.ids) == _core.IMAGE_ID] = model.config.vision.n_patches
        positions = np.cumsum(lengths) - lengths
        return positions[self.answers] - 1


def load_conversations(
    images: str | Path, prompts: str | Path, limit: int | None = None
) -> list[Conversation]:
    """Reads a file of questions, or of whole conversations, about the pictures in a folder.

    Args:
        images: A folder. Files in it that are no pictures are passed over.
        prompts: UTF-8 text. Either a question per line, each to be asked about each picture by itself, pictures sorted
            by name; or JSON per line, ``{"image": "name.jpg", "messages": [...]}`` with messages as `Model.chat` takes
            them, or ending with the assistant's. Empty lines are passed over.
        limit: Read only so many conversations, the first.

    Raises:
        ValueError: No conversation in the files, or one that a model cannot hold; ImageError for a picture that a JSON
            line names and that cannot be used.
        OSError: The folder or the file cannot be read.
    """
    folder, file = Path(images), Path(prompts)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, found other bytes at {error.start}") from error
    # Not splitlines(): text, of JSON strings too, may hold what it also takes for the end of a line, such as U+2028.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file}: expected a question or a conversation per line, found no line")
    if lines[0][1].startswith("{"):
        found: Iterator[Conversation] = (
            _read_line(folder, line, f"{file}, line {number}") for number, line in lines
        )
    else:
        questions = [line for _, line in lines]
        found = (
            Conversation(picture, (("user", question),))
            for picture in _pictures(folder)
            for question in questions
        )
    conversations = list(itertools.islice(found, limit))
    if not conversations:
        raise ValueError(f"{folder}: expected pictures, found none")
    return conversations


def _pictures(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and _is_picture(path):
            yield path


def _is_picture(path: Path) -> bool:
    try:
        load_image(path)
    except ImageError:
        return False
    return True


def _read_line(folder: Path, line: str, where: str) -> Conversation:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON: {error}") from error
    if not isinstance(value, dict) or value.keys() != {"image", "messages"}:
        raise ValueError(f"{where}: expected an object with the keys image and messages, found {line:.60}")
    name, messages = value["image"], value["messages"]
    if not isinstance(name, str) or not isinstance(messages, (str, list)):
        raise ValueError(f"{where}: expected image to be a file's name, and messages a list")
    picture = folder / name
    try:
        load_image(picture)
        _, turns = normalise(picture, messages, ends=("user", "assistant"))
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    for (previous, _), (role, _) in itertools.pairwise([("", ""), *turns]):
        if role == "assistant" and previous != "user":
            raise ValueError(f"{where}: expected a user's turn before each of the assistant's")
    return Conversation(picture, tuple(turns))


def transcribe(
    model: Model, conversation: Conversation, max_tokens: int, on_progress: Progress | None = None
) -> Transcript:
    """The ids of a conversation; if it ends with the user's turn, the model's most likely answer is part of it.

    Args:
        model: Answers, and gives prompt and tokens.
        conversation: What was said.
        max_tokens: Longest answer.
        on_progress: Called while the model answers.
    """
    turns = list(conversation.turns)
    complete = True
    if turns[-1][0] == "user":
        messages = [{"role": role, "content": text} for role, text in turns]
        reply = model.chat(
            conversation.image, messages, max_tokens=max_tokens, temperature=0.0, on_progress=on_progress
        )
        complete = reply.finish_reason == "stop"
        turns.append(("assistant", reply.text))

    ids = _prompt(model, turns[:-1]) + _answer(model, turns[-1][1], complete)
    answers = np.zeros(len(ids), np.bool_)
    for i, (role, text) in enumerate(turns):
        if role == "assistant":
            question = _prompt(model, turns[:i])
            begin, end = (_common(ids, part) for part in (question, question + _answer(model, text)))
            answers[begin:end] = True
    return Transcript(ids, answers)


def answer_logits(
    model: Model,
    conversation: Conversation,
    transcript: Transcript,
    on_progress: Progress | None = None,
    statistics: _core.ActivationStatistics | None = None,
) -> NDArray[np.float32]:
    """Logits that predict each of the assistant's tokens, (A, V); `statistics` gain what goes into the matrices."""
    pixels = model.preprocess(conversation.image)
    positions = transcript.answer_rows(model).tolist()
    with model._borrowed_session() as session:
        return session.logits(transcript.ids, pixels, _core.Control(on_progress), statistics, positions)


def _prompt(model: Model, turns: list[tuple[str, str]]) -> list[int]:
    return model._model.prompt_ids(turns, True)


def _answer(model: Model, text: str, complete: bool = True) -> list[int]:
    """What a model writes after a prompt to say this; with the stop text if it says no more (csrc/prompt.cpp)."""
    ids = model.tokenize((f" {text}" if text else "") + ("\n###" if complete else ""))
    return ids[len(model.tokenize("")) :]  # without a BOS


def _common(a: Iterable[int], b: Iterable[int]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
