"""Checkpoint folders in the published layout, the input of many tests: golden's, and random ones at any size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "data" / "golden" / "checkpoint"
(GOLDEN_VIT,) = (GOLDEN / "vit").iterdir()
VIT_NAME = "clip-vit-H-14-laion2B-s32B-b79K-yi-vl-test"

FileFormat = Literal["safetensors", "bin"]


def golden_decoder() -> dict[str, torch.Tensor]:
    """Golden's tensors beside the vision tower, by published name."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(GOLDEN.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def golden_vit() -> dict[str, torch.Tensor]:
    """The tensors of golden's vision tower, by published name."""
    return torch.load(GOLDEN_VIT / "pytorch_model.bin", weights_only=True)


def write_checkpoint(
    folder: str | Path,
    *,
    decoder_layers: int = 2,
    hidden: int | None = None,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 128,
    mlp: int = 512,
    vit_layers: int = 3,
    vit_hidden: int = 160,
    vit_heads: int = 2,
    vit_mlp: int | None = None,
    image_size: int = 112,
    patch: int = 14,
    vocab: int = 2048,
    select_layer: int = -2,
    seed: int = 0,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    file_format: FileFormat = "safetensors",
    vit_format: FileFormat = "bin",
    shards: int = 2,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with random weights and golden's tokeniser; return ``folder``.

    ``hidden`` is ``heads * head_dim`` (published configs have no ``head_dim``), ``vit_mlp`` defaults to
    4 times ``vit_hidden``; ``vocab`` may exceed the tokeniser's 2048 pieces. ``shards`` 1 writes a single
    file without an index. ``config`` replaces keys of ``config.json``. The same arguments give the same
    bytes.
    """
    folder = Path(folder)
    hidden = heads * head_dim if hidden is None else hidden
    if hidden != heads * head_dim:
        raise ValueError(f"hidden {hidden} is not heads {heads} times head_dim {head_dim}")
    vit_mlp = 4 * vit_hidden if vit_mlp is None else vit_mlp
    vit_folder = folder / "vit" / VIT_NAME
    vit_folder.mkdir(parents=True, exist_ok=True)

    decoder_config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_aspect_ratio": "pad",
        "intermediate_size": mlp,
        "max_position_embeddings": 4096,
        "mm_hidden_size": vit_hidden,
        "mm_projector_type": "mlp2x_gelu_Norm",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": select_layer,
        "mm_vision_tower": f"./vit/{VIT_NAME}",
        "model_type": "llava",
        "num_attention_heads": heads,
        "num_hidden_layers": decoder_layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_mm_proj": True,
        "vocab_size": vocab,
    }
    _write_json(folder / "config.json", decoder_config | (config or {}))
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(GOLDEN / name, folder / name)

    vit_config = {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": vit_hidden,
        "image_size": image_size,
        "intermediate_size": vit_mlp,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": vit_heads,
        "num_channels": 3,
        "num_hidden_layers": vit_layers,
        "patch_size": patch,
        "projection_dim": 1024,
        "torch_dtype": dtype,
    }
    _write_json(vit_folder / "config.json", vit_config)
    preprocessor = json.loads((GOLDEN_VIT / "preprocessor_config.json").read_text())
    preprocessor["crop_size"] = {"height": image_size, "width": image_size}
    preprocessor["size"] = {"shortest_edge": image_size}
    _write_json(vit_folder / "preprocessor_config.json", preprocessor)

    with _one_thread():
        random = _Random(seed, getattr(torch, dtype))
        decoder = _decoder_tensors(random, decoder_layers, hidden, kv_heads * head_dim, mlp, vocab)
        decoder |= _projector_tensors(random, hidden, vit_hidden)
        vit = _vit_tensors(random, vit_layers, vit_hidden, vit_mlp, image_size, patch)
        write_shards(folder, decoder, file_format=file_format, shards=shards)
        write_shards(vit_folder, vit, file_format=vit_format, shards=1)
    return folder


@contextmanager
def _one_thread() -> Iterator[None]:
    """Waking torch's threads for each of hundreds of small tensors costs more than the work itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_shards(
    folder: Path, tensors: dict[str, torch.Tensor], *, file_format: FileFormat, shards: int
) -> None:
    """Write weights under the published file names, with an index if there is more than one shard."""
    stem = "model" if file_format == "safetensors" else "pytorch_model"
    if shards == 1:
        _save(tensors, folder / f"{stem}.{file_format}")
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file_name = f"{stem}-{i + 1:05d}-of-{shards:05d}.{file_format}"
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        _save({name: tensors[name] for name in part}, folder / file_name)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.{file_format}.index.json", index)


def remove_weights(folder: Path) -> None:
    """Takes the weights of a folder away, not those of its vision tower."""
    for path in [*folder.glob("*.safetensors*"), *folder.glob("pytorch_model*")]:
        path.unlink()


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON object, or takes those away that are `...`."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del values[key]
        else:
            values[key] = value
    path.write_text(json.dumps(values))


class _Random:
    """Weights whose scales keep activations near 1, so that logits are well-conditioned."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = np.random.default_rng(seed)
        self._dtype = dtype

    def normal(self, *shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
        values = self._generator.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(
            mean
        )
        return torch.from_numpy(values).to(self._dtype)

    def matrix(self, outputs: int, inputs: int, gain: float = 1.0) -> torch.Tensor:
        return self.normal(outputs, inputs, scale=gain / inputs**0.5)

    def linear(self, name: str, outputs: int, inputs: int, gain: float = 1.0) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": self.matrix(outputs, inputs, gain),
            f"{name}.bias": self.normal(outputs, scale=0.1),
        }

    def norm_weight(self, width: int) -> torch.Tensor:
        return self.normal(width, mean=1.0, scale=0.1)

    def layer_norm(self, name: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.norm_weight(width), f"{name}.bias": self.normal(width, scale=0.1)}


# The branches that are added to the residual stream are halved, so that depth does not drown the input.
_RESIDUAL_GAIN = 0.5


def _decoder_tensors(
    random: _Random, layers: int, width: int, kv_width: int, mlp: int, vocab: int
) -> dict[str, torch.Tensor]:
    tensors = {"model.embed_tokens.weight": random.normal(vocab, width)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": random.norm_weight(width),
            f"{prefix}.self_attn.q_proj.weight": random.matrix(width, width),
            f"{prefix}.self_attn.k_proj.weight": random.matrix(kv_width, width),
            f"{prefix}.self_attn.v_proj.weight": random.matrix(kv_width, width),
            f"{prefix}.self_attn.o_proj.weight": random.matrix(width, width, _RESIDUAL_GAIN),
            f"{prefix}.post_attention_layernorm.weight": random.norm_weight(width),
            f"{prefix}.mlp.gate_proj.weight": random.matrix(mlp, width),
            f"{prefix}.mlp.up_proj.weight": random.matrix(mlp, width),
            f"{prefix}.mlp.down_proj.weight": random.matrix(width, mlp, _RESIDUAL_GAIN),
        }
    tensors["model.norm.weight"] = random.norm_weight(width)
    tensors["lm_head.weight"] = random.matrix(vocab, width)
    return tensors


def _projector_tensors(random: _Random, width: int, vit_width: int) -> dict[str, torch.Tensor]:
    return {
        **random.linear("model.mm_projector.0", width, vit_width),
        **random.layer_norm("model.mm_projector.1", width),
        **random.linear("model.mm_projector.3", width, width),
        **random.layer_norm("model.mm_projector.4", width),
    }


def _vit_tensors(
    random: _Random, layers: int, width: int, mlp: int, image_size: int, patch: int
) -> dict[str, torch.Tensor]:
    embeddings = "vision_model.embeddings"
    tensors = {
        f"{embeddings}.class_embedding": random.normal(width),
        f"{embeddings}.patch_embedding.weight": random.matrix(width, 3 * patch**2).reshape(
            width, 3, patch, patch
        ),
        f"{embeddings}.position_embedding.weight": random.normal(
            (image_size // patch) ** 2 + 1, width, scale=0.5
        ),
        **random.layer_norm("vision_model.pre_layrnorm", width),
    }
    for i in range(layers):
        prefix = f"vision_model.encoder.layers.{i}"
        tensors |= random.layer_norm(f"{prefix}.layer_norm1", width)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors |= random.linear(f"{prefix}.self_attn.{name}", width, width)
        tensors |= random.linear(f"{prefix}.self_attn.out_proj", width, width, _RESIDUAL_GAIN)
        tensors |= random.layer_norm(f"{prefix}.layer_norm2", width)
        tensors |= random.linear(f"{prefix}.mlp.fc1", mlp, width)
        tensors |= random.linear(f"{prefix}.mlp.fc2", width, mlp, _RESIDUAL_GAIN)
    return tensors | random.layer_norm("vision_model.post_layernorm", width)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        # clone: a slice would be saved with all of its storage
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
