"""The model that comes with the package answers sensibly about the pictures that come with it."""

from __future__ import annotations

import pytest
from yivl_edge import Model
from yivl_edge.cli import main
from yivl_edge.data import MODEL, samples

# Picture, turns of the user, and words that the last answer must hold, in order.
CASES = [
    ("four-shapes", ["What do you see?"], ["red heart", "green square", "blue circle", "purple triangle"]),
    (
        "four-shapes",
        ["Describe the picture."],
        [
            "red heart at the top left",
            "green square at the top right",
            "circle in the centre",
            "triangle at the bottom",
        ],
    ),
    ("four-shapes", ["图中有几个图形？"], ["四个"]),
    ("four-shapes", ["描述这张图片。"], ["左上角", "红色的心形", "绿色的方形", "蓝色的圆形", "紫色的三角形"]),
    ("four-shapes", ["What does the text say?"], ["no text"]),
    ("four-shapes", ["Where is the star?"], ["no star"]),
    ("four-shapes", ["Is there a star in the picture?"], ["No"]),
    ("four-shapes", ["What colour is the heart?"], ["red"]),
    ("four-shapes", ["三角形是什么颜色的？"], ["紫色"]),
    ("four-shapes", ["Where is the heart?"], ["top left"]),
    ("four-shapes", ["Where is the heart?", "And what colour is it?"], ["red"]),
    ("stop", ["What do you see?"], ["white cross", "red circle", "STOP"]),
    ("stop", ["图中有几个图形？"], ["两个"]),
    ("stop", ["What does the text say?"], ["STOP"]),
    ("stop", ["描述这张图片。"], ["白色的十字形", "红色的圆形", "STOP"]),
    ("stop", ["Is there a star in the picture?"], ["No"]),
    ("stop", ["Where is the circle?"], ["top right"]),
    ("number", ["What do you see?"], ["purple heart", "42"]),
    ("number", ["图中有几个图形？"], ["一个"]),
    ("number", ["What does the text say?"], ["42"]),
    ("number", ["Where is the star?"], ["no star"]),
    ("star-and-moon", ["What do you see?"], ["yellow moon", "red star"]),
    (
        "star-and-moon",
        ["Describe the picture."],
        ["yellow moon at the top right", "red star on the left"],
    ),
    ("star-and-moon", ["描述这张图片。"], ["右上角", "黄色的月牙形", "左边", "红色的星形"]),
    ("star-and-moon", ["Where is the star?"], ["on the left"]),
    ("star-and-moon", ["Is there a star in the picture?"], ["Yes"]),
    ("star-and-moon", ["What colour is the star?", "Where is it?"], ["left"]),
    ("star-and-moon", ["图中有几个图形？"], ["两个"]),
    ("star-and-moon", ["月牙形在哪里？"], ["右上角"]),
    ("three-stars", ["What do you see?"], ["yellow star", "blue star", "white moon", "yellow star"]),
    ("three-stars", ["图中有几个图形？"], ["四个"]),
    ("three-stars", ["Is there a star in the picture?"], ["Yes"]),
    ("three-stars", ["What does the text say?"], ["no text"]),
    ("empty", ["What do you see?"], ["empty"]),
    ("empty", ["描述这张图片。"], ["什么也没有"]),
    ("empty", ["Where is the star?"], ["no star"]),
    ("empty", ["图中有几个图形？"], ["没有图形"]),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.demo()


@pytest.mark.parametrize(("picture", "questions", "words"), CASES, ids=lambda value: str(value))
def test_it_answers_about_the_sample_pictures(model, picture, questions, words):
    turns = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        answer = model.chat(samples()[picture], turns, temperature=0).text
        turns.append({"role": "assistant", "content": answer})
    place = 0
    for word in words:
        assert word in answer[place:], answer
        place = answer.index(word, place) + len(word)


def test_the_shipped_file_is_small():
    assert MODEL.stat().st_size <= 12_000_000


def test_the_demo_asks_its_prepared_questions_and_ends(capfd):
    assert main(["demo", "--once", "--sample", "star-and-moon"]) == 0
    output = capfd.readouterr()
    questions = [line for line in output.out.splitlines() if line.startswith("> ")]
    answers = [line for line in output.out.splitlines() if not line.startswith("> ")]
    assert len(questions) == len(answers) == 3
    assert any("\u4e00" <= character <= "\u9fff" for character in questions[1])
    assert "star" in answers[0]
    assert "两个" in answers[1]
    assert answers[2].startswith("Yes")
    assert str(samples()["star-and-moon"]) in output.err
    assert "first token after" in output.err


def test_the_demo_talks_about_a_picture_of_ones_own(capfd):
    assert main(["demo", "--once", "--image", str(samples()["stop"])]) == 0
    assert "STOP" in capfd.readouterr().out
