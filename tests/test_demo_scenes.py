"""The demo's pictures, questions and model: reproducible, right, and exactly Yi-VL's architecture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo import conversations, scenes


def combination(thing: scenes.Thing) -> tuple[str, str, int]:
    return thing.shape, thing.colour, thing.cell


def test_seed_gives_the_same_scene_picture_and_questions() -> None:
    first, second = scenes.make_scene(7), scenes.make_scene(7)
    assert first == second
    picture, labels = scenes.render(first, 7)
    again, labels_again = scenes.render(second, 7)
    assert picture.tobytes() == again.tobytes()
    np.testing.assert_array_equal(labels, labels_again)
    for family in conversations.FAMILIES:
        assert conversations.ask(first, family, "en", 3) == conversations.ask(second, family, "en", 3)


def test_held_out_combinations_are_a_tenth_and_never_shown_in_training() -> None:
    everything = [
        scenes.Thing(s, c, cell, True) for s in scenes.SHAPES for c in scenes.COLOURS for cell in range(9)
    ]
    assert 0.07 < np.mean([scenes.is_held_out(t) for t in everything]) < 0.13
    for seed in range(500):
        assert not any(scenes.is_held_out(t) for t in scenes.make_scene(seed).things)
        assert any(scenes.is_held_out(t) for t in scenes.make_scene(seed, held_out=True).things)


def test_things_stand_in_reading_order_and_never_on_the_text() -> None:
    for seed in range(500):
        scene = scenes.make_scene(seed, held_out=seed % 2 == 0)
        cells = [t.cell for t in scene.things]
        assert cells == sorted(set(cells))
        if scene.text:
            assert all(cell // 3 != scene.row for cell in cells)


@pytest.mark.parametrize("language", conversations.LANGUAGES)
@pytest.mark.parametrize("family", conversations.FAMILIES)
def test_every_family_can_be_asked(family: str, language: str) -> None:
    found = [
        turns
        for seed in range(40)
        if (turns := conversations.ask(scenes.make_scene(seed), family, language, seed))
    ]
    assert len(found) >= 8
    assert all(len(turns) > 1 for turns in found) == (family == "followup")
    for turns in found:
        for question, answer in turns:
            assert question == question.strip()
            assert answer
            assert answer[-1] in ".。"


SCENE = scenes.Scene(
    (
        scenes.Thing("star", "red", 0, True),
        scenes.Thing("star", "blue", 2, False),
        scenes.Thing("moon", "orange", 4, False),
    ),
    "STOP",
    2,
)


def every_turn(scene: scenes.Scene, family: str, language: str) -> dict[str, str]:
    """Question -> answer over many seeds; a question must not have two answers."""
    found: dict[str, str] = {}
    for seed in range(400):
        turns = conversations.ask(scene, family, language, seed)
        if turns and len(turns) == 1:
            question, answer = turns[0]
            assert found.setdefault(question, answer) == answer
    return found


@pytest.mark.parametrize(
    ("family", "language", "question", "answer"),
    [
        ("what", "en", "What do you see?",
         "There is a red star, a blue star, an orange moon and the word STOP."),
        ("what", "zh", "图中有什么？", "图中有一个红色的星形、一个蓝色的星形、一个橙色的月牙形和单词STOP。"),
        ("describe", "en", "Describe the picture.",
         "There is a red star at the top left, a blue star at the top right and an orange moon in the centre."
         " The word STOP is written at the bottom."),
        ("colour", "en", "What colour is the moon?", "The moon is orange."),
        ("shape", "zh", "蓝色的图形是什么？", "蓝色的图形是星形。"),
        ("count", "en", "How many stars are there?", "There are two stars."),
        ("count", "zh", "有几个图形？", "有三个图形。"),
        ("where", "en", "Where is the blue star?", "The blue star is at the top right."),
        ("compare", "en", "Which is bigger, the red star or the moon?", "The red star is bigger."),
        ("compare", "zh", "月牙形在红色的星形的哪边？", "月牙形在红色的星形的右下方。"),
        ("yesno", "en", "Is the moon red?", "No, the moon is orange."),
        ("yesno", "en", "Is there a red star?", "Yes, there is a red star."),
        ("read", "en", "What does the text say?", "The word is STOP."),
        ("absent", "en", "What number is shown?", "There is no number in the picture."),
        ("absent", "en", "Where is the circle?", "There is no circle in the picture."),
    ],
)  # fmt: skip
def test_answers_of_a_known_scene(family: str, language: str, question: str, answer: str) -> None:
    assert every_turn(SCENE, family, language)[question] == answer


@pytest.mark.parametrize("language", conversations.LANGUAGES)
def test_a_question_has_one_answer_in_all_families(language: str) -> None:
    answers: dict[str, str] = {}
    for scene in (SCENE, scenes.make_scene(0), scenes.make_scene(2)):
        answers.clear()
        for family in conversations.FAMILIES:
            for question, answer in every_turn(scene, family, language).items():
                assert answers.setdefault(question, answer) == answer


def test_nobody_is_asked_about_one_of_two_like_things() -> None:
    for language, name in (("en", "the star"), ("zh", "^星形")):
        asked = every_turn(SCENE, "where", language) | every_turn(SCENE, "colour", language)
        assert not any(name in "^" + question for question in asked)


def test_labels_say_what_the_patches_show() -> None:
    _, labels = scenes.render(SCENE, 1)
    assert labels.shape == (64, 7)
    shapes = set(labels[:, 0]) - {0}
    assert shapes == {scenes.SHAPES.index(s) + 1 for s in ("star", "moon")}
    text = {tuple(map(int, row)) for row in labels[:, 4:] if row[0]}
    assert text == {(scenes.CHARACTERS.index(c) + 1, 1, scenes.WORDS.index("STOP") + 1) for c in "STOP"}
    rows = np.flatnonzero(labels[:, 4]) // 8
    assert rows.min() >= 4  # printed in the lowest third
