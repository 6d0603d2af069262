"""Folders of full-precision weights: as 01.AI publishes them, and the port to transformers' own LLaVA."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gguf import GGMLQuantizationType
from yivl_edge.convert.checkpoint import FloatArray, Weights
from yivl_edge.convert.config import (
    ARCHITECTURE,
    JsonFile,
    ModelConfig,
    find_vision_folder,
    read_clip,
    read_config,
    read_image,
    read_llama,
)
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.source import Source
from yivl_edge.convert.tensor_map import (
    IGNORED_IN_SHARDS,
    IGNORED_IN_VIT,
    Part,
    Tensor,
)
from yivl_edge.convert.tokenizer import read_tokenizer

PORT_ARCHITECTURE = "LlavaForConditionalGeneration"


def open_folder(folder: Path) -> Source:
    """The source for what ``config.json`` says that the folder is."""
    config = JsonFile(folder / "config.json", "The folder should be a published Yi-VL one, e.g. Yi-VL-6B.")
    architectures = config.values.get("architectures")
    if isinstance(architectures, list) and ARCHITECTURE in architectures:
        return PublishedFolder(folder, config)
    if architectures == [PORT_ARCHITECTURE]:
        return TransformersFolder(folder, config)
    expected = f'["{ARCHITECTURE}"] (as published) or ["{PORT_ARCHITECTURE}"] (the transformers port)'
    raise CheckpointError(f"{config.fail('architectures', expected)}: only Yi-VL models can be converted")


class _Folder(Source):
    """Weights by name in one folder or two."""

    published_rows: ClassVar[bool] = True

    def __init__(self, weights: Mapping[Part, Weights], ignored: Mapping[Part, Sequence[str]]) -> None:
        self._weights = weights
        self._ignored = ignored  # of the weights that belong to the part: names that may be left out

    def _name(self, tensor: Tensor) -> str:
        """The tensor's name in its file."""
        return tensor.source

    def check(self, table: Sequence[Tensor]) -> None:
        """See Source; what would be left out silently is refused."""
        for tensor in table:
            self._weights[tensor.part].check(self._name(tensor), tensor.shape)
        for part, ignored in self._ignored.items():
            weights = self._weights[part]
            used = {self._name(tensor) for tensor in table if self._weights[tensor.part] is weights}
            pattern = re.compile("|".join(ignored))
            if unknown := sorted(name for name in weights.names() - used if not pattern.fullmatch(name)):
                raise CheckpointError(
                    f"{weights.folder} has {len(unknown)} tensors that Yi-VL does not have, e.g. {unknown[0]}. "
                    "config.json is another model's, or the model has parts that the engine cannot compute."
                )

    def type_of(self, tensor: Tensor) -> GGMLQuantizationType:
        """See Source."""
        return GGMLQuantizationType[self._weights[tensor.part].dtype(self._name(tensor))]

    def read(self, tensor: Tensor, first: int, count: int) -> FloatArray:
        """See Source."""
        return self._weights[tensor.part].read(self._name(tensor), first, count)


class PublishedFolder(_Folder):
    """The layout of 01.AI: shards in the folder, the ViT in a folder of its own."""

    def __init__(self, folder: Path, config: JsonFile) -> None:
        self.config = read_config(folder, config)
        self.tokenizer = read_tokenizer(folder, self.config.decoder.vocab_size)
        tied = (r"lm_head\.weight",) if self.config.decoder.tied_embeddings else ()
        shards, vit = Weights(folder), Weights(find_vision_folder(folder, config))
        super().__init__(
            {Part.DECODER: shards, Part.PROJECTOR: shards, Part.VISION: vit},
            {Part.DECODER: (*IGNORED_IN_SHARDS, *tied), Part.VISION: IGNORED_IN_VIT},
        )


# transformers writes only what differs from these defaults of its LlamaConfig and CLIPVisionConfig in LLaVA.
_LLAMA_DEFAULTS: dict[str, int | float] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
_CLIP_DEFAULTS: dict[str, int | float] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
}

# Published name -> the port's, the first pattern that fits; its projector numbers layers, not modules.
_PROJECTOR = {"0": "linear_1", "1": "linear_2", "3": "linear_3", "4": "linear_4"}
_NESTED = (  # before transformers 4.52, and as the port was published
    (r"model\.mm_projector\.(\d)\.(.*)", lambda m: f"multi_modal_projector.{_PROJECTOR[m[1]]}.{m[2]}"),
    (r"(model\..*|lm_head\..*)", r"language_model.\1"),
    (r"(vision_model\..*)", r"vision_tower.\1"),
)
_FLAT = (  # since then
    (r"model\.mm_projector\.(\d)\.(.*)", lambda m: f"model.multi_modal_projector.{_PROJECTOR[m[1]]}.{m[2]}"),
    (r"model\.(.*)", r"model.language_model.\1"),
    (r"(lm_head\..*)", r"\1"),
    (r"(vision_model\..*)", r"model.vision_tower.\1"),
)


class TransformersFolder(_Folder):
    """The port: one set of shards, its config in ``text_config`` and ``vision_config``."""

    def __init__(self, folder: Path, config: JsonFile) -> None:
        text = _section(config, "text_config")
        vision = _section(config, "vision_config")
        config.require("projector_hidden_act", "gelu", "the projector's activation is GELU", default="gelu")
        config.require(
            "vision_feature_select_strategy", "default", "the class row cannot be kept", default="default"
        )
        vision_config = read_clip(
            vision, config, "vision_feature_layer", defaults=_CLIP_DEFAULTS, default_act="quick_gelu"
        )
        tied = text.boolean(
            "tie_word_embeddings", default=config.boolean("tie_word_embeddings", default=False)
        )
        self.config = ModelConfig(
            name=folder.resolve().name,
            decoder=read_llama(_with_rope(text), tied_embeddings=tied, defaults=_LLAMA_DEFAULTS),
            vision=vision_config,
            # The port's image processor has no word for padding; Yi-VL always pads.
            image=read_image(folder, vision_config.image_size, pads=True),
        )
        self.tokenizer = read_tokenizer(folder, self.config.decoder.vocab_size)
        weights = Weights(folder)
        self._rules = (
            _FLAT if any(n.startswith("model.language_model.") for n in weights.names()) else _NESTED
        )
        ignored = [*_ported(IGNORED_IN_VIT, self._rules), r".*\.rotary_emb\.inv_freq"]
        if tied:
            ignored.append(r"(language_model\.)?lm_head\.weight")
        super().__init__(dict.fromkeys(Part, weights), {Part.DECODER: ignored})

    def _name(self, tensor: Tensor) -> str:
        for pattern, name in self._rules:
            if re.fullmatch(pattern, tensor.source):
                return re.sub(pattern, name, tensor.source)
        raise AssertionError(f"the port has no name for {tensor.source}")


def _section(config: JsonFile, key: str) -> JsonFile:
    value = config.values.get(key)
    if not isinstance(value, dict):
        raise config.fail(key, "a JSON object")
    return JsonFile(config.path, "", value)


def _with_rope(text: JsonFile) -> JsonFile:
    """Since transformers 5 RoPE's settings are in an object of their own."""
    rope: Any = text.values.get("rope_parameters")
    if not isinstance(rope, dict):
        return text
    kind = rope.get("rope_type", "default")
    scaling = None if kind == "default" else rope
    return JsonFile(
        text.path,
        "",
        text.values | {"rope_scaling": scaling} | {k: v for k, v in rope.items() if k == "rope_theta"},
    )


def _ported(patterns: Sequence[str], rules: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """Patterns of published ViT names as patterns of the port's."""
    prefix = rules[-1][1].removesuffix(r"\1").replace(".", r"\.")
    for pattern in patterns:
        yield f"{prefix}(?:{pattern})"
