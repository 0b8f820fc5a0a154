"""Decoding of every kind of file, and the crops of all views."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from simclr_pl.data.decode import EXTENSIONS, cut_crops, read_image, to_pixels
from simclr_pl.errors import InputError

# Four blocks that JPEG keeps almost as they are; no rotation or flip of it looks the same.
BLOCKS = np.zeros((32, 48, 3), np.uint8)
BLOCKS[:16, :24] = (200, 30, 30)
BLOCKS[:16, 24:] = (30, 200, 30)
BLOCKS[16:, :24] = (30, 30, 200)
BLOCKS[16:, 24:] = (220, 220, 60)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    generator = np.random.default_rng(height * 100 + width)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, as float64 (H, W, 1)."""
    return (rgb.astype(np.float64) @ [0.299, 0.587, 0.114])[..., None]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(np.float64) - expected).max() <= tolerance


def saved(path: Path, image: Image.Image | np.ndarray, **options: Any) -> str:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return str(path)


# Files.


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.tiff", "a.ppm"])
def test_lossless_rgb_files_are_read_to_the_bit(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name, noise(13, 9))
    assert np.array_equal(read_image(path, 3), noise(13, 9))
    assert_close(read_image(path, 1), grey_of(noise(13, 9)), 1)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.gif"])
def test_lossy_rgb_files_are_read_in_the_right_place_and_channel(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name, BLOCKS)
    assert_close(read_image(path, 3)[4:12, 4:20], BLOCKS[4:12, 4:20], 12)
    assert_close(read_image(path, 3)[20:28, 28:44], BLOCKS[20:28, 28:44], 12)
    assert_close(read_image(path, 1)[20:28, 28:44], grey_of(BLOCKS)[20:28, 28:44], 12)


def test_every_known_extension_is_one_that_pillow_opens() -> None:
    assert set(EXTENSIONS) <= set(Image.registered_extensions())


def test_rgba_png_loses_its_alpha_and_keeps_its_colours(tmp_path: Path) -> None:
    rgba = noise(6, 7, 4)
    path = saved(tmp_path / "a.png", rgba)
    assert np.array_equal(read_image(path, 3), rgba[..., :3])


def test_palette_png_is_read_in_its_colours(tmp_path: Path) -> None:
    colours = noise(1, 256)[0]
    index = noise(8, 5, 1)[..., 0]
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    path = saved(tmp_path / "a.png", image)
    with Image.open(path) as stored:
        assert stored.mode == "P"
    assert np.array_equal(read_image(path, 3), colours[index])
    assert_close(read_image(path, 1), grey_of(colours[index]), 1)


@pytest.mark.parametrize("name", ["a.png", "a.pgm"])
def test_grey_files_are_read_as_one_channel_or_three_equal_ones(name: str, tmp_path: Path) -> None:
    grey = noise(6, 7, 1)
    path = saved(tmp_path / name, grey[..., 0])
    assert np.array_equal(read_image(path, 1), grey)
    assert np.array_equal(read_image(path, 3), np.repeat(grey, 3, 2))


def test_black_and_white_png_is_read_as_0_and_255(tmp_path: Path) -> None:
    white = noise(6, 7, 1)[..., 0] > 127
    path = saved(tmp_path / "a.png", white)
    assert np.array_equal(read_image(path, 1)[..., 0], white * 255)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_to_8_bits_and_not_clipped(name: str, tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 42).reshape(6, 7).astype(np.uint16)
    path = saved(tmp_path / name, deep)
    expected = deep[..., None] / 257
    assert_close(read_image(path, 1), expected, 1)
    assert_close(read_image(path, 3), np.repeat(expected, 3, 2), 1)


def test_a_float_tiff_of_unknown_range_raises_with_its_path(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tif", np.linspace(0, 1, 42, dtype=np.float32).reshape(6, 7))
    with pytest.raises(InputError, match=r"a\.tif.*8 or 16 bits a channel; got .*'F'"):
        read_image(path, 3)


def test_cmyk_jpeg_is_read_as_rgb(tmp_path: Path) -> None:
    cmyk = np.zeros((16, 32, 4), np.uint8)
    cmyk[:, :16] = (0, 255, 255, 0)  # red
    cmyk[:, 16:] = (255, 0, 0, 51)  # cyan, a fifth black
    image = Image.merge("CMYK", [Image.fromarray(plane) for plane in np.moveaxis(cmyk, 2, 0)])
    path = saved(tmp_path / "a.jpg", image, quality=100)
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    pixels = read_image(path, 3)
    assert_close(pixels[4:12, 4:12], np.broadcast_to([255, 0, 0], (8, 8, 3)), 8)
    assert_close(pixels[4:12, 20:28], np.broadcast_to([0, 204, 204], (8, 8, 3)), 8)


# From the stored array to the upright one; EXIF 2.32, tag 274.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotated_jpeg_is_read_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    plain = saved(tmp_path / "plain.jpg", BLOCKS)
    turned = saved(tmp_path / "turned.jpg", BLOCKS, exif=exif)
    expected = UPRIGHT[orientation](read_image(plain, 3))
    assert np.array_equal(read_image(turned, 3), expected)
    assert np.array_equal(read_image(turned, 1), UPRIGHT[orientation](read_image(plain, 1)))


def broken_files() -> dict[str, bytes]:
    png, jpeg = Path("a.png"), Path("a.jpg")

    def encoded(path: Path) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(noise(40, 40)).save(stream, path.suffix[1:].replace("jpg", "jpeg"))
        return stream.getvalue()

    whole = encoded(png)
    start = whole.index(b"IDAT")
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    huge = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return {
        "empty.jpg": b"",
        "text.jpg": b"not an image",
        "half.jpg": encoded(jpeg)[:600],
        "half.png": whole[: len(whole) // 2],
        "chunk.png": whole[: start - 4] + struct.pack(">I", 100) + whole[start:],  # SyntaxError
        "header.ppm": b"P6\n4x 4\n255\n" + bytes(48),  # ValueError
        "huge.png": whole[:8] + huge + whole[33:],  # DecompressionBombError
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_raises_input_error_with_its_path(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with pytest.raises(InputError, match=r"must be a readable image.*Repair or remove") as caught:
        read_image(str(path), 3)
    assert repr(str(path)) in str(caught.value)


def test_a_missing_file_and_a_folder_raise_input_error_with_their_path(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(InputError, match="must be a readable image") as caught:
            read_image(str(path), 3)
        assert repr(str(path)) in str(caught.value)


# Items of a user's data set.


@pytest.mark.parametrize("channels", [1, 3])
def test_to_pixels_takes_pil_array_and_tensor_alike(channels: int) -> None:
    pixels = noise(5, 8, channels)
    forms = [
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels),
        pixels,
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
    ]
    for form in forms:
        assert np.array_equal(to_pixels(form, channels), pixels)


def test_to_pixels_repeats_grey_to_three_channels() -> None:
    grey = noise(5, 8, 1)
    tensor = torch.from_numpy(grey[..., 0])
    for form in (Image.fromarray(grey[..., 0]), grey, grey[..., 0], tensor, tensor[None]):
        assert np.array_equal(to_pixels(form, 3), np.repeat(grey, 3, 2))
        assert np.array_equal(to_pixels(form, 1), grey)


def test_to_pixels_turns_a_colour_pil_image_to_grey() -> None:
    assert_close(to_pixels(Image.fromarray(noise(5, 8)), 1), grey_of(noise(5, 8)), 1)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3), np.float32), "ndarray of float32"),
        (np.zeros((4, 4), np.uint16), "ndarray of uint16"),
        (torch.zeros(3, 4, 4), "[a-zA-Z]+ of .*float32"),
        (np.zeros((2, 4, 4, 3), np.uint8), "ndarray of uint8"),
        (torch.zeros(4, dtype=torch.uint8), "[a-zA-Z]+ of .*uint8"),
        ("cat.png", "str of no dtype"),
        (None, "NoneType of no dtype"),
    ],
)
def test_to_pixels_refuses_other_types_dtypes_and_shapes(image: Any, found: str) -> None:
    with pytest.raises(InputError, match=f"must be PIL images.*got {found}"):
        to_pixels(image, 3)


@pytest.mark.parametrize(
    ("image", "channels", "count"),
    [
        (noise(4, 4, 4), 3, 4),
        (noise(4, 4, 3), 1, 3),
        (torch.zeros(2, 4, 5, dtype=torch.uint8), 3, 2),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), 3, 4),  # (H, W, C) tensors are none of ours
    ],
)
def test_to_pixels_refuses_another_number_of_channels(
    image: Any, channels: int, count: int
) -> None:
    with pytest.raises(InputError, match=f"must have {channels} channels; got {count}"):
        to_pixels(image, channels)


# Crops.


def triangle_crop(pixels: np.ndarray, crop: list[int], size: int) -> np.ndarray:
    """Pixel by pixel in float64: the triangle filter, widened when shrinking, inside the crop."""
    top, left, height, width, flipped = crop
    part = pixels[top : top + height, left : left + width].astype(np.float64)

    def weights(length: int) -> np.ndarray:
        scale = length / size
        table = np.zeros((size, length))
        for i in range(size):
            for j in range(length):
                distance = abs((j + 0.5) - (i + 0.5) * scale)
                table[i, j] = max(0.0, 1 - distance / max(1.0, scale))
        return table / table.sum(1, keepdims=True)

    out = np.einsum("ih,hwc,jw->cij", weights(height), part, weights(width))
    return out[:, :, ::-1] if flipped else out


CROPS = np.array(
    [
        [0, 0, 37, 53, 0],  # the whole image
        [5, 7, 11, 20, 0],  # one side shrinks, one grows
        [5, 7, 11, 20, 1],
        [30, 40, 7, 13, 1],  # a corner, both sides grow
        [36, 52, 1, 1, 0],  # one pixel
        [3, 2, 16, 16, 1],  # no resize
    ]
)


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_equal_pil_crop_resize_and_mirror(channels: int) -> None:
    pixels = noise(37, 53, channels)
    out = np.empty((len(CROPS), channels, 16, 16), np.uint8)
    cut_crops(pixels, CROPS, 16, out)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    for view, (top, left, height, width, flipped) in zip(out, CROPS.tolist(), strict=True):
        expected = image.crop((left, top, left + width, top + height))
        expected = expected.resize((16, 16), Image.Resampling.BILINEAR)
        array = np.asarray(ImageOps.mirror(expected) if flipped else expected)
        array = array[None] if channels == 1 else array.transpose(2, 0, 1)
        assert np.array_equal(view, array)


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_within_1_of_a_float64_triangle_filter(channels: int) -> None:
    pixels = noise(37, 53, channels)
    out = np.empty((len(CROPS), channels, 16, 16), np.uint8)
    cut_crops(pixels, CROPS, 16, out)
    for view, crop in zip(out, CROPS.tolist(), strict=True):
        assert_close(view, triangle_crop(pixels, crop, 16), 1)


def test_a_crop_of_the_view_size_is_copied_and_a_flip_mirrors_it() -> None:
    pixels = noise(20, 20)
    out = np.empty((2, 3, 8, 8), np.uint8)
    cut_crops(pixels, np.array([[3, 5, 8, 8, 0], [3, 5, 8, 8, 1]]), 8, out)
    part = pixels[3:11, 5:13].transpose(2, 0, 1)
    assert np.array_equal(out[0], part)
    assert np.array_equal(out[1], part[:, :, ::-1])
