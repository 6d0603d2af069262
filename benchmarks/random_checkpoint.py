"""Write a published Yi-VL folder of true dimensions with random bf16 weights: for measuring the converter.

Example:
    python benchmarks/random_checkpoint.py --size 6b -o /tmp/random-6b

Shards of 5 GB, the ViT in its own folder, a tokeniser of 64,000 pieces. ``--blocks`` keeps fewer of the decoder's
blocks. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))

import random_model
from yivl_edge.convert.config import ModelConfig
from yivl_edge.convert.tensor_map import Part, Policy, Tensor, tensors
from yivl_edge.convert.tokenizer import TokenizerTables

SHARD_BYTES = 5_000_000_000
VIT_FOLDER = "vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-random-448"
_POOL = 16_777_259  # random weights, written again and again: a prime number, so that rows differ


def write_checkpoint(output: Path, size: str, *, blocks: int | None = None, seed: int = 0) -> None:
    """Write the folder; ``blocks`` of the decoder (default: all)."""
    decoder, vision = random_model.SIZES[size]
    if blocks is not None:
        decoder = replace(decoder, blocks=blocks)
    config = ModelConfig(f"random Yi-VL {size}", decoder, vision, random_model.IMAGE)
    vit = output / VIT_FOLDER
    vit.mkdir(parents=True)
    _write_json(output / "config.json", _config(config))
    _write_json(vit / "config.json", _vit_config(config))
    _write_json(vit / "preprocessor_config.json", _preprocessor(config))
    (output / "tokenizer.model").write_bytes(tokenizer_model(random_model.make_tokenizer(decoder.vocab_size)))
    _write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "add_bos_token": False,
            "add_eos_token": False,
        },
    )
    pool = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32)
    table = list(tensors(config.sizes(), blocks=decoder.blocks, vision_blocks=vision.blocks))
    _write_shards(output, [t for t in table if t.part is not Part.VISION], pool)
    _write_safetensors(vit / "model.safetensors", [t for t in table if t.part is Part.VISION], pool)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")


def _config(config: ModelConfig) -> dict[str, object]:
    decoder, vision = config.decoder, config.vision
    assert vision is not None
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_act": "silu",
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.blocks,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "max_position_embeddings": decoder.context_length,
        "rms_norm_eps": decoder.rms_norm_epsilon,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": decoder.vocab_size,
        "torch_dtype": "bfloat16",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision.width,
        "mm_projector_type": "mlp2x_gelu_Norm",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": vision.blocks_run - vision.blocks - 1,
        "mm_vision_tower": f"./{VIT_FOLDER}",
    }


def _vit_config(config: ModelConfig) -> dict[str, object]:
    vision = config.vision
    assert vision is not None
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.blocks,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_epsilon,
        "torch_dtype": "bfloat16",
    }


def _preprocessor(config: ModelConfig) -> dict[str, object]:
    assert config.vision is not None
    side = config.vision.image_size
    return {
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": config.image.mean,
        "image_std": config.image.std,
    }


# --- Weights


def _write_shards(folder: Path, table: Sequence[Tensor], pool: npt.NDArray[np.float32]) -> None:
    shards: list[list[Tensor]] = [[]]
    room = SHARD_BYTES
    for tensor in table:
        if shards[-1] and _nbytes(tensor) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= _nbytes(tensor)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, pool)
        weight_map |= dict.fromkeys((tensor.source for tensor in shard), name)
    total = sum(map(_nbytes, table))
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _nbytes(tensor: Tensor) -> int:
    return 2 * prod(tensor.shape)


def _write_safetensors(path: Path, table: Sequence[Tensor], pool: npt.NDArray[np.float32]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in table:
        header[tensor.source] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [at, at + _nbytes(tensor)],
        }
        at += _nbytes(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in table:
            for piece in _pieces(tensor, pool, start):
                file.write(piece.data)
            start = (start + prod(tensor.shape)) % _POOL


def _pieces(tensor: Tensor, pool: npt.NDArray[np.float32], start: int) -> Iterator[npt.NDArray[np.uint16]]:
    """The tensor's weights in bf16, cut off rather than rounded, from place ``start`` of the pool."""
    norm = (
        tensor.rule.policy is Policy.VECTOR and "norm" in tensor.source and tensor.source.endswith("weight")
    )
    scale = 0.02 if tensor.rule.policy is Policy.VECTOR else random_model.matrix_deviation(tensor)
    left = prod(tensor.shape)
    while left:
        values = pool[start : start + left] * np.float32(scale) + np.float32(norm)
        yield (values.view(np.uint32) >> 16).astype(np.uint16)
        left -= len(values)
        start = 0


# --- Tokeniser


def tokenizer_model(tables: TokenizerTables) -> bytes:
    """The tables as sentencepiece's ModelProto (field numbers: yivl_edge/convert/tokenizer.py)."""
    pieces = (
        _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _varint_field(3, kind)
        for piece, score, kind in zip(tables.pieces, tables.scores, tables.types, strict=True)
    )
    trainer = _varint_field(3, 2) + _varint_field(35, 1)  # BPE with byte fallback
    flags = ((3, tables.add_dummy_prefix), (4, tables.remove_extra_whitespaces), (5, True))
    normalizer = _field(1, b"identity") + b"".join(_varint_field(number, flag) for number, flag in flags)
    return b"".join(_field(1, piece) for piece in pieces) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts: list[int] = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def main(arguments: Iterable[str] | None = None) -> None:
    """Write what the command line asks for; print size and time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("6b", "34b", "demo"), required=True)
    parser.add_argument("--blocks", type=int, help="of the decoder (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="must not exist")
    args = parser.parse_args(None if arguments is None else list(arguments))
    began = time.perf_counter()
    write_checkpoint(args.output, args.size, blocks=args.blocks, seed=args.seed)
    total = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"wrote {args.output} ({total / 1e9:.2f} GB) in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
