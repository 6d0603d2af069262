"""What the converter writes: every tensor's values and type, every key, for each type and layout."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yivl_edge
from checkpoints import GOLDEN, golden_decoder, golden_vit, write_checkpoint
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_contents import keys, shape_of, tensors
from yivl_edge.convert import convert

COMPUTED = ("yivl.selftest.", "yivl.rounding", "yivl.importance", "yivl.header_sha256")
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


@pytest.fixture(scope="module")
def golden_weights() -> dict[str, np.ndarray]:
    """Every published tensor of the golden checkpoint in float32, by published name."""
    return {name: tensor.float().numpy() for name, tensor in (golden_decoder() | golden_vit()).items()}


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
