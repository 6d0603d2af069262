"""``yivl-edge bench``: the stages that it reports, and that its figures are of the work that was done."""

from __future__ import annotations

import itertools
import json
import os
import platform
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_random_model import load
from yivl_edge import Model, _core, measure
from yivl_edge.cli import _parser, main
from yivl_edge.cli.bench import _Bench
from yivl_edge.image import load_image
from yivl_edge.measure import Stages, machine_name, measure_ceilings

QUICK = ["--prompt-tokens", "40", "--generate", "6", "--runs", "2", "--threads", "1"]


def test_bench_prints_a_table_and_writes_the_same_figures_as_json(golden_f32, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", str(golden_f32), *QUICK, "--json", str(out)]) == 0
    table = capsys.readouterr().out
    result = json.loads(out.read_text())
    stages = {row["stage"]: row for row in result["stages"]}
    assert list(stages) == [
        "load",
        "image encoding",
        "prefill",
        "decoding",
        "picture and question to first token",
    ]
    assert all(stage in table for stage in stages)
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in stages.values())
    assert result["threads"] == 1
    assert measure.machine_name() in table
    assert result["machine"] == measure.machine_name()
    isa = _core.isa_name()
    assert result["computes"].startswith(f"1 threads, {isa}")
    assert _core.isa_variant(isa) in result["computes"]
    assert result["ceilings"]["read_bytes_per_second"] > 1e8
    # Golden's sizes (tests/data/golden/README.md): 3 blocks of width 160 on 65 rows, then the projector, by hand.
    blocks = 3 * (2 * 65 * (4 * 160 * 160 + 2 * 160 * 640) + 4 * 65 * 65 * 160)
    assert stages["image encoding"]["flop"] == blocks + 2 * 64 * (588 * 160 + 160 * 256 + 256 * 256)
    # 3 layers in float32: 256 x (256 + 128 + 128 + 256) for attention, 3 x 256 x 768 for the MLP; the head; 7 positions
    # of keys and values; the norms.
    weights = 4 * (3 * (256 * 768 + 3 * 256 * 768 + 2 * 256) + 2048 * 256 + 256)
    assert stages["decoding"]["bytes"] == weights + 2 * 3 * 128 * 4 * 7


def test_a_profile_without_a_gpu_is_an_error(golden_f32, capsys):
    assert main(["bench", str(golden_f32), *QUICK, "--device", "cpu", "--profile"]) == 1
    assert "--profile: expected a GPU, found " + _core.isa_name() in capsys.readouterr().err


def test_bench_decodes_after_a_long_text_if_asked(golden_f32, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", str(golden_f32), *QUICK, "--context", "50", "--json", str(out)]) == 0
    stages = {row["stage"]: row for row in json.loads(out.read_text())["stages"]}
    more = stages["decoding after 50 tokens"]["bytes"] - stages["decoding"]["bytes"]
    assert more == 2 * 3 * 128 * 4 * (50 - 4)  # keys and values of 46 more positions, in 3 layers of 128
    assert "decoding after 50 tokens" in capsys.readouterr().out


def test_decoding_reads_keys_and_values_without_what_pads_them(tmp_path):
    (path,) = load("random_model").write_random_model(
        tmp_path / "header.gguf", size="6b", type_name="q4_0", vision_type="q8_0", header_only=True
    )
    file = _core.GgufFile.open(path)
    core = SimpleNamespace(config=_core.read_config(file, file))
    stages = Stages(SimpleNamespace(_model=core, device="cuda:0 a card"), path)
    more = stages.decode_bytes(1000, 1) - stages.decode_bytes(0, 1)
    assert more == 1000 * 32 * 2 * 4 * 128 * 4  # 32 layers, 4 heads of 128


def test_decoding_and_prefill_are_as_long_as_asked(golden_model, golden_f32):
    stages = Stages(golden_model, str(golden_f32))
    began = []
    begin = golden_model._idle[0].__class__.begin

    class Recording:
        """A session that notes what it is asked to begin."""

        def __init__(self, session):
            self.session = session

        def begin(self, ids, *rest):
            began.append((len(ids), rest[1]))
            begin(self.session, ids, *rest)

        def __getattr__(self, name):
            return getattr(self.session, name)

    golden_model._idle = [Recording(session) for session in golden_model._idle]
    try:
        stages.prefill(21)
        seconds = stages.decode(9, 5, 2)
    finally:
        golden_model._idle = [recording.session for recording in golden_model._idle]
    assert began[0] == (21, 1)
    assert len(seconds) == 2
    assert began[1:] == [(9, 2), (9, 6), (9, 6)]


def test_quantised_products_are_held_to_the_unit_that_computes_them(golden_model, golden_f32, golden_q4_0):
    ceilings = measure_ceilings(1)
    in_floats = Stages(golden_model, str(golden_f32))
    assert (in_floats.image_unit, in_floats.prefill_unit) == ("float32", "float32")
    assert ceilings.per_second("float32") == ceilings.float_per_second > 0
    unit = Stages(Model(golden_q4_0, device="cpu"), str(golden_q4_0)).prefill_unit
    assert unit == (ceilings.packed_unit or "float32")
    if ceilings.packed_unit:
        assert ceilings.per_second(unit) == ceilings.packed_per_second > 0
        assert ceilings.packed_unit in str(ceilings)
    else:
        assert ceilings.packed_per_second == 0


def test_ceilings_are_of_the_instruction_set_in_use(monkeypatch):
    monkeypatch.setenv("YIVL_ISA", "portable")
    ceilings = measure_ceilings(1)
    # It multiplies in float32 only.
    assert ceilings.packed_unit == ""
    assert ceilings.packed_per_second == 0


def test_a_machine_is_named_by_its_architecture_where_its_model_is_unknown(monkeypatch):
    monkeypatch.setattr(measure, "cpu_info", {"model name": "EPYC"}.get)
    assert machine_name() == f"EPYC, {os.cpu_count()} CPUs"
    monkeypatch.setattr(measure, "cpu_info", lambda key: "")
    assert machine_name() == f"{platform.machine()}, {os.cpu_count()} CPUs"


def test_a_picture_that_was_embedded_ahead_is_not_encoded_again(golden_model, golden_image):
    ids, pixels = golden_model.prompt_ids("What is this?"), golden_model.preprocess(golden_image)
    session = _core.Session(golden_model._model)
    asked = []
    for ahead in (False, True):
        if ahead:
            session = _core.Session(golden_model._model)
            session.embed_image(pixels, _core.Control())
        stages = set()
        session.begin(ids, pixels, 1, _core.SamplingOptions(temperature=0), [])
        while session.next(_core.Control(lambda stage, _, stages=stages: stages.add(stage))) is not None:
            pass
        asked.append((stages, session.text))
    assert asked[0][0] - asked[1][0] == {"image"}
    assert asked[0][1] == asked[1][1]


def test_answer_computes_the_whole_prompt_again(golden_model, golden_f32, golden_image):
    stages = Stages(golden_model, str(golden_f32))
    picture = load_image(golden_image).copy()
    cached = []
    for value in (0, 255):
        picture[0, 0] = value
        reply = stages.answer(picture, "What is this?")
        cached.append(reply.usage.cached_tokens)
        assert reply.timings.image > 0
        assert reply.usage.completion_tokens == 1
    assert cached == [0, 0]


def test_bench_of_a_text_model_leaves_the_picture_out(golden_pair, golden_image, capsys):
    assert main(["bench", str(golden_pair[0]), *QUICK]) == 0
    assert "image encoding" not in capsys.readouterr().out
    assert main(["bench", str(golden_pair[0]), *QUICK, "--image", str(golden_image)]) == 1
    assert (
        "has no vision tower for --image: give the file of its pair with --mmproj" in capsys.readouterr().err
    )


def test_every_run_encodes_another_picture_however_large_it_is(golden_f32, golden_model, tmp_path):
    Image.new("RGB", (6000, 3500), "gray").save(tmp_path / "large.png")
    arguments = ["bench", str(golden_f32), *QUICK, "--image", str(tmp_path / "large.png")]
    bench = _Bench(_parser().parse_args(arguments))
    pixels = [golden_model.preprocess(bench._next_picture()) for _ in range(3)]
    assert not np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[1], pixels[2])


def test_a_file_that_is_given_twice_counts_once(golden_f32, golden_model):
    twice = Stages(golden_model, str(golden_f32), str(golden_f32))
    assert twice.decode_bytes(0, 1) == Stages(golden_model, str(golden_f32)).decode_bytes(0, 1)


def test_embeddings_that_are_the_head_too_are_read_for_every_token(golden_model, golden_f32, monkeypatch):
    expected = Stages(golden_model, str(golden_f32)).decode_bytes(
        0, 1
    )  # its head is as large as its embeddings
    tensors = [t for t in _core.GgufFile.open(golden_f32).tensors if t.name != "output.weight"]
    monkeypatch.setattr(
        measure._core, "GgufFile", SimpleNamespace(open=lambda _: SimpleNamespace(tensors=tensors))
    )
    assert Stages(golden_model, str(golden_f32)).decode_bytes(0, 1) == expected


@pytest.mark.parametrize("option", ["--json", "-o"])
def test_figures_do_not_take_the_place_of_the_model(golden_f32, tmp_path, golden_image, option, capsys):
    model, prompts = tmp_path / "model.gguf", tmp_path / "prompts.txt"
    model.write_bytes(golden_f32.read_bytes())
    prompts.write_text("Why?\n", encoding="utf-8")
    talks = ["--images", str(golden_image.parent), "--prompts", str(prompts)]
    commands = {
        "--json": [["bench", str(model), *QUICK], ["compare", str(golden_f32), str(model), *talks]],
        "-o": [["imatrix", str(model), *talks]],
    }
    for command in commands[option]:
        for victim in (model, prompts) if command[0] != "bench" else (model,):
            before = victim.read_bytes()
            assert main([*command, option, str(victim)]) == 1
            assert (
                f"{victim}: expected another file than {victim}, which it would replace"
                in capsys.readouterr().err
            )
            assert victim.read_bytes() == before


@pytest.mark.parametrize(
    ("cache", "expected"),
    [("32768K", 1 << 28), ("105M", 1 << 28), ("100000K", 819200000), ("500000K", 1 << 30), (None, 1 << 28)],
)
def test_reading_is_measured_beyond_the_last_cache(cache, expected, monkeypatch):
    def read_text(path):
        if cache is None:
            raise FileNotFoundError(path)
        return f"{cache}\n"

    monkeypatch.setattr(measure, "Path", lambda path: SimpleNamespace(read_text=lambda: read_text(path)))
    assert measure._bytes_to_read() == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt-tokens", "5000"],
        ["--generate", "0"],
        ["--context", "0"],
        ["--context", "5000"],
        ["--runs", "0"],
    ],
)
def test_bench_refuses_what_it_cannot_measure_in_one_line(golden_f32, arguments, capsys):
    assert main(["bench", str(golden_f32), *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_figures_do_not_take_the_place_of_the_vision_half(golden_pair, tmp_path, golden_image, capsys):
    text, mmproj = map(str, golden_pair)
    victim, prompts = tmp_path / "mmproj.gguf", tmp_path / "prompts.txt"
    victim.write_bytes(golden_pair[1].read_bytes())
    prompts.write_text("Why?\n", encoding="utf-8")
    talks = ["--images", str(golden_image.parent), "--prompts", str(prompts)]
    for command in (
        ["bench", text, "--mmproj", str(victim), *QUICK, "--json", str(victim)],
        ["imatrix", text, "--mmproj", str(victim), *talks, "-o", str(victim)],
        [
            "compare",
            text,
            text,
            "--mmproj-a",
            str(victim),
            "--mmproj-b",
            mmproj,
            *talks,
            "--json",
            str(victim),
        ],
        [
            "compare",
            text,
            text,
            "--mmproj-a",
            mmproj,
            "--mmproj-b",
            str(victim),
            *talks,
            "--json",
            str(victim),
        ],
    ):
        assert main(command) == 1
        assert "which it would replace" in capsys.readouterr().err
        assert victim.read_bytes() == golden_pair[1].read_bytes()


def test_arithmetic_of_a_prompt_is_counted_pair_by_pair(golden_model, golden_f32):
    n, width, kv_width, mlp, layers, vocab = 5, 256, 128, 768, 3, 2048
    flop = 2 * width * vocab
    for layer, t in itertools.product(range(layers), range(n)):
        flop += 2 * width * 2 * kv_width  # keys and values
        if layer < layers - 1 or t == n - 1:
            flop += 2 * width * (2 * width + 3 * mlp)  # queries, output, MLP
            flop += 4 * (t + 1) * width  # scores and values of t + 1 keys
    # Half of n^2 pairs for n (n + 1) / 2.
    assert abs(Stages(golden_model, str(golden_f32)).prefill_flop(n) - flop) <= 2 * (layers - 1) * n * width
