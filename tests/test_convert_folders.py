"""Published folders as they may come: other containers, types and settings than the golden one's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    GOLDEN,
    GOLDEN_VIT,
    golden_decoder,
    golden_vit,
    remove_weights,
    write_checkpoint,
    write_shards,
)
from gguf import GGUFReader
from gguf_contents import keys, tensors
from safetensors.torch import load_file
from yivl_edge.convert import convert


def golden_copy(folder: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, folder / "checkpoint"))


@pytest.mark.parametrize(("file_format", "shards"), [("bin", 2), ("bin", 1), ("safetensors", 1)])
@pytest.mark.parametrize("vit_format", ["bin", "safetensors"])
def test_other_containers_of_the_same_weights_give_the_same_file(
    tmp_path: Path, golden_q8_0: Path, file_format: str, shards: int, vit_format: str
) -> None:
    folder = golden_copy(tmp_path)
    remove_weights(folder)
    write_shards(folder, golden_decoder(), file_format=file_format, shards=shards)
    vit_folder = folder / GOLDEN_VIT.relative_to(GOLDEN)
    remove_weights(vit_folder)
    write_shards(vit_folder, golden_vit(), file_format=vit_format, shards=1)
    convert(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == golden_q8_0.read_bytes()


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


def test_vision_tower_in_the_shards_is_ignored(tmp_path: Path, golden_q8_0: Path) -> None:
    folder = golden_copy(tmp_path)
    copies = {
        f"model.vision_tower.vision_tower.{name}": torch.zeros_like(tensor)
        for name, tensor in golden_vit().items()
    }
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    write_shards(tmp_path, copies, file_format="safetensors", shards=1)
    (tmp_path / "model.safetensors").rename(folder / "extra.safetensors")
    index["weight_map"] |= dict.fromkeys(copies, "extra.safetensors")
    index_path.write_text(json.dumps(index))
    convert(folder, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == golden_q8_0.read_bytes()


def test_safetensors_alone_need_no_torch(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", vit_format="safetensors")
    code = (
        "import sys; from yivl_edge.convert import convert; convert(*sys.argv[1:]); "
        "assert not {'torch', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "out.gguf")], check=True)
