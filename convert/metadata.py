"""The keys of docs/file-format.md for one model."""

from __future__ import annotations

from collections.abc import Sequence

from gguf import GGUFValueType
from yivl_edge.convert.config import ModelConfig
from yivl_edge.convert.header import Key
from yivl_edge.convert.tokenizer import TokenizerTables

FORMAT_VERSION = 1


def _u32(name: str, value: int) -> Key:
    return Key(name, value, GGUFValueType.UINT32)


def _f32(name: str, value: float) -> Key:
    return Key(name, value, GGUFValueType.FLOAT32)


def _bool(name: str, value: bool) -> Key:
    return Key(name, value, GGUFValueType.BOOL)


def _string(name: str, value: str) -> Key:
    return Key(name, value, GGUFValueType.STRING)


def _array(name: str, values: Sequence[object], item_type: GGUFValueType) -> Key:
    return Key(name, list(values), GGUFValueType.ARRAY, item_type)


def general_keys(config: ModelConfig) -> list[Key]:
    """Keys of every file, whatever its types."""
    return [_string("general.name", config.name), _u32("general.quantization_version", 2)]


def file_type_key(file_type: int) -> Key:
    """The main weight type of a file, llama.cpp's number."""
    return _u32("general.file_type", file_type)


def text_keys(config: ModelConfig, tokenizer: TokenizerTables) -> list[Key]:
    """Keys of the decoder, the tokeniser and the prompt."""
    decoder = config.decoder
    return [
        _u32("llama.context_length", decoder.context_length),
        _u32("llama.embedding_length", decoder.width),
        _u32("llama.block_count", decoder.blocks),
        _u32("llama.feed_forward_length", decoder.mlp_width),
        _u32("llama.attention.head_count", decoder.heads),
        _u32("llama.attention.head_count_kv", decoder.kv_heads),
        _f32("llama.attention.layer_norm_rms_epsilon", decoder.rms_norm_epsilon),
        _f32("llama.rope.freq_base", decoder.rope_theta),
        _u32("llama.rope.dimension_count", decoder.head_dim),
        _u32("llama.vocab_size", decoder.vocab_size),
        *_tokenizer_keys(tokenizer),
        _u32("yivl.format_version", FORMAT_VERSION),
        _string("yivl.prompt.system", config.prompt.system),
        _array("yivl.prompt.stops", config.prompt.stops, GGUFValueType.STRING),
        _f32("yivl.sampling.temperature", config.prompt.temperature),
        _u32("yivl.sampling.max_tokens", config.prompt.max_tokens),
    ]


def _tokenizer_keys(tokenizer: TokenizerTables) -> list[Key]:
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unknown": tokenizer.unknown_id,
        "padding": tokenizer.padding_id,
    }
    keys = [
        _string("tokenizer.ggml.model", "llama"),
        _array("tokenizer.ggml.tokens", tokenizer.pieces, GGUFValueType.STRING),
        _array("tokenizer.ggml.scores", tokenizer.scores, GGUFValueType.FLOAT32),
        _array("tokenizer.ggml.token_type", tokenizer.types, GGUFValueType.INT32),
        *(_u32(f"tokenizer.ggml.{name}_token_id", i) for name, i in ids.items() if i is not None),
        _bool("tokenizer.ggml.add_bos_token", tokenizer.add_bos),
        _bool("tokenizer.ggml.add_eos_token", tokenizer.add_eos),
        _bool("tokenizer.ggml.add_space_prefix", tokenizer.add_dummy_prefix),
        _bool("tokenizer.ggml.remove_extra_whitespaces", tokenizer.remove_extra_whitespaces),
    ]
    if tokenizer.special_ids:
        keys.append(_array("yivl.tokenizer.special_ids", tokenizer.special_ids, GGUFValueType.INT32))
    return keys


def vision_keys(config: ModelConfig, blocks: int) -> list[Key]:
    """Keys of the ViT, the projector and the preprocessing; ``blocks`` of the ViT are in the file."""
    vision, image = config.vision, config.image
    assert vision is not None
    return [
        _bool("clip.has_vision_encoder", True),
        _bool("clip.has_text_encoder", False),
        _bool("clip.has_llava_projector", True),
        _string("clip.projector_type", "mlp"),
        _bool("clip.use_gelu", True),
        _u32("clip.vision.image_size", vision.image_size),
        _u32("clip.vision.patch_size", vision.patch_size),
        _u32("clip.vision.embedding_length", vision.width),
        _u32("clip.vision.feed_forward_length", vision.mlp_width),
        _u32("clip.vision.block_count", blocks),
        _u32("clip.vision.attention.head_count", vision.heads),
        _f32("clip.vision.attention.layer_norm_epsilon", vision.norm_epsilon),
        _u32("clip.vision.projection_dim", config.decoder.width),
        _array("clip.vision.image_mean", image.mean, GGUFValueType.FLOAT32),
        _array("clip.vision.image_std", image.std, GGUFValueType.FLOAT32),
        _u32("yivl.vision.blocks_run", vision.blocks_run),
        _f32("yivl.vision.projector_norm_epsilon", vision.projector_norm_epsilon),
        _string("yivl.image.aspect_ratio", image.aspect_ratio),
        _array("yivl.image.pad_color", image.pad_color, GGUFValueType.UINT32),
    ]
