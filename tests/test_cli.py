"""The command line, as its users meet it: arguments, pipes, and a terminal."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yivl_edge
from gguf import GGMLQuantizationType
from weight_types import rewrite
from yivl_edge import _core
from yivl_edge.cli import chat, main
from yivl_edge.cli.terminal import visible
from yivl_edge.replies import ChatResult, Timings, Usage

COMMAND = [sys.executable, "-m", "yivl_edge"]
# With Python's UTF-8 mode, what the tests see does not depend on the locale they run in.
ENVIRONMENT = {**os.environ, "PYTHONUTF8": "1", "TERM": "xterm"}
IMATRIX = ["imatrix", "m", "--images", "i", "--prompts", "p", "-o", "o"]


def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=60,
        env=ENVIRONMENT,
        check=False,
    )


def error_line(captured: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    output = captured.readouterr()
    assert output.out == ""
    assert output.err.startswith("yivl-edge: error: ")
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1
    return output.err


# One question.


def test_a_question_is_answered_as_the_python_api_answers_it(golden_f32, golden_image, golden_model, capfd):
    options = {"max_tokens": 12, "temperature": 0.7, "seed": 5, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    arguments = ["chat", str(golden_f32), "--image", str(golden_image), "--prompt", "这是什么？"]
    for name, value in options.items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    assert main([*arguments, "--repetition-penalty", "1.1", "--system", "Be brief.", "--threads", "1"]) == 0
    expected = golden_model.chat(
        golden_image, "这是什么？", system="Be brief.", repetition_penalty=1.1, **options
    )
    output = capfd.readouterr()
    assert output.out == expected.text + "\n"
    assert output.err == "(stopped after 12 tokens)\n"


def test_the_pair_answers_as_the_single_file(golden_f32, golden_pair, golden_image, capfd):
    text, mmproj = map(str, golden_pair)
    rest = ["--image", str(golden_image), "--prompt", "What?", "--max-tokens", "8", "--temperature", "0"]
    assert main(["chat", str(golden_f32), *rest]) == 0
    single = capfd.readouterr().out
    assert main(["chat", text, "--mmproj", mmproj, *rest]) == 0
    assert capfd.readouterr().out == single


def test_a_question_may_come_through_a_pipe(golden_f32, golden_model):
    result = run("chat", golden_f32, "--max-tokens", 6, "--temperature", 0, stdin="讲个笑话\n".encode())
    expected = golden_model.chat(None, "讲个笑话", max_tokens=6, temperature=0).text
    assert (result.returncode, result.stdout.decode()) == (0, expected + "\n")


def test_the_file_gives_the_defaults_of_sampling(golden_f32, golden_model, tmp_path, capfd):
    contents = bytearray(golden_f32.read_bytes())
    for key, value in {"yivl.sampling.temperature": ("<f", 0), "yivl.sampling.max_tokens": ("<I", 3)}.items():
        # After the key stand its type, in 4 bytes, and the value.
        struct.pack_into(value[0], contents, contents.index(key.encode()) + len(key) + 4, value[1])
    path = tmp_path / "greedy.gguf"
    path.write_bytes(contents)
    assert main(["chat", str(path), "--prompt", "Hi"]) == 0
    output = capfd.readouterr()
    assert output.out == golden_model.chat(None, "Hi", temperature=0, max_tokens=3).text + "\n"
    assert output.err == "(stopped after 3 tokens)\n"


def test_an_answer_is_cut_where_the_context_ends(golden_f32, golden_model, capfd):
    positions = len(golden_model.prompt_ids("hello", image=False))
    arguments = ["chat", str(golden_f32), "--prompt", "hello", "--temperature", "0"]
    assert main([*arguments, "--n-ctx", str(positions + 9)]) == 0
    output = capfd.readouterr()
    assert output.out == golden_model.chat(None, "hello", temperature=0, max_tokens=9).text + "\n"
    assert output.err == "(stopped: the context is full)\n"


def test_timings_count_tokens(golden_f32, golden_image, golden_model, capfd):
    arguments = ["chat", str(golden_f32), "--image", str(golden_image), "--prompt", "What?"]
    assert main([*arguments, "--max-tokens", "4", "--temperature", "0", "--timings"]) == 0
    positions = len(golden_model.prompt_ids("What?")) + golden_model.config.vision.n_patches - 1
    assert f"{positions} tokens, 0 cached" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "speed"), [(6, "0.5"), (0.3, "10"), (0.003, "1,000"), (0.00078, "3,846")]
)
def test_timings_show_a_speed_without_an_exponent(seconds, speed, capfd):
    timings = Timings(preprocess=0, image=0, prefill=0, first_token=0, decode=seconds)
    usage = Usage(prompt_tokens=1, cached_tokens=0, completion_tokens=4)
    chat._print_timings(ChatResult("", "stop", usage, timings))
    assert f"4 tokens, {speed} a second" in capfd.readouterr().err


def test_nobody_reading_the_answer_is_no_traceback(golden_f32):
    process = subprocess.Popen(
        [*COMMAND, "chat", golden_f32, "--prompt", "hello", "--temperature", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141


# Errors.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chat", "missing.gguf", "--prompt", "x"], "missing.gguf: cannot open: No such file or directory"),
        (["chat", "", "--prompt", "x"], "error: '': cannot open: No such file or directory"),
        (["inspect", "missing.gguf"], "missing.gguf: cannot open: No such file or directory"),
        (["inspect", __file__], "this is no GGUF file"),
        (["chat", __file__, "--prompt", "x"], "this is no GGUF file"),
        (["chat", "{model}", "--image", "missing.png", "--prompt", "x"], "missing.png: no such file"),
        (["chat", "{model}", "--image", "", "--prompt", "x"], "error: '': no such file"),
        (["chat", "{model}", "--image", "{model}", "--prompt", "x"], "expected a picture"),
        (
            ["chat", "{text}", "--image", "{image}", "--prompt", "x"],
            "give the file of its pair with --mmproj",
        ),
        (["chat", "{mmproj}", "--prompt", "x"], "give the text model first"),
        (["chat", "{text}", "--mmproj", "{text}", "--prompt", "x"], "expected a vision tower"),
        (["chat", "{model}", "--prompt", " "], "expected a question: give it with --prompt, or pipe it in"),
        (["chat", "{model}", "--prompt", "a\udcffb"], "question: expected text in"),
        (
            ["chat", "{model}", "--prompt", "x", "--n-ctx", "10"],
            "tokens; ask a shorter question or raise --n-ctx",
        ),
        (
            ["chat", "{model}", "--prompt", "x", "--n-ctx", "9999"],
            "expected 1 to the model's 4096, found 9999",
        ),
        (
            ["chat", "{model}", "--image", "{image}", "--prompt", "x", "--max-image-pixels", "99"],
            "above the limit of 99",
        ),
        (
            ["inspect", "{text}", "--n-ctx", "9999"],
            "expected at most the model's context of 4096, found 9999",
        ),
        (["inspect", "{mmproj}", "--mmproj", "{text}"], "expected the text model of the pair"),
    ],
)
def test_what_cannot_work_is_one_line(golden_f32, golden_pair, golden_image, capfd, arguments, expected):
    paths = {"model": golden_f32, "text": golden_pair[0], "mmproj": golden_pair[1], "image": golden_image}
    assert main([argument.format(**paths) for argument in arguments]) == 1
    assert expected in error_line(capfd)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["chat"], "required: MODEL"),
        (["chat", "m", "--temperature", "-1"], "--temperature: expected a number from 0 to 100, found '-1'"),
        (
            ["chat", "m", "--temperature", "nan"],
            "--temperature: expected a number from 0 to 100, found 'nan'",
        ),
        (["chat", "m", "--top-p", "0"], "--top-p: expected a number above 0 and up to 1, found '0'"),
        (["chat", "m", "--min-p", "2"], "--min-p: expected a number from 0 to 1, found '2'"),
        (["chat", "m", "--top-k", "-1"], "--top-k: expected an integer of at least 0, found '-1'"),
        (["chat", "m", "--repetition-penalty", "0"], "expected a number above 0 and up to 100, found '0'"),
        (["chat", "m", "--max-tokens", "0"], "--max-tokens: expected an integer of at least 1, found '0'"),
        (["chat", "m", "--seed", str(2**64)], f"expected an integer from 0 to {2**64 - 1}, found '{2**64}'"),
        (["chat", "m", "--threads", "two"], "--threads: expected an integer from 1 to 1024, found 'two'"),
        (
            ["verify", "m", "--threads", "9" * 30],
            f"--threads: expected an integer from 1 to 1024, found '{'9' * 30}'",
        ),
        (
            ["chat", "m", "--top-k", "9" * 30],
            f"--top-k: expected an integer from 0 to {2**31 - 1}, found '{'9' * 30}'",
        ),
        (
            [*IMATRIX, "--limit", "9" * 30],
            f"--limit: expected an integer from 1 to {2**31 - 1}, found '{'9' * 30}'",
        ),
        (["chat", "m", "--n-ctx", "0"], "--n-ctx: expected an integer of at least 1, found '0'"),
        (["inspect"], "required: FILE"),
        (["inspect", "m", "--n-ctx", "1.5"], "--n-ctx: expected an integer of at least 1, found '1.5'"),
        (["inspect", "m", "--device", "cpu"], "--device: expected cuda or cuda:N, found 'cpu'"),
        (["inspect", "m", "--device", "cuda:x"], "--device: expected cuda or cuda:N, found 'cuda:x'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capfd, arguments, expected):
    assert main(arguments) == 2
    assert expected in error_line(capfd)


def test_a_text_that_is_not_text_is_refused(golden_f32):
    result = run("chat", golden_f32, stdin=b"\xff\xfe")
    assert result.returncode == 1
    assert b"question: expected text in utf-8, found other bytes" in result.stderr


@pytest.mark.parametrize("command", ["chat", "inspect", "convert"])
def test_help_shows_an_example(command, capfd):
    assert main([command, "--help"]) == 0
    assert re.search(r"examples?:\n +(yivl-edge|python -m yivl_edge\.)\W?" + command, capfd.readouterr().out)


def test_version(capfd):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"yivl-edge \d+\.\d+\.\d+\n", capfd.readouterr().out)


def test_the_version_is_unknown_where_the_package_is_not_installed(capfd, monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == "yivl-edge unknown\n"
    with pytest.raises(AttributeError, match="'yivl_edge' has no attribute '_version'"):
        yivl_edge._version  # noqa: B018


# A terminal.


# The progress line is wiped, and what follows is not the next one ("Reading the question").
ANSWER_BEGINS = r"\x1b\[K[^A-Z\r\x1b]"


class Terminal:
    """A command on a pseudo-terminal, and what it has written."""

    def __init__(self, *arguments: object, stdout: Path | None = None) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            if stdout is not None:
                os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
            os.execve(sys.executable, [*COMMAND, *map(str, arguments)], ENVIRONMENT)
        self.unread = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def read_until(self, pattern: str, timeout: float = 20) -> str:
        """What came since the last call up to the end of the pattern."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.unread)):
            if not select.select([self._fd], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"no {pattern!r} in {self.unread!r}")
            try:
                self.unread += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:  # what Linux says at the end
                raise AssertionError(f"ended without {pattern!r}: {self.unread!r}") from None
            # Line ends as the program wrote them, without readline's switching of bracketed paste.
            self.unread = re.sub(r"\x1b\[\?2004(h|l\r)|\r(?=\n)", "", self.unread)
        text = self.unread[: found.end()]
        self.unread = self.unread[found.end() :]
        return text

    def exit_code(self) -> int:
        """Waits for the end."""
        end = time.monotonic() + 10
        while (status := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < end, f"still running: {self.unread!r}"
            time.sleep(0.01)
        self.pid = 0
        return os.waitstatus_to_exitcode(status[1])

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


@pytest.fixture
def terminal(golden_f32: Path) -> Iterator[Terminal]:
    session = Terminal("chat", golden_f32, "--temperature", 0, "--max-tokens", 6, "--timings")
    session.read_until("> $")
    yield session
    session.close()


def ask(terminal: Terminal, question: str) -> tuple[int, int]:
    """Prompt and cached tokens of the next turn."""
    terminal.type(question + "\n")
    match = re.search(r"for (\d+) tokens, (\d+) cached", terminal.read_until(r"cached;[^)]*\)\n> $"))
    assert match is not None
    return int(match[1]), int(match[2])


def test_a_conversation_goes_on_until_reset(terminal, golden_model):
    alone = len(golden_model.prompt_ids("Hello", image=False))
    time.sleep(0.5)  # a person types longer than a thread takes to begin
    first, cached = ask(terminal, "Hello")
    assert first == alone
    # What comes before the question was computed while it was typed.
    before = golden_model.prompt("Hello", image=False).split("Hello")[0].rstrip()
    assert len(golden_model.tokenize(before)) <= cached < alone
    time.sleep(0.5)
    second, cached = ask(terminal, "再说一遍")
    assert second > alone + 6
    # The answer, too, was read while the next question was typed.
    said = golden_model.chat(None, "Hello", max_tokens=6, temperature=0).text
    turns = [("user", "Hello"), ("assistant", said), ("user", "再说一遍")]
    until_now = golden_model.prompt([{"role": role, "content": text} for role, text in turns], image=False)
    assert cached >= len(golden_model.tokenize(until_now.split("再说一遍")[0].rstrip()))
    terminal.type("/reset\n")
    terminal.read_until(r"\(new conversation\)\n> $")
    assert ask(terminal, "Hello")[0] == alone
    terminal.type("/exit\n")
    assert terminal.exit_code() == 0


def test_a_picture_starts_a_new_conversation(terminal, golden_model, golden_image, tmp_path):
    picture = tmp_path / "one more photo.png"
    shutil.copy(golden_image, picture)
    ask(terminal, "Hello")
    for typed in (picture, f'"{picture}"', str(picture).replace(" ", "\\ "), f"{tmp_path}/one\t"):
        terminal.type(f"/image {typed}\n")
        terminal.read_until(rf"\(new conversation about {re.escape(str(picture))}\)\n> $")
    picture.unlink()  # what has been seen stays seen
    rows = golden_model.config.vision.n_patches
    alone = len(golden_model.prompt_ids("What?")) + rows - 1
    time.sleep(0.5)
    prompt, cached = ask(terminal, "What?")
    assert prompt == alone
    before_picture = golden_model.prompt("What?").split("<image_placeholder>")[0]
    assert len(golden_model.tokenize(before_picture)) + rows <= cached < alone

    # A picture that cannot be used changes nothing.
    terminal.type(f"/image {picture}\n")
    terminal.read_until(r"no such file\)\n> $")
    assert ask(terminal, "And now?")[0] > alone + 6
    terminal.type("/reset\n")
    terminal.read_until("> $")
    assert ask(terminal, "What?")[0] == alone
    terminal.type("\x04")
    terminal.read_until("\n$")
    assert terminal.exit_code() == 0


def test_ctrl_c_stops_only_the_answer_being_given(golden_f32, golden_model):
    # This greedy answer of the golden model is hundreds of tokens long.
    session = Terminal("chat", golden_f32, "--temperature", 0, "--timings")
    try:
        session.read_until("> $")
        session.type("hello\n")
        session.read_until(ANSWER_BEGINS)
        session.type("\x03")
        assert "Traceback" not in session.read_until(r"\(stopped\)\n> $")
        # The question and the part that was answered stay in the conversation.
        session.type("/reset\nhello\n")
        session.read_until(r"\(new conversation\)\n> hello\n" + f"(?s:.*?){ANSWER_BEGINS}(?s:.{{12}})")
        session.type("\x03")
        session.read_until(r"\(stopped\)\n> $")
        session.type("go on\n")
        found = re.search(r"for (\d+) tokens", session.read_until(r"cached;[^)]*\)\n> $", 30))
        assert found is not None
        turns = [("user", "hello"), ("assistant", ""), ("user", "go on")]
        unanswered = [{"role": role, "content": text} for role, text in turns]
        assert int(found[1]) > len(golden_model.prompt_ids(unanswered, image=False))

        # At the prompt it clears the line and says how to leave.
        session.type("half a question")
        session.read_until("half a question")
        # Readline shows a key before it waits for the next one; CPython sees an interrupt in between only with the
        # next key. Nothing tells from outside that it waits again.
        time.sleep(0.5)
        session.type("\x03")
        session.read_until(r"\(/exit or Ctrl-D ends the conversation\)\n> $")
        session.type("/exit\n")
        assert session.exit_code() == 0
    finally:
        session.close()


def test_only_answers_go_where_standard_output_leads(golden_f32, golden_model, tmp_path):
    log = tmp_path / "log"
    session = Terminal("chat", golden_f32, "--temperature", 0, "--max-tokens", 6, stdout=log)
    try:
        session.read_until("> $")
        session.type("hello\n")
        session.read_until(r"\(stopped after 6 tokens\)\n> $")
        session.type("/exit\n")
        assert session.exit_code() == 0
    finally:
        session.close()
    expected = golden_model.chat(None, "hello", max_tokens=6, temperature=0).text
    assert log.read_text(encoding="utf-8") == expected + "\n"


def test_a_terminal_says_what_it_does_not_understand(terminal):
    for typed, answer in [
        ("/dance\n", r"\(/dance is no command; /help lists them\)"),
        ("/image\n", r"\(expected the path of a picture: /image PATH\)"),
        ("/help\n", r"/image PATH  [^>]*/reset  [^>]*/exit "),
        ("   \n", ""),
    ]:
        terminal.type(typed)
        terminal.read_until(answer + r"[^>]*> $")


def test_a_full_context_is_said_with_what_to_do(golden_f32, golden_model):
    room = len(golden_model.prompt_ids("hello", image=False)) + 9
    session = Terminal("chat", golden_f32, "--temperature", 0, "--n-ctx", room)
    try:
        session.read_until("> $")
        session.type("hello\n")
        session.read_until(r"\(stopped: the context is full\)\n> $")
        # The conversation fills the context: nothing can be computed ahead, and the question says why.
        session.type("hello\n")
        session.read_until(rf"takes \d+ of {room} tokens; /reset starts a new one\)\n> $")
        session.type("/reset\nhello\n")
        session.read_until(r"\(stopped: the context is full\)\n> $")
    finally:
        session.close()


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\tc\n\x7f\x9b你") == "a␛[2Jb\tc\n\ufffd\ufffd你"


# inspect.


TOWER = ("vision tower", "projector")


def inspect_json(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_inspect_counts_every_tensor_and_byte(golden_f32, golden_pair, capfd):
    single = inspect_json(capfd, golden_f32)
    tensors = _core.GgufFile.open(golden_f32).tensors
    assert sum(row["tensors"] for row in single["tensors"]) == len(tensors)
    assert sum(row["bytes"] for row in single["tensors"]) == sum(tensor.nbytes for tensor in tensors)
    assert sum(row["parameters"] for row in single["tensors"]) == single["parameters"]
    assert single["bits_per_weight"] == 32
    assert {row["group"] for row in single["tensors"]} == {
        "decoder attention",
        "decoder MLP",
        "embeddings and output",
        "vision tower",
        "projector",
    }
    # q, k, v, output and a norm in each of 3 layers
    attention = next(row for row in single["tensors"] if row["group"] == "decoder attention")
    assert (attention["type"], attention["tensors"]) == ("F32", 15)
    assert attention["parameters"] == 3 * (2 * 256 * 256 + 2 * 128 * 256 + 256)

    pair = inspect_json(capfd, golden_pair[0], "--mmproj", golden_pair[1])
    text, vision = inspect_json(capfd, golden_pair[0]), inspect_json(capfd, golden_pair[1])
    assert [single["layout"], pair["layout"], text["layout"], vision["layout"]] == [
        "single",
        "pair",
        "text",
        "mmproj",
    ]
    assert pair["tensors"] == text["tensors"] + vision["tensors"]
    assert pair["files"] == text["files"] + vision["files"]
    for key in ("decoder", "vision", "tokenizer", "prompt", "preprocessing", "sampling"):
        assert pair[key] == single[key]
    assert (text["vision"], vision["decoder"], vision["memory"]) == (None, None, None)
    assert (text["decoder"], vision["vision"]) == (single["decoder"], single["vision"])


def test_inspect_counts_a_file_once_that_is_given_twice(golden_f32, capfd):
    assert inspect_json(capfd, golden_f32, "--mmproj", golden_f32) == inspect_json(capfd, golden_f32)


def test_inspect_counts_of_two_single_files_the_halves_that_a_model_uses(golden_f32, golden_q8_0, capfd):
    mixed = inspect_json(capfd, golden_q8_0, "--mmproj", golden_f32)
    decoder = [row for row in inspect_json(capfd, golden_q8_0)["tensors"] if row["group"] not in TOWER]
    tower = [row for row in inspect_json(capfd, golden_f32)["tensors"] if row["group"] in TOWER]
    assert mixed["tensors"] == decoder + tower
    assert len(mixed["files"]) == 2


def test_inspect_writes_json_that_no_encoding_spoils(golden_f32):
    command = [sys.executable, "-m", "yivl_edge", "inspect", str(golden_f32), "--json"]
    found = [
        subprocess.run(
            command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": encoding}
        )
        for encoding in ("latin-1", "utf-8")
    ]
    assert json.loads(found[0].stdout) == json.loads(found[1].stdout)
    assert not json.loads(found[0].stdout)["prompt"]["system"].isascii()


def test_inspect_tells_what_the_model_tells(golden_f32, golden_model, capfd):
    contents = inspect_json(capfd, golden_f32)
    config = golden_model.config
    assert contents["decoder"]["n_layers"] == config.decoder.n_layers == 3
    assert contents["vision"]["n_patches"] == config.vision.n_patches == 64
    assert contents["prompt"] == {"system": config.system, "stops": config.stops}
    assert contents["tokenizer"]["vocabulary"] == config.decoder.vocab_size
    assert sum(contents["tokenizer"]["pieces"].values()) == config.decoder.vocab_size
    assert contents["preprocessing"]["pad_color"] == [122, 116, 104]
    assert contents["sampling"] == {"temperature": 0.2, "max_tokens": 1024}


def test_inspect_computes_memory_for_a_context(golden_f32, capfd):
    memory = inspect_json(capfd, golden_f32, "--n-ctx", 100)["memory"]
    assert (
        memory["kv_cache"] == 2 * 3 * 100 * 128 * 4
    )  # keys and values, layers, positions, KV width, float32
    assert memory["weights"] == os.path.getsize(golden_f32)
    parts = ("weights", "kv_cache", "activations", "vision_activations")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert inspect_json(capfd, golden_f32)["memory"]["n_ctx"] == 4096


def test_inspect_prints_the_same_for_people(golden_pair, capfd):
    text, mmproj = map(str, golden_pair)
    assert main(["inspect", text, "--mmproj", mmproj]) == 0
    output = capfd.readouterr().out
    for line in (
        "layout        text model and mmproj",
        "decoder       3 layers, width 256, 2 heads of 128, 1 KV heads",
        "vision tower  3 layers run, width 160, 2 heads of 80",
        'stops         "###", "\\nHuman:"',
        "picture       padded with (122, 116, 104) to a square, resized to 112 x 112",
    ):
        assert line + "\n" in output
    assert main(["inspect", mmproj]) == 0
    assert "their text model is in another file" in capfd.readouterr().out


# The typed face of the native module.


def test_the_stub_names_what_the_native_module_has():
    stub = ast.parse(Path(yivl_edge.__file__).with_name("_core.pyi").read_text())
    names: dict[str, set[str]] = {"": set()}
    for node in stub.body:
        owners = [("", node)]
        if isinstance(node, ast.ClassDef):
            names[node.name] = set()
            owners += [(node.name, item) for item in node.body]
        for owner, item in owners:
            if isinstance(item, (ast.ClassDef, ast.FunctionDef)) and item.name != "__init__":
                names[owner].add(item.name)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                names[owner].add(item.target.id)
    for owner, members in names.items():
        found = getattr(_core, owner) if owner else _core
        public = {name for name in vars(found) if not name.startswith("_")}
        assert members == public, owner or "module"


# What goes wrong.


@pytest.fixture
def damaged(golden_f32: Path, tmp_path: Path) -> Path:
    """A model whose logits are no numbers."""

    def tensor(name: str, values: np.ndarray) -> tuple[str, np.ndarray, GGMLQuantizationType]:
        return (
            name,
            values * np.float32("nan" if name == "output_norm.weight" else 1),
            GGMLQuantizationType.F32,
        )

    return rewrite(golden_f32, tmp_path / "damaged.gguf", tensor=tensor)


def test_a_damaged_model_is_told_on_one_line(damaged, golden_f32, golden_image, tmp_path, capfd):
    (tmp_path / "questions.txt").write_text("Why?\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/one.png").write_bytes(golden_image.read_bytes())
    talks = ["--images", str(tmp_path / "pictures"), "--prompts", str(tmp_path / "questions.txt")]
    for command in (
        ["chat", str(damaged), "--prompt", "Why?"],
        ["bench", str(damaged), "--prompt-tokens", "8", "--generate", "2", "--runs", "1"],
        ["imatrix", str(damaged), *talks, "-o", str(tmp_path / "out.gguf")],
        ["compare", str(damaged), str(golden_f32), *talks],
    ):
        assert main(command) == 1
        error = capfd.readouterr().err
        assert "yivl-edge: error: the logits hold NaN or infinity: the model's weights are damaged" in error
        assert "Traceback" not in error
    assert not (tmp_path / "out.gguf").exists()


def test_a_conversation_with_a_damaged_model_goes_on(damaged):
    found = run("chat", damaged, stdin=b"")
    assert found.returncode == 1  # no question
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(COMMAND[0], [*COMMAND, "chat", str(damaged)], ENVIRONMENT)
    os.write(terminal, b"Why?\n/exit\n")
    output = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 4096):
            output += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert b"the logits hold NaN or infinity" in output
    assert b"Traceback" not in output


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "arguments", [["inspect"], ["chat", "--prompt", "Why?", "--max-tokens", "2"], ["chat"]]
)
def test_closed_streams_are_nothing_to_fail_over(golden_f32, closed, arguments):
    command, *options = arguments
    line = shlex.join([*COMMAND, command, str(golden_f32), *options]) + " " + closed
    found = subprocess.run(["sh", "-c", line], capture_output=True, timeout=60, env=ENVIRONMENT, check=False)
    nothing_asked = arguments == ["chat"]
    assert found.returncode == (1 if nothing_asked else 0), found.stderr
    assert b"Traceback" not in found.stderr
    if ">&-" not in closed.split() and not nothing_asked:
        assert found.stdout


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_question_ends_with_130(golden_f32, monkeypatch, capfd):
    monkeypatch.setattr("yivl_edge.cli.chat.Progress.__call__", interrupt)
    assert main(["chat", str(golden_f32), "--prompt", "Why?"]) == 130
    assert main(["demo", "--once"]) == 130
    assert capfd.readouterr().out.count("> ") == 1  # no other question after it
