"""Logits against a torch float32 twin with the same weights: every type, both layouts, many shapes, any chunking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from closeness import relative_l2
from gguf import GGMLQuantizationType
from twin import Twin
from weight_types import ALL_TYPES, retype
from yivl_edge import Model, _core
from yivl_edge.convert import convert

GOLDEN = Path(__file__).parent / "data/golden"
QUESTION = "What is this? 这是什么？"


@pytest.fixture(scope="module")
def wide_f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 file whose decoder and vision rows are all whole 256-blocks, so that every type applies everywhere."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(
        folder / "checkpoint",
        heads=2,
        kv_heads=1,
        head_dim=128,
        mlp=512,
        vit_hidden=256,
        vit_heads=4,
        vit_layers=3,
    )
    convert(folder / "checkpoint", folder / "wide.gguf", type="f32")
    return folder / "wide.gguf"


@pytest.fixture(scope="module")
def pixels(golden_image: Path, golden_model: Model) -> np.ndarray:
    return golden_model.preprocess(golden_image)


def tolerance(device: str, type_name: str) -> float:
    """Relative L2 error of logits that an instruction set or a GPU may make with weights of a type."""
    # In float32 with the same weights, 1e-3 leaves room for other summation orders only. AMX rounds both operands of a
    # product of many tokens to bfloat16, whose 8 bits of significand put each off by up to 2^-9; over a sum these
    # errors average out, and 1.1e-2 at most is what remains of them in these logits. A GPU rounds to half precision, 11
    # bits: 1.4e-3.
    if type_name.lower() == "f32":
        return 1e-3
    return 2e-2 if device == "amx" else 3e-3 if device.startswith("cuda") else 1e-3


def check_logits_on_every_isa(
    monkeypatch: pytest.MonkeyPatch, image: Path, type_name: str, text: Path, mmproj: Path | None = None
) -> None:
    expected = None
    for isa in _core.available_isas():
        monkeypatch.setenv("YIVL_ISA", isa)
        model = Model(text, mmproj=mmproj)
        if expected is None:
            expected = Twin(text, mmproj).logits(model.prompt_ids(QUESTION), model.preprocess(image))
        assert relative_l2(model.logits(image, QUESTION), expected) <= tolerance(model.device, type_name), isa


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
def test_every_weight_type_computes_what_its_dequantised_weights_do(
    wide_f32, tmp_path, golden_image, kind, monkeypatch
):
    path = retype(wide_f32, tmp_path / f"{kind.name}.gguf", kind)
    check_logits_on_every_isa(monkeypatch, golden_image, kind.name, path)


@pytest.mark.parametrize("type_name", ["f16", "bf16", "q8_0", "q4_0"])
def test_a_pair_of_every_written_type_computes_what_its_dequantised_weights_do(
    tmp_path, golden_image, type_name, monkeypatch
):
    text, mmproj = tmp_path / "pair.gguf", tmp_path / "pair-mmproj.gguf"
    convert(GOLDEN / "checkpoint", text, type=type_name, layout="pair")
    check_logits_on_every_isa(monkeypatch, golden_image, type_name, text, mmproj)


def test_pair_and_single_layout_give_the_same_logits(golden_f32, golden_pair, golden_image):
    text, mmproj = golden_pair
    single = Model(golden_f32).logits(golden_image, QUESTION)
    pair = Model(text, mmproj=mmproj)
    np.testing.assert_array_equal(pair.logits(golden_image, QUESTION), single)
    expected = Twin(text, mmproj).logits(pair.prompt_ids(QUESTION), pair.preprocess(golden_image))
    assert relative_l2(single, expected) <= 1e-4


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "vit_heads", "vit_head_dim"),
    [
        (2, 2, 64, 2, 64),
        (4, 2, 64, 1, 128),
        (7, 1, 64, 2, 80),
        (14, 2, 64, 1, 80),
        (8, 1, 80, 2, 64),
        (2, 1, 80, 1, 64),
        (2, 1, 128, 2, 128),
        (4, 2, 128, 1, 64),  # keys of a whole kilobyte, which lie further apart in the cache
    ],
)
def test_grouped_query_attention_and_head_dims(
    tmp_path, golden_image, heads, kv_heads, head_dim, vit_heads, vit_head_dim
):
    write_checkpoint(
        tmp_path / "c",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=96,
        vit_hidden=vit_heads * vit_head_dim,
        vit_heads=vit_heads,
    )
    convert(tmp_path / "c", tmp_path / "m.gguf", type="f32")
    model = Model(tmp_path / "m.gguf")
    twin = Twin(tmp_path / "m.gguf")
    pixels = model.preprocess(golden_image)
    assert relative_l2(model.vision_features(golden_image), twin.vision_features(pixels)) <= 1e-5
    logits = twin.logits(model.prompt_ids(QUESTION), pixels)
    assert relative_l2(model.logits(golden_image, QUESTION), logits) <= 1e-4


@pytest.mark.parametrize("image_size", [112, 224, 448])
def test_image_grids(tmp_path, golden_image, image_size):
    write_checkpoint(
        tmp_path / "c", image_size=image_size, vit_hidden=64, vit_heads=1, heads=1, head_dim=64, mlp=96
    )
    convert(tmp_path / "c", tmp_path / "m.gguf", type="f32")
    model = Model(tmp_path / "m.gguf")
    twin = Twin(tmp_path / "m.gguf")
    pixels = model.preprocess(golden_image)
    assert pixels.shape == (3, image_size, image_size)
    features = model.vision_features(golden_image)
    assert features.shape == ((image_size // 14) ** 2, 64)
    assert relative_l2(features, twin.vision_features(pixels)) <= 1e-5
    assert relative_l2(model.encode_image(golden_image), twin.encode_image(pixels)) <= 1e-5
    logits = twin.logits(model.prompt_ids(QUESTION), pixels)
    assert relative_l2(model.logits(golden_image, QUESTION), logits) <= 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 48, 64])
@pytest.mark.parametrize(
    "kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0], ids=lambda kind: kind.name
)
def test_prefill_in_chunks_equals_prefill_at_once(golden_model, golden_f32, tmp_path, pixels, chunk, kind):
    model = golden_model
    if kind != GGMLQuantizationType.F32:  # rounded to bfloat16 on some instruction sets
        model = Model(retype(golden_f32, tmp_path / "model.gguf", kind))
    # 278 positions, and the logits of 256 at once: neither that nor chunks of 48 or 64 leave fewer than 16 over.
    ids = model.prompt_ids(2 * QUESTION)
    control = _core.Control()
    whole = _core.Session(model._model, 1024, 1024).logits(ids, pixels, control)
    chunked = _core.Session(model._model, 1024, chunk).logits(ids, pixels, control)
    on_gpu = model.device.startswith("cuda")
    if chunk < 16 and (on_gpu or (model.device == "amx" and kind != GGMLQuantizationType.F32)):
        # Fewer tokens than a tile has are multiplied as integers, or not on a GPU's tensor cores.
        assert relative_l2(chunked, whole) <= tolerance(model.device, kind.name)
        return
    # Not only within 1e-5: each value is computed in an order that does not depend on its neighbours.
    np.testing.assert_array_equal(chunked, whole)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_logits_do_not_depend_on_the_number_of_threads(golden_f32, golden_model, golden_image, n_threads):
    other = Model(golden_f32, n_threads=n_threads)
    np.testing.assert_array_equal(
        other.logits(golden_image, QUESTION), golden_model.logits(golden_image, QUESTION)
    )


def test_cached_decoding_equals_uncached(golden_model, pixels):
    """Each greedy id from the growing KV cache is the one that computing everything anew gives."""
    core = golden_model._model
    control = _core.Control()
    ids = golden_model.prompt_ids(QUESTION)
    cached = _core.Session(core, 1024)
    cached.begin(ids, pixels, 16, _core.SamplingOptions(temperature=0.0, seed=0), [])
    while cached.next(control) is not None:
        pass
    fresh = _core.Session(core, 1024)
    for _ in range(cached.usage[2]):
        ids.append(int(fresh.logits(ids, pixels, control)[-1].argmax()))
    reply = ids[-cached.usage[2] :]
    assert cached.cached_prefix(ids, pixels) == core.n_positions(ids) - 1
    assert core.detokenize(reply).strip() == cached.text
