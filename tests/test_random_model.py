"""The writer of random models: true dimensions, weights of sane size, a tokeniser for ordinary text."""

from __future__ import annotations

import importlib.util
import sys
from math import prod
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sentencepiece
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from yivl_edge import Model
from yivl_edge.convert import convert
from yivl_edge.convert.config import ModelConfig
from yivl_edge.convert.tensor_map import Part, tensors
from yivl_edge.convert.tokenizer import read_sentencepiece
from yivl_edge.verify import verify

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
WEIGHT_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
WEIGHT_TYPES += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def load(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def random_model() -> ModuleType:
    return load("random_model")


@pytest.mark.parametrize(("size", "decoder"), [("6b", 6_061_035_520), ("34b", 34_388_917_248)])
def test_sizes_have_the_published_number_of_weights(
    random_model: ModuleType, size: str, decoder: int
) -> None:
    config = ModelConfig("", *random_model.SIZES[size], random_model.IMAGE)
    table = list(tensors(config.sizes(), blocks=config.decoder.blocks, vision_blocks=32))
    assert sum(prod(tensor.shape) for tensor in table if tensor.part is Part.DECODER) == decoder
    # CLIP ViT-H/14 at 224 pixels; 768 more position embeddings of 1280 at 448; less the final norm.
    vision = sum(prod(tensor.shape) for tensor in table if tensor.part is Part.VISION)
    assert vision == 630_766_080 + 768 * 1280 - 2 * 1280


@pytest.mark.parametrize("kind", [GGMLQuantizationType[name] for name in WEIGHT_TYPES])
def test_weights_have_the_deviation_asked_for(random_model: ModuleType, kind: GGMLQuantizationType) -> None:
    pool = random_model.Pool(kind, seed=0)
    block, size = GGML_QUANT_SIZES[kind]
    # From the end of the pool on, so that it starts anew within.
    data = np.concatenate(list(pool.pieces((1 << 20) // block * size, 1 / 64, start=0.99)))
    weights = dequantize(data.reshape(1, -1), kind)
    assert weights.size == 1 << 20
    # A K block's 8 scales are drawn from 64 values: with 4,096 blocks, deviations differ by about 1%.
    assert weights.std() * 64 == pytest.approx(1, abs=0.02)
    assert abs(weights.mean() * 64) < 0.02


def test_tokenizer_file_holds_the_tables(random_model: ModuleType, tmp_path: Path) -> None:
    tables = random_model.make_tokenizer(4096)
    (tmp_path / "tokenizer.model").write_bytes(load("random_checkpoint").tokenizer_model(tables))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert [oracle.id_to_piece(i) for i in range(len(oracle))] == tables.pieces
    read = read_sentencepiece(tmp_path / "tokenizer.model")
    assert (read.pieces, read.types, read.scores) == (tables.pieces, tables.types, tables.scores)
    assert not read.add_dummy_prefix
    assert oracle.decode(oracle.encode("A picture of a cat. 一只猫")) == "A picture of a cat. 一只猫"


def test_random_checkpoint_converts_and_proves_itself(tmp_path: Path) -> None:
    load("random_checkpoint").write_checkpoint(tmp_path / "folder", "demo", blocks=2)
    convert(tmp_path / "folder", tmp_path / "out.gguf", type="q4_k_m")
    assert verify(tmp_path / "out.gguf").passed


def test_tokeniser_has_its_size_and_no_piece_twice(random_model: ModuleType) -> None:
    tables = random_model.make_tokenizer(64_000)
    assert len(tables.pieces) == len(tables.scores) == len(tables.types) == 64_000
    assert len(set(tables.pieces)) == 64_000
    assert {"\u2581picture", "猫", "<0xFF>", "<|endoftext|>"} <= set(tables.pieces)


@pytest.mark.parametrize(("type_name", "layout"), [("q4_0", "single"), ("q4_k_m", "pair"), ("f16", "pair")])
def test_demo_size_runs(random_model: ModuleType, tmp_path: Path, type_name: str, layout: str) -> None:
    paths = random_model.write_random_model(
        tmp_path / "demo.gguf", size="demo", type_name=type_name, vision_type="q8_0", layout=layout
    )
    kinds = {tensor.name: tensor.tensor_type for path in paths for tensor in GGUFReader(path).tensors}
    assert kinds["v.blk.0.ffn_up.weight"] == GGMLQuantizationType.Q8_0
    model = Model(paths[0], mmproj=paths[1] if layout == "pair" else None)
    question = "Describe the picture in detail."
    assert len(model.tokenize(question)) < len(question) / 2
    logits = model.logits(DATA / "golden" / "image.png", question)
    # The head's rows have length 1 and its input has deviation 1.
    assert 0.5 < logits.std() < 2
    # Positions differ: activations did not collapse into one vector.
    assert logits.std(axis=0).mean() > 0.5
