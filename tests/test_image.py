"""From a picture to pixels: Pillow and the reference's image processor are the oracles."""

from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile
from yivl_edge import Model, _core
from yivl_edge.image import image_from_url, load_image

Pixels = NDArray[np.uint8]

PAD_COLOR = (122, 116, 104)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def config(size: int, *, pad: bool = True, color: tuple[int, int, int] = PAD_COLOR) -> _core.PreprocessConfig:
    return _core.PreprocessConfig(image_size=size, pad=pad, pad_color=color, mean=MEAN, std=STD)


def noise(rng: np.random.Generator, height: int, width: int, channels: int = 3) -> Pixels:
    """Random bytes, or the extremes only: those overshoot in the negative lobes and get clipped."""
    values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values if rng.integers(2) else np.where(values < 128, 0, 255).astype(np.uint8)


def log_uniform(rng: np.random.Generator, largest: int) -> int:
    return int(np.exp(rng.uniform(0, np.log(largest + 1))))


def padded(pixels: Pixels) -> Image.Image:
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(Image.fromarray(pixels), ((side - width) // 2, (side - height) // 2))
    return square


def resized(image: Image.Image, width: int, height: int) -> Pixels:
    """Columns first, then rows, which one call of Pillow 13 does not promise for every shape."""
    one_axis = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return np.asarray(one_axis.resize((width, height), Image.Resampling.BICUBIC))


# --- padding and resizing -----------------------------------------------------------------------------------


def test_padded_pictures_of_200_random_sizes_equal_pillow() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        shape = (log_uniform(rng, 700), log_uniform(rng, 200))
        height, width = shape if rng.integers(2) else shape[::-1]
        size = int(rng.integers(1, 449))
        pixels = noise(rng, height, width)
        expected = padded(pixels).resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(
            _core.fit(pixels, config(size)), expected, err_msg=f"{width} x {height} -> {size}"
        )


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (1, 2), (2, 1), (1, 1500), (4000, 30), (30, 2000), (448, 448), (447, 448)]
)
def test_padded_pictures_of_extreme_sizes_equal_pillow(width: int, height: int) -> None:
    pixels = noise(np.random.default_rng(width * height), height, width)
    expected = padded(pixels).resize((448, 448), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(_core.fit(pixels, config(448)), expected)


def square_by_lines(lines: Pixels, index: NDArray[np.int64]) -> Pixels:
    """What Pillow makes of the square whose row i is lines[index[i]]: its passes one after the other."""
    first_pass = Image.fromarray(lines).resize((448, len(lines)), Image.Resampling.BICUBIC)
    square = np.asarray(first_pass)[index]
    return np.asarray(Image.fromarray(square).resize((448, 448), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("width", [20000, 70001])  # the latter's coefficients come in two blocks
def test_a_wide_line_of_3_rows_equals_pillow(width: int) -> None:
    pixels = noise(np.random.default_rng(1), 3, width)
    lines = np.concatenate([pixels, np.full((1, width, 3), PAD_COLOR, np.uint8)])
    index = np.full(width, 3)
    above = (width - 3) // 2
    index[above : above + 3] = (0, 1, 2)
    np.testing.assert_array_equal(_core.fit(pixels, config(448)), square_by_lines(lines, index))


def test_a_3_by_20000_picture_equals_pillow() -> None:
    rng = np.random.default_rng(2)
    distinct = noise(rng, 40, 3)
    index = rng.integers(0, 40, 20000)
    lines = np.full((40, 20000, 3), PAD_COLOR, np.uint8)
    lines[:, 9998:10001] = distinct
    np.testing.assert_array_equal(_core.fit(distinct[index], config(448)), square_by_lines(lines, index))


def test_padding_takes_no_memory() -> None:
    # The padded squares would have 1.2 GB each, 20000 padded rows of the tall one 27 MB after the first pass.
    program = """
import resource, numpy as np
from yivl_edge import _core
config = _core.PreprocessConfig(image_size=448, pad=True, pad_color=(1, 2, 3), mean=(0, 0, 0), std=(1, 1, 1))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_core.fit(np.zeros((448, 448, 3), np.uint8), config)
before = peak()
_core.fit(np.zeros((3, 20000, 3), np.uint8), config)
_core.fit(np.zeros((20000, 3, 3), np.uint8), config)
print(peak() - before)
"""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux only")
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert int(output) < 8 * 1024  # the rows of the tall picture in the columns that it reaches: 300 KiB


def test_resizing_equals_pillow_for_any_pair_of_shapes() -> None:
    rng = np.random.default_rng(3)
    for _ in range(150):
        height, width = log_uniform(rng, 600), log_uniform(rng, 600)
        new_height, new_width = log_uniform(rng, 600), log_uniform(rng, 600)
        pixels = noise(rng, height, width)
        np.testing.assert_array_equal(
            _core.resize_bicubic(pixels, new_width, new_height),
            resized(Image.fromarray(pixels), new_width, new_height),
            err_msg=f"{width} x {height} -> {new_width} x {new_height}",
        )


def test_cropped_pictures_equal_pillow() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        height, width = log_uniform(rng, 500), log_uniform(rng, 500)
        size = int(rng.integers(1, 113))
        pixels = noise(rng, height, width)
        short = min(height, width)
        new_height, new_width = int(size * height / short), int(size * width / short)
        top, left = (new_height - size) // 2, (new_width - size) // 2
        expected = resized(Image.fromarray(pixels), new_width, new_height)
        expected = expected[top : top + size, left : left + size]
        np.testing.assert_array_equal(
            _core.fit(pixels, config(size, pad=False)), expected, err_msg=f"{width} x {height} -> {size}"
        )


# --- alpha --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", [PAD_COLOR, (0, 255, 1)])
def test_alpha_is_composed_as_pillow_does_for_every_value_and_alpha(color: tuple[int, int, int]) -> None:
    values, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    picture = np.stack([values, values, values, alphas], axis=2)
    background = Image.new("RGBA", (256, 256), (*color, 255))
    composed = Image.alpha_composite(background, Image.fromarray(picture)).convert("RGB")
    background.paste(Image.fromarray(picture), mask=Image.fromarray(alphas))
    np.testing.assert_array_equal(composed, background.convert("RGB"))
    np.testing.assert_array_equal(_core.fit(picture, config(256, color=color)), composed)


@pytest.mark.parametrize("pad", [True, False])
def test_a_transparent_picture_gives_what_its_composition_gives(pad: bool) -> None:
    picture = noise(np.random.default_rng(5), 90, 157, 4)
    background = Image.new("RGBA", (157, 90), (*PAD_COLOR, 255))
    composed = np.asarray(Image.alpha_composite(background, Image.fromarray(picture)).convert("RGB"))
    np.testing.assert_array_equal(
        _core.fit(picture, config(64, pad=pad)), _core.fit(composed, config(64, pad=pad))
    )


# --- pixels -------------------------------------------------------------------------------------------------


def test_pixels_equal_the_golden_ones(golden: dict[str, np.ndarray], golden_image: Path) -> None:
    pixels = _core.preprocess(load_image(golden_image), config(112))
    assert pixels.dtype == np.float32
    # The same arithmetic in the same order: there is nothing to round differently.
    np.testing.assert_array_equal(pixels, golden["pixels"])


@pytest.mark.parametrize("shape", [(300, 451), (64, 64), (50, 1200)])
def test_cropped_pixels_equal_those_of_the_clip_image_processor(shape: tuple[int, int]) -> None:
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:  # transformers 4: its only processor is the one of Pillow
        from transformers import CLIPImageProcessor as Processor
    pixels = noise(np.random.default_rng(6), *shape)
    processor = Processor(
        size={"shortest_edge": 112},
        crop_size={"height": 112, "width": 112},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(_core.preprocess(pixels, config(112, pad=False)), expected)


# --- what the core refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.zeros((4, 4), np.uint8), "found 2 dimensions"),
        (np.zeros((4, 4, 1), np.uint8), "found 1"),
        (np.zeros((4, 4, 5), np.uint8), "found 5"),
        (np.zeros((0, 4, 3), np.uint8), "found 4 x 0"),
        (np.zeros((4, 0, 3), np.uint8), "found 0 x 4"),
    ],
)
def test_the_core_names_a_wrong_shape(pixels: Pixels, found: str) -> None:
    with pytest.raises(_core.ImageError, match=found):
        _core.fit(pixels, config(8))


def test_a_model_names_a_wrong_shape(golden_model: Model) -> None:
    for shape, found in (
        ((4,), "found 1 dimensions"),
        ((4, 4), "found 2 dimensions"),
        ((1, 4, 4, 3), "found 4 dim"),
    ):
        with pytest.raises(_core.ImageError, match=found):
            golden_model._model.preprocess(np.zeros(shape, np.uint8), _core.Control())


@pytest.mark.parametrize("size", [0, -1, 2**31, 2**62])
def test_the_core_refuses_an_impossible_output_size(size: int) -> None:
    with pytest.raises(_core.ImageError, match="output size"):
        _core.fit(np.zeros((2, 2, 3), np.uint8), config(size))
    with pytest.raises(_core.ImageError, match="output size"):
        _core.resize_bicubic(np.zeros((2, 2, 3), np.uint8), 5, size)


def test_the_core_never_converts_an_array_silently() -> None:
    with pytest.raises(TypeError):
        _core.fit(np.zeros((2, 2, 3), np.float32), config(8))
    with pytest.raises(TypeError):
        _core.fit(np.zeros((2, 4, 3), np.uint8)[:, ::2], config(8))


# --- arrays and PIL images ----------------------------------------------------------------------------------

RNG = np.random.default_rng(7)
PHOTO = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GREY = PHOTO[:, :, 0]
ALPHA = PHOTO[:, :, 1]


def test_arrays_are_taken_as_they_are() -> None:
    assert load_image(PHOTO) is PHOTO
    rgba = np.dstack([PHOTO, ALPHA])
    np.testing.assert_array_equal(load_image(rgba), rgba)
    np.testing.assert_array_equal(load_image(GREY), np.dstack([GREY] * 3))
    turned = load_image(PHOTO[::-1, ::2])
    np.testing.assert_array_equal(turned, PHOTO[::-1, ::2])
    assert turned.flags.c_contiguous


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (PHOTO.astype(np.float32), "expected dtype uint8.* found float32"),
        (PHOTO.astype(np.uint16), "expected dtype uint8.* found uint16"),
        (PHOTO > 5, "expected dtype uint8.* found bool"),
        (np.zeros((3, 20, 30), np.uint8), r"expected shape \(H, W\).* found \(3, 20, 30\)"),
        (np.zeros((2, 20, 30, 3), np.uint8), r"expected shape .* found \(2, 20, 30, 3\)"),
        (np.zeros(30, np.uint8), r"expected shape .* found \(30,\)"),
        (np.zeros((0, 30, 3), np.uint8), "at least one pixel, found 30 x 0"),
    ],
)
def test_wrong_arrays_are_named(array: Pixels, found: str) -> None:
    with pytest.raises(_core.ImageError, match=found):
        load_image(array)


@pytest.mark.parametrize("source", [None, 7, [[1, 2, 3]], io.BytesIO(b"x")])
def test_other_types_are_refused(source: object) -> None:
    with pytest.raises(TypeError, match=f"found {type(source).__name__}"):
        load_image(source)  # type: ignore[arg-type]


def grey16(values: NDArray[np.int64], byte_order: str = "<") -> Image.Image:
    mode = {"<": "I;16", ">": "I;16B"}[byte_order]
    data = values.astype(f"{byte_order}u2").tobytes()
    return Image.frombytes(mode, values.shape[::-1], data)


RGB = Image.fromarray(PHOTO)
L = Image.fromarray(GREY)
A = Image.fromarray(ALPHA)
DEEP = GREY.astype(np.int64) * 256 + ALPHA


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, PHOTO),
        (L, np.dstack([GREY] * 3)),
        (L.convert("1"), np.asarray(L.convert("1").convert("RGB"))),
        (Image.merge("RGBA", (*RGB.split(), A)), np.dstack([PHOTO, ALPHA])),
        (Image.merge("LA", (L, A)), np.dstack([GREY] * 3 + [ALPHA])),
        (RGB.quantize(16), np.asarray(RGB.quantize(16).convert("RGB"))),
        (RGB.convert("CMYK"), np.asarray(RGB.convert("CMYK").convert("RGB"))),
        (RGB.convert("YCbCr"), np.asarray(RGB.convert("YCbCr").convert("RGB"))),
        (RGB.convert("HSV"), np.asarray(RGB.convert("HSV").convert("RGB"))),
        (RGB.convert("RGBX"), PHOTO),
        (grey16(DEEP), np.dstack([GREY] * 3)),
        (grey16(DEEP, ">"), np.dstack([GREY] * 3)),
        (Image.fromarray(DEEP.astype(np.int32)), np.dstack([GREY] * 3)),
    ],
    ids=["RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "YCbCr", "HSV", "RGBX", "I;16", "I;16B", "I"],
)
def test_every_mode_of_a_pil_image(image: Image.Image, expected: Pixels) -> None:
    pixels = load_image(image)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_is_divided_out(mode: str) -> None:
    straight = Image.new(
        "RGBA" if mode == "RGBa" else "LA", (2, 2), (200, 100, 50, 128) if mode == "RGBa" else (200, 128)
    )
    pixels = load_image(straight.convert(mode))
    assert pixels.shape == (2, 2, 4)
    # Premultiplied 8-bit values keep half the levels at alpha 128.
    np.testing.assert_allclose(pixels.astype(int), np.asarray(straight.convert("RGBA")).astype(int), atol=1)


def test_modes_without_a_defined_range_are_refused() -> None:
    with pytest.raises(_core.ImageError, match="expected 8 or 16 bits per channel, found floating point"):
        load_image(Image.new("F", (3, 3)))
    with pytest.raises(_core.ImageError, match="found values from -1 to 70000"):
        load_image(Image.fromarray(np.array([[-1, 70000]], np.int32)))
    with pytest.raises(_core.ImageError, match=r"expected one of the modes .* found LAB"):
        load_image(Image.new("LAB", (3, 3)))
    marked = Image.new("LAB", (3, 3))
    marked.info["transparency"] = 0
    with pytest.raises(_core.ImageError, match=r"expected one of the modes .* found LAB"):
        load_image(marked)


def test_a_pil_image_gives_its_current_frame_and_is_left_alone() -> None:
    frames = [Image.new("L", (5, 4), value) for value in (10, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    with Image.open(buffer) as image:
        image.seek(1)
        assert load_image(image).max() == 200
        assert (image.tell(), image.mode, image.size) == (1, "L", (5, 4))
        image.seek(0)
        assert load_image(image).max() == 10


def test_an_empty_pil_image_is_refused() -> None:
    with pytest.raises(_core.ImageError, match="found 0 x 5"):
        load_image(Image.new("RGB", (0, 5)))


# --- files --------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(
    width: int, height: int, depth: int, color_type: int, rows: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG file of which Pillow writes none: 16-bit colour, transparent colours, lies about the size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in chunks)
    data = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + data + chunk(b"IEND", b"")


LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}, "JPEG2000": {}}


@pytest.mark.parametrize("format", LOSSLESS)
def test_files_and_their_bytes_give_the_same_pixels(format: str, tmp_path: Path) -> None:
    data = encoded(RGB, format, **LOSSLESS[format])
    path = tmp_path / "picture"  # the content tells the format, not the name
    path.write_bytes(data)
    apart = bytearray(2 * len(data))
    apart[::2] = data
    for source in (path, str(path), data, bytearray(data), memoryview(data), memoryview(apart)[::2]):
        np.testing.assert_array_equal(load_image(source), PHOTO)


def test_jpeg_is_what_pillow_decodes() -> None:
    for image in (RGB, L, RGB.convert("CMYK")):
        data = encoded(image, "JPEG")
        np.testing.assert_array_equal(load_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_16_bit_grey_files_give_the_high_byte(byte_order: str) -> None:
    image = grey16(DEEP, byte_order)
    for data in (encoded(image, "TIFF"), encoded(grey16(DEEP), "PNG")):
        np.testing.assert_array_equal(load_image(data), np.dstack([GREY] * 3))


def test_16_bit_colour_files_give_the_high_byte() -> None:
    deep = (
        np.dstack([PHOTO, PHOTO[:, :, ::-1]]).reshape(13, 17, 2, 3).swapaxes(2, 3)
    )  # (..., channel, high and low)
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(deep))
    np.testing.assert_array_equal(load_image(png(17, 13, 16, 2, rows)), PHOTO)


def test_transparent_colours_become_alpha() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    expected = np.array([[(*red, 255), (*blue, 0)]], np.uint8)
    colour_key = png(2, 1, 8, 2, b"\0" + bytes(red + blue), (b"tRNS", struct.pack(">3H", *blue)))
    np.testing.assert_array_equal(load_image(colour_key), expected)

    palette = png(2, 1, 8, 3, b"\0\0\1", (b"PLTE", bytes(red + blue)), (b"tRNS", b"\xff\0"))
    np.testing.assert_array_equal(load_image(palette), expected)
    half = png(2, 1, 8, 3, b"\0\0\1", (b"PLTE", bytes(red + blue)), (b"tRNS", b"\xff\x80"))
    np.testing.assert_array_equal(load_image(half)[0, 1], (*blue, 128))

    grey_key = png(2, 1, 8, 0, b"\0\x20\x30", (b"tRNS", struct.pack(">H", 0x30)))
    np.testing.assert_array_equal(load_image(grey_key)[0], [(32, 32, 32, 255), (48, 48, 48, 0)])
    deep_key = png(2, 1, 16, 0, b"\0\x20\x01\x20\x02", (b"tRNS", b"\x20\x02"))
    np.testing.assert_array_equal(load_image(deep_key)[0], [(32, 32, 32, 255), (32, 32, 32, 0)])

    gif = encoded(RGB.quantize(16), "GIF", transparency=3)
    with Image.open(io.BytesIO(gif)) as image:
        np.testing.assert_array_equal(load_image(gif), image.convert("RGBA"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several_is_read(format: str) -> None:
    frames = [Image.new("RGB", (6, 4), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **LOSSLESS.get(format, {}))
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(load_image(data)[:, :, :3], np.asarray(frames[0]))


# The stored picture for each EXIF orientation of one that is shown as PHOTO.
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.transpose(1, 0, 2),
    6: lambda shown: np.rot90(shown, 1),
    7: lambda shown: shown[::-1, ::-1].transpose(1, 0, 2),
    8: lambda shown: np.rot90(shown, -1),
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PHOTO)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif, **LOSSLESS[format])
    np.testing.assert_array_equal(load_image(data), PHOTO)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(load_image(image), PHOTO)
        np.testing.assert_array_equal(load_image(image), PHOTO)  # the caller's image was not turned


def test_exif_orientation_of_a_jpeg_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = load_image(encoded(RGB, "JPEG"))
    np.testing.assert_array_equal(load_image(encoded(RGB, "JPEG", exif=exif)), np.rot90(upright, -1))


@pytest.mark.filterwarnings("ignore:.*EXIF.*:UserWarning")
def test_damaged_exif_does_not_hide_the_picture() -> None:
    for exif in (
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12",
    ):
        np.testing.assert_array_equal(load_image(encoded(RGB, "PNG", exif=exif)), PHOTO)


# --- bad files ----------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(_core.ImageError, match=r"nothing\.png: no such file"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(_core.ImageError, match=r"expected a picture file, found a directory"):
        load_image(tmp_path)
    with pytest.raises(_core.ImageError, match="null"):
        load_image("a\0b.png")


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    for source in (path, b""):
        with pytest.raises(_core.ImageError, match=r"expected a picture, found nothing \(0 bytes\)"):
            load_image(source)


def test_what_is_not_a_picture_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_text("<!doctype html><p>not found")
    with pytest.raises(
        _core.ImageError, match=r"page\.jpg: expected a picture \(JPEG.* begins with b'<!doctyp'"
    ):
        load_image(path)


def test_formats_that_run_programs_or_hide_pictures_stay_shut() -> None:
    for format in ("EPS", "ICO"):
        with pytest.raises(_core.ImageError, match="expected a picture"):
            load_image(encoded(RGB, format))


FORMATS: dict[str, dict[str, object]] = {**LOSSLESS, "JPEG": {}, "GIF": {}}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_files_are_refused(format: str) -> None:
    # Large enough that the second half of every file holds pixels, whatever the format's blocks are.
    data = encoded(Image.fromarray(noise(np.random.default_rng(8), 150, 150)), format, **FORMATS[format])
    for length in [*range(1, 64, 7), len(data) // 4, len(data) // 2, len(data) * 3 // 4]:
        with pytest.raises(_core.ImageError):
            load_image(data[:length])
    with pytest.raises(_core.ImageError, match=r"damaged or incomplete: .+"):
        load_image(data[: len(data) // 2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_give_pixels_or_an_image_error(format: str) -> None:
    rng = np.random.default_rng(9)
    data = np.frombuffer(encoded(RGB, format, **FORMATS[format]), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        positions = rng.integers(0, len(data), rng.integers(1, 6))
        damaged[positions] = rng.integers(0, 256, len(positions))
        try:
            pixels = load_image(damaged.tobytes(), max_pixels=1_000_000)
        except _core.ImageError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3


# --- the pixel limit ----------------------------------------------------------------------------------------


def test_the_limit_is_checked_before_anything_is_decoded() -> None:
    # A header and no data: had it been decoded, the complaint would be another.
    bomb = png(20000, 20000, 8, 2, b"")
    with pytest.raises(
        _core.ImageError, match="20000 x 20000 is 400000000 pixels, above the limit of 100000000"
    ) as e:
        load_image(bomb)
    assert "max_image_pixels" in str(e.value)
    with pytest.raises(_core.ImageError, match="damaged or incomplete"):
        load_image(png(200, 200, 8, 2, b""))


@pytest.mark.parametrize(
    "source", [PHOTO, GREY, RGB, encoded(RGB, "PNG")], ids=["RGB", "grey", "PIL", "file"]
)
def test_the_limit_is_an_argument(source: Pixels | Image.Image | bytes) -> None:
    assert load_image(source, max_pixels=13 * 17).shape == (13, 17, 3)
    with pytest.raises(_core.ImageError, match="17 x 13 is 221 pixels, above the limit of 220"):
        load_image(source, max_pixels=13 * 17 - 1)


@pytest.mark.parametrize("format", FORMATS)
def test_pillows_own_limit_neither_warns_nor_refuses(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(RGB, format, **FORMATS[format])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 13 * 17 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).shape == (13, 17, 3)
    if format not in ("TIFF", "WEBP"):  # whose decoders apply twice the limit themselves
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        assert load_image(data).shape == (13, 17, 3)


def test_global_state_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(RGB, "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 13 * 17 - 1)
    filters = list(warnings.filters)
    threads = [threading.Thread(target=load_image, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == filters
    assert Image.MAX_IMAGE_PIXELS == 13 * 17 - 1
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# --- URLs ---------------------------------------------------------------------------------------------------

PNG_BASE64 = base64.b64encode(encoded(RGB, "PNG")).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{PNG_BASE64}",
        f"DATA:image/png;BASE64,{PNG_BASE64}",
        f"data:image/jpeg;charset=utf-8;base64,{PNG_BASE64}",  # the content tells the format
        f"data:image/png;base64,{PNG_BASE64[:80]}\r\n  {PNG_BASE64[80:]}\n",
        "data:image/png;base64," + PNG_BASE64.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
    ],
    ids=["plain", "capitals", "parameters", "line breaks", "percent-encoded"],
)
def test_data_urls(url: str) -> None:
    np.testing.assert_array_equal(load_image(image_from_url(url)), PHOTO)
    np.testing.assert_array_equal(load_image(url), PHOTO)


@pytest.mark.parametrize("scheme", ["http", "https", "HTTPS"])
def test_urls_of_the_web_are_refused(scheme: str) -> None:
    for read in (image_from_url, load_image):
        with pytest.raises(_core.ImageError, match="download it first"):
            read(f"{scheme}://example.org/cat.png")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cat.png",
        "file:///etc/hosts",
        "data:",
        "data:image/png;base64",
        "data:image/png,abc",
        "data:text/plain;base64,aGVsbG8=",
        f"data:;base64,{PNG_BASE64}",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(_core.ImageError, match="expected data:image/TYPE;base64,DATA"):
        image_from_url(url)


def test_damaged_data_urls_are_refused_without_being_repeated_in_full() -> None:
    with pytest.raises(_core.ImageError, match="base64 data is damaged") as e:
        image_from_url("data:image/png;base64," + "!" * 100_000)
    assert len(str(e.value)) < 300
    with pytest.raises(_core.ImageError, match="damaged or incomplete") as e:
        load_image(f"data:image/png;base64,{PNG_BASE64[:400]}")
    assert len(str(e.value)) < 300
