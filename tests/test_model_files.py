"""Model files as a stranger may send them: each opens or is a ModelFileError that says what is wrong."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import string
from tiny_models import (
    Keys,
    Tensors,
    decoder_keys,
    decoder_tensors,
    vision_keys,
    vision_tensors,
    write_gguf,
    write_pair,
    write_single,
)
from yivl_edge import Model, ModelFileError, _core

WIDTH = 8
KEYS = decoder_keys(WIDTH) | vision_keys(WIDTH, WIDTH)
TENSORS = decoder_tensors(WIDTH, "F16") | vision_tensors(WIDTH, WIDTH, "F32")
# The tower's second block does not run, so it need not be there.
NEEDED_TENSORS = [name for name in TENSORS if not name.startswith("v.blk.1.")]
NEEDED_KEYS = [
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "clip.projector_type",
    "clip.vision.image_size",
    "clip.vision.patch_size",
    "clip.vision.embedding_length",
    "clip.vision.feed_forward_length",
    "clip.vision.block_count",
    "clip.vision.attention.head_count",
    "clip.vision.attention.layer_norm_epsilon",
    "clip.vision.image_mean",
    "clip.vision.image_std",
]


@pytest.fixture(scope="module", autouse=True)
def _no_large_allocation():
    """All files here are below 32 KB: however they are damaged, the process must not grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_single(tmp_path / "single.gguf")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path / "text.gguf", tmp_path / "mmproj.gguf")


def open_model(path: Path, mmproj: Path | None = None) -> Model:
    return Model(path, mmproj=mmproj, n_threads=1)


def error(path: Path, mmproj: Path | None = None, named: Path | None = None) -> str:
    """The message without the name of the file, which must be `named` or else `path`."""
    with pytest.raises(ModelFileError) as caught:
        open_model(path, mmproj)
    message = str(caught.value)
    assert message.startswith(f"{named or path}: ")
    return message.removeprefix(f"{named or path}: ")


def write(path: Path, keys: Keys = KEYS, tensors: Tensors = TENSORS) -> Path:
    return write_gguf(path, keys, tensors)


def logits(model: Model) -> np.ndarray:
    return model.logits(np.zeros((4, 4, 3), np.uint8), "ab")


# --- What opens --------------------------------------------------------------------------------------------


def test_single_file_pair_and_text_model_alone_open(single: Path, pair: tuple[Path, Path]) -> None:
    for model in (open_model(single), open_model(*pair)):
        assert np.isfinite(logits(model)).all()
    assert open_model(pair[0]).chat(None, "ab", max_tokens=2).usage.completion_tokens > 0


def test_a_text_model_alone_takes_no_pixels(pair: tuple[Path, Path]) -> None:
    session = _core.Session(open_model(pair[0])._model)
    for work in (session.vision_features, session.encode_image, session.embed_image):
        with pytest.raises(ValueError, match="no vision tower"):
            work(np.zeros(48, np.float32), _core.Control())


def test_a_block_that_does_not_run_may_be_missing(single: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "fewer.gguf", tensors={name: TENSORS[name] for name in NEEDED_TENSORS})
    np.testing.assert_array_equal(logits(open_model(path)), logits(open_model(single)))


def test_optional_keys_may_be_missing(tmp_path: Path) -> None:
    needed = {*NEEDED_KEYS, "clip.has_vision_encoder", "llama.attention.head_count_kv"}
    longer = {"llama.context_length": ("uint32", 1024)}  # for the default system text, byte by byte
    path = write(tmp_path / "bare.gguf", {name: KEYS[name] for name in needed} | longer)
    assert np.isfinite(logits(open_model(path))).all()


def test_a_bos_that_is_asked_for_but_not_named_costs_no_text(single: Path, tmp_path: Path) -> None:
    asked = KEYS | {"tokenizer.ggml.add_bos_token": ("bool", True)}
    unnamed = {name: value for name, value in asked.items() if name != "tokenizer.ggml.bos_token_id"}
    plain = open_model(single).prompt_ids("ab")
    assert open_model(write(tmp_path / "unnamed.gguf", unnamed)).prompt_ids("ab") == plain
    assert open_model(write(tmp_path / "named.gguf", asked)).prompt_ids("ab") == [1, *plain]


def test_swapped_names_of_the_towers_mlp_make_no_difference(single: Path, tmp_path: Path) -> None:
    def swap(name: str) -> str:
        to = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        return ".".join(to.get(part, part) if name.startswith("v.") else part for part in name.split("."))

    path = write(tmp_path / "swapped.gguf", tensors={swap(name): value for name, value in TENSORS.items()})
    np.testing.assert_array_equal(logits(open_model(path)), logits(open_model(single)))


def test_norms_and_biases_may_be_half_precision(single: Path, tmp_path: Path) -> None:
    halves = {
        name: (values.astype(np.float16), "F16") if values.ndim == 1 else (values, kind)
        for name, (values, kind) in TENSORS.items()
    }
    widened = {
        name: (values.astype(np.float32), "F32") if values.ndim == 1 else (values, kind)
        for name, (values, kind) in halves.items()
    }
    narrow = open_model(write(tmp_path / "f16.gguf", tensors=halves))
    wide = open_model(write(tmp_path / "f32.gguf", tensors=widened))
    np.testing.assert_array_equal(logits(narrow), logits(wide))


# --- Damaged bytes -----------------------------------------------------------------------------------------


def test_every_class_of_truncation_is_refused(single: Path) -> None:
    content = single.read_bytes()
    # 61 is coprime to the 4 and 8 byte fields, so that cuts fall on every place within them.
    for length in [*range(0, len(content) - 64, 61), len(content) - 64]:
        single.write_bytes(content[:length])
        message = error(single)
        assert "truncated" in message or "empty" in message, (length, message)


def entry(content: bytes, name: str) -> tuple[int, int, int, int]:
    """Where a tensor's entry has its rank, its first dimension, its type and its offset."""
    at = content.index(string(name)) + 8 + len(name)
    (rank,) = struct.unpack_from("<I", content, at)
    return at, at + 4, at + 4 + 8 * rank, at + 8 + 8 * rank


def change(content: bytes, at: int, layout: str, *values: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(layout, changed, at, *values)
    return bytes(changed)


Q, Q_NAME = "blk.0.attn_q.weight", "tensor 'blk.0.attn_q.weight'"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: change(c, 0, "<I", 0), "expected the letters GGUF"),
        (lambda c: change(c, 4, "<I", 9), "expected GGUF version 2 or 3, found version 9"),
        (
            lambda c: change(c, 8, "<Q", 2**40),
            "number of tensors: expected at most 65536, found 1099511627776",
        ),
        (lambda c: change(c, 16, "<Q", 2**40), "number of metadata keys: expected at most 65536"),
        (lambda c: change(c, 24, "<Q", 2**63), "metadata key 0: expected a string of at most"),
        (lambda c: change(c, entry(c, Q)[0], "<I", 7), f"{Q_NAME}: expected 1 to 4 dimensions, found 7"),
        (lambda c: change(c, entry(c, Q)[1], "<Q", 0), f"{Q_NAME}: expected dimensions from 1"),
        (lambda c: change(c, entry(c, Q)[1], "<Q", 2**60), f"{Q_NAME}: expected data that fit a file of"),
        (lambda c: change(c, entry(c, Q)[2], "<I", 16), f"{Q_NAME}: expected a weight type of F32, F16"),
        (
            lambda c: change(c, entry(c, Q)[2], "<I", 12),
            f"{Q_NAME}: expected rows of a multiple of 256 for Q4_K",
        ),
        (
            lambda c: change(c, entry(c, Q)[3], "<Q", 33),
            f"{Q_NAME}: expected an offset that is a multiple of 32",
        ),
        (
            lambda c: change(c, entry(c, Q)[3], "<Q", 2**63),
            f"{Q_NAME}: expected 128 bytes at offset 9223372036",
        ),
        (lambda c: change(c, entry(c, Q)[3], "<Q", 0), "they overlap"),
        (lambda c: c.replace(b"attn_k.w", b"attn_q.w"), "expected one tensor of this name, found a second"),
        (
            lambda c: c.replace(b"bos_token_id", b"eos_token_id"),
            "expected one key of this name, found a second",
        ),
        (
            lambda c: c.replace(string("<s>"), string("<s>", 2**40)),
            "key 'tokenizer.ggml.tokens': expected a string",
        ),
        (
            lambda c: change(c, c.index(b"ggml.scores") + 11 + 8, "<Q", 2**50),
            "key 'tokenizer.ggml.scores': array length: expected at most",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_field_is_named(single: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    content = single.read_bytes()
    damaged = damage(content)
    assert damaged != content
    single.write_bytes(damaged)
    assert message in error(single)


# --- Files that are whole, but no Yi-VL model --------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDED_TENSORS)
def test_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / "m.gguf", tensors={other: value for other, value in TENSORS.items() if other != name}
    )
    message = error(path)
    if name.endswith("ffn_down.weight"):
        assert "ffn_" in message
    else:
        assert message == f"tensor '{name}' is missing"


@pytest.mark.parametrize("name", NEEDED_TENSORS)
def test_wrong_shape_is_named_with_both_shapes(tmp_path: Path, name: str) -> None:
    values, kind = TENSORS[name]
    wrong = np.concatenate([values, values], axis=-1)
    message = error(write(tmp_path / "m.gguf", tensors=TENSORS | {name: (wrong, kind)}))
    assert message.startswith(f"tensor '{name}': expected shape ")
    assert str(tuple(wrong.shape)).replace(",)", ")") in message
    flat = values.reshape(-1, 1)
    assert error(write(tmp_path / "f.gguf", tensors=TENSORS | {name: (flat, kind)})).startswith("tensor '")


@pytest.mark.parametrize("name", NEEDED_KEYS)
def test_missing_or_mistyped_key_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.gguf", {other: value for other, value in KEYS.items() if other != name})
    message = error(path)
    assert name in message
    assert "found no such key" in message
    message = error(write(tmp_path / "w.gguf", KEYS | {name: ("bool", True)}))
    assert name in message
    assert "found a bool" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": ("uint32", 2)}, "tensor 'blk.1.attn_norm.weight' is missing"),
        ({"llama.block_count": ("uint32", 2**32 - 1)}, "llama.block_count: expected an integer from 1 to"),
        (
            {"llama.block_count": ("int32", -1)},
            "llama.block_count: expected an integer from 1 to 4096, found -1",
        ),
        (
            {"llama.embedding_length": ("uint64", 2**63)},
            "expected an integer below 2^63, found 9223372036854775808",
        ),
        (
            {"llama.attention.head_count": ("uint32", 3)},
            "llama.attention.head_count: expected a divisor of the width",
        ),
        (
            {"llama.attention.head_count_kv": ("uint32", 0)},
            "llama.attention.head_count_kv: expected an integer from",
        ),
        ({"llama.attention.head_count": ("uint32", 8)}, "head dim: expected an even number, found 1"),
        (
            {"llama.attention.layer_norm_rms_epsilon": ("float32", float("nan"))},
            "expected a positive number that 32 bits can hold, found nan",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": ("float32", -1e-9)},
            "expected a positive number that 32 bits can hold, found -1e-09",
        ),
        (
            {"llama.rope.freq_base": ("float64", 1e-50)},
            "expected a positive number that 32 bits can hold, found 1e-50",
        ),
        (
            {"clip.vision.attention.layer_norm_epsilon": ("float64", 1e39)},
            "expected a positive number that 32 bits can hold, found 1e+39",
        ),
        (
            {"yivl.sampling.temperature": ("float32", -1e-9)},
            "yivl.sampling.temperature: expected a number from 0 to 100, found -1e-09",
        ),
        (
            {"clip.vision.patch_size": ("uint32", 3)},
            "clip.vision.image_size: expected a multiple of the patch size 3",
        ),
        (
            {"clip.vision.image_mean": ("array", [0.5, 0.5])},
            "clip.vision.image_mean: expected 3 numbers, found 2",
        ),
        (
            {"clip.vision.image_std": ("array", [0.5, 0.5, 0.0])},
            "clip.vision.image_std: expected positive finite numbers, found 0",
        ),
        (
            {"clip.vision.image_std": ("array", [0.5, float("inf"), 0.5])},
            "clip.vision.image_std: expected positive finite numbers, found inf",
        ),
        (
            {"clip.vision.image_mean": ("array", [0.5, 0.5, -1e-9])},
            "clip.vision.image_mean: expected numbers from 0 to 1, found -1e-09",
        ),
        ({"clip.projector_type": ("string", "ldp")}, "clip.projector_type: expected 'mlp', found 'ldp'"),
        (
            {"yivl.format_version": ("uint32", 2)},
            "yivl.format_version: expected 1, found 2; a newer yivl-edge may read this file",
        ),
        (
            {"yivl.vision.blocks_run": ("uint32", 3)},
            "yivl.vision.blocks_run: expected an integer from 1 to 2, found 3",
        ),
        (
            {"yivl.image.pad_color": ("array", [1, 2, 256])},
            "yivl.image.pad_color: expected numbers from 0 to 255",
        ),
        (
            {"tokenizer.ggml.model": ("string", "gpt2")},
            "tokenizer.ggml.model: expected 'llama' (SentencePiece BPE)",
        ),
        (
            {"tokenizer.ggml.scores": ("array", [0.0])},
            "expected one score and one type for each of 264 pieces",
        ),
        (
            {"tokenizer.ggml.eos_token_id": ("uint32", 264)},
            "the id of the last token (EOS), 264, is not in the vocab",
        ),
        ({"tokenizer.ggml.token_type": ("array", [1])}, "264 pieces, found 264 scores and 1 types"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_value_is_named(tmp_path: Path, changes: Keys, message: str) -> None:
    assert message in error(write(tmp_path / "m.gguf", KEYS | changes))


def test_quantised_norm_is_refused(tmp_path: Path) -> None:
    vector = (np.zeros(34, np.uint8), "Q8_0")
    path = write_gguf(
        tmp_path / "m.gguf",
        decoder_keys(32),
        decoder_tensors(32, "Q8_0") | {"output_norm.weight": vector},
    )
    assert error(path) == "tensor 'output_norm.weight': expected type F32, F16 or BF16, found Q8_0"


def test_halves_of_a_pair_in_each_others_place_are_refused(pair: tuple[Path, Path]) -> None:
    text, mmproj = pair
    assert (
        "general.architecture: expected 'llama' (a Yi decoder), found 'clip'; this is an mmproj file"
        in error(mmproj)
    )
    assert "expected 'llama'" in error(mmproj, text)
    assert "expected a vision tower" in error(text, text, named=text)
    assert "general.architecture: expected 'llama'" in error(mmproj, mmproj)


def test_an_mmproj_of_another_width_is_refused(single: Path, pair: tuple[Path, Path]) -> None:
    message = error(single, pair[1], named=pair[1])
    assert message == "tensor 'mm.0.weight': expected shape (8, 8), found (32, 8)"


def test_files_of_other_models_and_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    write_gguf(path, KEYS, TENSORS, "qwen2")
    assert "general.architecture: expected 'llama' (a Yi decoder), found 'qwen2'" in error(path)
    for content in (b"\x80\x02}q\x00.", b'{"a": 1}', b"PK\x03\x04" + bytes(100), b"GGUF"):
        path.write_bytes(content)
        error(path)
    path.unlink()
    assert "cannot open" in error(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"llama.rope.dimension_count": ("uint32", 2)},
            "llama.rope.dimension_count: expected the head dim 4, found 2",
        ),
        ({"llama.expert_count": ("uint32", 2)}, "llama.expert_count: not part of"),
        ({"llama.rope.scaling.type": ("string", "linear")}, "llama.rope.scaling.type: not part of"),
        (
            {"yivl.prompt.stops": ("array", ["###", ""])},
            "yivl.prompt.stops: expected texts, found an empty one",
        ),
        ({"yivl.image.pad_color": ("array", [1, 2])}, "expected 3 numbers, found 2"),
    ],
)
def test_what_a_key_says_of_another_model_is_refused(tmp_path: Path, keys: Keys, message: str) -> None:
    assert message in error(write(tmp_path / "m.gguf", KEYS | keys))


def test_keys_that_say_nothing_else_are_taken(tmp_path: Path) -> None:
    same = {
        "llama.expert_count": ("uint32", 0),
        "llama.rope.scaling.type": ("string", "none"),
        "clip.projector_type": ("string", "mlp_norm"),
    }
    open_model(write(tmp_path / "m.gguf", KEYS | same))


def test_defaults_are_the_published_models(tmp_path: Path) -> None:
    keys = {k: v for k, v in KEYS.items() if not k.startswith("yivl.") and k != "llama.rope.freq_base"}
    keys |= {"clip.vision.image_mean": ("array", [0.48145466, 0.4578275, 0.40821073])}
    config = open_model(write(tmp_path / "m.gguf", keys)).config
    assert tuple(config.pad_color) == (122, 116, 104)
    assert config.decoder.rope_theta == 10000
    assert config.stops == ["###", "\nHuman:"]
    assert config.system.startswith("This is a chat between an inquisitive human and an AI assistant.")
    assert config.system.endswith("礼貌的回答。")
