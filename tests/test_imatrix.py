"""Importance matrices: what is recorded against a torch twin, the file, and files that are none."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import gguf_contents
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_gguf
from twin import Twin
from yivl_edge import Model, ModelFileError, _core, data
from yivl_edge.cli import main
from yivl_edge.cli.imatrix import record
from yivl_edge.cli.terminal import Progress
from yivl_edge.conversations import Conversation, answer_logits, load_conversations, transcribe
from yivl_edge.convert.imatrix import read_imatrix, write_imatrix

QUESTIONS = "What is this?\n\n  这是什么？ \n"
TALK = [
    {"role": "user", "content": "What is this?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "它是什么颜色的？"},
    {"role": "assistant", "content": "它是黑色的。"},
]

LEAVES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "out_proj": "attn_out",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}


@pytest.fixture
def pictures(tmp_path, golden_image) -> Path:
    """A folder of two pictures and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    with Image.open(golden_image) as image:
        image.convert("RGB").rotate(90).save(folder / "b.png")
        image.convert("RGB").save(folder / "a.jpg")
    (folder / "notes.txt").write_text("no picture")
    (folder / "more").mkdir()
    return folder


def logits(
    model: Model, image: Path, ids: list[int], statistics: _core.ActivationStatistics | None = None
) -> np.ndarray:
    """Of every position."""
    with model._borrowed_session() as session:
        return session.logits(ids, model.preprocess(image), _core.Control(), statistics)


def lines(path: Path, *values: object) -> Path:
    path.write_text(
        "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8"
    )
    return path


def twin_statistics(
    twin: Twin, ids: list[int], pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[np.ndarray, int]]:
    """Sums of squares of the input columns of every product that torch computes, in float64, and rows."""
    names = {weight.data_ptr(): name for name, weight in twin.projector.items() if name.endswith("weight")}
    for model, prefix in ((twin.decoder, "blk"), (twin.vit, "v.blk")):
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                *_, block, _, leaf = ("", "", "", *path.split("."))
                name = "output" if leaf == "lm_head" else f"{prefix}.{block}.{LEAVES[leaf]}"
                names[module.weight.data_ptr()] = f"{name}.weight"
    found: dict[str, tuple[np.ndarray, int]] = {}
    linear = torch.nn.functional.linear

    def recording(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        found[names[weight.data_ptr()]] = (rows.square().sum(0).numpy(), len(rows))
        return linear(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", recording)
        twin.logits(ids, pixels)
    patch_size = twin.vit.config.patch_size
    patches = torch.nn.functional.unfold(torch.from_numpy(pixels)[None], patch_size, stride=patch_size)
    found["v.patch_embd.weight"] = (patches[0].double().square().sum(1).numpy(), patches.shape[2])
    return found


def test_recorded_columns_are_the_squared_activations_of_a_torch_twin(
    golden_f32, golden_model, golden_image, monkeypatch
):
    ids = transcribe(
        golden_model, Conversation(golden_image, (("user", "What?"), ("assistant", "猫"))), 1
    ).ids
    expected = twin_statistics(Twin(golden_f32), ids, golden_model.preprocess(golden_image), monkeypatch)
    statistics = _core.ActivationStatistics(golden_model._model)
    assert statistics.columns == {}
    logits(golden_model, golden_image, ids, statistics=statistics)
    columns = statistics.columns
    # 3 ViT blocks of 6 matrices and the patch embedding, 2 of the projector, 3 decoder layers of 7, the output head.
    assert len(columns) == 3 * 6 + 1 + 2 + 3 * 7 + 1
    assert columns.keys() == expected.keys()
    for name, (sums, rows, *_) in columns.items():
        assert rows == expected[name][1], name
        # Activations agree to about 1e-5 of their size (test_golden.py), squares to twice that.
        np.testing.assert_allclose(sums, expected[name][0], rtol=1e-4, err_msg=name)


def test_recording_adds_up_and_changes_no_result(golden_model, golden_image):
    ids = golden_model.prompt_ids("What?")
    plain = logits(golden_model, golden_image, ids)
    statistics = _core.ActivationStatistics(golden_model._model)
    np.testing.assert_array_equal(logits(golden_model, golden_image, ids, statistics=statistics), plain)
    once = statistics.columns
    logits(
        golden_model, golden_image, ids, statistics=statistics
    )  # the picture's rows too, though it is known
    for name, (sums, rows, *_) in statistics.columns.items():
        assert rows == 2 * once[name][1]
        np.testing.assert_allclose(
            sums, 2 * once[name][0], rtol=1e-12, err_msg=name
        )  # double sums, another order


def test_answers_alone_are_computed_as_among_all_positions(golden_model, golden_image):
    turns = (("user", "What?"), ("assistant", "a cat"), ("user", "Why?"), ("assistant", "It is."))
    conversation = Conversation(golden_image, turns)
    transcript = transcribe(golden_model, conversation, 1)
    rows = transcript.answer_rows(golden_model)
    everything = logits(golden_model, golden_image, transcript.ids)
    assert 0 < len(rows) < len(everything)
    statistics = _core.ActivationStatistics(golden_model._model)
    found = answer_logits(golden_model, conversation, transcript, statistics=statistics)
    # Other rows in one product: other sums of float32.
    np.testing.assert_allclose(found, everything[rows], rtol=0, atol=1e-5 * np.abs(everything).max())
    assert statistics.columns["output.weight"][1] == len(rows)
    assert statistics.columns["blk.0.attn_q.weight"][1] == len(everything)


@pytest.mark.parametrize("batch", [7, 512])
def test_rows_that_predict_answers_are_told_from_the_others(golden_model, golden_image, monkeypatch, batch):
    turns = (("user", "What?"), ("assistant", "a cat"), ("user", "Why?"), ("assistant", "It is."))
    transcript = transcribe(golden_model, Conversation(golden_image, turns), 1)
    wanted = transcript.answer_rows(golden_model).tolist()
    pixels = golden_model.preprocess(golden_image)

    def columns(positions: list[int] | None, end: int | None = None) -> dict[str, tuple]:
        statistics = _core.ActivationStatistics(golden_model._model)
        session = _core.Session(golden_model._model, 0, batch)
        session.logits(transcript.ids[:end], pixels, _core.Control(), statistics, positions)
        return statistics.columns

    found, everything = columns(wanted), columns(None)
    # The last position alone: what all positions give, less what those before it give.
    last, before = (
        columns([len(transcript.ids) - 2 + golden_model.config.vision.n_patches]),
        columns(None, -1),
    )
    for name, (sums, rows, marked, marked_rows) in found.items():
        if not name.startswith("blk."):
            assert marked_rows == 0
            assert not marked.any()
            continue
        assert (rows, marked_rows) == (everything[name][1], len(wanted))
        np.testing.assert_allclose(sums, everything[name][0], rtol=1e-12)
        assert (marked <= sums * (1 + 1e-12)).all()
        np.testing.assert_allclose(everything[name][2], sums, rtol=1e-12)
        difference = everything[name][0] - before[name][0]
        scale = everything[name][0].max()
        np.testing.assert_allclose(last[name][2], difference, rtol=1e-3, atol=1e-6 * scale, err_msg=name)


def test_answers_count_three_quarters(golden_model, golden_image):
    conversation = Conversation(golden_image, (("user", "What?"), ("assistant", "a cat")))
    statistics = _core.ActivationStatistics(golden_model._model)
    answer_logits(
        golden_model, conversation, transcribe(golden_model, conversation, 1), statistics=statistics
    )
    columns, _ = record(golden_model, [conversation], 1, Progress())
    for name, (sums, rows, marked, marked_rows) in statistics.columns.items():
        weighed, count = columns[name]
        assert count == rows
        if marked_rows == 0:
            np.testing.assert_array_equal(weighed, sums)
            continue
        others = (sums - marked) / (rows - marked_rows)
        np.testing.assert_allclose(weighed / count, 0.75 * marked / marked_rows + 0.25 * others, rtol=1e-12)


@pytest.mark.parametrize("positions", [[-1], [3, 2], [1, 1], [10**6]])
def test_positions_out_of_order_or_range_are_refused(golden_model, golden_image, positions):
    ids, pixels = golden_model.prompt_ids("What?"), golden_model.preprocess(golden_image)
    with pytest.raises(ValueError, match="positions: expected rising numbers from 0 to"):
        _core.Session(golden_model._model).logits(ids, pixels, _core.Control(), None, positions)


def test_statistics_of_another_model_are_refused(golden_model, golden_image):
    statistics = _core.ActivationStatistics(Model.demo()._model)
    with pytest.raises(ValueError, match="of another model"):
        logits(golden_model, golden_image, golden_model.prompt_ids("What?"), statistics=statistics)


def test_every_matrix_of_the_demo_model_is_recorded():
    model = Model.demo()
    picture = next(iter(data.samples().values()))
    columns, positions = record(model, [Conversation(picture, (("user", "What is there?"),))], 4, Progress())
    matrices = {
        t.name: t.shape
        for t in _core.GgufFile.open(data.MODEL).tensors
        if len(t.shape) > 1 and not t.name.endswith("embd.weight")
    }
    run = model.config.vision.n_blocks
    expected = {name for name in matrices if not name.startswith(f"v.blk.{run}.")}
    assert columns.keys() == expected | {"v.patch_embd.weight"}
    assert columns["output.weight"][1] == 4  # tokens of the answer
    for name in expected - {"output.weight"}:
        assert columns[name][0].shape == matrices[name][-1:]
        assert columns[name][1] in (
            positions,
            model.config.vision.n_patches,
            model.config.vision.n_patches + 1,
        )


def test_roundings_change_answers_where_these_are_predicted():
    """Why rows that predict answers are weighed: the gradient of the answers' logits stands on them."""
    model, twin = Model.demo(), Twin(data.MODEL)
    twin.decoder.requires_grad_(False)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    for block, layer in enumerate(twin.decoder.model.layers):
        for path, module in layer.named_modules():
            leaf = LEAVES.get(path.rpartition(".")[2])
            if leaf is not None and leaf not in ("attn_k", "attn_v"):
                module.register_forward_hook(
                    lambda _module, _inputs, output, name=f"blk.{block}.{leaf}": keep(name, output)
                )
    random = torch.Generator().manual_seed(0)
    shares: dict[str, list[float]] = {}
    part = []
    for picture in data.samples().values():
        transcript = transcribe(model, Conversation(picture, (("user", "What is there?"),)), 64)
        rows = transcript.answer_rows(model)
        image = torch.from_numpy(twin.encode_image(model.preprocess(picture)))
        table = twin.decoder.model.embed_tokens.weight
        x = torch.cat([image if i == _core.IMAGE_ID else table[i][None] for i in transcript.ids])[None]
        logits = twin.decoder(inputs_embeds=x.requires_grad_(), use_cache=False).logits[0, rows]
        signs = torch.randint(0, 2, logits.shape, generator=random) * 2.0 - 1
        (logits * signs).sum().backward()
        part.append(len(rows) / x.shape[1])
        for name, output in outputs.items():
            squares = output.grad[0].square().sum(-1)
            shares.setdefault(name, []).append(float(squares[rows].sum() / squares.sum()))
    assert len(shares) == 4 * 5
    assert np.mean(part) < 0.15
    assert all(np.mean(share) > 0.5 for share in shares.values()), shares


# Transcripts.


def test_a_transcript_is_what_the_model_reads_in_the_next_turn(golden_model, golden_image):
    turns = tuple((m["role"], m["content"]) for m in TALK)
    transcript = transcribe(golden_model, Conversation(golden_image, turns), 1)
    later = golden_model.prompt_ids([*TALK, {"role": "user", "content": "Why?"}])
    assert transcript.ids == later[: len(transcript.ids)]
    said = golden_model.detokenize([int(i) for i in transcript.answer_ids()])
    assert said == " a cat\n### 它是黑色的。\n###"
    # Rows of logits: an id's position less one, and a picture takes n_patches positions.
    first = int(np.flatnonzero(transcript.answers)[0])
    assert transcript.answer_rows(golden_model)[0] == first - 2 + golden_model.config.vision.n_patches


def test_a_question_is_answered_greedily_and_the_answer_is_part_of_the_transcript(golden_model, golden_image):
    transcript = transcribe(golden_model, Conversation(golden_image, (("user", "What?"),)), 5)
    reply = golden_model.chat(golden_image, "What?", max_tokens=5, temperature=0.0)
    assert reply.finish_reason == "length"
    said = golden_model.detokenize([int(i) for i in transcript.answer_ids()])
    assert said == " " + reply.text  # without a stop text, which the model did not write
    assert transcript.ids == golden_model.prompt_ids("What?") + golden_model.tokenize(said)


def test_questions_are_asked_about_each_picture_in_turn(pictures, tmp_path):
    prompts = tmp_path / "questions.txt"
    prompts.write_text("\ufeff" + QUESTIONS, encoding="utf-8")
    found = load_conversations(pictures, prompts)
    assert [(c.image.name, c.turns) for c in found] == [
        (name, (("user", question),))
        for name in ("a.jpg", "b.png")
        for question in ("What is this?", "这是什么？")
    ]
    assert load_conversations(pictures, prompts, limit=3) == found[:3]


def test_json_lines_are_whole_conversations(pictures, tmp_path):
    prompts = lines(
        tmp_path / "talk.jsonl",
        {"image": "b.png", "messages": TALK},
        {"image": "a.jpg", "messages": "What?"},
    )
    first, second = load_conversations(pictures, prompts)
    assert first == Conversation(pictures / "b.png", tuple((m["role"], m["content"]) for m in TALK))
    assert second == Conversation(pictures / "a.jpg", (("user", "What?"),))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\v", "\f"])
def test_only_a_newline_ends_a_line(pictures, tmp_path, mark):
    asked = f"What{mark}is this?"
    questions = tmp_path / "questions.txt"
    questions.write_bytes(f"{asked}\r\nWhy?\r\n".encode())
    found = load_conversations(pictures, questions, limit=2)
    assert [c.turns[0][1] for c in found] == [asked, "Why?"]
    if mark not in "\v\f":  # which JSON allows in no string
        talk = tmp_path / "talk.jsonl"
        line = {"image": "a.jpg", "messages": asked}
        talk.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
        assert load_conversations(pictures, talk)[0].turns == (("user", asked),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\n \n", "expected a question or a conversation per line, found no line"),
        (b"\xff\xfe", "expected UTF-8 text, found other bytes at 0"),
        (b"{nonsense", "line 1: expected JSON"),
        (b"\n" + b'{"image":' + b"[" * 100_000, "line 2: expected JSON"),
        (b'{"image": "a.jpg"}', "expected an object with the keys image and messages"),
        (b'{"image": 1, "messages": []}', "expected image to be a file's name"),
        (b'{"image": "a.jpg", "messages": []}', "found no messages"),
        (b'{"image": "a.jpg", "messages": [{"role": "sytem", "content": "x"}]}', "found 'sytem'"),
        (
            b'{"image": "a.jpg", "messages": [{"role": "assistant", "content": "x"}]}',
            "before each of the assist",
        ),
        (b'{"image": "missing.jpg", "messages": "x"}', "line 1: .*missing.jpg: no such file"),
        (b'{"image": "notes.txt", "messages": "x"}', "line 1: .*expected a picture"),
        (b'{"image": "a.jpg", "messages": "\\ud800"}', "lone surrogate"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(pictures, tmp_path, text, expected):
    prompts = tmp_path / "prompts"
    prompts.write_bytes(text)
    with pytest.raises(ValueError, match=expected):
        load_conversations(pictures, prompts)


# The command and its file.


def test_the_command_writes_what_llama_cpp_and_we_read(golden_f32, golden_model, pictures, tmp_path, capfd):
    prompts = tmp_path / "questions.txt"
    prompts.write_text(QUESTIONS, encoding="utf-8")
    out = tmp_path / "golden.imatrix"
    arguments = ["imatrix", str(golden_f32), "--images", str(pictures), "--prompts", str(prompts)]
    assert main([*arguments, "-o", str(out), "--max-tokens", "3", "--limit", "3"]) == 0
    output = capfd.readouterr()
    assert output.out == ""
    assert "43 matrices, 3 conversations" in output.err

    conversations = load_conversations(pictures, prompts, 3)
    columns, positions = record(golden_model, conversations, 3, Progress())
    reader = gguf.GGUFReader(out)
    assert gguf_contents.keys(reader) == {
        "general.type": "imatrix",
        "imatrix.datasets": [str(prompts)],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": positions // 3,
    }
    tensors = gguf_contents.tensors(reader)
    assert tensors.keys() == {name + part for name in columns for part in (".in_sum2", ".counts")}
    assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    found = read_imatrix(out)
    assert found.keys() == columns.keys()
    for name, (sums, rows) in columns.items():
        # GGUF has the innermost dimension first.
        assert tensors[name + ".in_sum2"].shape.tolist() == [len(sums), 1]
        assert tensors[name + ".counts"].shape.tolist() == [1, 1]
        assert tensors[name + ".counts"].data.item() == rows
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], sums / rows, rtol=1e-6, err_msg=name)  # two float32 roundings


def test_a_pair_is_recorded_as_the_single_file(golden_model, golden_pair, golden_image):
    text, mmproj = golden_pair
    conversations = [Conversation(golden_image, (("user", "What?"), ("assistant", "a cat")))]
    single, _ = record(golden_model, conversations, 1, Progress())
    pair, _ = record(Model(text, mmproj=mmproj), conversations, 1, Progress())
    assert pair.keys() == single.keys()
    for name, (sums, rows) in single.items():
        np.testing.assert_array_equal(pair[name][0], sums, err_msg=name)
        assert pair[name][1] == rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--images": "missing"}, "missing"),
        ({"--images": "{empty}"}, "expected pictures, found none"),
        ({"--prompts": "missing"}, "missing"),
        ({"-o": "nowhere/out.gguf"}, "nowhere/out.gguf: expected a file's name in a folder that exists"),
        ({"-o": "empty"}, "empty: expected a file's name in a folder that exists"),
        ({"-o": ""}, "error: '': expected a file's name in a folder that exists"),
        ({"-o": "pipe"}, "pipe: expected a file, found a pipe or a device"),
        ({"-o": "{picture}"}, "which it would replace"),
        ({"model": "missing.gguf"}, "missing.gguf: cannot open"),
        ({"model": "{text}"}, "no vision tower"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_no_file(
    golden_f32, golden_pair, pictures, tmp_path, monkeypatch, capfd, changes, expected
):
    work = tmp_path / "work"
    (work / "empty").mkdir(parents=True)
    monkeypatch.chdir(work)
    os.mkfifo("pipe")
    picture = pictures / "b.png"
    before = picture.read_bytes()
    prompts = tmp_path / "questions.txt"
    prompts.write_text(QUESTIONS, encoding="utf-8")
    options = {
        "--images": str(pictures),
        "--prompts": str(prompts),
        "-o": "out.gguf",
        "model": str(golden_f32),
    }
    options |= {
        k: v.format(empty=work / "empty", text=golden_pair[0], picture=picture) for k, v in changes.items()
    }
    model = options.pop("model")
    assert main(["imatrix", model, *(part for option in options.items() for part in option)]) == 1
    error = capfd.readouterr().err
    assert error.startswith("yivl-edge: error: ")
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(work)) == ["empty", "pipe"]
    assert Path("pipe").is_fifo()
    assert picture.read_bytes() == before


def test_ctrl_c_leaves_no_file(golden_f32, pictures, tmp_path, monkeypatch):
    prompts = tmp_path / "questions.txt"
    prompts.write_text(QUESTIONS, encoding="utf-8")
    seen: list[str] = []

    def interrupt(progress: Progress, stage: str, fraction: float) -> None:
        seen.append(progress.prefix)
        if progress.prefix == "2/4 " and stage == "prefill":
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", interrupt)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["imatrix", str(golden_f32), "--images", str(pictures), "--prompts", str(prompts)]
    assert main([*arguments, "-o", str(out / "x.gguf"), "--max-tokens", "2"]) == 130
    assert {"1/4 ", "2/4 "} == set(seen)
    assert os.listdir(out) == []


# Reading.


def binary(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    """llama.cpp's older format."""
    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        parts += [struct.pack("<i", len(name)), name, struct.pack("<ii", calls, len(values))]
        parts.append(np.array(values, "<f4").tobytes())
    return b"".join(parts) + tail


def test_the_older_binary_format_is_read(tmp_path):
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 7, 8) + b"wiki.txt"  # chunks and dataset, which newer versions add
    entries = (
        (b"blk.0.attn_q.weight", 4, [2.0, 4.0, 0.0]),
        (b"output.weight", 1, [3.0]),
        (b"unused", 0, [1.0]),
    )
    for end in (b"", tail):
        path.write_bytes(binary(*entries, tail=end))
        found = read_imatrix(path)
        assert list(found) == ["blk.0.attn_q.weight", "output.weight"]
        assert found["blk.0.attn_q.weight"].tolist() == [0.5, 1.0, 0.0]
        assert found["output.weight"].dtype == np.float32


def gguf_file(path: Path, kind: str | None, tensors: dict[str, np.ndarray]) -> Path:
    keys = {} if kind is None else {"general.type": ("string", kind)}
    types = {np.float32: "F32", np.float16: "F16"}
    return write_gguf(path, keys, {name: (v, types[v.dtype.type]) for name, v in tensors.items()}, "none")


def test_a_file_of_llama_cpp_is_read(tmp_path):
    """With what its versions add (sums of the activations), or leave without input."""
    tensors = {}
    for name, count in (("blk.0.ffn_up.weight", 8.0), ("blk.1.ffn_up.weight", 0.0)):
        tensors |= {
            f"{name}.in_sum2": np.array([[8.0, 4.0]], np.float32),
            f"{name}.counts": np.array([[count]], np.float32),
            f"{name}.in_sum": np.array([[-8.0, 4.0]], np.float32),
        }
    gguf_file(tmp_path / "i.gguf", "imatrix", tensors)
    found = read_imatrix(tmp_path / "i.gguf")
    assert {name: values.tolist() for name, values in found.items()} == {"blk.0.ffn_up.weight": [1.0, 0.5]}


ONE = np.ones((1, 1), np.float32)


@pytest.mark.parametrize(
    ("kind", "tensors", "expected"),
    [
        (None, {"x.in_sum2": ONE, "x.counts": ONE}, "expected an importance matrix, found general.type None"),
        ("model", {"x.in_sum2": ONE, "x.counts": ONE}, "found general.type 'model'"),
        ("imatrix", {"x": ONE}, "found one without entries"),
        ("imatrix", {"x.in_sum2": ONE}, "tensor 'x.counts' is missing"),
        ("imatrix", {"x.in_sum2": ONE, "x.counts": -ONE}, "x.counts: expected one count"),
        ("imatrix", {"x.in_sum2": ONE, "x.counts": ONE * np.nan}, "x.counts: expected one count"),
        (
            "imatrix",
            {"x.in_sum2": np.ones((2, 1), np.float32), "x.counts": ONE},
            r"found F32 of shape \(2, 1\)",
        ),
        (
            "imatrix",
            {"x.in_sum2": ONE.astype(np.float16), "x.counts": ONE},
            "expected one row of F32, found F16",
        ),
        ("imatrix", {"x.in_sum2": -ONE, "x.counts": ONE}, "'x': expected mean squares, finite"),
        ("imatrix", {"x.in_sum2": ONE * np.inf, "x.counts": ONE}, "'x': expected mean squares, finite"),
    ],
)
def test_gguf_files_that_are_no_importance_matrix_are_refused(tmp_path, kind, tensors, expected):
    path = gguf_file(tmp_path / "i.gguf", kind, tensors)
    with pytest.raises(ModelFileError, match=expected):
        read_imatrix(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"# a text file, read as binary",
        struct.pack("<i", 0),
        struct.pack("<i", -1),
        struct.pack("<i", 2**31 - 1),
        struct.pack("<ii", 1, -5),
        binary((b"x", 1, [])),
        binary((b"x", -1, [1.0])),
        binary((b"x", 1, [float("nan")])),
        binary((b"x", 1, [-1.0])),
        binary((b"\xff", 1, [1.0])),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, 2**31 - 1),
        struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii", 1, -(2**30)),
    ],
)
def test_binary_files_that_are_no_importance_matrix_are_refused(tmp_path, content):
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"i\.dat: "):
        read_imatrix(path)


def test_a_binary_file_cut_anywhere_is_refused(tmp_path):
    whole = binary((b"blk.0.attn_q.weight", 2, [1.0, 2.0]), (b"output.weight", 2, [1.0]))
    path = tmp_path / "i.dat"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            read_imatrix(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"none\.gguf: cannot be read: No such file"):
        read_imatrix(tmp_path / "none.gguf")


def test_sums_that_are_not_finite_are_not_written(tmp_path):
    for value in (np.nan, np.inf, 1e39):
        with pytest.raises(ValueError, match="x: expected finite activations"):
            write_imatrix(
                tmp_path / "i.gguf", {"x": (np.array([value]), 1)}, datasets=[], chunk_count=1, chunk_size=1
            )
    assert os.listdir(tmp_path) == []
