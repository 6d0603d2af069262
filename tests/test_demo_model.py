"""The demo's torch model is Yi-VL's architecture: transformers computes the same from the exported folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from demo import model as yivl  # noqa: E402

SIZES = yivl.Sizes(
    image=28, vit_width=128, vit_layers=3, vit_heads=2, vit_mlp=192, layers=2, mlp=320, vocab=64
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = yivl.YiVL(SIZES)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and norms that matter
    path = tmp_path_factory.mktemp("published")
    yivl.export_folder(model, b"", path, torch.float32)
    return path


def test_vision_tower_is_clip_up_to_the_last_block_but_one(folder: Path) -> None:
    config = json.loads((folder / yivl.VIT_FOLDER / "config.json").read_text())
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)).eval()
    state = safetensors_torch.load_file(folder / yivl.VIT_FOLDER / "model.safetensors")
    if not any(name.startswith("vision_model.") for name in tower.state_dict()):  # newer
        state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    images = torch.randn(2, 3, SIZES.image, SIZES.image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        ours = yivl.load_folder(folder).vision(images)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)  # float32, another order of sums


def test_decoder_is_llama(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"], config["architectures"], config["rope_scaling"]
    llama = transformers.LlamaConfig(**config)
    if hasattr(llama, "rope_parameters"):  # newer releases
        llama.rope_parameters = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    reference = transformers.LlamaForCausalLM(llama).eval()
    state = safetensors_torch.load_file(folder / "model-00001-of-00001.safetensors")
    state = {name: value for name, value in state.items() if "mm_projector" not in name}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    ids = torch.arange(2, 22)[None]
    decoder = yivl.load_folder(folder).decoder
    with torch.no_grad():
        expected = reference(ids).logits
        hidden, _ = decoder(decoder.embed(ids), torch.arange(20)[None])
        torch.testing.assert_close(decoder.head(hidden), expected, atol=1e-4, rtol=1e-4)
        # In two parts, the second after the first's keys and values.
        _, past = decoder(decoder.embed(ids[:, :12]), torch.arange(12)[None])
        mask = (torch.arange(20)[None] <= torch.arange(12, 20)[:, None])[None, None]
        hidden, _ = decoder(decoder.embed(ids[:, 12:]), torch.arange(12, 20)[None], mask, past)
        torch.testing.assert_close(decoder.head(hidden), expected[:, 12:], atol=1e-4, rtol=1e-4)


def test_an_evaluation_of_nobody_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = pytest.importorskip("demo.evaluate")
    monkeypatch.setattr("sys.argv", ["evaluate"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "expected --checkpoint, --files or both" in capsys.readouterr().err
