"""Multi-round chat: system texts, roles, pictures, sampling, stops, cancelling, threads."""

from __future__ import annotations

import base64
import gc
import itertools
import struct
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yivl_edge
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
    with pytest.raises(ValueError, match="hold a picture: expected image=True"):
        model.prompt([user(parts)], image=False)


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
        {"max_tokens": 2**63},
        {"top_k": 2**31},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_sampling_options_out_of_range_are_value_errors(model, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        ask(model, None, FIRST, **option)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": "hot"},
        {"seed": 1.5},
        {"max_tokens": None},
        {"stop": [1]},
        {"stop": 1},
        {"system": 1},
        {"on_progress": 1},
        {"cancel": 1},
    ],
)
def test_options_of_another_type_are_named(model, option):
    with pytest.raises(TypeError, match=rf"^{next(iter(option))}: expected"):
        ask(model, None, FIRST, **option)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"device": 0}, TypeError),
        ({"max_image_pixels": "many"}, TypeError),
        ({"max_image_pixels": 0}, ValueError),
        ({"on_progress": 1}, TypeError),
    ],
)
def test_wrong_options_of_a_model_are_named(golden_f32, option, error):
    with pytest.raises(error, match=rf"^{next(iter(option))}: expected"):
        Model(golden_f32, **option)


def test_ids_that_are_no_ids_are_named(model):
    with pytest.raises(TypeError, match=r"^ids\[0\]: expected an integer, found 'a'"):
        model.detokenize("abc")
    with pytest.raises(ValueError, match=r"^ids\[1\]: expected an integer from .*, found 1099511627776"):
        model.detokenize([5, 2**40])


def test_the_context_is_what_was_asked_for_or_the_models_own(golden_f32, model):
    assert model.n_ctx == 1024
    assert Model(golden_f32).n_ctx == model.config.decoder.context_length


def test_sizes_of_a_session_are_checked_before_memory_is_asked_for(golden_f32, model):
    for n_ctx in (0, -1, 4097, 10**15, 2**63 - 1, 2**70):
        with pytest.raises(ValueError, match="n_ctx: expected"):
            Model(golden_f32, n_ctx=n_ctx)
    for batch in (0, -1):
        with pytest.raises(ValueError, match="batch: expected at least 1"):
            _core.Session(model._model, 16, batch)


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
    with pytest.raises(ContextOverflowError, match=rf"needs {prompt + 2**63 - 1} tokens"):
        ask(model, golden_image, FIRST, max_tokens=2**63 - 1)
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
    assert getattr(reply.timings, stage) > 0
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
    timer = threading.Timer(0.05, stream.close)
    timer.start()
    for _ in stream:
        pass
    timer.join()
    assert stream.result.finish_reason == "cancelled"


def test_a_cancel_during_a_prefill_of_a_second_ends_it_within_100_ms(golden_f32):
    model = Model(golden_f32, device="cpu")  # a GPU takes less
    waits = []
    for i in range(3):  # another process may take the processor for longer
        begun = threading.Event()
        question = f"{i} " + "sky and sea " * 400
        stream = ask(model, None, question, stream=True, on_progress=lambda *_, begun=begun: begun.set())
        cancelled_at = []

        def cancel(begun=begun, stream=stream, cancelled_at=cancelled_at):
            begun.wait()
            time.sleep(0.02)
            cancelled_at.append(time.perf_counter())
            stream.cancel()

        canceller = threading.Thread(target=cancel)
        canceller.start()
        assert list(stream) == []
        waits.append(time.perf_counter() - cancelled_at[0])
        canceller.join()
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.usage.completion_tokens == 0
    assert min(waits) < 0.1


@pytest.mark.parametrize("dropped", [False, True])
def test_a_callback_that_refers_to_its_stream_keeps_nothing_alive(golden_f32, golden_image, dropped):
    class Window:
        def ask(self, model):
            self.stream = ask(
                model, golden_image, FIRST, stream=True, on_progress=self.progress, cancel=self, max_tokens=8
            )
            pieces = itertools.islice(self.stream, 1) if dropped else self.stream
            assert "".join(pieces)

        def progress(self, *_):
            pass

        def is_set(self):
            return False

    model = Model(golden_f32, n_ctx=1024)
    Window().ask(model)
    gc.collect()
    # The session of the first: another would know nothing of this conversation.
    assert ask(model, golden_image, FIRST, max_tokens=1).usage.cached_tokens > IMAGE_ROWS
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_stream_is_about_the_array_as_it_was_when_asked(model, golden_image):
    expected = ask(model, golden_image, FIRST).text
    frame = np.array(Image.open(golden_image).convert("RGB"))
    stream = ask(model, frame, FIRST, stream=True)
    frame[:] = 0
    assert "".join(stream).strip() == expected
    assert ask(model, frame, FIRST).text != expected


@pytest.mark.parametrize("stage", ["image", "prefill", "decode"])
def test_a_stream_may_be_closed_by_its_own_on_progress_but_not_read(model, golden_image, stage):
    stream = ask(
        model,
        golden_image,
        FIRST,
        stream=True,
        max_tokens=600,
        on_progress=lambda s, _: s == stage and stream.close(),
    )
    assert "".join(stream) == stream.result.text
    assert stream.result.finish_reason == "cancelled"
    stream = ask(model, golden_image, FIRST, stream=True, on_progress=lambda *_: next(stream))
    with pytest.raises(ValueError, match="cannot be read while it computes"):
        next(stream)
    assert ask(model, golden_image, FIRST).finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "work",
    [
        'model.chat(picture, "a", max_tokens=2000, temperature=0, on_progress=lambda s, _: s == "decode" and set())',
        'model.prefill(picture, "sky and sea " * 400, on_progress=lambda *_: set())',
        "[(model.chat(picture, 'a', max_tokens=9), set()) for _ in itertools.count()]",
        "[(set(), model.logits(picture, 'sky and sea ' * 99)) for _ in itertools.count()]",
        "[(set(), Model(sys.argv[1])) for _ in itertools.count()]",
    ],
)
def test_a_daemon_thread_that_computes_does_not_abort_the_interpreter_at_its_end(
    golden_f32, golden_image, work
):
    script = f"""if True:
        import itertools, sys, threading
        from yivl_edge import Model

        model, picture, begun = Model(sys.argv[1]), sys.argv[2], threading.Event()
        set = begun.set
        threading.Thread(target=lambda: {work}, daemon=True).start()
        assert begun.wait(20)
    """
    run = subprocess.run(
        [sys.executable, "-c", script, golden_f32, golden_image], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


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


def ticks_during(work):
    """How often another Python thread runs while `work` does; about once if it holds the GIL all the time."""
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    work()
    end = time.perf_counter()
    done.set()
    ticker.join()
    return sum(begin < t < end for t in ticks)


def test_other_python_threads_run_while_the_core_computes(model, golden_image):
    def compute():
        pixels = model.preprocess(golden_image)
        with model._borrowed_session() as session:
            session.logits(model.prompt_ids("a" * 300), pixels, _core.Control())

    assert ticks_during(compute) >= 2


def test_other_python_threads_run_while_the_core_tokenises(model):
    text = "a cat " * 100000
    ids = model.tokenize("cat") * 2000000
    for work in (
        lambda: model._model.tokenize(text),
        lambda: model._model.prompt_ids([("user", text)], True),
        lambda: model._model.detokenize(ids),
    ):
        assert ticks_during(work) >= 15  # of about 100


# What a result says, and when it ends


def test_without_a_seed_replies_differ(model):
    assert len({ask(model, None, FIRST, temperature=3.0, seed=None).text for _ in range(4)}) > 1


def test_reading_the_picture_counts(model, golden_image, monkeypatch):
    load = yivl_edge.model.load_image

    def slow(*arguments, **options):
        time.sleep(0.2)
        return load(*arguments, **options)

    monkeypatch.setattr(yivl_edge.model, "load_image", slow)
    times = ask(model, golden_image, FIRST).timings
    assert times.preprocess >= 0.2
    assert times.first_token >= times.preprocess + times.image + times.prefill


def test_texts_of_a_turn_are_lines(model):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert model.prompt([user(parts)], image=False) == model.prompt("a\nb", image=False)


def test_the_end_of_text_ends_a_reply_and_counts(golden_f32, tmp_path):
    # What comes first greedily is made the end of text.
    first = int(Model(golden_f32).logits(None, "Why?")[-1].argmax())
    data, key = bytearray(golden_f32.read_bytes()), b"tokenizer.ggml.eos_token_id"
    struct.pack_into("<I", data, data.index(key) + len(key) + 4, first)
    (tmp_path / "model.gguf").write_bytes(data)
    reply = Model(tmp_path / "model.gguf").chat(None, "Why?", temperature=0, max_tokens=5)
    assert (reply.text, reply.finish_reason, reply.usage.completion_tokens) == ("", "stop", 1)


def test_a_stop_text_at_the_very_end_is_a_stop(model, golden_image):
    whole = ask(model, golden_image, FIRST)
    assert whole.finish_reason == "length"
    end = whole.text[-2:]
    reply = ask(model, golden_image, FIRST, stop=[end, whole.text[-3:] + "zzz"])
    assert (reply.finish_reason, reply.text) == ("stop", whole.text[: whole.text.index(end)].rstrip())


def test_the_last_progress_is_all_of_it(golden_f32, model):
    opened, decoded = [], []
    Model(golden_f32, on_progress=lambda *progress: opened.append(progress))
    assert (opened[0], opened[-1]) == (("load", 0.0), ("load", 1.0))
    whole = ask(model, None, FIRST, max_tokens=40)
    ask(
        model,
        None,
        FIRST,
        max_tokens=40,
        stop=whole.text[5:7],
        on_progress=lambda *progress: decoded.append(progress),
    )
    assert decoded[-1] == ("decode", 1.0)


def test_a_cancelled_picture_is_not_preprocessed(model):
    control = _core.Control()
    control.cancel()
    with pytest.raises(_core.Cancelled):
        model._model.preprocess(np.zeros((8, 8, 3), np.uint8), control)


def test_the_context_is_used_to_its_last_token(model):
    room = model.n_ctx - len(model.prompt_ids("Why?", image=False))
    model.chat(None, "Why?", max_tokens=room, stream=True).close()
    with pytest.raises(ContextOverflowError, match=f"needs {model.n_ctx + 1} tokens"):
        model.chat(None, "Why?", max_tokens=room + 1, stream=True)
