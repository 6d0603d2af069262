"""What a model takes of a GPU's memory, from the headers of its files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from emulated import EMULATOR
from test_random_model import load
from tiny_models import write_single
from yivl_edge import DeviceError, _core
from yivl_edge.cli import main

GIB = 2**30
# What the runtime and a desktop take of a card: a card of 24 GiB has 23 to itself.
TAKEN = 1 * GIB


def plan_of(size: str, type_name: str, folder: Path, n_ctx: int = 0) -> _core.MemoryPlan:
    (path,) = load("random_model").write_random_model(
        folder / "header.gguf", size=size, type_name=type_name, vision_type="q8_0", header_only=True
    )
    file = _core.GgufFile.open(path)
    return _core.MemoryPlan(file, file, _core.read_config(file, file), n_ctx)


@pytest.mark.parametrize(
    ("size", "type_name", "card", "needed"),
    [("6b", "q4_k_m", 8 * GIB, 5.37e9), ("6b", "q8_0", 12 * GIB, 8.1e9), ("34b", "q4_k_m", 24 * GIB, 24.0e9)],
)
def test_true_models_fit_their_cards_with_a_full_context(
    size: str, type_name: str, card: int, needed: float, tmp_path: Path
) -> None:
    plan = plan_of(size, type_name, tmp_path, 4096)
    assert plan.on_device(plan.n_layers) == pytest.approx(needed, rel=0.01)
    assert plan.most_layers(card - TAKEN) == plan.n_layers


def test_the_parts_of_a_plan_are_those_of_the_model(tmp_path: Path) -> None:
    plan = plan_of("6b", "q4_0", tmp_path, 1000)
    assert plan.n_layers == 32
    # Keys and values of 4 heads of 128 in float32.
    assert plan.kv_on_device(32) == 32 * plan.kv_on_device(1) == 2 * 32 * 1000 * 4 * 128 * 4
    # 18 bytes for 32 weights: Q, K, V and the output; the MLP; two norms in float32.
    layer = 4096 * (2 * 4096 + 2 * 512 + 3 * 11008) * 18 // 32 + 2 * 4096 * 4
    assert [plan.weights_on_device(n + 1) - plan.weights_on_device(n) for n in (0, 7, 30)] == [layer] * 3
    # The embedding table comes with the first layer, which is the last to go.
    table = plan.weights_on_device(32) - plan.weights_on_device(31) - layer
    assert table == 64000 * 4096 * 18 // 32
    rest = plan.on_device(0) - plan.weights_on_device(0) - plan.decoder_activations - plan.vision_activations
    assert rest == _core.DEVICE_RESERVE
    assert plan.most_layers(plan.on_device(5)) == 5
    assert plan.most_layers(plan.on_device(5) - 1) == 4
    assert plan.most_layers(plan.on_device(0) - 1) == -1


def test_every_tensor_counts_once(golden_f32: Path) -> None:
    file = _core.GgufFile.open(golden_f32)
    config = _core.read_config(file, file)
    plan = _core.MemoryPlan(file, file, config)
    sizes = {t.name: t.nbytes for t in file.tensors}
    # Each rounded up to 256 bytes.
    assert 0 <= plan.weights_on_device(3) - sum(sizes.values()) < 256 * len(sizes)
    assert (
        plan.weights_on_device(0)
        == plan.vision_weights + sizes["output.weight"] + sizes["output_norm.weight"]
    )


def test_a_number_of_layers_out_of_range_is_an_error(tmp_path: Path) -> None:
    plan = plan_of("6b", "q4_0", tmp_path)
    for bytes_on_device in (plan.weights_on_device, plan.kv_on_device, plan.on_device):
        for n in (-1, 33, 2**62):
            with pytest.raises(ValueError, match=f"n_gpu_layers: expected 0 to 32, found {n}"):
                bytes_on_device(n)


def test_a_context_out_of_range_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_ctx: expected 1 to the model's 4096, found 5000"):
        plan_of("6b", "q4_0", tmp_path, 5000)


@pytest.mark.skipif(not EMULATOR, reason="needs a device whose memory can be set")
def test_inspect_shows_what_a_gpu_would_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of("6b", "q4_k_m", tmp_path)
    file = str(tmp_path / "header.gguf")
    _, total, free = _core.cuda_memory("cuda")
    for wanted in (free, 4 * 10**9, 10**9):
        monkeypatch.setenv("YIVL_EMULATOR_MEMORY", str(total - free + wanted))
        assert main(["inspect", file, "--device", "cuda", "--json"]) == 0
        device = json.loads(capsys.readouterr().out)["device"]
        assert device["free"] == wanted
        fitting = plan.most_layers(wanted)
        assert device["fits"] == (fitting >= 0)
        n = device["gpu_layers"]
        assert n == max(fitting, 0)
        parts = ("weights", "vision_weights", "kv_cache", "workspace")
        assert sum(device[part] for part in parts) == device["needed"] == plan.on_device(n)
        assert device["spill"] + device["needed"] == plan.on_device(32)
        assert main(["inspect", file, "--device", "cuda"]) == 0
        text = capsys.readouterr().out
        assert ("which does not fit" in text) == (wanted == 10**9)
        assert (f"{32 - n} of 32 layers" in text) == (n < 32)
        assert ("on the CPU    nothing" in text) == (n == 32)


def test_inspect_for_a_device_that_is_not_there_is_an_error(
    golden_f32: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(golden_f32), "--device", "cuda:99"]) == 1
    assert "CUDA" in capsys.readouterr().err
    with pytest.raises(DeviceError):
        _core.cuda_memory("cuda:99")


def test_activations_are_for_no_more_tokens_than_the_context_has(golden_f32: Path) -> None:
    file = _core.GgufFile.open(golden_f32)
    config = _core.read_config(file, file)
    d = config.decoder
    floats = 100 * (2 * d.width + 2 * d.n_heads * d.head_dim + d.mlp_width) + d.vocab_size
    assert _core.MemoryPlan(file, file, config, 100).decoder_activations == 4 * floats
    assert _core.memory_needed(config, 100)[1] == 4 * floats


def test_a_block_of_the_tower_that_does_not_run_takes_no_memory(golden_pair: tuple[Path, Path]) -> None:
    text, vision = map(_core.GgufFile.open, golden_pair)
    config = _core.read_config(text, vision)
    assert config.vision is not None
    unused = f"v.blk.{config.vision.n_blocks}."
    assert any(tensor.name.startswith(unused) for tensor in vision.tensors)
    used = sum(tensor.nbytes for tensor in vision.tensors if not tensor.name.startswith(unused))
    rest = _core.MemoryPlan(text, vision, config).vision_weights - used
    assert 0 <= rest < 256 * len(vision.tensors)  # each begins at a multiple of 256


def test_embeddings_that_are_the_head_too_stay_on_the_device(tmp_path: Path) -> None:
    file = _core.GgufFile.open(write_single(tmp_path / "tied.gguf"))
    plan = _core.MemoryPlan(file, file, _core.read_config(file, file))
    sizes = {tensor.name: -(-tensor.nbytes // 256) * 256 for tensor in file.tensors}
    assert "output.weight" not in sizes
    head = sizes["token_embd.weight"] + sizes["output_norm.weight"]
    assert plan.weights_on_device(0) == plan.vision_weights + head
