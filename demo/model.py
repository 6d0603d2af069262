"""Yi-VL's architecture in torch at any size, to train, and to keep as a published folder.

Letters: B pictures, N patches, W vision width, T tokens, S keys, D decoder width, H heads, K KV heads,
V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SYSTEM = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed "
    "and polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)
PREFIX = SYSTEM + "\n\n### Human: "  # everything before the picture
STOP = "###"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)
VIT_FOLDER = "vit/clip-vit-yi-vl-demo-112"


@dataclass(frozen=True)
class Sizes:
    """Every size of the model; `vit_layers` counts the last block, which the files hold but nobody runs."""

    image: int = 112
    patch: int = 14
    vit_width: int = 256
    vit_layers: int = 6
    vit_heads: int = 4
    vit_mlp: int = 768
    width: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 704
    vocab: int = 1152
    rope_theta: float = 5e6

    @property
    def patches(self) -> int:
        """Patches of a picture: its rows in the decoder's sequence."""
        return (self.image // self.patch) ** 2


def preprocess(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Yi-VL's padding and resizing, before the scaling: (size, size, 3) uint8."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def normalise(pixels: Tensor) -> Tensor:
    """(B, S, S, 3) of 0 to 255 -> (B, 3, S, S) as the vision tower wants it."""
    mean, std = (torch.tensor(v, device=pixels.device) for v in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


class VisionBlock(nn.Module):
    """Pre-norm block with biases and erf GELU."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.vit_heads
        self.ln1, self.ln2 = nn.LayerNorm(s.vit_width), nn.LayerNorm(s.vit_width)
        self.qkv = nn.Linear(s.vit_width, 3 * s.vit_width)
        self.out = nn.Linear(s.vit_width, s.vit_width)
        self.fc1 = nn.Linear(s.vit_width, s.vit_mlp)
        self.fc2 = nn.Linear(s.vit_mlp, s.vit_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N + 1, W) -> the same shape."""
        b, n, w = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Written out: on a CPU this is faster in training than torch's fused attention.
        weights = torch.softmax(q @ k.mT * (w // self.heads) ** -0.5, -1).to(v.dtype)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, n, w))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class VisionTower(nn.Module):
    """CLIP's ViT up to the last block but one, class row dropped."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(s.vit_width) * 0.02)
        self.patch = nn.Conv2d(3, s.vit_width, s.patch, s.patch, bias=False)
        self.position = nn.Parameter(torch.randn(s.patches + 1, s.vit_width) * 0.02)
        self.pre_ln = nn.LayerNorm(s.vit_width)
        self.blocks = nn.ModuleList(VisionBlock(s) for _ in range(s.vit_layers - 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, W)."""
        # The convolution written as one matrix product over patches: (B, N, 3 P P).
        b, c, size, _ = images.shape
        side, p = size // self.patch.stride[0], self.patch.stride[0]
        cut = images.view(b, c, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, -1)
        patches = F.linear(cut, self.patch.weight.flatten(1))
        first = self.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        x = self.pre_ln(torch.cat([first, patches], 1) + self.position).to(patches.dtype)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class Projector(nn.Sequential):
    """Linear, LayerNorm, GELU, Linear, LayerNorm: (B, N, W) -> (B, N, D)."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(
            nn.Linear(s.vit_width, s.width),
            nn.LayerNorm(s.width),
            nn.GELU(),
            nn.Linear(s.width, s.width),
            nn.LayerNorm(s.width),
        )


class RMSNorm(nn.Module):
    """Root mean square norm with eps 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


KeyValue = tuple[Tensor, Tensor]  # (B, K, S, head dim) each


class DecoderBlock(nn.Module):
    """LLaMA's block: RMSNorm, grouped-query attention with RoPE, SwiGLU."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = s.heads, s.kv_heads, s.width // s.heads
        self.watched = False  # whether training wants to see where attention goes
        self.norm1, self.norm2 = RMSNorm(s.width), RMSNorm(s.width)
        self.qkv = nn.Linear(s.width, (s.heads + 2 * s.kv_heads) * self.head, bias=False)
        self.out = nn.Linear(s.width, s.width, bias=False)
        self.gate_up = nn.Linear(s.width, 2 * s.mlp, bias=False)
        self.down = nn.Linear(s.mlp, s.width, bias=False)

    def forward(
        self, x: Tensor, rope: KeyValue, mask: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """(B, T, D) and mask (B, 1, 1, T, S), added to the scores -> (B, T, D), its keys and values.

        A watched block also gives its attention, (B, H, T, S).
        """
        b, t, d = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, -1, self.head).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = _rotate(q, rope), _rotate(k, rope)
        if past is not None:
            k = torch.cat([past[0].expand(b, -1, -1, -1), k], 2)
            v = torch.cat([past[1].expand(b, -1, -1, -1), v], 2)
        # The heads of a group share keys and are so many more rows of one product: (B K, group T, S).
        scores = torch.bmm(q.reshape(b * self.kv_heads, -1, self.head), k.flatten(0, 1).mT)
        scores = scores.view(b, self.kv_heads, -1, t, k.shape[2]) * self.head**-0.5 + mask
        weights = torch.softmax(scores, -1).to(v.dtype).view(b * self.kv_heads, -1, k.shape[2])
        mixed = torch.bmm(weights, v.flatten(0, 1)).view(b, self.heads, t, self.head)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        seen = weights.view(b, self.heads, t, -1) if self.watched else None
        return x + self.down(F.silu(gate) * up), (k, v), seen


def _rotate(x: Tensor, rope: KeyValue) -> Tensor:
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Decoder(nn.Module):
    """Embeddings in, hidden states after the last norm out."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocab, s.width)
        self.blocks = nn.ModuleList(DecoderBlock(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.width)
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        dim = s.width // s.heads
        frequencies = s.rope_theta ** (-torch.arange(0, dim, 2).float() / dim)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
        seen: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """(B, T, D), positions (B, T), mask (B, 1, T, S) true where seen -> (B, T, D), each block's KV.

        `seen` receives the attention of watched blocks.
        """
        angles = positions.unsqueeze(1).unsqueeze(-1).float() * self.frequencies
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        rope = (angles.cos().to(dtype), angles.sin().to(dtype))
        if mask is None:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -1e9).unsqueeze(1)
        x, kept = x.to(dtype), []
        for i, block in enumerate(self.blocks):
            x, kv, weights = block(x, rope, mask, past[i] if past else None)
            kept.append(kv)
            if seen is not None and weights is not None:
                seen.append(weights)
        return self.norm(x), kept


class YiVL(nn.Module):
    """The whole model."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.vision = VisionTower(sizes)
        self.projector = Projector(sizes)
        self.decoder = Decoder(sizes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=0.7 * fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, D)."""
        return self.projector(self.vision(images))


# ----------------------------------------------------------------------------------------------------------
# The published folder


def published_names(sizes: Sizes) -> dict[str, tuple[str, list[str], list[int]]]:
    """Our parameter -> (file part "llm" or "vit", published names, rows of each)."""
    names: dict[str, tuple[str, list[str], list[int]]] = {}
    d, w = sizes.width, sizes.vit_width
    kv = sizes.kv_heads * (d // sizes.heads)

    def llm(ours: str, *theirs: str, rows: Sequence[int] = ()) -> None:
        names[ours] = ("llm", [f"{t}.weight" for t in theirs], list(rows))

    llm("decoder.embed.weight", "model.embed_tokens")
    llm("decoder.norm.weight", "model.norm")
    llm("decoder.head.weight", "lm_head")
    for i in range(sizes.layers):
        ours, theirs = f"decoder.blocks.{i}", f"model.layers.{i}"
        llm(f"{ours}.norm1.weight", f"{theirs}.input_layernorm")
        llm(f"{ours}.norm2.weight", f"{theirs}.post_attention_layernorm")
        llm(f"{ours}.qkv.weight", *(f"{theirs}.self_attn.{p}_proj" for p in "qkv"), rows=(d, kv, kv))
        llm(f"{ours}.out.weight", f"{theirs}.self_attn.o_proj")
        llm(
            f"{ours}.gate_up.weight",
            f"{theirs}.mlp.gate_proj",
            f"{theirs}.mlp.up_proj",
            rows=(sizes.mlp, sizes.mlp),
        )
        llm(f"{ours}.down.weight", f"{theirs}.mlp.down_proj")
    for i in (0, 1, 3, 4):
        for part in ("weight", "bias"):
            names[f"projector.{i}.{part}"] = ("llm", [f"model.mm_projector.{i}.{part}"], [])

    root = "vision_model"
    names["vision.class_embedding"] = ("vit", [f"{root}.embeddings.class_embedding"], [])
    names["vision.patch.weight"] = ("vit", [f"{root}.embeddings.patch_embedding.weight"], [])
    names["vision.position"] = ("vit", [f"{root}.embeddings.position_embedding.weight"], [])
    parts = ("weight", "bias")
    for part in parts:
        names[f"vision.pre_ln.{part}"] = ("vit", [f"{root}.pre_layrnorm.{part}"], [])
    for i in range(sizes.vit_layers - 1):
        ours, theirs = f"vision.blocks.{i}", f"{root}.encoder.layers.{i}"
        pairs = {"ln1": "layer_norm1", "ln2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        pairs["out"] = "self_attn.out_proj"
        for part in parts:
            for a, b in pairs.items():
                names[f"{ours}.{a}.{part}"] = ("vit", [f"{theirs}.{b}.{part}"], [])
            names[f"{ours}.qkv.{part}"] = (
                "vit",
                [f"{theirs}.self_attn.{p}_proj.{part}" for p in "qkv"],
                [w, w, w],
            )
    return names


def export_folder(model: YiVL, tokenizer: bytes, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes the model as a published folder: one shard with an index, the tower in a subfolder."""
    s = model.sizes
    state = {name: value.detach().to("cpu", dtype) for name, value in model.state_dict().items()}
    files: dict[str, dict[str, Tensor]] = {"llm": {}, "vit": {}}
    for ours, (file, theirs, rows) in published_names(s).items():
        pieces = state[ours].split(rows) if rows else [state[ours]]
        for name, piece in zip(theirs, pieces, strict=True):
            files[file][name] = piece.clone()
    # The last block and the last norm belong to a published tower, though the selected layer is before them.
    fresh = VisionBlock(s).to(dtype).state_dict()
    for ours, (_, theirs, rows) in published_names(s).items():
        if ours.startswith("vision.blocks.0."):
            value = fresh[ours.removeprefix("vision.blocks.0.")]
            for name, piece in zip(theirs, value.split(rows) if rows else [value], strict=True):
                files["vit"][name.replace("layers.0.", f"layers.{s.vit_layers - 1}.")] = piece.clone()
    files["vit"]["vision_model.post_layernorm.weight"] = torch.ones(s.vit_width, dtype=dtype)
    files["vit"]["vision_model.post_layernorm.bias"] = torch.zeros(s.vit_width, dtype=dtype)

    vit = folder / VIT_FOLDER
    vit.mkdir(parents=True, exist_ok=True)
    shard = "model-00001-of-00001.safetensors"
    save_file(files["llm"], folder / shard, {"format": "pt"})
    save_file(files["vit"], vit / "model.safetensors", {"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in files["llm"].values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(files["llm"], shard)}
    (folder / "tokenizer.model").write_bytes(tokenizer)
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", _config(s, name))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    _write_json(vit / "config.json", _vit_config(s, name))
    _write_json(vit / "preprocessor_config.json", _preprocessor_config(s))


def load_folder(folder: Path) -> YiVL:
    """Reads what `export_folder` wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    vit = json.loads((folder / VIT_FOLDER / "config.json").read_text())
    sizes = Sizes(
        image=vit["image_size"],
        patch=vit["patch_size"],
        vit_width=vit["hidden_size"],
        vit_layers=vit["num_hidden_layers"],
        vit_heads=vit["num_attention_heads"],
        vit_mlp=vit["intermediate_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        mlp=config["intermediate_size"],
        vocab=config["vocab_size"],
        rope_theta=config["rope_theta"],
    )
    files = {
        "llm": load_file(folder / "model-00001-of-00001.safetensors"),
        "vit": load_file(folder / VIT_FOLDER / "model.safetensors"),
    }
    model = YiVL(sizes)
    model.load_state_dict(
        {
            ours: torch.cat([files[file][name].float() for name in theirs])
            for ours, (file, theirs, _) in published_names(sizes).items()
        }
    )
    return model.eval()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


_TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "model_max_length": 4096,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
}


def _config(s: Sizes, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": s.width,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": s.mlp,
        "max_position_embeddings": 4096,
        "mm_hidden_size": s.vit_width,
        "mm_projector_type": "mlp2x_gelu_Norm",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"./{VIT_FOLDER}",
        "model_type": "llava",
        "num_attention_heads": s.heads,
        "num_hidden_layers": s.layers,
        "num_key_value_heads": s.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": s.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": s.vocab,
    }


def _vit_config(s: Sizes, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": s.vit_width,
        "image_size": s.image,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": s.vit_mlp,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": s.vit_heads,
        "num_channels": 3,
        "num_hidden_layers": s.vit_layers,
        "patch_size": s.patch,
        "projection_dim": s.width,
        "torch_dtype": dtype,
    }


def _preprocessor_config(s: Sizes) -> dict[str, Any]:
    return {
        "crop_size": {"height": s.image, "width": s.image},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": s.image},
    }
