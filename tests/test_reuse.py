"""What conversations find again of earlier ones: the picture, and the keys and values of a common beginning."""

# ruff: noqa: F811  the fixtures come from the tests of conversations

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from test_conversation import FIRST, IMAGE_ROWS, ask, assistant, model, other_image, user  # noqa: F401
from yivl_edge import Model, _core


def test_second_turn_neither_encodes_the_image_again_nor_computes_the_common_prefix(model, golden_image):
    first = ask(model, golden_image, FIRST)
    assert first.usage.cached_tokens == 0
    assert first.timings.image > 0
    turns = [user(FIRST), assistant(first.text), user("还有什么？")]
    second = ask(model, golden_image, turns)
    assert second.timings.image == 0
    # Everything up to the reply is common; the reply itself may be tokenised otherwise than it was sampled.
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    assert second.usage.prompt_tokens == len(model.prompt_ids(turns)) + IMAGE_ROWS - 1


@pytest.mark.parametrize("file", ["golden_f32", "golden_q4_0"])
def test_replies_with_reuse_equal_replies_without(file, request, golden_image, other_image):
    if file == "golden_q4_0" and _core.isa_name() == "amx":
        pytest.skip("fewer than 16 new tokens take another arithmetic")
    path = request.getfixturevalue(file)
    model = Model(path, n_ctx=1024)
    turns = [user(FIRST)]
    for question in ["还有什么？", "Why?", "C#?"]:
        reply = ask(model, golden_image, turns)
        alone = ask(Model(path, n_ctx=1024), golden_image, turns)
        assert alone.usage.cached_tokens == 0
        assert reply.text == alone.text
        turns += [assistant(reply.text), user(question)]
        ask(model, other_image, "Something else in between")


def test_another_image_is_never_answered_with_the_first_ones_cache(
    model, golden_f32, golden_image, other_image
):
    ask(model, golden_image, FIRST)
    reply = ask(model, other_image, FIRST)
    text_before_image = len(model.tokenize(model.prompt(FIRST).split("<image_placeholder>")[0]))
    assert reply.usage.cached_tokens == text_before_image
    assert reply.timings.image > 0
    assert reply.text == ask(Model(golden_f32, n_ctx=1024), other_image, FIRST).text


def test_the_same_question_twice_computes_one_position(model, golden_image):
    first = ask(model, golden_image, FIRST)
    again = ask(model, golden_image, FIRST)
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    assert again.text == first.text


def test_the_image_is_known_by_its_content_not_by_its_object(model, golden_image):
    ask(model, golden_image, FIRST)
    again = ask(model, np.asarray(Image.open(golden_image).convert("RGB")), FIRST)
    assert again.timings.image == 0


@pytest.mark.parametrize("work", ["prefill", "logits"])
def test_other_work_of_a_session_ends_its_reply(model, work):
    session = _core.Session(model._model, 64)
    session.begin(list(range(3, 13)), None, 50, _core.SamplingOptions(temperature=0), [])
    control = _core.Control()
    session.next(control)
    getattr(session, work)(list(range(20, 84)), None, control)
    assert session.next(control) is None
    assert session.finish_reason == "cancelled"
    session.begin(list(range(3, 13)), None, 2, _core.SamplingOptions(temperature=0), [])
    session.next(control)
    assert session.usage[1] == 0


class StoppingControl(_core.Control):
    """Cancels, or raises KeyError, at a certain call of on_progress."""

    def __init__(self, calls: int, raising: bool) -> None:
        super().__init__(self.on_progress)
        self.calls_left = calls
        self.raising = raising

    def on_progress(self, stage: str, fraction: float) -> None:
        self.calls_left -= 1
        if self.calls_left == 0 and self.raising:
            raise KeyError(stage)
        if self.calls_left == 0:
            self.cancel()


@pytest.mark.parametrize("batch", [7, 40, 1152])
def test_replies_after_cancels_and_errors_anywhere_equal_those_of_a_fresh_session(
    golden_f32, golden_image, other_image, batch
):
    model = Model(golden_f32, n_ctx=256)
    core = model._model
    greedy = _core.SamplingOptions(temperature=0)
    pictures = [None, model.preprocess(golden_image), model.preprocess(other_image)]
    system = ("system", "Be brief.")
    conversations = [
        [system, ("user", "Describe the cat.")],
        [system, ("user", "Describe the cats, please.")],
        [system, ("user", "Describe the cat."), ("assistant", "No."), ("user", "还有什么？")],
        [("system", "Be"), ("user", "a")],
    ]

    def reply(session, ids, pixels, control):
        session.begin(ids, pixels, 5, greedy, [])
        while session.next(control) is not None:
            pass
        return session.text

    fresh = {}
    for p, pixels in enumerate(pictures):
        for c, turns in enumerate(conversations):
            ids = core.prompt_ids(turns, pixels is not None)
            fresh[p, c] = ids, reply(_core.Session(core, 256), ids, pixels, _core.Control())
    assert len({text for _, text in fresh.values()}) > len(fresh) // 2

    rng = random.Random(batch)
    session = _core.Session(core, 256, batch)
    stopped = 0
    for _ in range(100):
        p, c = rng.choice(list(fresh))
        ids, text = fresh[p, c]
        control = StoppingControl(rng.choice([10**6, rng.randrange(1, 25)]), raising=rng.random() < 0.5)
        try:
            got = reply(session, ids, pictures[p], control)
        except KeyError:
            stopped += 1
        else:
            cancelled = session.finish_reason == "cancelled"
            stopped += cancelled
            assert text.startswith(got) if cancelled else got == text, (p, c)
        if rng.random() < 0.1:
            session.vision_features(pictures[1], _core.Control())
    assert 20 < stopped < 80


def two_conversations(model):
    """At once, so that each has a cache of its own; their results."""
    first = ask(model, None, "first", stream=True)
    next(first)
    second = ask(model, None, "second, of which more", stream=True)
    next(second)
    return [
        (question, stream.result)
        for question, stream in (("first", first), ("second, of which more", second))
    ]


def test_two_conversations_in_turns_keep_their_caches(model):
    first, second = two_conversations(model)
    for question, result in (second, first, first, second):
        assert ask(model, None, question).usage.cached_tokens == result.usage.prompt_tokens - 1


def test_a_prefill_goes_on_from_the_conversation_that_it_begins_like(model):
    first, second = two_conversations(model)
    assert model.prefill(None, second[0])
    for question, result in (first, second):
        assert ask(model, None, question).usage.cached_tokens == result.usage.prompt_tokens - 1


def test_caches_of_many_conversations_at_once_are_not_all_kept(model):
    streams = [ask(model, None, f"{i}", stream=True) for i in range(6)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    assert len(model._idle) == 4
