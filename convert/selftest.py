"""Makes the self-test of ``yivl_edge.selftest`` while a model is converted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType
from yivl_edge import _core
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.header import Key
from yivl_edge.convert.reference import Reference, Visit
from yivl_edge.convert.source import Source
from yivl_edge.hashes import NO_HASH
from yivl_edge.selftest import PREFIX, TEXT, picture, relative_error, sample, sample_logits


@dataclass(frozen=True)
class SelfTestKeys:
    """The keys of a self-test, with zeros for what is computed: of any file, of the text half, of the vision half."""

    general: list[Key]
    text: list[Key]
    vision: list[Key]


def self_test_keys(source: Source) -> SelfTestKeys:
    """The keys for a source."""
    vision, image, ids = source.config.vision, picture(), _ids(source)
    text = [
        Key(PREFIX + "text", TEXT, GGUFValueType.STRING),
        _array("ids", ids, GGUFValueType.INT32),
        *_expected("logits", sample_logits, (len(ids), source.config.decoder.vocab_size)),
        _array("top_ids", [0] * len(ids), GGUFValueType.INT32),
        _array("top_margins", [0.0] * len(ids), GGUFValueType.FLOAT32),
    ]
    vision_keys = []
    if vision is not None:
        vision_keys = [
            _array("picture", image.ravel().tolist(), GGUFValueType.UINT8),
            _array("picture_size", [image.shape[1], image.shape[0]], GGUFValueType.UINT32),
            Key(PREFIX + "pixels_sha256", NO_HASH, GGUFValueType.STRING),
            *_expected("vision", sample, (vision.patches, vision.width)),
            *_expected("projector", sample, (vision.patches, source.config.decoder.width)),
        ]
    return SelfTestKeys([_number("structure")], text, vision_keys)


def make_self_test(source: Source, visit: Visit, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The values of what is computed; raise CheckpointError where the converted weights are in the wrong place."""
    reference = Reference(source.config, visit, pool, published_rows=source.published_rows)
    values: dict[str, Any] = {}

    def keep(stage: str, sample: FloatArray, by_file: FloatArray, by_source: FloatArray) -> None:
        values[PREFIX + stage] = sample.tolist()
        values[f"{PREFIX}{stage}.error"] = relative_error(by_file, by_source)

    if source.config.vision is not None:
        pixels = _pixels(source)
        values[PREFIX + "pixels_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
        features = reference.vision(pixels)
        keep("vision", sample(features[2]), features[1], features[0])
        embeddings = reference.projector(features)
        keep("projector", sample(embeddings[2]), embeddings[1], embeddings[0])
    by_source, by_file = reference.logits(_ids(source))
    keep("logits", sample_logits(by_file), by_file, by_source)
    best = np.sort(by_file, -1)[:, -2:]
    scale = np.sqrt(np.square(by_file).mean(-1))
    values[PREFIX + "top_ids"] = by_file.argmax(-1).tolist()
    values[PREFIX + "top_margins"] = ((best[:, 1] - best[:, 0]) / scale).tolist()
    values[PREFIX + "structure"] = reference.structure
    return values


def _ids(source: Source) -> list[int]:
    tables = source.tokenizer
    tokenizer = _core.Tokenizer(
        tables.pieces,
        tables.scores,
        tables.types,
        bos_id=-1 if tables.bos_id is None else tables.bos_id,
        eos_id=-1 if tables.eos_id is None else tables.eos_id,
        unk_id=0 if tables.unknown_id is None else tables.unknown_id,
        add_bos=tables.add_bos,
        add_eos=tables.add_eos,
        add_dummy_prefix=tables.add_dummy_prefix,
        remove_extra_whitespaces=tables.remove_extra_whitespaces,
        special_ids=tables.special_ids,
    )
    return tokenizer.encode(TEXT)[: source.config.decoder.context_length]


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
    return Key(PREFIX + name, items, GGUFValueType.ARRAY, item_type)


def _number(name: str) -> Key:
    return Key(PREFIX + name, 0.0, GGUFValueType.FLOAT32)


def _expected(stage: str, take: Callable[[FloatArray], FloatArray], shape: tuple[int, int]) -> list[Key]:
    return [
        _array(stage, [0.0] * take(np.zeros(shape, np.float32)).size, GGUFValueType.FLOAT32),
        _number(f"{stage}.error"),
    ]
