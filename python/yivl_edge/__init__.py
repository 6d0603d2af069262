"""Run 01.AI's Yi-VL vision-language models on the machine in front of you."""

from yivl_edge._core import Cancelled, ContextOverflowError, ImageError, ModelFileError

__all__ = ["Cancelled", "ContextOverflowError", "ImageError", "ModelFileError"]
