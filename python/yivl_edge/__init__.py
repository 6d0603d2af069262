"""Run 01.AI's Yi-VL vision-language models on the machine in front of you."""

from yivl_edge._core import ContextOverflowError, DeviceError, ImageError, ModelFileError, quantize
from yivl_edge.model import ChatResult, ChatStream, Model, Timings, Usage

__all__ = [
    "ChatResult",
    "ChatStream",
    "ContextOverflowError",
    "DeviceError",
    "ImageError",
    "Model",
    "ModelFileError",
    "Timings",
    "Usage",
    "quantize",
]
