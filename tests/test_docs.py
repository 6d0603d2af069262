"""The examples of the documentation run."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import yivl_edge
from emulated import missing_device
from PIL import Image
from yivl_edge import Model
from yivl_edge._core import GgufFile
from yivl_edge.cli import main
from yivl_edge.convert.imatrix import write_imatrix

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture
def folder(tmp_path, monkeypatch, golden_f32, golden_q4_0, golden_pair, golden_image):
    """A folder with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").symlink_to(golden_f32)
    Path("text.gguf").symlink_to(golden_pair[0])
    Path("text-mmproj.gguf").symlink_to(golden_pair[1])
    Path("Yi-VL-6B").symlink_to(ROOT / "tests" / "data" / "golden" / "checkpoint")
    Path("model-q4_0.gguf").symlink_to(golden_q4_0)
    Image.open(golden_image).convert("RGB").save("photo.jpg")
    Path("mmproj.gguf").symlink_to(golden_pair[1])
    Path("yi-vl-6b-f16.gguf").symlink_to(golden_f32)
    shutil.copyfile(golden_q4_0, "yi-vl-6b-q4_k_m.gguf")  # no link: an example writes it anew
    columns = {
        t.name: (np.ones(t.shape[-1]), 1) for t in GgufFile.open(golden_f32).tensors if len(t.shape) == 2
    }
    write_imatrix("yi-vl-6b-imatrix.gguf", columns, datasets=["ones"], chunk_count=1, chunk_size=1)
    Path("photos").mkdir()
    Path("photos/photo.jpg").symlink_to(tmp_path / "photo.jpg")
    Path("questions.txt").write_text("What is this?\n", encoding="utf-8")
    return tmp_path


def test_the_python_examples_of_the_api_run_one_after_another(folder, capsys):
    names: dict[str, object] = {}
    examples = blocks(DOCS / "api.md", "python")
    assert len(examples) >= 6
    for example in examples:
        exec(compile(example, "docs/api.md", "exec"), names)
    assert "tokens were there already" in capsys.readouterr().out


def test_the_c_plus_plus_example_is_the_program_that_is_built():
    (example,) = blocks(DOCS / "api.md", "cpp")
    assert example == (ROOT / "tests" / "cpp" / "example.cpp").read_text()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_c_plus_plus_example_fits_the_headers():
    command = [
        "c++",
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-Icsrc",
        "tests/cpp/example.cpp",
    ]
    subprocess.run(command, cwd=ROOT, check=True)


def commands() -> list[str]:
    """Those that end by themselves: without a question, chat and demo talk with a person."""
    lines = "".join(blocks(DOCS / "command-line.md", "sh")).splitlines()
    talk = re.compile(r"yivl-edge (chat(?!.*--prompt)|demo(?!.*--once))")
    return [line for line in lines if "|" not in line and not talk.match(line)]


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_command_line_page_run(folder, command):
    program, *arguments = shlex.split(command)
    assert program == "yivl-edge"
    if "cuda" in arguments and (reason := missing_device()):
        pytest.skip(reason)
    if arguments[0] == "chat":
        arguments += ["--max-tokens", "4"]
    assert main(arguments) == 0


def test_every_option_is_documented(capfd):
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    for command in (
        "",
        "chat",
        "demo",
        "inspect",
        "bench",
        "imatrix",
        "compare",
        "verify",
        "convert",
        "quantize",
    ):
        assert main([*command.split(), "--help"]) == 0
        for option in re.findall(r"^  (?:-o [^,]*, )?(--[a-z-]+)", capfd.readouterr().out, re.MULTILINE):
            assert re.search(f"`(yivl-edge )?{option}", page), option


def test_every_public_name_is_documented():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in (*yivl_edge.__all__, "__version__"):
        assert getattr(yivl_edge, name)
        assert re.search(rf"`(yivl_edge\.)?{name}\b", page), name


def test_the_types_of_arguments_annotate_functions_that_say_when_there_is_none():
    def ask(
        image: yivl_edge.ImageSource | None,
        messages: yivl_edge.Messages | None,
        on_progress: yivl_edge.Progress | None,
        cancel: yivl_edge.CancelFlag | None,
    ) -> None: ...

    types = get_type_hints(ask)  # evaluated, as where a module does not put its annotations off
    for name in ("image", "messages", "on_progress", "cancel"):
        assert type(None) in get_args(types[name])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("Model", Model),
        ("model.chat", Model.chat),
        ("Model.demo", Model.demo),
        ("model.prefill", Model.prefill),
    ],
)
def test_parameters_and_defaults_are_the_documented_ones(name, function):
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    (documented,) = re.findall(rf"`{re.escape(name)}\(([^`]*)\)`", text)
    found, keywords = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            found.append("*")
            keywords = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        found.append((parameter.name + default).replace("'", '"').replace("_", ""))
    # Large numbers may be written with underscores.
    assert re.sub(r"[\s_]+", "", documented).split(",") == found
