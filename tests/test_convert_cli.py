"""The converter's command line: what it prints, and that the function prints nothing."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yivl_edge.convert
from checkpoints import GOLDEN, write_checkpoint
from yivl_edge.convert.__main__ import main


def test_command_line_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.gguf"
    assert main([str(GOLDEN), "-o", str(output), "--type", "q4_0", "--layout", "pair"]) == 0
    out, err = capsys.readouterr()
    assert re.findall(r"wrote (.*) \([\d.]+ MB\)", out) == [str(output), str(tmp_path / "out-mmproj.gguf")]
    # A line for every tenth that is reached, of which one slice of a model this small may skip one.
    tenths = [int(line.removeprefix("convert: ").removesuffix("0%")) for line in err.splitlines()]
    assert tenths == sorted(set(tenths))
    assert tenths[-1] == 10
    assert len(tenths) >= 8


def test_command_line_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", decoder_layers=1)
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "yivl_edge.convert", str(folder), "-o", str(tmp_path / "out.gguf")]
    subprocess.run(command, stderr=terminal, stdout=subprocess.DEVNULL, check=True)
    os.close(terminal)
    drawn = os.read(main_end, 100_000).decode()
    os.close(main_end)
    assert re.search(r"\rconvert: 100%\|.*\| ", drawn)


def test_command_line_tells_errors_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none"), "-o", str(tmp_path / "out.gguf")]) == 1
    assert capsys.readouterr().err.startswith("yivl-edge: error: ")
    assert main([str(GOLDEN), "-o", str(tmp_path / "none" / "out.gguf")]) == 1
    assert "expected a file's name in a folder that exists" in capsys.readouterr().err


def test_folder_of_something_else_is_told_by_the_name_that_the_usage_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "out.gguf")]) == 1
    assert "The folder should be a published Yi-VL one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"usage: .* SOURCE", capsys.readouterr().out, re.DOTALL)


MODULE = [sys.executable, "-m", "yivl_edge.convert", str(GOLDEN), "-o", "out.gguf", "--dry-run"]


def test_module_ends_as_the_command_does_when_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(MODULE, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")


def test_module_ends_as_the_command_does_after_ctrl_c() -> None:
    # The plan is longer than this pipe: once its first byte has come, the program still prints.
    with subprocess.Popen(MODULE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pipesize=4096) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"\n")


def test_help_shows_an_example_and_the_pair(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "python -m yivl_edge.convert Yi-VL-6B -o" in text
    assert "OUT-mmproj.gguf" in text


def test_function_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    yivl_edge.convert.convert(GOLDEN, tmp_path / "out.gguf")
    assert capfd.readouterr() == ("", "")
