"""Complete models of a few kilobytes, written as GGUF directly, for the file tests and the fuzz corpus."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

# Name to (the writer's add_ method without its prefix, value).
Keys = dict[str, tuple[str, object]]
# Name to (numbers or, for a quantised type, bytes; type name).
Tensors = dict[str, tuple[np.ndarray, str]]

LAYERS = 1
BLOCKS = 2
IMAGE, PATCH = 4, 2
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * 5]


def write_gguf(path: Path, keys: Keys, tensors: Tensors, architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, (kind, value) in keys.items():
        getattr(writer, f"add_{kind}")(name, value)
    for name, (values, type_name) in tensors.items():
        raw_type = None if type_name in ("F32", "F16") else gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, values, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Random:
    def __init__(self, type_name: str) -> None:
        self.rng = np.random.default_rng(0)
        self.type_name = type_name

    def matrix(self, *shape: int) -> tuple[np.ndarray, str]:
        values = self.rng.normal(0, 0.1, shape).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[self.type_name]), self.type_name

    def vector(self, size: int) -> tuple[np.ndarray, str]:
        return self.rng.normal(1, 0.1, size).astype(np.float32), "F32"


def decoder_keys(width: int) -> Keys:
    return {
        "general.name": ("string", "tiny"),
        "llama.context_length": ("uint32", 64),
        "llama.embedding_length": ("uint32", width),
        "llama.block_count": ("uint32", LAYERS),
        "llama.feed_forward_length": ("uint32", width),
        "llama.attention.head_count": ("uint32", 2),
        "llama.attention.head_count_kv": ("uint32", 1),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-5),
        "llama.rope.freq_base": ("float32", 5e6),
        "llama.rope.dimension_count": ("uint32", width // 2),
        "llama.vocab_size": ("uint32", len(PIECES)),
        "tokenizer.ggml.model": ("string", "llama"),
        "tokenizer.ggml.tokens": ("array", PIECES),
        "tokenizer.ggml.scores": ("array", [-float(i) for i in range(len(PIECES))]),
        "tokenizer.ggml.token_type": ("array", TYPES),
        "tokenizer.ggml.unknown_token_id": ("uint32", 0),
        "tokenizer.ggml.bos_token_id": ("uint32", 1),
        "tokenizer.ggml.eos_token_id": ("uint32", 2),
        "tokenizer.ggml.add_bos_token": ("bool", False),
        "tokenizer.ggml.add_eos_token": ("bool", False),
        "tokenizer.ggml.add_space_prefix": ("bool", False),
        "tokenizer.ggml.remove_extra_whitespaces": ("bool", False),
        "yivl.tokenizer.special_ids": ("array", [1, 2]),
        "yivl.format_version": ("uint32", 1),
        "yivl.prompt.system": ("string", "Be brief."),
        "yivl.prompt.stops": ("array", ["###", "\nHuman:"]),
        "yivl.sampling.temperature": ("float32", 0.2),
        "yivl.sampling.max_tokens": ("uint32", 16),
    }


def decoder_tensors(width: int, type_name: str) -> Tensors:
    r = _Random(type_name)
    tensors = {"token_embd.weight": r.matrix(len(PIECES), width)}
    for i in range(LAYERS):
        tensors |= {
            f"blk.{i}.attn_norm.weight": r.vector(width),
            f"blk.{i}.attn_q.weight": r.matrix(width, width),
            f"blk.{i}.attn_k.weight": r.matrix(width // 2, width),
            f"blk.{i}.attn_v.weight": r.matrix(width // 2, width),
            f"blk.{i}.attn_output.weight": r.matrix(width, width),
            f"blk.{i}.ffn_norm.weight": r.vector(width),
            f"blk.{i}.ffn_gate.weight": r.matrix(width, width),
            f"blk.{i}.ffn_up.weight": r.matrix(width, width),
            f"blk.{i}.ffn_down.weight": r.matrix(width, width),
        }
    return tensors | {"output_norm.weight": r.vector(width)}


def vision_keys(width: int, decoder_width: int) -> Keys:
    return {
        "clip.has_vision_encoder": ("bool", True),
        "clip.has_text_encoder": ("bool", False),
        "clip.has_llava_projector": ("bool", True),
        "clip.projector_type": ("string", "mlp"),
        "clip.use_gelu": ("bool", True),
        "clip.vision.image_size": ("uint32", IMAGE),
        "clip.vision.patch_size": ("uint32", PATCH),
        "clip.vision.embedding_length": ("uint32", width),
        "clip.vision.feed_forward_length": ("uint32", 2 * width),
        "clip.vision.block_count": ("uint32", BLOCKS),
        "clip.vision.attention.head_count": ("uint32", 2),
        "clip.vision.attention.layer_norm_epsilon": ("float32", 1e-5),
        "clip.vision.projection_dim": ("uint32", decoder_width),
        "clip.vision.image_mean": ("array", [0.5, 0.25, 0.125]),
        "clip.vision.image_std": ("array", [0.25, 0.25, 0.25]),
        "yivl.vision.blocks_run": ("uint32", BLOCKS - 1),
        "yivl.vision.projector_norm_epsilon": ("float32", 1e-5),
        "yivl.image.aspect_ratio": ("string", "pad"),
        "yivl.image.pad_color": ("array", [127, 63, 31]),
    }


def vision_tensors(width: int, decoder_width: int, type_name: str) -> Tensors:
    r = _Random(type_name)

    def linear(name: str, rows: int, cols: int) -> Tensors:
        return {f"{name}.weight": r.matrix(rows, cols), f"{name}.bias": r.vector(rows)}

    def norm(name: str, size: int) -> Tensors:
        return {f"{name}.weight": r.vector(size), f"{name}.bias": r.vector(size)}

    tensors = {
        "v.class_embd": r.vector(width),
        "v.patch_embd.weight": _Random("F16").matrix(width, 3, PATCH, PATCH),
        "v.position_embd.weight": _Random("F32").matrix((IMAGE // PATCH) ** 2 + 1, width),
    }
    tensors |= norm("v.pre_ln", width)
    for i in range(BLOCKS):
        blk = f"v.blk.{i}"
        tensors |= norm(f"{blk}.ln1", width) | norm(f"{blk}.ln2", width)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            tensors |= linear(f"{blk}.{name}", width, width)
        tensors |= linear(f"{blk}.ffn_up", 2 * width, width) | linear(f"{blk}.ffn_down", width, 2 * width)
    tensors |= linear("mm.0", decoder_width, width) | norm("mm.1", decoder_width)
    return tensors | linear("mm.3", decoder_width, decoder_width) | norm("mm.4", decoder_width)


def write_single(path: Path) -> Path:
    keys = decoder_keys(8) | vision_keys(8, 8)
    return write_gguf(path, keys, decoder_tensors(8, "F16") | vision_tensors(8, 8, "F32"))


def write_pair(text: Path, mmproj: Path) -> tuple[Path, Path]:
    write_gguf(text, decoder_keys(32), decoder_tensors(32, "Q8_0"))
    write_gguf(mmproj, vision_keys(8, 32), vision_tensors(8, 32, "F32"), "clip")
    return text, mmproj
