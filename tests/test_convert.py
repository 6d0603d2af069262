"""The converter: what it writes, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import yivl_edge
import yivl_edge.convert
from checkpoints import GOLDEN, VIT_NAME, write_checkpoint, write_shards
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from yivl_edge.convert import CheckpointError, convert
from yivl_edge.convert import converter as converter_module
from yivl_edge.convert import writer as writer_module
from yivl_edge.convert.__main__ import main
from yivl_edge.convert.tokenizer import read_sentencepiece

COMPUTED = ("yivl.selftest.", "yivl.rounding", "yivl.importance", "yivl.header_sha256")
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
GOLDEN_VIT = next((GOLDEN / "vit").iterdir())


@pytest.fixture(scope="module")
def golden_weights() -> dict[str, np.ndarray]:
    """Every published tensor of the golden checkpoint in float32, by published name."""
    tensors = torch.load(GOLDEN_VIT / "pytorch_model.bin", weights_only=True)
    for shard in GOLDEN.glob("*.safetensors"):
        tensors |= load_file(shard)
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[GGUFReader]]:
    """The golden checkpoint converted to a type and a layout, once for all tests."""

    @cache
    def files(type_name: str, layout: str = "single") -> list[GGUFReader]:
        output = tmp_path_factory.mktemp("golden") / "out.gguf"
        result = convert(GOLDEN, output, type=type_name, layout=layout)
        names = ["out.gguf", "out-mmproj.gguf"] if layout == "pair" else ["out.gguf"]
        assert result.files == tuple(output.with_name(name) for name in names)
        assert result.notes == ()
        return [GGUFReader(path) for path in result.files]

    return files


@pytest.fixture(scope="module")
def golden_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The golden checkpoint's single Q8_0 file."""
    output = tmp_path_factory.mktemp("golden") / "out.gguf"
    convert(GOLDEN, output)
    return output.read_bytes()


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small") / "model", decoder_layers=1)


@pytest.fixture
def small_copy(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "model"))


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
    golden_files: Callable[..., list[GGUFReader]],
    golden_weights: dict[str, np.ndarray],
    type_name: str,
    layout: str,
) -> None:
    vision_type = GGMLQuantizationType["Q8_0" if type_name == "q4_0" else type_name.upper()]
    found = {}
    for reader in golden_files(type_name, layout):
        found |= tensors(reader)
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
            if name == "output.weight" and type_name == "q4_0":
                wanted = GGMLQuantizationType.Q6_K  # llama.cpp's mix
        assert tensor.tensor_type == wanted, name
        if re.fullmatch(r"blk\.\d+\.attn_[qk]\.weight", name):
            expected = rope_order(expected, head_dim=128)
        np.testing.assert_array_equal(
            tensor.data.reshape(-1).view(np.uint8),
            yivl_edge.quantize(
                expected.reshape(len(expected), -1) if expected.ndim > 1 else expected, wanted.name
            ).ravel(),
            name,
        )
        if wanted in (GGMLQuantizationType.F32, GGMLQuantizationType.BF16):  # the golden weights are bf16
            np.testing.assert_array_equal(dequantize(tensor.data, wanted).reshape(expected.shape), expected)

    vision_blocks = 3 if layout == "single" else 4
    missing = {f"vision_model.encoder.layers.{i}." for i in range(vision_blocks, 4)}
    unused = {name for name in golden_weights if name.startswith((*missing, "vision_model.post_layernorm"))}
    assert {published_name(name) for name in found} == set(golden_weights) - unused


@pytest.mark.parametrize("type_name", TYPES)
def test_single_file_has_every_key(golden_files: Callable[..., list[GGUFReader]], type_name: str) -> None:
    found = keys(golden_files(type_name)[0])
    expected = DECODER_KEYS | VISION_KEYS
    expected |= {"general.file_type": FILE_TYPES[type_name], "clip.vision.block_count": 3}
    golden_prompt = str(np.load(GOLDEN.parent / "golden.npz")["prompt_0"])
    assert golden_prompt.startswith(found.pop("yivl.prompt.system") + "\n\n### Human:")
    computed = {name for name in found if name.startswith(COMPUTED)}  # tests/test_verify.py
    hashes = dict(reversed(line.split("  ")) for line in found.pop("yivl.sha256"))
    assert hashes == {
        tensor.name: hashlib.sha256(tensor.data.tobytes()).hexdigest()
        for tensor in golden_files(type_name)[0].tensors
    }
    assert {name: value for name, value in found.items() if name not in TOKEN_TABLES | computed} == expected


def test_pair_splits_the_keys(golden_files: Callable[..., list[GGUFReader]]) -> None:
    text, vision = golden_files("q4_0", "pair")
    found = keys(text)
    assert {name for name in found if not name.startswith(COMPUTED)} == {
        *DECODER_KEYS, *TOKEN_TABLES, "general.file_type", "yivl.prompt.system", "yivl.sha256"
    }  # fmt: skip
    assert found["general.file_type"] == FILE_TYPES["q4_0"]
    expected = VISION_KEYS | {
        "general.architecture": "clip",
        "general.name": "checkpoint",
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES["q8_0"],
        "clip.vision.block_count": 4,
    }
    computed = ("yivl.sha256", *COMPUTED)
    assert {name: value for name, value in keys(vision).items() if not name.startswith(computed)} == expected
    # Each half has its own part of the self-test.
    parts = [
        {name.split(".")[2] for name in keys(half) if name.startswith("yivl.selftest.")}
        for half in (text, vision)
    ]
    assert parts[0] == {"structure", "text", "ids", "logits", "top_ids", "top_margins"}
    assert parts[1] == {"structure", "picture", "picture_size", "pixels_sha256", "vision", "projector"}


def test_value_types_are_those_of_the_format_page(golden_files: Callable[..., list[GGUFReader]]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "file-format.md").read_text(encoding="utf-8")
    words = {
        "string": "STRING",
        "u8": "UINT8",
        "u32": "UINT32",
        "i32": "INT32",
        "f32": "FLOAT32",
        "bool": "BOOL",
    }
    documented = {}
    for row in re.findall(r"^\| (`.*?) \| ([a-z0-9]+)(\[\w*\])? \|", page, re.MULTILINE):
        names = re.findall(r"`([^`]+)`", row[0])
        for name in names:
            full = name if "." in name[1:] and not name.startswith(".") else "tokenizer.ggml" + name
            documented[full] = (["ARRAY"] if row[2] else []) + [words[row[1]]]
    for name, field in golden_files("q8_0")[0].fields.items():
        if not name.startswith("GGUF."):
            name = re.sub(
                r"^yivl\.selftest\.(vision|projector|logits)(\.error)?$",
                r"yivl.selftest.STAGE\2",
                name,
            )
            assert [kind.name for kind in field.types] == documented.get(name), name


def test_tokeniser_tables_equal_sentencepiece(golden_files: Callable[..., list[GGUFReader]]) -> None:
    found = keys(golden_files("q8_0")[0])
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
    assert text["blk.0.ffn_up.weight"].tensor_type == GGMLQuantizationType.Q4_0
    for name in ("v.blk.0.ffn_up.weight", "mm.0.weight", "v.patch_embd.weight"):
        assert vision[name].tensor_type == GGMLQuantizationType.F16


def test_rows_that_are_no_whole_blocks_fall_back(tmp_path: Path) -> None:
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
    tmp_path: Path, golden_bytes: bytes, file_format: str, shards: int, vit_format: str
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
    convert(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == golden_bytes


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


def test_slices_of_a_tensor_do_not_show(
    tmp_path: Path, golden_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter_module, "_CHUNK", 10_000)
    convert(GOLDEN, tmp_path / "out.gguf")
    (tmp_path / "whole.gguf").write_bytes(golden_bytes)
    sliced, whole = (GGUFReader(tmp_path / name) for name in ("out.gguf", "whole.gguf"))
    assert keys(sliced)["yivl.sha256"] == keys(whole)["yivl.sha256"]
    # The self-test's sums are in another order.
    for name, values in keys(whole).items():
        if name.startswith("yivl.selftest.") and isinstance(np.ravel(values)[0], float):
            np.testing.assert_allclose(keys(sliced)[name], values, atol=1e-4)


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


def test_vision_tower_in_the_shards_is_ignored(tmp_path: Path, golden_bytes: bytes) -> None:
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
    assert (tmp_path / "out.gguf").read_bytes() == golden_bytes


# --- What is refused


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del values[key]
        else:
            values[key] = value
    path.write_text(json.dumps(values))


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


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer; small numbers only."""
    if isinstance(value, int):
        return bytes(
            [
                number << 3 if number < 16 else (number << 3 & 0x7F) | 0x80,
                *([] if number < 16 else [number >> 4]),
                value,
            ]
        )
    return bytes([number << 3 | 2, len(value)]) + value


def sentencepiece_model(trainer: bytes = b"", normalizer: bytes = b"", denormalizer: bytes = b"") -> bytes:
    piece = field(1, field(1, b"<unk>") + field(3, 2))
    return piece + field(2, field(3, 2) + trainer) + field(3, normalizer) + field(5, denormalizer)


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
        write_bytes("tokenizer.model", sentencepiece_model(field(3, 1))),
        r"is no BPE model",
    ),
    "tokeniser normalises": (
        write_bytes(
            "tokenizer.model", sentencepiece_model(normalizer=field(1, b"nmt_nfkc") + field(2, b"x"))
        ),
        r"by the rules 'nmt_nfkc'",
    ),
    "tokeniser denormalises": (
        write_bytes("tokenizer.model", sentencepiece_model(denormalizer=field(2, b"x"))),
        r"by the rules 'unnamed'",
    ),
    "tokeniser with suffixes": (
        write_bytes("tokenizer.model", sentencepiece_model(field(24, 1))),
        r"as suffixes",
    ),
    "tokeniser without escapes": (
        write_bytes("tokenizer.model", sentencepiece_model(normalizer=field(5, 0))),
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


def test_pieces_are_filled_up_to_the_rows(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", vocab=2052)
    edit_json(
        folder / "tokenizer_config.json",
        added_tokens_decoder={
            "2049": {"content": "<|extra|>", "special": True},
            "2050": {"content": "<plain>", "special": False},
            "7": {"content": "<|im_end|>", "special": True},
        },
        additional_special_tokens=["<|im_sep|>"],
        pad_token={"content": "<|extra|>", "lstrip": False},
    )
    convert(folder, tmp_path / "out.gguf")
    found = keys(GGUFReader(tmp_path / "out.gguf"))
    assert found["tokenizer.ggml.tokens"][2047:] == [
        "潘",
        "<unused_2048>",
        "<|extra|>",
        "<plain>",
        "<unused_2051>",
    ]
    assert found["tokenizer.ggml.token_type"][2047:] == [1, 5, 3, 4, 5]
    assert len(found["tokenizer.ggml.scores"]) == 2052
    assert found["yivl.tokenizer.special_ids"] == [0, 1, 2, 7, 8, 2049, 2050]
    assert found["tokenizer.ggml.padding_token_id"] == 2049


def test_added_tokens_file_of_older_folders(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", vocab=2050)
    (folder / "added_tokens.json").write_text('{"<image>": 2048}')
    convert(folder, tmp_path / "out.gguf")
    found = keys(GGUFReader(tmp_path / "out.gguf"))
    assert found["tokenizer.ggml.tokens"][2048:] == ["<image>", "<unused_2049>"]
    assert found["tokenizer.ggml.token_type"][2048:] == [4, 5]


def test_tokeniser_with_llama_settings(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words are enough to train upon\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    model = read_sentencepiece(tmp_path / "llama.model")
    assert model.add_dummy_prefix
    assert model.remove_extra_whitespaces
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama.model"))
    assert model.pieces == [oracle.id_to_piece(i) for i in range(len(oracle))]


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


def test_safetensors_alone_need_no_torch(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", vit_format="safetensors")
    code = (
        "import sys; from yivl_edge.convert import convert; convert(*sys.argv[1:]); "
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "out.gguf")], check=True)


# --- All or nothing


def folder_state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def out_folder(tmp_path: Path) -> Path:
    """A folder with an old conversion, which a failure must leave as it is."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.gguf").write_bytes(b"old text")
    (folder / "out-mmproj.gguf").write_bytes(b"old vision")
    return folder


@pytest.mark.parametrize("layout", ["single", "pair"])
def test_replaces_old_files_and_leaves_nothing_else(out_folder: Path, layout: str) -> None:
    convert(GOLDEN, out_folder / "out.gguf", layout=layout)
    state = folder_state(out_folder)
    assert set(state) == {"out.gguf", "out-mmproj.gguf"}
    assert state["out.gguf"][:4] == b"GGUF"
    assert (state["out-mmproj.gguf"][:4] == b"GGUF") == (layout == "pair")


def test_full_disk_leaves_the_old_state(out_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder_state(out_folder)
    calls = 0

    def fill_up(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module.os, "fsync", fill_up)
    with pytest.raises(OSError, match="No space left"):
        convert(GOLDEN, out_folder / "out.gguf", layout="pair")
    assert folder_state(out_folder) == before


def test_too_little_space_is_told_before_anything_is_written(
    out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_state(out_folder)
    usage = shutil.disk_usage(out_folder)._replace(free=1_000_000)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(OSError, match=r"0\.01 GB needed, 0\.00 GB free"):
        convert(GOLDEN, out_folder / "out.gguf", type="f16")
    assert folder_state(out_folder) == before


def test_too_little_memory_is_told_before_anything_is_written(
    out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_state(out_folder)
    monkeypatch.setattr(converter_module, "_MEMORY", 1 << 60)
    with pytest.raises(MemoryError, match=r"converting needs .* GB of memory, .* GB are available"):
        convert(GOLDEN, out_folder / "out.gguf")
    assert folder_state(out_folder) == before


def test_failed_rename_of_the_second_half_takes_the_first_back(
    out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_state(out_folder)
    replace = Path.replace

    def refuse_mmproj(self: Path, target: Path) -> Path:
        if target.name == "out-mmproj.gguf" and self.read_bytes()[:4] == b"GGUF":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_mmproj)
    with pytest.raises(PermissionError):
        convert(GOLDEN, out_folder / "out.gguf", layout="pair")
    assert folder_state(out_folder) == before


@pytest.mark.parametrize("dry_run", [False, True])
def test_output_folder_must_exist(tmp_path: Path, dry_run: bool) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file .*missing, the output's folder"):
        convert(GOLDEN, tmp_path / "missing" / "out.gguf", type="q8_0", dry_run=dry_run)


def test_links_that_lead_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").symlink_to("b.gguf")
    (tmp_path / "b.gguf").symlink_to("a.gguf")
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: .*a\.gguf"):
        convert(GOLDEN, tmp_path / "a.gguf", type="q8_0")
    with pytest.raises(CheckpointError, match=r"a\.gguf does not exist"):
        convert(tmp_path / "a.gguf", tmp_path / "out.gguf", type="q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_output_through_a_link_goes_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to("out.gguf")
    convert(GOLDEN, tmp_path / "link.gguf", type="q8_0")
    assert (tmp_path / "link.gguf").is_symlink()
    assert not (tmp_path / "out.gguf").is_symlink()


def test_output_must_not_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").mkdir()
    with pytest.raises(OSError, match="exists and is no plain file"):
        convert(GOLDEN, tmp_path / "out.gguf")
    with pytest.raises(FileNotFoundError):
        convert(GOLDEN, tmp_path / "no such folder" / "out.gguf")


class CancelledError(Exception):
    pass


def test_progress_rises_to_one_and_can_cancel(out_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter_module, "_CHUNK", 100_000)
    calls: list[tuple[str, float]] = []
    convert(
        GOLDEN, out_folder / "out.gguf", on_progress=lambda stage, fraction: calls.append((stage, fraction))
    )
    assert {stage for stage, _ in calls} == {"convert"}
    fractions = [fraction for _, fraction in calls]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert max(np.diff([0.0, *fractions])) < 0.1

    before = folder_state(out_folder)

    def cancel(_stage: str, fraction: float) -> None:
        if fraction > 0.5:
            raise CancelledError

    with pytest.raises(CancelledError):
        convert(GOLDEN, out_folder / "out.gguf", on_progress=cancel)
    assert folder_state(out_folder) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signal_midway_leaves_the_old_state(
    tmp_path: Path, out_folder: Path, number: signal.Signals, status: int
) -> None:
    folder = write_checkpoint(tmp_path / "model", vit_format="safetensors")  # torch takes long to start
    before = folder_state(out_folder)
    # The command line, made to wait in the middle so that the signal cannot come too late.
    code = (
        "import sys, time; import yivl_edge.convert.converter as c; encode = c._encode\n"
        "def wait(tensor, *rest):\n"
        "    if tensor.name == 'blk.1.ffn_up.weight': print('halfway', flush=True); time.sleep(2)\n"
        "    return encode(tensor, *rest)\n"
        "c._encode = wait\n"
        "from yivl_edge.convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(folder), "-o", str(out_folder / "out.gguf")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    assert len(list(out_folder.iterdir())) == 3
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in stderr
    assert folder_state(out_folder) == before


@pytest.mark.parametrize("layout", ["single", "pair"])
def test_same_folder_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Whatever the number of threads, of the converter and of numpy's products."""
    monkeypatch.setattr(converter_module, "_CHUNK", 20_000)  # so that there are more pieces than threads
    convert(GOLDEN, tmp_path / "a.gguf", type="q4_k_m", layout=layout)
    command = "import sys, yivl_edge.convert.converter as c; c._CHUNK = 20_000\n"
    command += "from yivl_edge.convert import convert\n"
    command += (
        "convert(sys.argv[1], sys.argv[2], type='q4_k_m', layout=sys.argv[3], n_threads=int(sys.argv[4]))"
    )
    for blas, threads in (("1", "3"), ("3", "1")):
        arguments = [str(GOLDEN), str(tmp_path / "b.gguf"), layout, threads]
        environment = os.environ | dict.fromkeys(
            ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), blas
        )
        subprocess.run([sys.executable, "-c", command, *arguments], env=environment, check=True)
        for half in ("", "-mmproj") if layout == "pair" else ("",):
            assert (tmp_path / f"a{half}.gguf").read_bytes() == (tmp_path / f"b{half}.gguf").read_bytes()


def test_products_stay_on_their_thread() -> None:
    """By the measure of the processor's time: what several threads work on costs more of it than passes."""
    code = (
        "import time, numpy as np; from yivl_edge.convert.blas import one_blas_thread\n"
        "x = np.ones((1500, 1500), np.float32); x @ x\n"
        "with one_blas_thread():\n"
        "    mine, all = time.thread_time(), time.process_time()\n"
        "    for _ in range(5): x @ x\n"
        "    print((time.process_time() - all) / (time.thread_time() - mine))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(output) < 1.5  # 2 where two threads share the work, 1 and a little where they do not


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, file_format: str) -> None:
    sizes: dict[str, Any] = {"decoder_layers": 1, "vit_layers": 2, "vit_hidden": 32, "vit_mlp": 32}
    formats: dict[str, Any] = {"file_format": file_format, "vit_format": file_format, "shards": 1}
    # Three matrices of 32 MiB each in float32.
    large = write_checkpoint(tmp_path / "large", mlp=1 << 15, dtype="float16", **sizes, **formats)
    small = write_checkpoint(tmp_path / "small", mlp=256, **sizes, **formats)
    code = (
        "import resource, sys; from yivl_edge.convert import convert\n"
        "for folder in sys.argv[2:]:\n"
        "    convert(folder, sys.argv[1], type='f16')\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out.gguf"), str(small), str(large)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    small_peak, large_peak = (int(line) / 1024 for line in output.splitlines())
    # A slice of 2^20 weights takes 10 MiB in its three forms. A PyTorch file's pages count while they are
    # mapped, up to the whole file here (48 MiB).
    assert large_peak - small_peak < (24 if file_format == "safetensors" else 72)


# --- The command line


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


def test_command_line_draws_a_bar_on_a_terminal(tmp_path: Path, small_copy: Path) -> None:
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "yivl_edge.convert", str(small_copy), "-o", str(tmp_path / "out.gguf")]
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
    assert "No such file or directory" in capsys.readouterr().err


def test_help_shows_an_example_and_the_pair(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "python -m yivl_edge.convert Yi-VL-6B -o" in text
    assert "OUT-mmproj.gguf" in text


def test_function_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    yivl_edge.convert.convert(GOLDEN, tmp_path / "out.gguf")
    assert capfd.readouterr() == ("", "")
