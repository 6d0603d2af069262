"""GGUF files as a source: our own, or the pair that llama.cpp's scripts make, of this year or older."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType
from yivl_edge import _core
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.header import Key
from yivl_edge.convert.source import Source
from yivl_edge.convert.tensor_map import Part, Tensor
from yivl_edge.convert.tokenizer import TokenizerTables
from yivl_edge.hashes import TENSORS_KEY, DamagedHeaderError, recorded_hashes


class GgufSource(Source):
    """One file, or a text model and its mmproj; a text model alone has no vision."""

    published_rows: ClassVar[bool] = False

    def __init__(self, path: Path, mmproj: Path | None) -> None:
        # Opening the model checks keys, tensors and shapes as if it were to be used.
        _core.Model.open(os.fsencode(path), os.fsencode(mmproj or ""), 1, _core.Control())
        self._paths = [path] if mmproj is None else [path, mmproj]
        files = [_core.GgufFile.open(path) for path in self._paths]
        text, vision = files[0], files[-1]
        has_vision = "clip.vision.image_size" in vision.metadata
        config = _core.read_config(text, vision if has_vision else None)
        self._keys: dict[str, Any] = dict(vision.metadata) | dict(text.metadata)
        self._tensors = {tensor.name: tensor for file in reversed(files) for tensor in file.tensors}
        self.config = self._model_config(path, config)
        self.tokenizer = self._tokenizer_tables(text)
        self.extra_keys = [
            Key(name, value, GGUFValueType.STRING)
            for name, value in text.metadata.items()
            if name.startswith("general.") and name not in _OWN_KEYS and isinstance(value, str)
        ]
        numbers = {Part.DECODER: text, Part.VISION: vision}
        self.file_types = {
            part: number
            for part, file in numbers.items()
            if isinstance(number := file.metadata.get("general.file_type"), int)
        }
        self._swapped = _swapped_mlp(self._tensors, self.config.vision)
        self.notes = []
        self._hashes: dict[str, tuple[Path, str]] = {}
        for carrying, file in zip(self._paths, files, strict=True):
            if TENSORS_KEY not in file.metadata:
                continue
            try:
                hashes = recorded_hashes(carrying)
            except DamagedHeaderError:
                self.notes.append(
                    f"{carrying}: its header is not the one that was hashed: another program changed it, or it is "
                    "damaged. Its hashes were not checked"
                )
            else:
                self._hashes |= {name: (carrying, sha256) for name, sha256 in hashes.items()}

    def _model_config(self, path: Path, config: _core.Config) -> ModelConfig:
        decoder, vision = config.decoder, config.vision
        return ModelConfig(
            name=config.name or path.stem,
            decoder=DecoderConfig(
                vocab_size=decoder.vocab_size,
                context_length=decoder.context_length,
                width=decoder.width,
                mlp_width=decoder.mlp_width,
                blocks=decoder.n_layers,
                heads=decoder.n_heads,
                kv_heads=decoder.n_kv_heads,
                rms_norm_epsilon=decoder.norm_eps,
                rope_theta=decoder.rope_theta,
                tied_embeddings="output.weight" not in self._tensors,
            ),
            vision=None
            if vision is None
            else VisionConfig(
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                width=vision.width,
                mlp_width=vision.mlp_width,
                blocks=int(self._keys["clip.vision.block_count"]),
                blocks_run=vision.n_blocks,
                heads=vision.n_heads,
                norm_epsilon=vision.norm_eps,
                projector_norm_epsilon=float(self._keys.get("yivl.vision.projector_norm_epsilon", 1e-5)),
            ),
            image=ImageConfig(
                mean=_triple(config.image_mean),
                std=_triple(config.image_std),
                aspect_ratio=config.image_aspect_ratio,
                pad_color=_triple(config.pad_color),
            ),
            prompt=PromptConfig(config.system, tuple(config.stops), config.temperature, config.max_tokens),
        )

    def _tokenizer_tables(self, text: _core.GgufFile) -> TokenizerTables:
        read = _core.read_tokenizer_config(text)
        scores: list[float] = self._keys["tokenizer.ggml.scores"]
        return TokenizerTables(
            pieces=read.pieces,
            scores=scores,
            types=read.types,
            bos_id=_id(read.bos_id),
            eos_id=_id(read.eos_id),
            unknown_id=_id(read.unk_id),
            padding_id=self._keys.get("tokenizer.ggml.padding_token_id"),
            special_ids=sorted(read.special_ids),
            add_bos=read.add_bos,
            add_eos=read.add_eos,
            add_dummy_prefix=read.add_dummy_prefix,
            remove_extra_whitespaces=read.remove_extra_whitespaces,
        )

    def _name(self, tensor: Tensor) -> str:
        """The tensor's name in the file."""
        if not self._swapped or tensor.part is not Part.VISION:
            return tensor.name
        other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        return ".".join(other.get(part, part) for part in tensor.name.split("."))

    def _find(self, tensor: Tensor) -> _core.GgufTensor:
        return self._tensors[self._name(tensor)]

    def tensors(self, *, all_vision_blocks: bool) -> list[Tensor]:
        """See Source."""
        vision = self.config.vision
        if all_vision_blocks and vision is not None and vision.blocks == vision.blocks_run:
            raise CheckpointError(
                f"{self._paths[-1]} has only the {vision.blocks} ViT blocks that run. llama.cpp's pair needs the block "
                "behind them too, since llama.cpp runs one fewer than it is told: make the pair from the folder."
            )
        return super().tensors(all_vision_blocks=all_vision_blocks)

    def check(self, table: Sequence[Tensor]) -> None:
        """See Source; what runs, the core has checked when the model was opened."""
        for tensor in table:
            found = self._tensors.get(self._name(tensor))
            if found is None or found.shape != tensor.shape:
                what = "nothing" if found is None else f"shape {found.shape}"
                raise CheckpointError(
                    f"{self._paths[-1]}: {tensor.name} should have shape {tensor.shape}, found {what}"
                )

    def type_of(self, tensor: Tensor) -> GGMLQuantizationType:
        """See Source."""
        return GGMLQuantizationType[self._find(tensor).type]

    def read(self, tensor: Tensor, first: int, count: int) -> FloatArray:
        """See Source."""
        columns = int(np.prod(tensor.shape[1:]))
        values = _core.dequantize(self.stored(tensor, first, count), self.type_of(tensor), 1, count * columns)
        return values.reshape(count, *tensor.shape[1:])

    def stored(self, tensor: Tensor, first: int, count: int) -> npt.NDArray[np.uint8]:
        """See Source."""
        data = self._find(tensor).data
        row = len(data) // tensor.shape[0]  # a vector has rows of one
        return data[first * row : (first + count) * row]

    def stored_hash(self, tensor: Tensor) -> tuple[Path, str] | None:
        """See Source."""
        return self._hashes.get(self._name(tensor))


_OWN_KEYS = {"general.architecture", "general.name"}


def _triple(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    first, second, third = values
    return first, second, third


def _id(value: int) -> int | None:
    return value if value >= 0 else None


def _swapped_mlp(tensors: dict[str, _core.GgufTensor], vision: VisionConfig | None) -> bool:
    """Whether an older script called the ViT's first MLP layer ``ffn_down``: told by its shape."""
    if vision is None or vision.mlp_width == vision.width:
        return False
    return tensors["v.blk.0.ffn_down.weight"].shape[0] == vision.mlp_width
