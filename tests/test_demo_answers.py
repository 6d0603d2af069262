"""The shipped demo model answers fixed questions about the shipped pictures, word for word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yivl_edge

DATA = Path(yivl_edge.__file__).parent / "data"
QUESTIONS = json.loads((Path(__file__).parent / "data" / "demo_questions.json").read_text(encoding="utf-8"))
FILES = sorted(DATA.glob("*.gguf"))


def test_there_are_enough_questions_of_every_kind() -> None:
    assert len(QUESTIONS) >= 30
    assert sum(len(q["messages"]) > 1 for q in QUESTIONS) >= 5
    assert sum(any("一" <= c <= "鿿" for c in q["answer"]) for q in QUESTIONS) >= 10
    assert {q["picture"] for q in QUESTIONS} == {path.name for path in DATA.glob("*.png")}


@pytest.mark.skipif(not FILES, reason="the demo model is not in the package's data folder")
def test_answers_word_for_word() -> None:
    model = yivl_edge.Model(FILES[0])
    wrong = []
    for q in QUESTIONS:
        reply = model.chat(DATA / q["picture"], q["messages"], temperature=0.0, max_tokens=96)
        if reply.text != q["answer"]:
            wrong.append((q["picture"], q["messages"][-1]["content"], q["answer"], reply.text))
    assert not wrong
