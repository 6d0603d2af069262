"""The shipped demo model answers fixed questions about the shipped pictures, word for word, with every instruction set.

One of 50 answers is two points of accuracy, and arithmetic may change it by 0.3: so none may differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from yivl_edge import Model
from yivl_edge.data import samples

QUESTIONS = json.loads((Path(__file__).parent / "data" / "demo_questions.json").read_text(encoding="utf-8"))


def test_there_are_enough_questions_of_every_kind() -> None:
    assert len(QUESTIONS) >= 30
    assert sum(len(q["messages"]) > 1 for q in QUESTIONS) >= 5
    assert sum(any("一" <= c <= "鿿" for c in q["answer"]) for q in QUESTIONS) >= 10
    assert {q["picture"] for q in QUESTIONS} == {path.name for path in samples().values()}


def test_answers_word_for_word(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YIVL_ISA", isa)
    model = Model.demo()
    pictures = {path.name: path for path in samples().values()}
    wrong = []
    for q in QUESTIONS:
        reply = model.chat(pictures[q["picture"]], q["messages"], temperature=0.0, max_tokens=96)
        if reply.text != q["answer"]:
            wrong.append((q["picture"], q["messages"][-1]["content"], q["answer"], reply.text))
    assert not wrong
