"""From bytes to pixels, and from pixels to the crops of all views.

Symbols: V views, C channels (1 or 3), H x W pixels of an image, S side of a view.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image

from simclr_pl.cpu import scratch
from simclr_pl.crop_kernels import crop_rows, is_small, resize
from simclr_pl.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 100_000_000  # a 100 megapixel camera's picture; decoded it takes 300 MB
_SMALL = 2**16  # bytes of an image up to which one call for all views is quicker

# Of the formats that Pillow reads, those of pictures; not EPS and its like, which start programs.
_PILLOW_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_ORIENTATION_TAG = 0x0112
_ORIENTED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by the EXIF standard, table 6
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


class UnreadableSample(InputError):  # noqa: N818 (names a state of the data, not of the program)
    """One image cannot be used; the message says why, without the image's name."""


class Picture(NamedTuple):
    """An image whose size is known and whose pixels are decoded on demand.

    Attributes:
        height, width: in pixels, upright.
        pixels: returns (H, W, C) uint8; raises `UnreadableSample`. With ``reuse=True`` the array
            may be overwritten when this thread decodes another image.
    """

    height: int
    width: int
    pixels: Callable[..., np.ndarray]


def open_picture(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Reads the head of an encoded image.

    JPEG is decoded by libjpeg-turbo, to the pixels that Pillow gives, but strictly: what it calls
    corrupt is unreadable, where Pillow would go on with grey or shifted pixels. JPEGs of other colour
    spaces (CMYK) and all other formats go through Pillow: transparency is dropped, 16 bits are
    cut to 8, of an animation the first frame counts. EXIF's orientation is honoured.

    Args:
        data: the file's content.
        channels: 3 for RGB, 1 for grey.
        max_pixels: H * W at most, a guard against decompression bombs.

    Raises:
        UnreadableSample: no known format, or more than ``max_pixels``.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            colour = ""  # e.g. lossless JPEG: Pillow may know better, or say what is wrong
        if colour in ("YCbCr", "RGB", "Gray"):
            _check_size(height, width, max_pixels)
            orientation = _jpeg_orientation(data)
            decode = partial(_decode_jpeg, data, (height, width, channels), orientation)
            if orientation >= 5:
                height, width = width, height
            return Picture(height, width, decode)
    return _open_by_pillow(data, channels, max_pixels)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise UnreadableSample(
            f"{width} x {height} pixels are more than `max_pixels` {max_pixels:,}"
        )


def _decode_jpeg(
    data: bytes, shape: tuple[int, int, int], orientation: int, reuse: bool = False
) -> np.ndarray:
    try:
        room = scratch(shape, "pixels") if reuse else None
        pixels = _strictly(data, "RGB" if shape[2] == 3 else "GRAY", room)
    except ValueError as error:
        raise UnreadableSample(str(error)) from error
    if orientation in _ORIENTED:
        pixels = np.ascontiguousarray(_ORIENTED[orientation](pixels))
    return pixels


def _strictly(data: bytes, space: str, room: np.ndarray | None) -> np.ndarray:
    decode: Callable[..., np.ndarray] = partial(simplejpeg.decode_jpeg, data, space, buffer=room)
    try:
        return decode(strict=True)
    except ValueError as error:
        # Of no consequence, says libjpeg itself: some cameras leave these bytes zero.
        if "Invalid SOS parameters for sequential JPEG" not in str(error):
            raise
        return decode(strict=False)


def _jpeg_orientation(data: bytes) -> int:
    """1 to 8, from the EXIF segment; walking the few segments is 20 times cheaper than Pillow."""
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) != b"\xda":
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xe1" and data[at + 4 : at + 10] == b"Exif\0\0":
            return _orientation(data[at + 10 : at + 2 + length])
        at += 1 if marker == b"\xff" else 2 + max(2, length)  # any marker may be padded
    return 1


def _orientation(exif: bytes) -> int:
    """1 to 8; what is damaged or out of range counts as 1. Pillow's reader would warn of damage."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    start = int.from_bytes(exif[4:8], order)
    entries = int.from_bytes(exif[start : start + 2], order)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(exif)), 12):
        if int.from_bytes(exif[at : at + 2], order) == _ORIENTATION_TAG:
            long = int.from_bytes(exif[at + 2 : at + 4], order) == 4  # else it is a short
            value = int.from_bytes(exif[at + 8 : at + (12 if long else 10)], order)
            return value if value in _ORIENTED else 1
    return 1


def _open_by_pillow(data: bytes, channels: int, max_pixels: int) -> Picture:
    try:
        image = _identified(data)
    except Exception as error:  # on damaged files Pillow also raises SyntaxError, ValueError, ...
        raise UnreadableSample(_reason(error)) from error
    width, height = image.size
    _check_size(height, width, max_pixels)
    orientation = _pillow_orientation(image, data)
    if orientation >= 5:
        height, width = width, height
    return Picture(height, width, partial(_decode_by_pillow, image, channels, orientation))


def _identified(data: bytes) -> Image.Image:
    """Image.open without its guard against bombs, a global limit and in part a mere warning."""
    Image.init()
    for name in _PILLOW_FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory and accepts and accepts(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    raise UnreadableSample("of no known image format" if data else "the file is empty")


def _pillow_orientation(image: Image.Image, data: bytes) -> int:
    exif = image.info.get("exif", b"")  # none of TIFF, which Pillow turns by itself
    if image.format == "PNG" and (at := data.find(b"eXIf")) >= 0:  # it may come after the pixels
        exif = data[at + 4 :]
    return _orientation(exif.removeprefix(b"Exif\0\0"))


def _decode_by_pillow(
    image: Image.Image, channels: int, orientation: int, reuse: bool = False
) -> np.ndarray:
    try:
        pixels = _pixels_of(image, channels)
    except Exception as error:
        raise UnreadableSample(_reason(error)) from error
    if orientation in _ORIENTED:
        pixels = np.ascontiguousarray(_ORIENTED[orientation](pixels))
    return pixels


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _pixels_of(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableSample(
            f"Pillow's mode {image.mode!r} has a range that is unknown; convert it to 8 bits a channel"
        )
    if "transparency" in image.info:  # else Pillow warns, or mixes the key colour in
        image = image.convert("RGBA")
    array = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return array if array.ndim == 3 else array[..., None]


def to_pixels(image: Any, channels: int) -> np.ndarray:
    """The pixels of what a user's data set returns.

    Args:
        image: a PIL image, an (H, W) or (H, W, C) uint8 array, or a (C, H, W) uint8 tensor.
        channels: 3 or 1; grey images are repeated to 3.

    Returns:
        (H, W, C) uint8.

    Raises:
        InputError: another type, dtype or shape.
        UnreadableSample: no pixels at all.
    """
    if isinstance(image, Image.Image):
        return _decode_by_pillow(image, channels, 1)
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0).numpy() if image.dim() == 3 else image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        found = f"{type(image).__name__} of {getattr(image, 'dtype', 'no dtype')}"
        raise InputError(
            "a data set's images must be PIL images, (H, W, C) uint8 arrays or (C, H, W) uint8 "
            f"tensors; got {found}. Return the image without transforms."
        )
    array = image if image.ndim == 3 else image[..., None]
    if not array.size:
        raise UnreadableSample(f"it has no pixels but the shape {image.shape}")
    if array.shape[2] == 1 and channels == 3:
        array = np.repeat(array, 3, 2)
    if array.shape[2] != channels:
        raise InputError(
            f"images must have {channels} channels; got {array.shape[2]}. Set the source's `channels`."
        )
    return array


def cut_crops(pixels: np.ndarray, crops: np.ndarray, size: int, out: np.ndarray) -> None:
    """Cuts the crops of all views out of one decoded image.

    Args:
        pixels: (H, W, C) uint8.
        crops: (V, 5) top, left, height, width, flipped.
        size: S.
        out: (V, S, S, C) uint8, filled in.
    """
    if is_small(size) and pixels.nbytes <= _SMALL:  # to the same bits
        height, width, channels = pixels.shape
        one = np.require(pixels, requirements=["C", "W"])  # else compiled once more
        zero, sides = np.zeros(1, np.int64), np.array([[height, width]])
        return crop_rows(one.reshape(-1, channels), zero, sides, zero, crops[None], out[None])
    for view, (top, left, height, width, flipped) in zip(out, crops.tolist(), strict=True):
        crop = pixels[top : top + height, left : left + width]
        resize(crop, size, size, bool(flipped), view)
