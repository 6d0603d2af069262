"""A reply's text does not depend on how its bytes arrive, and what is shown early is never taken back."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from yivl_edge import _core

STOPS = ["###", "\nHuman:"]


def without_incomplete_end(data: bytes) -> bytes:
    """Without the bytes at the end that more bytes could complete to a character."""
    for length in range(min(3, len(data)), 0, -1):
        tail = data[-length:]
        try:
            tail.decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return data[:-length]
    return data


def expected_text(data: bytes, stops: Sequence[str]) -> str:
    """The definition, on all bytes at once, with Python's decoder, find and strip."""
    text = without_incomplete_end(data).decode(errors="replace")
    cuts = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(cuts, default=len(text))].strip()


def streamed(chunks: Iterable[bytes], stops: Sequence[str]) -> list[str]:
    stream = _core.TextStream(list(stops))
    pieces = []
    for chunk in chunks:
        pieces.append(stream.push(chunk))
        assert stream.text == "".join(pieces)
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces


# Pieces of stops, whitespace, characters of one to four bytes, parts of characters, bytes of none.
WORDS = ["#", "##", "###", "\n", "\nHu", "Human:", "man:", "Human", ":", "a", "b", "ab", "C#", "\0", "é"]
WORDS += ["中", "😀", "停止", " ", "\t", "\x1c", "\x85", "\xa0", "\u3000", "\u200b"]
BROKEN = ["e4", "b8", "ad", "f0", "9f", "98", "e280", "c2", "ff", "eda080", "c0", "f4908080", "e080"]
FRAGMENTS = [*(word.encode() for word in WORDS), *map(bytes.fromhex, BROKEN)]
SHORT_STOPS = ["#", "##", "ab", "b", "bab", "aba", "\n", "\n\n", " a", "a ", "中", "停", "停止", "\ufffd"]
SHORT_STOPS += ["\u3000#"]
DATA = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(b"".join)
STOP_LISTS = st.one_of(st.just(STOPS), st.lists(st.sampled_from(SHORT_STOPS), max_size=3))


def test_any_split_of_many_random_replies_gives_the_same_text() -> None:
    """Hypothesis shrinks what it finds but is slow: this covers more."""
    rng = random.Random(11)
    for _ in range(15_000):
        data = b"".join(rng.choices(FRAGMENTS, k=rng.randint(0, 14)))
        stops = STOPS if rng.random() < 0.5 else rng.choices(SHORT_STOPS, k=rng.randint(0, 3))
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, 8)))
        chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert "".join(streamed(chunks, stops)) == expected_text(data, stops), (chunks, stops)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(DATA, STOP_LISTS, st.data())
@example(b"abc", ["bc", "abcd"], None)
@example(b"\nHuman: hello", STOPS, None)
def test_any_split_gives_the_same_text(data: bytes, stops: list[str], draw: st.DataObject | None) -> None:
    expected = expected_text(data, stops)
    chunkings = [[data], [data[i : i + 1] for i in range(len(data))]]
    if draw is not None:
        cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
        chunkings.append([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)])
    for chunks in chunkings:
        assert "".join(streamed(chunks, stops)) == expected


@settings(derandomize=True, deadline=None, max_examples=200)
@given(DATA, STOP_LISTS, st.lists(st.sampled_from(FRAGMENTS), max_size=4).map(b"".join))
def test_what_is_shown_holds_whatever_follows(data: bytes, stops: list[str], more: bytes) -> None:
    stream = _core.TextStream(stops)
    shown = stream.push(data)
    assert expected_text(data, stops).startswith(shown)
    if stream.stopped:
        assert shown == expected_text(data, stops) == expected_text(data + more, stops)
        assert stream.push(more) == stream.finish() == ""
    else:
        assert expected_text(data + more, stops).startswith(shown)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(DATA, STOP_LISTS)
def test_no_more_is_held_back_than_must_be(data: bytes, stops: list[str]) -> None:
    """What is held back could still be lost to an incomplete character, a stop or the stripping."""
    stream = _core.TextStream(stops)
    shown = stream.push(data)
    text = without_incomplete_end(data).decode(errors="replace")
    if stream.stopped:
        return
    could_stop = [at for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in stops)]
    assert shown == text[: min(could_stop, default=len(text))].strip()


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (" It is a cat.\n###", "It is a cat."),
        (" It is a cat.\n### Human: more", "It is a cat."),
        (" It is a cat.\nHuman: more", "It is a cat."),
        (" It is a cat. \n \nHuman: more", "It is a cat."),
        ("It is written in C#", "It is written in C#"),
        ("C# and F# are languages, ## is a heading", "C# and F# are languages, ## is a heading"),
        ("a trailing ##", "a trailing ##"),
        ("a trailing ## \n", "a trailing ##"),
        ("####", ""),
        ("\nHuman: hello", ""),
        (" \n\nHuman:", ""),
        ("Human: is the first word", "Human: is the first word"),
        ("one\nHumans: two", "one\nHumans: two"),
        ("one\n\nHuman", "one\n\nHuman"),
        ("图片里有两只猫。###", "图片里有两只猫。"),
        ("   ", ""),
        ("", ""),
        ("\u3000\x1c全角\u2003\x85", "全角"),
    ],
)
def test_replies(reply: str, text: str) -> None:
    data = reply.encode()
    assert "".join(streamed([data[i : i + 1] for i in range(len(data))], STOPS)) == text


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    chunks = [" A", " cat", ".", " ", " C#", "#", " ok\n", "Hu", "ge", " ##", "#"]
    assert streamed([chunk.encode() for chunk in chunks], STOPS) == [
        *["A", " cat", ".", "", "  C", "", "## ok", "", "\nHuge", "", "", ""]
    ]


def test_a_split_character_is_shown_whole() -> None:
    first, second = "猫".encode()[:1], "猫".encode()[1:]
    assert streamed([b"a", first, second, b"b"], STOPS) == ["a", "", "猫", "b", ""]


def test_an_incomplete_last_character_is_dropped_and_an_invalid_one_replaced() -> None:
    assert streamed(["猫".encode() + b"\xf0\x9f\x98"], STOPS) == ["猫", ""]
    assert streamed([b"a\xf0\x9f\x98", b"b"], STOPS) == ["a", "\ufffdb", ""]
    assert streamed([b"\xff"], STOPS) == ["\ufffd", ""]


def test_the_earliest_stop_wins_even_if_a_later_one_is_complete_first() -> None:
    stream = _core.TextStream(["bc", "abcd"])
    assert stream.push(b"xabc") == "x"
    assert not stream.stopped  # "abcd" may yet begin before "bc"
    assert stream.push(b"d") == ""
    assert stream.stopped
    assert stream.text == "x"

    stream = _core.TextStream(["bc", "abcd"])
    stream.push(b"xabc")
    assert stream.finish() == "a"
    assert stream.stopped


def test_stop_is_told_at_once() -> None:
    stream = _core.TextStream(STOPS)
    assert [(stream.push(b), stream.stopped) for b in (b"hi #", b"#", b"#", b"more")] == [
        ("hi", False),
        ("", False),
        ("", True),
        ("", True),
    ]
    assert stream.finish() == ""
    assert stream.text == "hi"


def test_nothing_comes_after_the_end() -> None:
    stream = _core.TextStream(STOPS)
    assert stream.push(b"a #") == "a"
    assert stream.finish() == " #"
    assert stream.push(b"b") == stream.finish() == ""
    assert not stream.stopped


def test_every_whitespace_of_python_is_stripped_and_nothing_else() -> None:
    assert not any(chr(code).isspace() for code in range(0x3400, sys.maxunicode + 1))
    for code in [*range(0x3400), *range(0xF900, 0x11000)]:
        text = f"{chr(code)}a{chr(code)}"
        assert streamed([text.encode()], [])[0] == (text.strip() if chr(code).isspace() else text), hex(code)


def test_many_pushes_take_no_quadratic_time() -> None:
    """200,000 held-back line breaks: rescanning them at each push would be 2 * 10^10 steps."""
    stream = _core.TextStream(STOPS)
    assert all(stream.push(b"\n") == "" for _ in range(200_000))
    assert stream.push(b"a") == "a"
    assert all(stream.push(b"\n") == "" for _ in range(200_000))
    assert stream.push(b"b") == "\n" * 200_000 + "b"


@pytest.mark.parametrize(("stop", "message"), [("", "must not be empty"), (b"\xff", "not valid UTF-8")])
def test_a_stop_text_that_cannot_work_is_refused(stop: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.TextStream(["ok", stop])
