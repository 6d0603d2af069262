"""The model that comes with the package, through the API and the command line."""

from __future__ import annotations

import io

import numpy as np
import pytest
from yivl_edge import ImageError, Model
from yivl_edge.cli import main
from yivl_edge.data import MODEL, samples


def test_a_follow_up_builds_on_the_models_own_answer():
    model = Model.demo()
    turns = [{"role": "user", "content": "What colour is the star?"}]
    first = model.chat(samples()["star-and-moon"], turns, temperature=0)
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Where is it?"}]
    second = model.chat(samples()["star-and-moon"], turns, temperature=0)
    assert "red" in first.text
    assert "on the left" in second.text
    assert second.timings.image == 0


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


def test_the_demo_asks_for_a_picture_on_standard_error(capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("0\nstop\n/exit\n"))
    assert main(["demo"]) == 0
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count(f"Which picture, 1 to {len(samples())}? ") == 2
    assert f"(the picture is {samples()['stop']})" in output.err


def test_the_demo_says_how_to_choose_a_picture_where_nobody_can_be_asked(capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["demo"]) == 1
    error = capfd.readouterr().err
    assert "found the end of the input: give it with --sample or --image" in error
    assert "Traceback" not in error


def test_the_demo_model_opens_with_the_options_of_every_model():
    assert Model.demo(n_ctx=300).n_ctx == 300
    assert Model.demo(n_threads=1).n_threads == 1
    with pytest.raises(ImageError, match="above the limit of 10;"):
        Model.demo(max_image_pixels=10).preprocess(np.zeros((8, 8, 3), np.uint8))
