"""``yivl-edge compare``: its figures against numpy on the logits of torch twins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from twin import Twin
from weight_types import rewrite
from yivl_edge import Model, _core, data
from yivl_edge.cli import main
from yivl_edge.cli.compare import Predictions, predictions, summarise

ANSWER = "The cat is black."
TALK = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "一只猫"},
    {"role": "user", "content": "What colour is it?"},
    {"role": "assistant", "content": ANSWER},
]


@pytest.fixture
def arguments(tmp_path, golden_image) -> list[str]:
    """Of the command: one conversation that is answered, and one that ends with a question."""
    prompts = tmp_path / "talk.jsonl"
    talks = [{"image": str(golden_image), "messages": messages} for messages in (TALK, "Why?")]
    prompts.write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
    return ["--images", str(tmp_path), "--prompts", str(prompts), "--max-tokens", "6"]


@pytest.fixture
def float_isa(monkeypatch) -> None:
    """Products in float32, as torch computes them: AMX would round to bfloat16."""
    monkeypatch.setenv("YIVL_ISA", next(isa for isa in _core.available_isas() if isa != "amx"))


def test_a_model_is_no_distance_from_itself(golden_q4_0, arguments, tmp_path, capfd):
    out = tmp_path / "out.json"
    assert main(["compare", str(golden_q4_0), str(golden_q4_0), *arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [result[key] for key in ("kl_mean", "kl_median", "kl_p99", "kl_max")] == [0.0] * 4
    assert result["top1_agreement"] == 1.0
    assert result["perplexity_a"] == result["perplexity_b"]
    assert result["a"] == result["b"]
    assert result["conversations"] == 2
    output = capfd.readouterr().out
    assert "mean 0.000000, median 0.000000, 99% 0.000000, max 0.000000" in output
    assert "same most likely token: 100.00%" in output


def reference(
    files: tuple[Path, Path], model: Model, image: Path, prompt: list[int], answer: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each token of the answer: KL, agreement, log probability by A and by B; from the twins' logits."""
    pixels = model.preprocess(image)
    logs = []
    for file in files:
        logits = Twin(file).logits(prompt + answer, pixels)[-len(answer) - 1 : -1].astype(np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    a, b = logs
    rows = np.arange(len(answer))
    same = a.argmax(axis=1) == b.argmax(axis=1)
    return (np.exp(a) * (a - b)).sum(axis=1), same, a[rows, answer], b[rows, answer]


def test_the_figures_are_those_of_the_twins_logits(
    float_isa, golden_f32, golden_q4_0, golden_image, arguments, tmp_path, capfd
):
    out = tmp_path / "out.json"
    assert main(["compare", str(golden_f32), str(golden_q4_0), *arguments, "--json", str(out)]) == 0
    result = json.loads(out.read_text())

    model = Model(golden_f32)
    files = (golden_f32, golden_q4_0)
    reply = model.chat(golden_image, "Why?", max_tokens=6, temperature=0)
    assert reply.finish_reason == "length"  # no stop text: it was not said
    parts = [
        reference(files, model, golden_image, model.prompt_ids(messages), model.tokenize(answer))
        for messages, answer in (
            (TALK[:1], " 一只猫\n###"),
            (TALK[:3], f" {ANSWER}\n###"),
            ("Why?", f" {reply.text}"),
        )
    ]
    kl, same, log_a, log_b = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert result["tokens"] == len(kl)
    # Logits of the engine and of the twin differ by about 1e-5 of their size, which is about 10 here.
    for key, value in {
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.percentile(kl, 99),
        "kl_max": kl.max(),
        "perplexity_a": np.exp(-log_a.mean()),
        "perplexity_b": np.exp(-log_b.mean()),
    }.items():
        assert result[key] == pytest.approx(value, rel=1e-3), key
    assert result["top1_agreement"] == same.mean()
    assert result["kl_mean"] > 0.001  # there is something to measure
    for name, file in zip("ab", files, strict=True):
        assert result[name]["bytes"] == file.stat().st_size
        assert result[name]["files"] == [str(file)]
    assert result["a"]["bits_per_weight"] == 32.0
    assert result["b"]["bits_per_weight"] < 12
    output = capfd.readouterr().out
    assert f"mean {result['kl_mean']:.6f}" in output
    assert f"{result['perplexity_a']:.4f}" in output


def test_a_pair_compares_as_the_single_file(golden_f32, golden_pair, arguments, tmp_path):
    text, mmproj = map(str, golden_pair)
    out = tmp_path / "out.json"
    pair = ["compare", str(golden_f32), text, "--mmproj-b", mmproj]
    assert main([*pair, *arguments, "--limit", "1", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["kl_max"], result["top1_agreement"], result["conversations"]) == (0.0, 1.0, 1)
    assert result["b"]["files"] == [text, mmproj]
    assert result["b"]["bytes"] == sum(path.stat().st_size for path in golden_pair)


def test_large_logits_overflow_nothing():
    """KL of (1, 0) against (p, 1 - p) is -log p, however far apart the logits are."""
    a = np.array([[3e4, -3e4, -3e4]], np.float32)
    b = np.array([[0.0, np.log(3.0), -3e4]], np.float32)
    found = predictions(a, b, np.array([1]))
    assert found.divergence[0] == pytest.approx(np.log(4.0), rel=1e-6)
    assert not found.agreement[0]
    assert (found.log_a[0], found.log_b[0]) == (-6e4, pytest.approx(np.log(0.75), rel=1e-6))
    result = summarise([found])
    assert result.kl_mean == result.kl_p99 == found.divergence[0]
    assert (result.perplexity_a, result.perplexity_b) == (np.inf, pytest.approx(4 / 3, rel=1e-6))


def test_json_has_null_for_infinity_and_is_there_complete_or_not_at_all(
    golden_q4_0, arguments, tmp_path, monkeypatch, capfd
):
    unlikely = Predictions(np.zeros(1), np.ones(1, bool), np.full(1, -1e4), np.full(1, -1e4))
    monkeypatch.setattr("yivl_edge.cli.compare.predictions", lambda *_: unlikely)
    out = tmp_path / "out.json"
    command = ["compare", str(golden_q4_0), str(golden_q4_0), *arguments, "--limit", "1", "--json", str(out)]
    assert main(command) == 0
    assert "inf" in capfd.readouterr().out
    assert json.loads(out.read_text())["perplexity_a"] is None
    before = out.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    assert main(command) == 1
    assert out.read_bytes() == before
    assert main([*command[:-1], str(tmp_path / "missing" / "out.json")]) == 1
    assert "expected a file's name in a folder that exists" in capfd.readouterr().err


def test_figures_do_not_take_the_place_of_a_picture(golden_q4_0, golden_image, tmp_path, capfd):
    picture, prompts = tmp_path / "picture.png", tmp_path / "questions.txt"
    picture.write_bytes(golden_image.read_bytes())
    prompts.write_text("Why?\n", encoding="utf-8")
    talks = ["--images", str(tmp_path), "--prompts", str(prompts)]
    assert main(["compare", str(golden_q4_0), str(golden_q4_0), *talks, "--json", str(picture)]) == 1
    assert f"expected another file than {picture}, which it would replace" in capfd.readouterr().err
    assert picture.read_bytes() == golden_image.read_bytes()


def test_logits_that_are_no_numbers_are_told():
    found = predictions(np.full((1, 3), np.nan, np.float32), np.ones((1, 3), np.float32), np.array([1]))
    with pytest.raises(ValueError, match="expected finite logits"):
        summarise([found])


@pytest.mark.parametrize("other", ["demo", "renamed"])
def test_another_vocabulary_is_refused(golden_f32, arguments, tmp_path, capfd, other):
    def rename_last(keys):
        keys["tokenizer.ggml.tokens"][-1] = "something else"
        return keys

    path = data.MODEL if other == "demo" else rewrite(golden_f32, tmp_path / "o.gguf", keys=rename_last)
    assert main(["compare", str(golden_f32), str(path), *arguments]) == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert "expected two models with one vocabulary, found" in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("{f32}", "missing.gguf"), "missing.gguf: cannot open"),
        (("{f32}", "{text}"), "no vision tower"),
        (("{mmproj}", "{f32}"), "mmproj"),
    ],
)
def test_what_cannot_be_compared_is_one_line(golden_f32, golden_pair, arguments, capfd, files, expected):
    paths = {"f32": golden_f32, "text": golden_pair[0], "mmproj": golden_pair[1]}
    assert main(["compare", *(file.format(**paths) for file in files), *arguments]) == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert expected in output.err
    assert output.err.count("\n") == 1
