"""Makes the self-test of ``yivl_edge.selftest`` while a model is converted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from yivl_edge import _core
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.reference import Reference, Work
from yivl_edge.convert.source import Source
from yivl_edge.convert.tensor_map import Part, Tensor
from yivl_edge.convert.writer import Key
from yivl_edge.selftest import (
    IMAGE_ID,
    IMAGE_ROWS,
    TEXTS,
    Expected,
    error_limit,
    picture,
    sample,
    sample_logits,
    spread,
)

_PREFIX = "yivl.selftest."
# Types that round so finely that an error beyond the limit can only be the converter's.
_FINE = 0.02


def self_test_keys(source: Source) -> list[Key]:
    """The keys with zeros for what is computed, which keep their places in the file."""
    vision, image = source.config.vision, picture()
    ids = _ids(source)
    shapes = {"logits": (len(ids), source.config.decoder.vocab_size)}
    keys = []
    if vision is not None:
        keys += [
            _array("picture", image.ravel().tolist(), GGUFValueType.UINT8),
            _array("picture_size", [image.shape[1], image.shape[0]], GGUFValueType.UINT32),
            Key(_PREFIX + "pixels_sha256", "0" * 64, GGUFValueType.STRING),
        ]
        shapes["vision"] = (vision.patches, vision.width)
        shapes["projector"] = (vision.patches, source.config.decoder.width)
    keys += [
        _array("ids", ids, GGUFValueType.INT32),
        _array("top_ids", [0] * len(ids), GGUFValueType.INT32),
        _array("top_margins", [0.0] * len(ids), GGUFValueType.FLOAT32),
    ]
    for stage, shape in shapes.items():
        empty = _sample_of(stage)(np.zeros(shape, np.float32)).tolist()
        keys += [_array(f"{stage}.{kind}", empty, GGUFValueType.FLOAT32) for kind in ("source", "file")]
    return keys


def make_self_test(
    source: Source,
    visit: Callable[[str, Work[Any]], list[Any]],
    types: Mapping[Tensor, GGMLQuantizationType],
) -> dict[str, Any]:
    """The values of those keys; raise CheckpointError where the converted weights do something else altogether."""
    reference = Reference(source.config, visit, published_rows=source.published_rows)
    values: dict[str, Any] = {}
    ids = _ids(source)
    rows = np.zeros((2, 0, source.config.decoder.width), np.float32)
    if source.config.vision is not None:
        pixels = _pixels(source)
        values[_PREFIX + "pixels_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
        features = reference.vision(pixels)
        _keep(values, "vision", features, types, (Part.VISION,))
        embeddings = reference.projector(features)
        _keep(values, "projector", embeddings, types, (Part.VISION, Part.PROJECTOR))
        rows = embeddings[:, spread(IMAGE_ROWS, embeddings.shape[1])]
    logits = reference.logits(ids, rows)
    _keep(values, "logits", logits, types, tuple(Part))
    best = np.sort(logits[1], -1)[:, -2:]
    scale = np.sqrt(np.square(logits[1]).mean(-1))
    values[_PREFIX + "top_ids"] = logits[1].argmax(-1).tolist()
    values[_PREFIX + "top_margins"] = ((best[:, 1] - best[:, 0]) / scale).tolist()
    return values


def _keep(
    values: dict[str, Any],
    stage: str,
    outputs: FloatArray,
    types: Mapping[Tensor, GGMLQuantizationType],
    parts: Sequence[Part],
) -> None:
    samples = Expected(*(_sample_of(stage)(side) for side in outputs))
    names = {type.name for tensor, type in types.items() if tensor.part in parts}
    limit = error_limit(names)
    if samples.error > limit and limit <= 12 * _FINE:
        raise CheckpointError(
            f"the converted weights do not do what the source's do: {stage} differs by {samples.error:.3g}, at most "
            f"{limit:.3g} is expected of {', '.join(sorted(names))}. Please report this."
        )
    values[f"{_PREFIX}{stage}.source"] = samples.source.tolist()
    values[f"{_PREFIX}{stage}.file"] = samples.file.tolist()


def _sample_of(stage: str) -> Callable[[FloatArray], FloatArray]:
    return sample_logits if stage == "logits" else sample


def _ids(source: Source) -> list[int]:
    tables = source.tokenizer
    tokenizer = _core.Tokenizer(
        tables.pieces,
        tables.scores,
        tables.types,
        bos_id=-1 if tables.bos_id is None else tables.bos_id,
        eos_id=-1 if tables.eos_id is None else tables.eos_id,
        unk_id=0 if tables.unknown_id is None else tables.unknown_id,
        special_ids=tables.special_ids,
    )
    before, after = (tokenizer.encode(text, add_special=False) for text in TEXTS)
    vision = source.config.vision
    rows = 0 if vision is None else len(spread(IMAGE_ROWS, vision.patches))
    return [*before, *[IMAGE_ID] * rows, *after]


def _pixels(source: Source) -> FloatArray:
    """The picture as the engine prepares it; tests hold that to Pillow's and the reference's own result."""
    image, vision = source.config.image, source.config.vision
    assert vision is not None
    return _core.preprocess(
        picture(),
        _core.PreprocessConfig(
            image_size=vision.image_size,
            pad=image.aspect_ratio == "pad",
            pad_color=image.pad_color,
            mean=image.mean,
            std=image.std,
        ),
    )


def _array(name: str, items: Sequence[object], item_type: GGUFValueType) -> Key:
    return Key(_PREFIX + name, items, GGUFValueType.ARRAY, item_type)
