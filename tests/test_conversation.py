"""Multi-round chat: reuse, system texts, roles, pictures, sampling, stops, cancelling, threads."""

from __future__ import annotations

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from yivl_edge import ContextOverflowError, Model, _core

FIRST = "Describe the cat."
IMAGE_ROWS = 64


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def model(golden_f32: Path) -> Model:
    """A fresh model: nothing in its caches."""
    return Model(golden_f32, n_ctx=1024)


@pytest.fixture(scope="module")
def other_image() -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))


def ask(model, image, messages, **options):
    options = {"max_tokens": 12, "temperature": 0.8, "seed": 5} | options
    return model.chat(image, messages, **options)


# Reuse


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


def test_replies_with_reuse_equal_replies_without(model, golden_f32, golden_image, other_image):
    turns = [user(FIRST)]
    for question in ["还有什么？", "Why?", "C#?"]:
        reply = ask(model, golden_image, turns)
        alone = ask(Model(golden_f32, n_ctx=1024), golden_image, turns)
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


# Prompts


def test_text_only_chat(model):
    reply = ask(model, None, FIRST)
    assert "<image_placeholder>" not in model.prompt(FIRST, image=False)
    assert reply.usage.prompt_tokens == len(model.prompt_ids(FIRST, image=False))


def test_a_system_message_or_argument_replaces_the_default(model):
    as_message = model.prompt([{"role": "system", "content": "Be brief."}, user("Hi")])
    assert as_message == "Be brief.\n\n### Human: <image_placeholder>\nHi\n### Assistant:"
    by_argument = ask(model, None, "Hi", system="Be brief.")
    assert by_argument.usage.prompt_tokens == len(
        model.tokenize("Be brief.\n\n### Human: Hi\n### Assistant:")
    )
    with pytest.raises(ValueError, match="found both"):
        ask(model, None, [{"role": "system", "content": "a"}, user("b")], system="c")
    with pytest.raises(ValueError, match=r"messages\[1\].*only at the beginning"):
        ask(model, None, [user("b"), {"role": "system", "content": "a"}, user("b")])


def test_empty_assistant_turns_and_consecutive_turns_of_one_role_keep_their_place(model):
    text = model.prompt([user("a"), assistant(""), user("b"), user("c")], image=False)
    assert text.endswith("\n\n### Human: a\n### Assistant: \n### Human: b\n### Human: c\n### Assistant:")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected the last message to be the user's, found no messages"),
        (
            [user("a"), assistant("b")],
            "expected the last message to be the user's, found one of role 'assistant'",
        ),
        ([{"role": "robot", "content": "a"}], r"messages\[0\]: role: expected one of .*'robot'"),
        ([{"role": "user"}], "expected the key 'content'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "expected parts of type 'text' or 'image_url'"),
    ],
)
def test_wrong_conversations_are_value_errors(model, messages, message):
    with pytest.raises(ValueError, match=message):
        ask(model, None, messages)


def test_a_placeholder_typed_by_a_user_is_text(model, golden_image):
    typed = "What does <image_placeholder> mean?"
    ids = model.prompt_ids(typed)
    assert ids.count(-200) == 1
    after_image = ids[ids.index(-200) + 1 :]
    assert after_image == model.tokenize(f"\n{typed}\n### Assistant:")
    assert ask(model, golden_image, typed).usage.prompt_tokens == len(ids) + IMAGE_ROWS - 1
    assert -200 not in model.prompt_ids(typed, image=False)


def as_part(path: Path):
    encoded = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def test_openai_content_parts(model, golden_image):
    parts = [as_part(golden_image), {"type": "text", "text": FIRST}]
    assert ask(model, None, [user(parts)]).text == ask(model, golden_image, FIRST).text


def test_an_image_in_a_later_turn_or_a_second_image_is_refused(model, golden_image):
    parts = [as_part(golden_image), {"type": "text", "text": FIRST}]
    with pytest.raises(ValueError, match=r"messages\[2\].*first user message"):
        ask(model, None, [user("a"), assistant("b"), user(parts)])
    with pytest.raises(ValueError, match=r"messages\[0\].*assistant|first user message"):
        ask(model, None, [assistant(parts), user("b")])
    with pytest.raises(ValueError, match="expected one picture, found a second"):
        ask(model, None, [user([as_part(golden_image), *parts])])
    with pytest.raises(ValueError, match="expected one picture, found a second"):
        ask(model, golden_image, [user(parts)])


def test_a_lone_surrogate_is_named(model):
    broken = "a\ud800"
    for place, call in {
        r"messages\[0\]: content": lambda: ask(model, None, broken),
        "system": lambda: ask(model, None, "a", system=broken),
        "stop": lambda: ask(model, None, "a", stop=[broken]),
        "text": lambda: model.tokenize(broken),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{place}: expected text, found a lone surrogate U\+D800 at position 1"
        ):
            call()


# Sampling


def test_same_seed_same_text_on_any_number_of_threads(golden_f32, golden_image):
    texts = {
        ask(Model(golden_f32, n_threads=n), golden_image, FIRST, temperature=1.0).text for n in (1, 2, 3)
    }
    assert len(texts) == 1
    model = Model(golden_f32)
    assert len({ask(model, golden_image, FIRST, temperature=1.0, seed=seed).text for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
    ],
)
def test_sampling_options_out_of_range_are_value_errors(model, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ask(model, None, FIRST, **option)


# Ends


def test_pieces_of_a_stream_are_the_whole_text(model, golden_image):
    stream = ask(model, golden_image, FIRST, stream=True, max_tokens=40)
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == ask(model, golden_image, FIRST, max_tokens=40).text
    assert all(pieces)


def test_a_stop_text_ends_the_reply(model, golden_image):
    whole = ask(model, golden_image, FIRST, max_tokens=40)
    assert whole.finish_reason == "length"
    assert whole.usage.completion_tokens == 40
    stop = whole.text[5:7]
    stopped = ask(model, golden_image, FIRST, max_tokens=40, stop=stop)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)].rstrip()


def test_overflow_is_raised_before_any_computing_with_both_numbers(model, golden_image):
    prompt = len(model.prompt_ids(FIRST)) + IMAGE_ROWS - 1
    seen = []
    with pytest.raises(ContextOverflowError, match=rf"needs {prompt + 1000} tokens .*holds 1024"):
        ask(model, golden_image, FIRST, max_tokens=1000, on_progress=lambda *a: seen.append(a))
    assert not seen
    with pytest.raises(ContextOverflowError):
        ask(model, "no such picture.png", FIRST, max_tokens=1000)
    assert ask(model, golden_image, FIRST, max_tokens=4).usage.completion_tokens <= 4


# Cancelling


def test_progress_reports_stages_and_fractions(model, golden_image):
    seen = []
    ask(model, golden_image, FIRST, on_progress=lambda stage, fraction: seen.append((stage, fraction)))
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages == ["image", "prefill", "decode"]
    for stage in stages:
        fractions = [fraction for s, fraction in seen if s == stage]
        assert fractions == sorted(fractions)
        assert 0 <= fractions[0] <= fractions[-1] <= 1
        assert fractions[-1] == 1


def test_an_exception_in_on_progress_ends_the_work_and_is_passed_on(model, golden_image):
    def fail(stage, fraction):
        if stage == "prefill":
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        ask(model, golden_image, FIRST, on_progress=fail)
    assert ask(model, golden_image, FIRST).finish_reason in ("stop", "length")


@pytest.mark.parametrize("stage", ["image", "prefill", "decode"])
def test_a_cancel_flag_ends_the_reply_in_every_stage(model, golden_image, stage):
    flag = threading.Event()
    reply = ask(
        model,
        golden_image,
        FIRST,
        on_progress=lambda s, _: s == stage and flag.set(),
        cancel=flag,
        max_tokens=600,
    )
    assert reply.finish_reason == "cancelled"
    assert reply.usage.completion_tokens < 600
    again = ask(model, golden_image, FIRST)
    assert again.finish_reason in ("stop", "length")


def test_a_cancel_flag_ends_the_reading_of_a_picture(model):
    flag = threading.Event()
    flag.set()
    picture = np.zeros((3000, 4000, 3), np.uint8)
    reply = ask(model, picture, FIRST, cancel=flag)
    assert (reply.text, reply.finish_reason) == ("", "cancelled")


def test_closing_a_stream_leaves_the_model_usable(model, golden_image):
    stream = ask(model, golden_image, FIRST, stream=True, max_tokens=600)
    first_piece = next(stream)
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text.startswith(first_piece)
    assert list(stream) == []
    whole = ask(model, golden_image, FIRST, max_tokens=40).text
    assert whole.startswith(first_piece)


def test_a_stream_closed_by_another_thread_ends_soon(model, golden_image):
    stream = ask(model, golden_image, FIRST, stream=True, max_tokens=600)
    closed_at = []

    def close():
        closed_at.append(time.perf_counter())
        stream.close()

    timer = threading.Timer(0.05, close)
    timer.start()
    for _ in stream:
        pass
    timer.join()
    assert stream.result.finish_reason == "cancelled"


# Threads


def test_four_threads_on_one_model_reply_as_one_after_another(model, golden_image, other_image):
    jobs = [(golden_image, FIRST, 1), (other_image, FIRST, 2), (None, FIRST, 3), (golden_image, "Why?", 4)]

    def run(job):
        image, question, seed = job
        first = ask(model, image, question, seed=seed)
        second = ask(model, image, [user(question), assistant(first.text), user("And?")], seed=seed)
        return first.text, second.text

    one_by_one = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, jobs)) == one_by_one


def test_other_python_threads_run_while_the_core_computes(model, golden_image):
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    pixels = model.preprocess(golden_image)
    with model._borrowed_session() as session:
        session.logits(model.prompt_ids("a" * 300), pixels, _core.Control())
    end = time.perf_counter()
    done.set()
    ticker.join()
    # Held for the whole computation, the GIL would allow no tick strictly inside it.
    assert sum(begin < t < end for t in ticks) >= 2
