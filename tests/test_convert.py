"""The converter: what it writes, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from checkpoints import GOLDEN, VIT_NAME, write_checkpoint, write_shards
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

import yivl_edge.convert
from yivl_edge.convert import CheckpointError, convert
from yivl_edge.convert import converter as converter_module
from yivl_edge.convert import writer as writer_module
from yivl_edge.convert.__main__ import main
from yivl_edge.convert.tokenizer import read_sentencepiece

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
GOLDEN_VIT = next((GOLDEN / "vit").iterdir())


@pytest.fixture(scope="module")
def golden_weights() -> dict[str, np.ndarray]:
    """Every published tensor of the golden checkpoint in float32, by published name."""
    tensors = torch.load(GOLDEN_VIT / "pytorch_model.bin", weights_only=True)
    for shard in GOLDEN.glob("*.safetensors"):
        tensors |= load_file(shard)
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def published_name(name: str) -> str:
    """The rules of docs/file-format.md, written once more and independently of the converter's table."""
    fixed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "v.class_embd": "vision_model.embeddings.class_embedding",
        "v.patch_embd.weight": "vision_model.embeddings.patch_embedding.weight",
        "v.position_embd.weight": "vision_model.embeddings.position_embedding.weight",
    }
    if name in fixed:
        return fixed[name]
    if name.startswith("mm."):
        return f"model.mm_projector.{name[3:]}"
    if name.startswith("v.pre_ln."):
        return name.replace("v.pre_ln", "vision_model.pre_layrnorm")
    decoder = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    vision = decoder | {
        "ln1": "layer_norm1",
        "ln2": "layer_norm2",
        "attn_out": "self_attn.out_proj",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    }
    match = re.fullmatch(r"(v\.)?blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    assert match, name
    is_vision, block, part, kind = match.groups()
    prefix = "vision_model.encoder.layers" if is_vision else "model.layers"
    return f"{prefix}.{block}.{(vision if is_vision else decoder)[part]}.{kind}"


def rope_order(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The permutation of Q and K, row by row as the page says it."""
    out = np.empty_like(rows)
    for head in range(0, len(rows), head_dim):
        for j in range(head_dim // 2):
            out[head + 2 * j] = rows[head + j]
            out[head + 2 * j + 1] = rows[head + j + head_dim // 2]
    return out


def keys(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(reader: GGUFReader) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in reader.tensors}


def shape_of(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


DECODER_KEYS = {
    "general.architecture": "llama",
    "general.name": "checkpoint",
    "general.quantization_version": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 256,
    "llama.block_count": 3,
    "llama.feed_forward_length": 768,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5, rel=1e-7),
    "llama.rope.freq_base": 5e6,
    "llama.rope.dimension_count": 128,
    "llama.vocab_size": 2048,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "yivl.tokenizer.special_ids": [0, 1, 2],
    "yivl.format_version": 1,
    "yivl.prompt.stops": ["###", "\nHuman:"],
    "yivl.sampling.temperature": pytest.approx(0.2, rel=1e-7),
    "yivl.sampling.max_tokens": 1024,
}
VISION_KEYS = {
    "clip.has_vision_encoder": True,
    "clip.has_text_encoder": False,
    "clip.has_llava_projector": True,
    "clip.projector_type": "mlp",
    "clip.use_gelu": True,
    "clip.vision.image_size": 112,
    "clip.vision.patch_size": 14,
    "clip.vision.embedding_length": 160,
    "clip.vision.feed_forward_length": 640,
    "clip.vision.attention.head_count": 2,
    "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-5, rel=1e-7),
    "clip.vision.projection_dim": 256,
    "clip.vision.image_mean": pytest.approx([0.48145466, 0.4578275, 0.40821073], rel=1e-7),
    "clip.vision.image_std": pytest.approx([0.26862954, 0.26130258, 0.27577711], rel=1e-7),
    "yivl.vision.blocks_run": 3,
    "yivl.vision.projector_norm_epsilon": pytest.approx(1e-5, rel=1e-7),
    "yivl.image.aspect_ratio": "pad",
    "yivl.image.pad_color": [122, 116, 104],
}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2}
TOKEN_TABLES = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}


# --- What is written


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("layout", ["single", "pair"])
def test_every_tensor_has_the_published_values_in_its_type(
    tmp_path: Path, golden_weights: dict[str, np.ndarray], type_name: str, layout: str
) -> None:
    result = convert(GOLDEN, tmp_path / "out.gguf", type=type_name, layout=layout)
    assert result.notes == ()
    vision_type = GGMLQuantizationType["Q8_0" if type_name == "q4_0" else type_name.upper()]
    found = {}
    for path in result.files:
        found |= tensors(GGUFReader(path))
    for name, tensor in found.items():
        expected = golden_weights[published_name(name)]
        assert shape_of(tensor) == expected.shape, name
        if name == "v.patch_embd.weight":
            wanted = GGMLQuantizationType["F32" if type_name in ("f32", "bf16") else "F16"]
        elif expected.ndim == 1 or name == "v.position_embd.weight":
            wanted = GGMLQuantizationType.F32
        else:
            is_vision = name.startswith(("v.", "mm."))
            wanted = vision_type if is_vision else GGMLQuantizationType[type_name.upper()]
        assert tensor.tensor_type == wanted, name
        if re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", name):
            expected = rope_order(expected, head_dim=128)
        np.testing.assert_array_equal(
            tensor.data.reshape(-1).view(np.uint8),
            quantize(expected, wanted).reshape(-1).view(np.uint8),
            name,
        )
        if wanted in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):  # the golden weights are bf16
            np.testing.assert_array_equal(dequantize(tensor.data, wanted).reshape(expected.shape), expected)

    vision_blocks = 3 if layout == "single" else 4
    missing = {f"vision_model.encoder.layers.{i}." for i in range(vision_blocks, 4)}
    unused = {name for name in golden_weights if name.startswith((*missing, "vision_model.post_layernorm"))}
    assert {published_name(name) for name in found} == set(golden_weights) - unused


@pytest.mark.parametrize("type_name", TYPES)
def test_single_file_has_every_key(tmp_path: Path, type_name: str) -> None:
    (path,) = convert(GOLDEN, tmp_path / "out.gguf", type=type_name).files
    found = keys(GGUFReader(path))
    expected = DECODER_KEYS | VISION_KEYS
    expected |= {"general.file_type": FILE_TYPES[type_name], "clip.vision.block_count": 3}
    golden_prompt = str(np.load(GOLDEN.parent / "golden.npz")["prompt_0"])
    assert golden_prompt.startswith(found.pop("yivl.prompt.system") + "\n\n### Human:")
    assert {name: value for name, value in found.items() if name not in TOKEN_TABLES} == expected


def test_pair_splits_the_keys(tmp_path: Path) -> None:
    text, vision = convert(GOLDEN, tmp_path / "out.gguf", type="q4_0", layout="pair").files
    assert (text, vision) == (tmp_path / "out.gguf", tmp_path / "out-mmproj.gguf")
    found = keys(GGUFReader(text))
    assert set(found) == {*DECODER_KEYS, *TOKEN_TABLES, "general.file_type", "yivl.prompt.system"}
    assert found["general.file_type"] == FILE_TYPES["q4_0"]
    expected = VISION_KEYS | {
        "general.architecture": "clip",
        "general.name": "checkpoint",
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES["q8_0"],
        "clip.vision.block_count": 4,
    }
    assert keys(GGUFReader(vision)) == expected


def test_value_types_are_those_of_the_format_page(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "file-format.md").read_text(encoding="utf-8")
    words = {"string": "STRING", "u32": "UINT32", "i32": "INT32", "f32": "FLOAT32", "bool": "BOOL"}
    documented = {}
    for row in re.findall(r"^\| (`.*?) \| ([a-z0-9]+)(\[\w*\])? \|", page, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", row[0])
        for name in names:
            full = name if "." in name[1:] and not name.startswith(".") else "tokenizer.ggml" + name
            documented[full] = (["ARRAY"] if row[2] else []) + [words[row[1]]]
    reader = GGUFReader(convert(GOLDEN, tmp_path / "out.gguf").files[0])
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert [kind.name for kind in field.types] == documented.get(name), name


def test_tokeniser_tables_equal_sentencepiece(tmp_path: Path) -> None:
    found = keys(GGUFReader(convert(GOLDEN, tmp_path / "out.gguf").files[0]))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
    assert found["tokenizer.ggml.tokens"] == [oracle.id_to_piece(i) for i in range(len(oracle))]
    assert found["tokenizer.ggml.scores"] == [oracle.get_score(i) for i in range(len(oracle))]
    kinds = found["tokenizer.ggml.token_type"]
    for number, of_kind in {
        2: oracle.is_unknown,
        3: oracle.is_control,
        5: oracle.is_unused,
        6: oracle.is_byte,
    }.items():
        assert [kind == number for kind in kinds] == [of_kind(i) for i in range(len(oracle))]
    assert all(
        kinds[i] == 4 for i in range(3, 9)
    )  # <|Human|> and so on: user defined, which the oracle cannot tell


def test_vision_type_is_set_apart(tmp_path: Path) -> None:
    result = convert(GOLDEN, tmp_path / "out.gguf", type="q4_0", vision_type="f16", layout="pair")
    text, vision = (tensors(GGUFReader(path)) for path in result.files)
    assert text["output.weight"].tensor_type == GGMLQuantizationType.Q4_0
    for name in ("v.blk.0.ffn_up.weight", "mm.0.weight", "v.patch_embd.weight"):
        assert vision[name].tensor_type == GGMLQuantizationType.F16


def test_rows_that_are_no_whole_blocks_fall_back_to_f16(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", mlp=336)
    result = convert(folder, tmp_path / "out.gguf", type="q4_0")
    assert len(result.notes) == 1
    assert "blk.N.ffn_down.weight (2 of them)" in result.notes[0]
    found = tensors(GGUFReader(tmp_path / "out.gguf"))
    assert found["blk.1.ffn_down.weight"].tensor_type == GGMLQuantizationType.F16
    assert found["blk.1.ffn_up.weight"].tensor_type == GGMLQuantizationType.Q4_0


def golden_copy(folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, folder / "checkpoint"))


def remove_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors*"), *folder.glob("pytorch_model*")]:
        path.unlink()


@pytest.mark.parametrize(("file_format", "shards"), [("bin", 2), ("bin", 1), ("safetensors", 1)])
@pytest.mark.parametrize("vit_format", ["bin", "safetensors"])
def test_other_containers_of_the_same_weights_give_the_same_file(
    tmp_path: Path, file_format: str, shards: int, vit_format: str
) -> None:
    folder = golden_copy(tmp_path)
    decoder = {}
    for shard in sorted(GOLDEN.glob("*.safetensors")):
        decoder |= load_file(shard)
    remove_weights(folder)
    write_shards(folder, decoder, file_format=file_format, shards=shards)
    vit_folder = folder / GOLDEN_VIT.relative_to(GOLDEN)
    vit = torch.load(GOLDEN_VIT / "pytorch_model.bin", weights_only=True)
    remove_weights(vit_folder)
    write_shards(vit_folder, vit, file_format=vit_format, shards=1)
    convert(folder, tmp_path / "other.gguf")
    convert(GOLDEN, tmp_path / "golden.gguf")
    assert (tmp_path / "other.gguf").read_bytes() == (tmp_path / "golden.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_published_types_are_read_exactly(tmp_path: Path, dtype: str, file_format: str) -> None:
    folder = write_checkpoint(
        tmp_path / "model", decoder_layers=1, vit_layers=2, dtype=dtype, file_format=file_format, shards=1
    )
    convert(folder, tmp_path / "out.gguf", type="f32")
    if file_format == "safetensors":
        source = load_file(folder / "model.safetensors")
    else:
        source = torch.load(folder / "pytorch_model.bin", weights_only=True)
    found = tensors(GGUFReader(tmp_path / "out.gguf"))
    np.testing.assert_array_equal(
        found["blk.0.ffn_up.weight"].data, source["model.layers.0.mlp.up_proj.weight"].float().numpy()
    )


def test_slices_of_a_tensor_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(GOLDEN, tmp_path / "whole.gguf")
    monkeypatch.setattr(converter_module, "_CHUNK", 1000)
    convert(GOLDEN, tmp_path / "slices.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "slices.gguf").read_bytes()


def test_tied_embeddings_have_no_output_matrix(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config={"tie_word_embeddings": True})
    convert(folder, tmp_path / "out.gguf")
    assert "output.weight" not in tensors(GGUFReader(tmp_path / "out.gguf"))


@pytest.mark.parametrize(("select_layer", "blocks"), [(-1, 3), (-3, 1), (2, 2)])
def test_selected_layer_says_how_many_blocks_run(tmp_path: Path, select_layer: int, blocks: int) -> None:
    folder = write_checkpoint(tmp_path / "model", select_layer=select_layer)
    convert(folder, tmp_path / "out.gguf")
    reader = GGUFReader(tmp_path / "out.gguf")
    found = keys(reader)
    assert (found["clip.vision.block_count"], found["yivl.vision.blocks_run"]) == (blocks, blocks)
    assert {name.split(".")[2] for name in tensors(reader) if name.startswith("v.blk.")} == set(
        map(str, range(blocks))
    )


def test_other_aspect_ratio_crops(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config={"image_aspect_ratio": "square"})
    convert(folder, tmp_path / "out.gguf")
    assert keys(GGUFReader(tmp_path / "out.gguf"))["yivl.image.aspect_ratio"] == "crop"


def test_vision_tower_in_the_shards_is_ignored(tmp_path: Path) -> None:
    folder = golden_copy(tmp_path)
    vit = torch.load(GOLDEN_VIT / "pytorch_model.bin", weights_only=True)
    copies = {
        f"model.vision_tower.vision_tower.{name}": torch.zeros_like(tensor) for name, tensor in vit.items()
    }
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    write_shards(tmp_path, copies, file_format="safetensors", shards=1)
    (tmp_path / "model.safetensors").rename(folder / "extra.safetensors")
    index["weight_map"] |= dict.fromkeys(copies, "extra.safetensors")
    index_path.write_text(json.dumps(index))
    convert(folder, tmp_path / "out.gguf")
    convert(GOLDEN, tmp_path / "golden.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "golden.gguf").read_bytes()
