"""Model.prefill: what comes before a question, computed ahead."""

# ruff: noqa: F811  the fixtures come from the tests of conversations

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from test_conversation import FIRST, IMAGE_ROWS, ask, assistant, model, other_image, user  # noqa: F401
from yivl_edge import ContextOverflowError, Model


def test_what_was_prefilled_is_not_computed_again(model, golden_f32, golden_image):
    before_question = model.prompt(FIRST).split(FIRST)[0].rstrip()
    least = len(model.tokenize(before_question.replace("<image_placeholder>", ""))) + IMAGE_ROWS
    assert model.prefill(golden_image)
    for question in [FIRST, "什么？", "\n", "C#?"]:
        reply = ask(model, golden_image, question)
        assert reply.usage.cached_tokens >= least
        assert reply.timings.image == 0
        alone = ask(Model(golden_f32, n_ctx=1024), golden_image, question)
        assert (reply.text, alone.usage.cached_tokens) == (alone.text, 0)
        assert model.prefill(golden_image)


def test_turns_until_now_are_prefilled_with_the_last_answer(model, golden_f32, golden_image):
    turns = [{"role": "system", "content": "Be brief."}, user(FIRST), assistant("A cat sleeps.")]
    assert model.prefill(golden_image, turns)
    turns.append(user("还有什么？"))
    reply = ask(model, golden_image, turns)
    so_far = model.prompt(turns).split("还有什么？")[0].rstrip()
    assert (
        reply.usage.cached_tokens
        >= len(model.tokenize(so_far.replace("<image_placeholder>", ""))) + IMAGE_ROWS
    )
    assert reply.text == ask(Model(golden_f32, n_ctx=1024), golden_image, turns).text


@pytest.mark.parametrize("messages", [FIRST, [user(FIRST)]])
def test_a_whole_prompt_can_be_prefilled(model, golden_image, messages):
    assert model.prefill(golden_image, messages)
    reply = ask(model, golden_image, messages)
    assert reply.usage.cached_tokens == reply.usage.prompt_tokens - 1


def test_prefilling_takes_nothing_from_a_longer_conversation(model, golden_image):
    first = ask(model, golden_image, FIRST)
    assert model.prefill(golden_image)
    assert ask(model, golden_image, FIRST).usage.cached_tokens == first.usage.prompt_tokens - 1


def test_a_text_or_system_text_alone_can_be_prefilled(model):
    assert model.prefill(None, system="Be brief.")
    reply = model.chat(None, "Why?", system="Be brief.", max_tokens=2)
    assert reply.usage.cached_tokens >= len(model.tokenize("Be brief."))


def test_a_reply_waits_for_the_prefill_of_its_beginning_and_for_no_other(model, golden_image, other_image):
    begun, go_on = threading.Event(), threading.Event()

    def hold(stage, fraction):
        begun.set()
        go_on.wait(20)

    prefill = threading.Thread(target=model.prefill, args=(golden_image,), kwargs={"on_progress": hold})
    prefill.start()
    assert begun.wait(20)
    try:
        assert ask(model, other_image, FIRST).usage.cached_tokens == 0
        assert ask(model, None, FIRST).usage.completion_tokens > 0

        flag = threading.Event()
        threading.Timer(0.1, flag.set).start()
        reply = ask(model, golden_image, FIRST, cancel=flag)
        assert (reply.finish_reason, reply.usage.completion_tokens) == ("cancelled", 0)

        # A reply that waits tells how far the other is.
        reached = []

        def note(stage, fraction):
            reached.append(stage)
            go_on.set()

        reply = ask(model, golden_image, FIRST, on_progress=note)
    finally:
        go_on.set()
        prefill.join()
    assert reached[0] == "image"
    assert reply.usage.cached_tokens > IMAGE_ROWS
    assert reply.timings.image == 0
    assert reply.timings.first_token > reply.timings.prefill > 0


@pytest.mark.parametrize("stage", ["image", "prefill"])
def test_a_cancelled_prefill_says_so_and_changes_no_reply(model, golden_f32, golden_image, stage):
    flag = threading.Event()
    stages = []

    def on_progress(reached, fraction):
        stages.append(reached)
        if reached == stage and not flag.is_set():
            flag.set()
            time.sleep(0.05)  # the core asks every 20 ms, and the golden model takes less

    assert not model.prefill(golden_image, on_progress=on_progress, cancel=flag)
    assert stages[-1] == stage
    assert not model.prefill(golden_image, cancel=flag)
    assert (
        ask(model, golden_image, FIRST).text == ask(Model(golden_f32, n_ctx=1024), golden_image, FIRST).text
    )


def test_what_cannot_be_prefilled_is_an_error(model, golden_image):
    with pytest.raises(ContextOverflowError, match=r"the context holds 1024"):
        model.prefill(golden_image, system="a b " * 600)
    with pytest.raises(ValueError, match="role"):
        model.prefill(golden_image, [{"role": "human", "content": "Why?"}])
    with pytest.raises(TypeError, match="cancel: expected"):
        model.prefill(golden_image, cancel=1)
    with pytest.raises(TypeError, match="on_progress: expected"):
        model.prefill(golden_image, on_progress=1)

    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.prefill(golden_image, on_progress=fail)
    assert model.prefill(golden_image)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_gets_an_error_not_a_wait_for_the_parents_prefill(golden_f32, golden_image):
    code = """
import os, sys, threading
from yivl_edge import Model

model, begun, forked = Model(sys.argv[1], n_ctx=1024, device="cpu"), threading.Event(), threading.Event()
def note(stage, fraction):
    begun.set()
    forked.wait()
prefill = threading.Thread(target=lambda: model.prefill(sys.argv[2], on_progress=note))
prefill.start()
begun.wait()
pid = os.fork()
if pid == 0:
    try:
        model.chat(sys.argv[2], "a", max_tokens=1)
    except RuntimeError as error:
        os.write(1, str(error).encode())
        os._exit(0)
    os._exit(3)
_, status = os.waitpid(pid, 0)
forked.set()
prefill.join()
assert os.waitstatus_to_exitcode(status) == 0
"""
    result = subprocess.run(
        [sys.executable, "-c", code, golden_f32, golden_image],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "did not survive the fork" in result.stdout


def test_waiting_for_a_prefill_counts(model, golden_image):
    begun, go_on = threading.Event(), threading.Event()

    def hold(*_):
        begun.set()
        go_on.wait(20)

    reading = threading.Thread(target=model.prefill, args=(golden_image,), kwargs={"on_progress": hold})
    reading.start()
    assert begun.wait(20)
    threading.Timer(0.3, go_on.set).start()
    times = ask(model, golden_image, FIRST).timings
    reading.join()
    assert times.prefill >= 0.2
    assert times.first_token >= times.preprocess + times.image + times.prefill


def test_a_question_asked_by_a_prefills_own_callback_does_not_wait_for_it(model, golden_image):
    replies = []

    def ask_once(*_):
        if not replies:
            replies.append(None)
            replies.append(ask(model, golden_image, FIRST, max_tokens=2))

    options = {"args": (golden_image,), "kwargs": {"on_progress": ask_once}}
    reading = threading.Thread(target=model.prefill, daemon=True, **options)
    reading.start()
    reading.join(20)
    assert not reading.is_alive()
    assert replies[1].usage.completion_tokens == 2
