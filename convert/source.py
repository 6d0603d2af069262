"""What can be converted: a published folder, its transformers port, a GGUF file or a pair of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from yivl_edge.convert.checkpoint import FloatArray
from yivl_edge.convert.config import ModelConfig
from yivl_edge.convert.errors import CheckpointError
from yivl_edge.convert.header import Key
from yivl_edge.convert.tensor_map import Part, Tensor, tensors
from yivl_edge.convert.tokenizer import TokenizerTables


class Source(ABC):
    """A model on disk: what it is, and its weights by rows of the tensor table."""

    # Whether rows of Q and K are in the published order, in which RoPE rotates halves of a head.
    published_rows: ClassVar[bool]

    config: ModelConfig
    tokenizer: TokenizerTables
    extra_keys: Sequence[Key] = ()  # beside those that follow from config and tokenizer
    file_types: Mapping[Part, int] = MappingProxyType(
        {}
    )  # ``general.file_type`` of decoder and vision, if there
    notes: Sequence[str] = ()  # what whoever converts this should know

    def tensors(self, *, all_vision_blocks: bool) -> list[Tensor]:
        """The table for this model, with the ViT's blocks that run or all of them."""
        vision = self.config.vision
        count = 0 if vision is None else vision.blocks if all_vision_blocks else vision.blocks_run
        return list(
            tensors(
                self.config.sizes(),
                blocks=self.config.decoder.blocks,
                vision_blocks=count,
                tied_embeddings=self.config.decoder.tied_embeddings,
            )
        )

    @abstractmethod
    def check(self, table: Sequence[Tensor]) -> None:
        """Raise CheckpointError unless the source has just these tensors (and what may be left out)."""

    @abstractmethod
    def type_of(self, tensor: Tensor) -> GGMLQuantizationType:
        """The tensor's type in the source."""

    @abstractmethod
    def read(self, tensor: Tensor, first: int, count: int) -> FloatArray:
        """Rows ``[first, first + count)`` in float32. Threads may call it."""

    def stored(self, _tensor: Tensor, _first: int, _count: int) -> npt.NDArray[np.uint8] | None:
        """The bytes of these rows, flat, where the source has them as GGUF has them. Threads may call it."""
        return None

    def stored_hash(self, _tensor: Tensor) -> tuple[Path, str] | None:
        """The SHA-256 that the tensor's stored bytes should have, and the file that says so."""
        return None


def open_source(path: Path, mmproj: Path | None) -> Source:
    """Open a folder, or a GGUF file and perhaps its mmproj; raise CheckpointError or ModelFileError."""
    # Here, since both import this module.
    from yivl_edge.convert.folder_source import open_folder
    from yivl_edge.convert.gguf_source import GgufSource

    if path.is_dir():
        if mmproj is not None:
            raise ValueError(f"mmproj belongs to a GGUF file, but {path} is a folder")
        return open_folder(path)
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist. It should be a published Yi-VL folder, e.g. Yi-VL-6B, or a GGUF file."
        )
    return GgufSource(path, mmproj)
