"""What a caller may pass as a conversation, made into what the core reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yivl_edge.image import ImageSource, image_from_url

Messages = str | Sequence[Mapping[str, Any]]

_ROLES = ("system", "user", "assistant")


def normalise(
    image: ImageSource | None,
    messages: Messages,
    system: str | None = None,
    *,
    ends: Sequence[str] = ("user",),
) -> tuple[ImageSource | None, list[tuple[str, str]]]:
    """The picture of a conversation and its turns.

    Args:
        image: The picture, or None: then it may stand in the messages.
        messages: One question, or turns ``{"role": "system"|"user"|"assistant", "content": ...}`` where the content
            is a string or a list of OpenAI content parts (``text``, and one ``image_url`` in the first user turn).
        system: Takes the place of the model's default system text; not together with a system turn.
        ends: The roles that the last turn may have; with ``""`` there may be no turn at all.

    Returns:
        The picture or None, and (role, text) pairs, the system turn first if there is one.

    Raises:
        ValueError: An unknown role or part, text with a lone surrogate, a picture in a later turn, two pictures, a
            system turn that is not the first, or a last turn of the wrong role.
        TypeError: Messages that are no sequence, one that is no mapping, or content that is no text.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a question or a list of turns, found {type(messages).__name__}")
    turns: list[tuple[str, str]] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise TypeError(
                f"{where}: expected a mapping with role and content, found {type(message).__name__}"
            )
        role = message.get("role")
        if role not in _ROLES:
            raise ValueError(f"{where}: role: expected one of {', '.join(_ROLES)}, found {role!r}")
        if "content" not in message:
            raise ValueError(f"{where}: expected the key 'content', found {sorted(map(str, message))}")
        text, pictures = _content(where, message["content"])
        if role == "system" and i > 0:
            raise ValueError(f"{where}: expected a system message only at the beginning")
        for picture in pictures:
            if role != "user" or any(earlier == "user" for earlier, _ in turns):
                raise ValueError(
                    f"{where}: expected the picture in the first user message, where Yi-VL was trained to find it"
                )
            if image is not None:
                raise ValueError(
                    f"{where}: expected one picture, found a second: Yi-VL looks at one per conversation"
                )
            image = picture
        turns.append((role, checked_text(f"{where}: content", text)))

    if system is not None:
        if turns and turns[0][0] == "system":
            raise ValueError("expected either the argument system or a system message, found both")
        turns.insert(0, ("system", checked_text("system", system)))
    if (turns[-1][0] if turns else "") not in ends:
        expected = " or ".join(f"the {role}'s" for role in ends)
        found = f"one of role {turns[-1][0]!r}" if turns else "no messages"
        raise ValueError(f"expected the last message to be {expected}, found {found}")
    return image, turns


def checked_text(where: str, text: str) -> str:
    """The text, if it is all characters: half of a surrogate pair is none. `where` names it in the error."""
    if not isinstance(text, str):
        raise TypeError(f"{where}: expected a string, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: expected text, found a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
        ) from error
    return text


def _content(where: str, content: object) -> tuple[str, list[ImageSource]]:
    """Text and pictures of one message's content."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise TypeError(
            f"{where}: content: expected a string or a list of parts, found {type(content).__name__}"
        )
    texts: list[str] = []
    pictures: list[ImageSource] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if not isinstance(url, str):
                raise TypeError(
                    f"{where}: image_url: expected a string or {{'url': ...}}, found {type(url).__name__}"
                )
            pictures.append(image_from_url(url))
        else:
            raise ValueError(f"{where}: expected parts of type 'text' or 'image_url', found {part!r:.80}")
    return "\n".join(texts), pictures
