"""What the converter refuses, and what it says: damaged folders, other models, values that do not fit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import GOLDEN, VIT_NAME, edit_json, remove_weights, write_checkpoint, write_shards
from protobuf import blob, number
from safetensors.torch import load_file
from yivl_edge.convert import CheckpointError, convert


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model", decoder_layers=1)


@pytest.fixture
def small_copy(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "model"))


# --- Damage


def in_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def in_vit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "vit" / VIT_NAME / "config.json", **changes)


def in_preprocessor(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "vit" / VIT_NAME / "preprocessor_config.json", **changes)


def in_tokenizer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def in_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def in_first_shard(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model-00001-of-00002.safetensors"
        weights = load_file(path)
        change(weights)
        write_shards(folder, weights, file_format="safetensors", shards=1)
        (folder / "model.safetensors").replace(path)

    return edit


def in_vit(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "vit" / VIT_NAME / "pytorch_model.bin"
        weights = torch.load(path, weights_only=True)
        change(weights)
        torch.save(weights, path)

    return edit


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def write_bytes(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def sentencepiece_model(trainer: bytes = b"", normalizer: bytes = b"", denormalizer: bytes = b"") -> bytes:
    piece = blob(1, blob(1, b"<unk>") + number(3, 2))
    return piece + blob(2, number(3, 2) + trainer) + blob(3, normalizer) + blob(5, denormalizer)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo this must not run",)


def write_malicious_pickle(folder: Path) -> None:
    path = folder / "vit" / VIT_NAME / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name, data in entries.items():
            new.writestr(name, pickle.dumps(Malicious(), protocol=2) if name.endswith("data.pkl") else data)


def set_tensor(
    name: str, value: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.__setitem__(name, value(weights[name]))


# --- Each is refused

UP = "model.layers.0.mlp.up_proj.weight"
FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"
VIT_FILE = f"vit/{VIT_NAME}/pytorch_model.bin"

REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"does not exist.*published Yi-VL folder"),
    "no config": (delete("config.json"), r"config\.json is missing"),
    "config no json": (write_bytes("config.json", b"{"), r"config\.json cannot be read as JSON"),
    "config a list": (write_bytes("config.json", b"[]"), r"holds no JSON object"),
    "config key missing": (
        in_config(hidden_size=...),
        r"hidden_size should be a positive integer, found nothing",
    ),
    "config key of another type": (in_config(hidden_size="256"), r'positive integer, found "256"'),
    "config key negative": (in_config(num_hidden_layers=-1), r"positive integer, found -1"),
    "eps not a number": (
        in_config(rms_norm_eps=True),
        r"rms_norm_eps should be a positive number, found true",
    ),
    "another architecture": (in_config(architectures=["LlamaForCausalLM"]), r"only Yi-VL models"),
    "the transformers port": (
        in_config(architectures=["LlavaForConditionalGeneration"]),
        r"text_config should be a JSON object",
    ),
    "rope scaling": (in_config(rope_scaling={"type": "linear", "factor": 2}), r"rope_scaling should be null"),
    "hidden activation": (in_config(hidden_act="gelu"), r'hidden_act should be "silu", found "gelu"'),
    "attention bias": (in_config(attention_bias=True), r"attention_bias should be false"),
    "mlp bias": (in_config(mlp_bias=True), r"mlp_bias should be false"),
    "image start marks": (in_config(mm_use_im_start_end=True), r"mm_use_im_start_end should be false"),
    "another head width": (in_config(head_dim=64), r"head_dim should be 128, found 64"),
    "heads do not divide": (in_config(num_attention_heads=3), r"divisor of hidden_size 256"),
    "kv heads do not divide": (in_config(num_key_value_heads=3), r"divisor of num_attention_heads 2"),
    "projector": (
        in_config(mm_projector_type="mlp2x_gelu"),
        r'mm_projector_type should be "mlp2x_gelu_Norm"',
    ),
    "select feature": (
        in_config(mm_vision_select_feature="cls_patch"),
        r"mm_vision_select_feature should be",
    ),
    "select layer of no number": (in_config(mm_vision_select_layer="last"), r"should be an integer, found"),
    "select layer before the first": (
        in_config(mm_vision_select_layer=-4),
        r"one of the ViT's 3 blocks, found -4",
    ),
    "select layer after the last": (
        in_config(mm_vision_select_layer=4),
        r"one of the ViT's 3 blocks, found 4",
    ),
    "aspect ratio": (in_config(image_aspect_ratio="anyres"), r'image_aspect_ratio should be "pad"'),
    "no vision tower named": (
        in_config(mm_vision_tower=None),
        r"mm_vision_tower should be a string, found null",
    ),
    "no vision folder": (
        in_config(mm_vision_tower="./vit/other"),
        r"other.* does not exist.*the vit folder included",
    ),
    "vision width": (in_config(mm_hidden_size=1280), r"mm_hidden_size should be 160, the hidden_size in"),
    "no vision config": (delete(f"vit/{VIT_NAME}/config.json"), r"config of a CLIPVisionModel"),
    "vision activation": (in_vit_config(hidden_act="quick_gelu"), r'hidden_act should be "gelu"'),
    "vision heads": (in_vit_config(num_attention_heads=7), r"divisor of hidden_size 160"),
    "patch size": (in_vit_config(patch_size=15), r"patch_size should be a divisor of image_size 112"),
    "no preprocessor": (
        delete(f"vit/{VIT_NAME}/preprocessor_config.json"),
        r"preprocessor_config\.json is missing",
    ),
    "preprocessor size": (
        in_preprocessor(size={"shortest_edge": 224}),
        r"size should be the ViT's image size 112",
    ),
    "preprocessor resampling": (in_preprocessor(resample=2), r"resample should be 3, found 2"),
    "preprocessor scale": (in_preprocessor(rescale_factor=0.5), r"rescale_factor should be 1/255"),
    "preprocessor step": (in_preprocessor(do_normalize=False), r"do_normalize should be true"),
    "preprocessor mean": (in_preprocessor(image_mean=[0.5, 0.5]), r"image_mean should be three numbers"),
    "no weights": (remove_weights, r"has no weights\. Expected one of model\.safetensors"),
    "no vision weights": (delete(VIT_FILE), rf"{VIT_NAME} has no weights"),
    "index no json": (write_bytes("model.safetensors.index.json", b"{}"), r"is no index of shards"),
    "shard missing": (
        delete("model-00002-of-00002.safetensors"),
        r"1 of 2 shards are missing, e\.g\. model-00002",
    ),
    "shard elsewhere": (in_index(lambda m: m.__setitem__(UP, "../x.safetensors")), r"is no index of shards"),
    "tensor not in index": (in_index(lambda m: m.pop(UP)), rf"tensor {UP} is missing"),
    "tensor not in shard": (in_first_shard(lambda w: w.pop(UP)), rf"says that {UP} is in model-00001"),
    "wrong shape": (
        in_first_shard(set_tensor(UP, lambda t: t[:8])),
        rf"{UP} should have shape \(512, 256\).*found \(8, 256\)",
    ),
    "wrong shape in .bin": (
        in_vit(set_tensor(FC1, lambda t: t.T)),
        r"should have shape \(640, 160\).*found \(160, 640\)",
    ),
    "wrong type": (
        in_first_shard(set_tensor(UP, lambda t: t.to(torch.int8))),
        rf"{UP} should be of type F32.*found I8",
    ),
    "wrong type in .bin": (
        in_vit(set_tensor(FC1, lambda t: t.double())),
        r"should be of type F32.*found torch\.float64",
    ),
    "not finite": (in_first_shard(set_tensor(UP, lambda t: t / 0)), r"no finite numbers"),
    "shard truncated": (
        truncate("model-00001-of-00002.safetensors", 100_000),
        r"header is wrong.*incomplete",
    ),
    "shard empty": (truncate("model-00001-of-00002.safetensors", 0), r"no safetensors file of 0 bytes"),
    "shard of other bytes": (
        write_bytes("model-00001-of-00002.safetensors", b"x" * 999),
        r"no safetensors file",
    ),
    "bin not fetched by Git LFS": (
        write_bytes(VIT_FILE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"cannot be read by torch.*Download it again",
    ),
    "bin empty": (truncate(VIT_FILE, 0), r"cannot be read by torch.*Download it again"),
    "bin truncated": (truncate(VIT_FILE, 10_000), r"cannot be read by torch.*incomplete"),
    "bin of other bytes": (write_bytes(VIT_FILE, b"no pickle"), r"pytorch_model\.bin"),
    "bin of no tensors": (
        lambda folder: torch.save([1, 2], folder / VIT_FILE),
        r"should hold tensors by name",
    ),
    "bin of the old format": (
        lambda folder: torch.save({}, folder / VIT_FILE, _use_new_zipfile_serialization=False),
        r"PyTorch before 1\.6\. Save it again",
    ),
    "bin with code": (write_malicious_pickle, r"could run code from the file, so it was refused"),
    "shard with a deep header": (
        write_bytes("model-00001-of-00002.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
        r"header is wrong",
    ),
    "shard with a strange header": (
        write_bytes("model-00001-of-00002.safetensors", (7).to_bytes(8, "little") + b'{"a":1}'),
        r"header is wrong",
    ),
    "no tokeniser": (delete("tokenizer.model"), r"tokenizer\.model is missing"),
    "no tokeniser config": (delete("tokenizer_config.json"), r"tokenizer_config\.json is missing"),
    "tokeniser damaged": (truncate("tokenizer.model", 20_001), r"no sentencepiece model, or damaged"),
    "tokeniser empty": (truncate("tokenizer.model", 0), r"no pieces"),
    "tokeniser of another kind": (
        write_bytes("tokenizer.model", sentencepiece_model(number(3, 1))),
        r"is no BPE model",
    ),
    "tokeniser normalises": (
        write_bytes("tokenizer.model", sentencepiece_model(normalizer=blob(1, b"nmt_nfkc") + blob(2, b"x"))),
        r"by the rules 'nmt_nfkc'",
    ),
    "tokeniser denormalises": (
        write_bytes("tokenizer.model", sentencepiece_model(denormalizer=blob(2, b"x"))),
        r"by the rules 'unnamed'",
    ),
    "tokeniser with suffixes": (
        write_bytes("tokenizer.model", sentencepiece_model(number(24, 1))),
        r"as suffixes",
    ),
    "tokeniser without escapes": (
        write_bytes("tokenizer.model", sentencepiece_model(normalizer=number(5, 0))),
        r"does not escape spaces",
    ),
    "tokeniser class": (
        in_tokenizer_config(tokenizer_class="GPT2Tokenizer"),
        r"tokenizer_class should be LlamaTokenizer",
    ),
    "unknown special token": (
        in_tokenizer_config(bos_token="<begin>"),
        r"bos_token should be a piece.*'<begin>'",
    ),
    "special token of no text": (
        in_tokenizer_config(eos_token=2),
        r"eos_token should be the text of a token",
    ),
    "stripping token": (
        in_tokenizer_config(eos_token={"content": "<|endoftext|>", "rstrip": True}),
        r"eos_token has rstrip set",
    ),
    "added token beyond the rows": (
        in_tokenizer_config(added_tokens_decoder={"2048": {"content": "<new>"}}),
        r"'<new>' the id 2048, but the embeddings have only 2048 rows",
    ),
    "added token of another name": (
        in_tokenizer_config(added_tokens_decoder={"7": {"content": "<new>"}}),
        r"calls token 7 '<new>', tokenizer\.model '<\|im_end\|>'",
    ),
    "two ends": (
        lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[2, 7]),
        r"eos_token_id should be 2.*found \[2, 7\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path: Path, small_copy: Path, case: str) -> None:
    damage, message = REFUSED[case]
    damage(small_copy)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        convert(small_copy, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*.gguf*"))
    assert not list(tmp_path.glob(".*"))


def test_refuses_tensors_that_would_be_left_out(tmp_path: Path, small_copy: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)}
    in_first_shard(lambda weights: weights.update(bias))(small_copy)
    in_index(lambda names: names.update(dict.fromkeys(bias, "model-00001-of-00002.safetensors")))(small_copy)
    with pytest.raises(CheckpointError, match=r"1 tensors that Yi-VL does not have, e\.g\. .*q_proj\.bias"):
        convert(small_copy, tmp_path / "out.gguf")


def test_refuses_more_pieces_than_rows(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", vocab=2047)
    with pytest.raises(CheckpointError, match="has 2048 pieces, the embeddings only 2047 rows"):
        convert(folder, tmp_path / "out.gguf")


def test_values_too_large_for_f16_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", dtype="float32")
    in_first_shard(set_tensor(UP, lambda t: t * 1e7))(folder)
    with pytest.raises(CheckpointError, match="too large for f16"):
        convert(folder, tmp_path / "out.gguf", type="f16")


@pytest.mark.parametrize("argument", ["type", "vision_type", "layout"])
def test_unknown_choices_are_named(tmp_path: Path, argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} should be one of .*, found 'q9_9'"):
        convert(GOLDEN, tmp_path / "out.gguf", **{argument: "q9_9"})


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"PyTorch file.*pip install torch"):
        convert(GOLDEN, tmp_path / "out.gguf")
    monkeypatch.delitem(sys.modules, "yivl_edge.convert.converter")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs the package gguf: pip install 'yivl-edge\[convert\]'"
    ):
        convert(GOLDEN, tmp_path / "out.gguf")
