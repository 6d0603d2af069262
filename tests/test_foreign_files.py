"""Files from elsewhere: pairs as llama.cpp's scripts write them, old and new."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import write_checkpoint
from closeness import relative_l2
from gguf import GGMLQuantizationType as T
from weight_types import rewrite
from yivl_edge import Model
from yivl_edge.convert import convert

QUESTION = "What is this?"


def without_our_keys(keys: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keys.items() if not name.startswith("yivl.")}


def with_block_count(count: int):
    return lambda keys: without_our_keys(keys) | {"clip.vision.block_count": count}


def as_old_scripts(n_blocks: int, norms: T = T.F32):
    """Swapped MLP names, the unused block left out; the projector's vectors of type `norms`."""

    def tensor(name: str, values: np.ndarray) -> tuple[str, np.ndarray, T] | None:
        if name.startswith("v.blk."):
            if int(name.split(".")[2]) >= n_blocks:
                return None
            swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
            name = ".".join(swap.get(part, part) for part in name.split("."))
        if values.ndim == 1 and name.startswith("mm.") and norms == T.F16:
            return name, values.astype(np.float16), T.F16
        return name, values, T.F32

    return tensor


# F16 rounds the projector's norms and biases to 11 bits; otherwise nothing changes.
@pytest.mark.parametrize(("norms", "tolerance"), [(T.F32, 0.0), (T.F16, 1e-3)])
def test_an_old_scripts_pair_gives_the_same_logits(
    golden_model, golden_pair, golden_image, tmp_path, norms, tolerance
):
    text, mmproj = golden_pair
    old_text = rewrite(text, tmp_path / "text.gguf", keys=without_our_keys)
    # Golden's ViT has 4 blocks, of which 3 run.
    old_mmproj = rewrite(
        mmproj, tmp_path / "mmproj.gguf", keys=with_block_count(3), tensor=as_old_scripts(3, norms)
    )
    shapes = {t.name: tuple(t.shape) for t in gguf.GGUFReader(old_mmproj).tensors}
    assert shapes["v.blk.0.ffn_down.weight"] == (160, 640)  # GGUF order: 160 inputs, 640 outputs
    model = Model(old_text, mmproj=old_mmproj)
    assert model.prompt_ids(QUESTION) == golden_model.prompt_ids(QUESTION)
    logits = model.logits(golden_image, QUESTION)
    assert relative_l2(logits, golden_model.logits(golden_image, QUESTION)) <= tolerance


@pytest.mark.parametrize("blocks_in_file", [31, 32])
def test_of_vit_hs_32_blocks_the_first_31_run(tmp_path, golden_image, blocks_in_file):
    write_checkpoint(
        tmp_path / "c", vit_layers=32, vit_hidden=64, vit_heads=1, vit_mlp=96, heads=1, head_dim=64, mlp=96
    )
    convert(tmp_path / "c", tmp_path / "m.gguf", type="f32", layout="pair")
    drop = as_old_scripts(31) if blocks_in_file == 31 else lambda name, values: (name, values, T.F32)
    foreign = rewrite(
        tmp_path / "m-mmproj.gguf",
        tmp_path / "foreign.gguf",
        keys=with_block_count(blocks_in_file),
        tensor=drop,
    )
    ours = Model(tmp_path / "m.gguf", mmproj=tmp_path / "m-mmproj.gguf")
    theirs = Model(tmp_path / "m.gguf", mmproj=foreign)
    assert ours.config.vision.n_blocks == theirs.config.vision.n_blocks == 31
    np.testing.assert_array_equal(theirs.vision_features(golden_image), ours.vision_features(golden_image))


def test_a_text_model_alone_answers_text_and_asks_for_its_mmproj_otherwise(golden_pair, golden_image):
    model = Model(golden_pair[0])
    assert model.chat(None, QUESTION, max_tokens=4).usage.completion_tokens > 0
    with pytest.raises(ValueError, match="mmproj"):
        model.chat(golden_image, QUESTION)


def test_a_text_model_given_as_mmproj_and_the_reverse_are_named(golden_pair):
    text, mmproj = golden_pair
    with pytest.raises(ValueError, match=f"{text.name}: expected a vision tower"):
        Model(text, mmproj=text)
    with pytest.raises(ValueError, match=f"{mmproj.name}: general.architecture: expected .*mmproj file"):
        Model(mmproj)


def test_a_path_is_taken_as_str_or_path(golden_f32: Path):
    assert Model(str(golden_f32)).config.decoder.n_layers == Model(golden_f32).config.decoder.n_layers == 3


def test_a_path_that_is_no_utf8_opens_and_one_with_a_null_character_is_named(
    golden_f32: Path, tmp_path: Path
):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf")
    with pytest.raises(ValueError, match=r"/m\\xff\.gguf: cannot open"):
        Model(path)
    os.symlink(golden_f32, path)
    assert Model(path).config.decoder.n_layers == 3
    with pytest.raises(ValueError, match="found one with a null character"):
        Model(f"{golden_f32}\0")
