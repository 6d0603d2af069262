"""Run 01.AI's Yi-VL vision-language models on the machine in front of you."""

from typing import TYPE_CHECKING

from yivl_edge._core import ContextOverflowError, DeviceError, ImageError, ModelFileError, quantize
from yivl_edge.image import ImageSource
from yivl_edge.messages import Messages
from yivl_edge.model import Model
from yivl_edge.replies import CancelFlag, ChatResult, ChatStream, Progress, Timings, Usage

__all__ = [
    "CancelFlag",
    "ChatResult",
    "ChatStream",
    "ContextOverflowError",
    "DeviceError",
    "ImageError",
    "ImageSource",
    "Messages",
    "Model",
    "ModelFileError",
    "Progress",
    "Timings",
    "Usage",
    "quantize",
]

__version__: str

if not TYPE_CHECKING:  # a type checker would take it for every name that there is not

    def __getattr__(name: str) -> str:
        """Finds ``__version__``: importing what reads the package's metadata takes a tenth as long as all the rest."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("yivl-edge")
        except PackageNotFoundError:
            return "unknown"
