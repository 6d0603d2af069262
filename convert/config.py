"""The sizes and settings of a model, read from a published folder and checked against what Yi-VL is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yivl_edge.convert.errors import CheckpointError

ARCHITECTURE = "LlavaLlamaForCausalLM"
PROJECTOR_TYPE = "mlp2x_gelu_Norm"
_NO_DEFAULTS: Mapping[str, int | float] = {}


@dataclass(frozen=True)
class DecoderConfig:
    """LLaMA: letters V, D, F, L, H, K and hd of docs/file-format.md."""

    vocab_size: int
    context_length: int
    width: int
    mlp_width: int
    blocks: int
    heads: int
    kv_heads: int
    rms_norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class VisionConfig:
    """The ViT: ``blocks`` are published, ``blocks_run`` lead to the selected hidden state."""

    image_size: int
    patch_size: int
    width: int
    mlp_width: int
    blocks: int
    blocks_run: int
    heads: int
    norm_epsilon: float
    # torch's default for LayerNorm, which the reference's projector leaves as it is.
    projector_norm_epsilon: float = 1e-5

    @property
    def patches(self) -> int:
        """Patches of one picture."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes pixels; ``aspect_ratio`` is ``pad`` or ``crop``."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect_ratio: str
    pad_color: tuple[int, int, int]


@dataclass(frozen=True)
class PromptConfig:
    """Prompt and sampling defaults, which the reference sets itself (generation_config.json does not count)."""

    system: str = (
        "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
        "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed "
        "and polite answers. "
        "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像，"
        "并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
    )
    stops: tuple[str, ...] = ("###", "\nHuman:")
    temperature: float = 0.2
    max_tokens: int = 1024


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model but its weights and its tokeniser; ``vision`` is None for a text model alone."""

    name: str
    decoder: DecoderConfig
    vision: VisionConfig | None
    image: ImageConfig
    prompt: PromptConfig = PromptConfig()

    def sizes(self) -> dict[str, int]:
        """The number behind each letter of the tensor table."""
        decoder, vision = self.decoder, self.vision
        sizes = {
            "V": decoder.vocab_size,
            "D": decoder.width,
            "F": decoder.mlp_width,
            "H": decoder.heads,
            "K": decoder.kv_heads,
            "hd": decoder.head_dim,
        }
        if vision is not None:
            sizes |= {
                "W": vision.width,
                "VF": vision.mlp_width,
                "C": 3,
                "P": vision.patch_size,
                "N+1": vision.patches + 1,
            }
        return sizes


class JsonFile:
    """A JSON object on disk whose values are asked for by type; errors name file, key and what was found."""

    values: dict[str, Any]

    def __init__(self, path: Path, hint: str, values: dict[str, Any] | None = None) -> None:
        self.path = path
        if values is not None:  # a part of another file
            self.values = values
            return
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing. {hint}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}. {hint}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds no JSON object. {hint}")
        self.values = values

    def fail(self, key: str, expected: str) -> CheckpointError:
        """The error that ``key`` is not what was expected."""
        found = json.dumps(self.values[key], ensure_ascii=False) if key in self.values else "nothing"
        return CheckpointError(f"{self.path}: {key} should be {expected}, found {found}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.fail(key, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.values.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.fail(key, "a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """A truth value; null counts as absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def string(self, key: str) -> str:
        """A string that is not empty."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.fail(key, "a string")
        return value

    def triple(self, key: str) -> tuple[float, float, float]:
        """Three numbers, one for each of red, green and blue."""
        value = self.values.get(key)
        if not isinstance(value, list) or [type(item) in (int, float) for item in value] != [True] * 3:
            raise self.fail(key, "three numbers")
        red, green, blue = (float(item) for item in value)
        return red, green, blue

    def require(self, key: str, expected: Any, reason: str, default: Any = None) -> None:
        """Refuse any other value than the one that the engine computes with."""
        if self.values.get(key, default) != expected:
            raise CheckpointError(f"{self.fail(key, json.dumps(expected))}: {reason}")


def read_config(folder: Path, config: JsonFile) -> ModelConfig:
    """Read the folder's ``config.json`` and the ViT's configs; raise CheckpointError for what is no Yi-VL model."""
    vision_folder = find_vision_folder(folder, config)
    vision = _read_vision(vision_folder, config)
    # Like the reference: any other word than "pad" leaves the shape to the image processor, which crops.
    aspect_ratio = config.values.get("image_aspect_ratio")
    if aspect_ratio not in ("pad", "square", None):
        raise config.fail("image_aspect_ratio", '"pad", "square" or null')
    return ModelConfig(
        name=folder.resolve().name,
        decoder=_read_decoder(config),
        vision=vision,
        image=read_image(vision_folder, vision.image_size, pads=aspect_ratio == "pad"),
    )


def find_vision_folder(folder: Path, config: JsonFile) -> Path:
    """The folder of the ViT, which ``mm_vision_tower`` names relative to the checkpoint."""
    vision_folder = folder / config.string("mm_vision_tower")
    if not vision_folder.is_dir():
        raise CheckpointError(
            f"{vision_folder}, the ViT's folder named by mm_vision_tower in {config.path}, does not exist. "
            "Download the whole repository, the vit folder included."
        )
    return vision_folder


def _read_decoder(config: JsonFile) -> DecoderConfig:
    other_prompt = "the engine puts the image into the prompt without marks around it"
    config.require("mm_use_im_start_end", False, other_prompt, default=False)
    config.require("mm_use_im_patch_token", False, other_prompt, default=False)
    return read_llama(config, tied_embeddings=config.boolean("tie_word_embeddings", default=False))


def read_llama(
    config: JsonFile, *, tied_embeddings: bool, defaults: Mapping[str, int | float] = _NO_DEFAULTS
) -> DecoderConfig:
    """The decoder's sizes from a LLaMA config; ``defaults`` stand in for keys that the file may lack."""
    no_such = "the engine has no such variant of the decoder"
    config.require("hidden_act", "silu", no_such)
    config.require("rope_scaling", None, no_such)
    config.require("attention_bias", False, no_such, default=False)
    config.require("mlp_bias", False, no_such, default=False)

    def integer(key: str) -> int:
        default = defaults.get(key)
        return config.integer(key, default=None if default is None else int(default))

    width, heads = integer("hidden_size"), integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    if width % heads or (width // heads) % 2:
        raise config.fail("num_attention_heads", f"a divisor of hidden_size {width} that leaves an even head")
    if heads % kv_heads:
        raise config.fail("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    config.require("head_dim", width // heads, "other head widths are not supported", default=width // heads)
    return DecoderConfig(
        vocab_size=integer("vocab_size"),
        context_length=integer("max_position_embeddings"),
        width=width,
        mlp_width=integer("intermediate_size"),
        blocks=integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        rms_norm_epsilon=config.number("rms_norm_eps", default=defaults.get("rms_norm_eps")),
        rope_theta=config.number("rope_theta", default=10000.0),
        tied_embeddings=tied_embeddings,
    )


def _read_vision(vision_folder: Path, config: JsonFile) -> VisionConfig:
    config.require("mm_projector_type", PROJECTOR_TYPE, "the engine has no other projector")
    config.require("mm_vision_select_feature", "patch", "the class row cannot be kept", default="patch")
    vision = JsonFile(
        vision_folder / "config.json", "The ViT's folder should hold the config of a CLIPVisionModel."
    )
    read = read_clip(vision, config, "mm_vision_select_layer")
    if config.integer("mm_hidden_size") != read.width:
        raise CheckpointError(
            f"{config.fail('mm_hidden_size', f'{read.width}, the hidden_size in {vision.path}')}"
        )
    return read


def read_clip(
    vision: JsonFile,
    config: JsonFile,
    select_key: str,
    *,
    defaults: Mapping[str, int | float] = _NO_DEFAULTS,
    default_act: str | None = None,
) -> VisionConfig:
    """The ViT's sizes from a CLIP vision config; ``config`` names the selected layer under ``select_key``."""
    vision.require("hidden_act", "gelu", "the engine computes GELU with erf only", default=default_act)
    vision.require("num_channels", 3, "pictures are RGB", default=3)

    def integer(key: str) -> int:
        default = defaults.get(key)
        return vision.integer(key, default=None if default is None else int(default))

    width, heads = integer("hidden_size"), integer("num_attention_heads")
    if width % heads:
        raise vision.fail("num_attention_heads", f"a divisor of hidden_size {width}")
    image_size, patch_size = integer("image_size"), integer("patch_size")
    if image_size % patch_size:
        raise vision.fail("patch_size", f"a divisor of image_size {image_size}")

    # hidden_states[0] is the input of the first block, so hidden_states[n] is the output of n blocks.
    blocks = integer("num_hidden_layers")
    selected = config.values.get(select_key)
    if not isinstance(selected, int) or isinstance(selected, bool):
        raise config.fail(select_key, "an integer")
    blocks_run = selected if selected >= 0 else blocks + 1 + selected
    if not 1 <= blocks_run <= blocks:
        raise config.fail(select_key, f"the output of one of the ViT's {blocks} blocks")
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        mlp_width=integer("intermediate_size"),
        blocks=blocks,
        blocks_run=blocks_run,
        heads=heads,
        norm_epsilon=vision.number("layer_norm_eps", default=defaults.get("layer_norm_eps")),
    )


def read_image(folder: Path, image_size: int, *, pads: bool) -> ImageConfig:
    """How pictures become pixels, from the folder's ``preprocessor_config.json``."""
    file = JsonFile(
        folder / "preprocessor_config.json", "It holds the mean and deviation of the ViT's pixels."
    )
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        file.require(key, True, "the engine always does it", default=True)
    file.require("resample", 3, "the engine resizes with bicubic interpolation", default=3)
    if abs(file.number("rescale_factor", default=1 / 255) * 255 - 1) > 1e-6:
        raise file.fail("rescale_factor", "1/255")
    sizes = {
        "size": (image_size, {"shortest_edge": image_size}),
        "crop_size": (image_size, {"height": image_size, "width": image_size}),
    }
    for key, accepted in sizes.items():
        if key in file.values and file.values[key] not in accepted:
            raise file.fail(key, f"the ViT's image size {image_size}")

    mean = file.triple("image_mean")
    red, green, blue = (int(value * 255) for value in mean)  # as the reference computes it
    return ImageConfig(mean, file.triple("image_std"), "pad" if pads else "crop", (red, green, blue))
