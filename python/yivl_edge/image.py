"""From whatever holds a picture to 8-bit pixels. ``docs/images.md`` says what becomes of each kind."""

from __future__ import annotations

import base64
import io
import os
import threading
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from yivl_edge._core import ImageError

__all__ = ["DEFAULT_MAX_PIXELS", "ImageSource", "image_from_url", "load_image"]

DEFAULT_MAX_PIXELS = 100_000_000
"""Limit on width x height of a picture."""

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
)

# Formats that people have pictures in. The others that Pillow knows stay shut: some run outside programs
# (EPS), some hide a second picture whose size nobody has checked (ICO). HEIF needs pillow-heif, registered.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")

# What to do to the stored picture, by the EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112

_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", *_ALPHA_MODES, *_16_BIT_MODES)

_warnings_lock = threading.Lock()


def load_image(source: ImageSource, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """The pixels of a picture, upright: uint8 (H, W, 3) RGB, or (H, W, 4) RGBA where it may be transparent.

    Args:
        source: A path; the bytes of a file; a ``data:image/...;base64,...`` URL; a PIL image (its current
            frame); or a uint8 array: (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA. An array in RGB or RGBA
            is returned as it is, copied only if it is not C-contiguous.
        max_pixels: Refuse a picture of more pixels than this, before it is decoded.

    Raises:
        ImageError: The picture cannot be used: says why, what was expected and what was found.
        TypeError: ``source`` is none of the above.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _from_pil(source, "PIL image", max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(
            io.BytesIO(bytes(source)), f"image of {memoryview(source).nbytes} bytes", max_pixels
        )
    if isinstance(source, str) and source[:8].lower().startswith(("data:", "http://", "https://")):
        return _from_file(io.BytesIO(image_from_url(source)), _shortened(source), max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fspath(source), max_pixels)
    raise TypeError(
        f"image: expected a path, bytes, a PIL image or a uint8 array, found {type(source).__name__}"
    )


def image_from_url(url: str) -> bytes:
    """The bytes of the picture file in a ``data:image/...;base64,...`` URL (an OpenAI ``image_url`` part).

    Raises:
        ImageError: Also for every other kind of URL: nothing is ever downloaded or read from disk.
    """
    name = f"image URL {_shortened(url)}"
    scheme, _, rest = url.partition(":")
    if scheme.lower() in ("http", "https"):
        raise ImageError(f"{name}: not downloaded; download it first and pass the file or its bytes")
    header, comma, payload = rest.partition(",")
    media_type, *parameters = (part.strip().lower() for part in header.split(";"))
    if (
        scheme.lower() != "data"
        or not comma
        or not media_type.startswith("image/")
        or "base64" not in parameters
    ):
        raise ImageError(f"{name}: expected data:image/TYPE;base64,DATA")
    try:
        return base64.b64decode(b"".join(urllib.parse.unquote_to_bytes(payload).split()), validate=True)
    except ValueError as error:
        raise ImageError(f"{name}: its base64 data is damaged: {error}") from error


def _from_array(array: NDArray[np.uint8], max_pixels: int) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise ImageError(f"image array: expected dtype uint8 with values 0 to 255, found {array.dtype}")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f"image array: expected shape (H, W), (H, W, 3) or (H, W, 4), found {array.shape}")
    _check_size("image array", (array.shape[1], array.shape[0]), max_pixels)
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    return np.ascontiguousarray(array)


def _from_path(path: str | bytes, max_pixels: int) -> NDArray[np.uint8]:
    name = os.fsdecode(path) or "''"
    try:
        with open(path, "rb") as file:
            return _from_file(file, name, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        # Windows refuses to open a directory without saying why.
        if isinstance(error, OSError) and os.path.isdir(path):
            raise ImageError(f"{name}: expected a picture file, found a directory") from error
        raise ImageError(f"{name}: cannot be read: {error}") from error


def _from_file(file: IO[bytes], name: str, max_pixels: int) -> NDArray[np.uint8]:
    with _open(file, name) as image:
        return _from_pil(image, name, max_pixels)


def _open(file: IO[bytes], name: str) -> Image.Image:
    """What Image.open does, less its pixel limit, which only global state of Pillow could lift."""
    prefix = file.read(16)
    if not prefix:
        raise ImageError(f"{name}: expected a picture, found nothing (0 bytes)")
    tried: set[str] = set()
    reason: Exception | None = None
    for register_formats in (Image.preinit, Image.init):  # a few common ones; all, which takes 0.1 s once
        register_formats()
        for format in [f for f in _FORMATS if f in Image.OPEN and f not in tried]:
            tried.add(format)
            factory, accept = Image.OPEN[format]
            try:
                accepted = accept is None or accept(prefix)
                if isinstance(accepted, str):
                    raise ImageError(f"{name}: this Pillow cannot read {format} files: {accepted}")
                if accepted:
                    file.seek(0)
                    return factory(file, "")
            except (ImageError, MemoryError):
                raise
            except Exception as error:  # what decoders raise for a damaged file has no common type
                reason = error
    if reason is not None:
        raise ImageError(f"{name}: damaged or incomplete: {reason}") from reason
    known = ", ".join(f for f in _FORMATS if f in tried)
    raise ImageError(f"{name}: expected a picture ({known}), found a file that begins with {prefix[:8]!r}")


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> NDArray[np.uint8]:
    _check_size(name, image.size, max_pixels)
    try:
        with _no_size_warning(image.size):
            image.load()
        return _convert(_upright(image), name)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # as above
        raise ImageError(f"{name}: damaged or incomplete: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "TIFF":  # turned by load(), though old versions of Pillow keep the tag
        return image
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damage to the metadata is none to the picture
        return image
    return image if turn is None else image.transpose(turn)


def _convert(image: Image.Image, name: str) -> NDArray[np.uint8]:
    if image.mode in _16_BIT_MODES:
        return _from_16_bit(image, name)
    if image.mode == "F":
        raise ImageError(f"{name}: expected 8 or 16 bits per channel, found floating point of unknown range")
    if image.mode == "La":  # converts to nothing else
        image = image.convert("LA")
    if image.mode not in _MODES:
        raise ImageError(f"{name}: expected one of the modes {', '.join(_MODES)}, found {image.mode}")
    if image.mode in _ALPHA_MODES or "transparency" in image.info or _palette_mode(image) == "RGBA":
        return np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _palette_mode(image: Image.Image) -> str | None:
    return image.palette.mode if image.mode == "P" and image.palette is not None else None


def _from_16_bit(image: Image.Image, name: str) -> NDArray[np.uint8]:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(
            f"{name}: expected 16-bit grey (0 to 65535), found values from {values.min()} to {values.max()}"
        )
    # The high byte, as Pillow itself takes it from 16-bit colour.
    channels = [(values >> 8).astype(np.uint8)] * 3
    if "transparency" in image.info:
        channels.append(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return np.stack(channels, axis=2)


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: expected at least one pixel, found {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} is {width * height} pixels, above the limit of {max_pixels}; "
            "max_image_pixels of Model (max_pixels of load_image) raises it"
        )


@contextmanager
def _no_size_warning(size: tuple[int, int]) -> Iterator[None]:
    # Our limit has been checked, Pillow's has no say. Warning filters belong to the whole process, so they
    # are touched only for pictures that would warn, one at a time.
    if Image.MAX_IMAGE_PIXELS is None or size[0] * size[1] <= Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
