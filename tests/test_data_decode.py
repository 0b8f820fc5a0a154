"""Decoding of every kind of file, and the crops of all views."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from pictures import encoded
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from simclr_pl.data.decode import (
    EXTENSIONS,
    UnreadableSample,
    cut_crops,
    open_picture,
    to_pixels,
)
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


@cache
def photographs() -> tuple[np.ndarray, np.ndarray]:
    """A temple and a flower, (427, 640, 3)."""
    temple, flower = load_sample_images().images
    return temple, flower


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, as float64 (H, W, 1)."""
    return (rgb.astype(np.float64) @ [0.299, 0.587, 0.114])[..., None]


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(np.float64) - expected).max() <= tolerance


def decoded(data: bytes, channels: int = 3) -> np.ndarray:
    """The pixels, which have the size that the head gave, one after the other in memory."""
    picture = open_picture(data, channels)
    pixels = picture.pixels()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (picture.height, picture.width, channels)
    assert pixels.flags.c_contiguous
    return pixels


def png_chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(
    width: int, height: int, depth: int, kind: int, rows: bytes, interlaced: bool = False
) -> bytes:
    """A PNG of ready rows, each after its filter's byte (RFC 2083)."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(interlaced))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", head)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def deep_png(pixels: np.ndarray) -> bytes:
    """16 bits a channel; grey, grey and alpha, RGB or RGBA by the number of channels."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Adam7: seven passes over ever finer grids."""
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    grids = [pixels[top::down, left::right] for top, left, down, right in passes]
    rows = b"".join(b"\0" + row.tobytes() for grid in grids if grid.size for row in grid)
    return png(pixels.shape[1], pixels.shape[0], 8, 2, rows, interlaced=True)


# Whole files.

LOSSLESS = {
    "PNG": lambda x: encoded(x, "png"),
    "interlaced PNG": interlaced_png,
    "BMP": lambda x: encoded(x, "bmp"),
    "TIFF": lambda x: encoded(x, "tiff"),
    "TIFF of LZW": lambda x: encoded(x, "tiff", compression="tiff_lzw"),
    "PPM": lambda x: encoded(x, "ppm"),
    "WebP": lambda x: encoded(x, "webp", lossless=True),
    "JPEG 2000": lambda x: encoded(x, "jpeg2000"),
}


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_rgb_files_are_read_to_the_bit(form: str) -> None:
    data = LOSSLESS[form](noise(13, 9))
    assert np.array_equal(decoded(data), noise(13, 9))
    assert_close(decoded(data, 1), grey_of(noise(13, 9)), 1)


@pytest.mark.parametrize("form", ["jpeg", "webp", "gif"])
def test_lossy_rgb_files_are_read_in_the_right_place_and_channel(form: str) -> None:
    data = encoded(BLOCKS, form)
    assert_close(decoded(data)[4:12, 4:20], BLOCKS[4:12, 4:20], 12)
    assert_close(decoded(data)[20:28, 28:44], BLOCKS[20:28, 28:44], 12)
    assert_close(decoded(data, 1)[20:28, 28:44], grey_of(BLOCKS)[20:28, 28:44], 12)


def test_every_known_extension_is_one_that_pillow_opens() -> None:
    assert set(EXTENSIONS) <= set(Image.registered_extensions())


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_known_extension_is_read(extension: str) -> None:
    form = Image.registered_extensions()[extension]
    assert decoded(encoded(BLOCKS, form)).shape == BLOCKS.shape


# JPEG, of every kind.


def photo() -> np.ndarray:
    """37 x 53 pixels, no multiple of any block."""
    return np.ascontiguousarray(photographs()[0][50:87, 200:253])


def cmyk_photo() -> Image.Image:
    return Image.fromarray(photo()).convert("CMYK")


def without_segment(data: bytes, marker: bytes) -> bytes:
    at = data.index(marker)
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


# By name: the file, its colour space and subsampling, and a marker that it must hold.
JPEGS: dict[str, tuple[Callable[[], bytes], str, str, bytes]] = {
    "grey": (lambda: encoded(photo()[..., :1], "jpeg"), "Gray", "Gray", b"\xff\xc0"),
    "4:4:4": (lambda: encoded(photo(), "jpeg", subsampling="4:4:4"), "YCbCr", "444", b"\xff\xc0"),
    "4:2:2": (lambda: encoded(photo(), "jpeg", subsampling="4:2:2"), "YCbCr", "422", b"\xff\xc0"),
    "4:2:0": (lambda: encoded(photo(), "jpeg", subsampling="4:2:0"), "YCbCr", "420", b"\xff\xc0"),
    "4:4:0": (
        lambda: simplejpeg.encode_jpeg(photo(), colorsubsampling="440"),
        "YCbCr",
        "440",
        b"\xff\xc0",
    ),
    "4:1:1": (
        lambda: simplejpeg.encode_jpeg(photo(), colorsubsampling="411"),
        "YCbCr",
        "411",
        b"\xff\xc0",
    ),
    "progressive": (
        lambda: encoded(photo(), "jpeg", progressive=True),
        "YCbCr",
        "420",
        b"\xff\xc2",
    ),
    "restart markers": (
        lambda: encoded(photo(), "jpeg", restart_marker_rows=1),
        "YCbCr",
        "420",
        b"\xff\xdd",
    ),
    "RGB": (lambda: encoded(photo(), "jpeg", keep_rgb=True), "RGB", "444", b"\xff\xc0"),
    "CMYK of Adobe": (lambda: encoded(cmyk_photo(), "jpeg"), "CMYK", "444", b"Adobe"),
    "CMYK": (
        lambda: without_segment(encoded(cmyk_photo(), "jpeg"), b"\xff\xee"),
        "CMYK",
        "444",
        b"\xff\xc0",
    ),
    "YCCK": (
        lambda: simplejpeg.encode_jpeg(np.array(cmyk_photo()), colorspace="CMYK"),
        "YCCK",
        "444",
        b"Adobe",
    ),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_is_read_to_the_pixels_of_pillow(kind: str, channels: int) -> None:
    make, space, subsampling, marker = JPEGS[kind]
    data = make()
    assert simplejpeg.decode_jpeg_header(data)[2:] == (space, subsampling)
    assert marker in data
    with Image.open(io.BytesIO(data)) as image:
        if channels == 1:
            image.draft("L", image.size)  # grey is the stored brightness, not made from the colours
        expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(decoded(data, channels), expected.reshape(37, 53, channels))


def test_cmyk_jpeg_is_read_in_its_colours() -> None:
    cmyk = np.zeros((16, 32, 4), np.uint8)
    cmyk[:, :16] = (0, 255, 255, 0)  # red
    cmyk[:, 16:] = (255, 0, 0, 51)  # cyan, a fifth black
    image = Image.merge("CMYK", [Image.fromarray(plane) for plane in np.moveaxis(cmyk, 2, 0)])
    pixels = decoded(encoded(image, "jpeg", quality=100))
    assert_close(pixels[4:12, 4:12], np.broadcast_to([255, 0, 0], (8, 8, 3)), 8)
    assert_close(pixels[4:12, 20:28], np.broadcast_to([0, 204, 204], (8, 8, 3)), 8)


# EXIF's orientation: from the stored array to the upright one; EXIF 2.32, tag 274.

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


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """One directory of two entries; the kind is 3 for 16 bits, 4 for 32."""
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *([orientation, 0][: 5 - kind]))
    directory = (
        struct.pack(order + "H", 2)
        + struct.pack(order + "HHII", 0x0100, 4, 1, 9)
        + struct.pack(order + "HHI", 0x0112, kind, 1)
        + value
        + bytes(4)
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", 8) + directory


def segment(marker: bytes, content: bytes) -> bytes:
    return b"\xff" + marker + struct.pack(">H", len(content) + 2) + content


def with_exif(data: bytes, content: bytes, before: bytes = b"") -> bytes:
    """A JPEG with EXIF behind the segments ``before``."""
    return data[:2] + before + segment(b"\xe1", b"Exif\0\0" + content) + data[2:]


TURNED = {
    "JPEG": lambda e: with_exif(encoded(BLOCKS, "jpeg"), e),
    "grey JPEG": lambda e: with_exif(encoded(BLOCKS[..., :1], "jpeg"), e),
    "CMYK JPEG": lambda e: with_exif(encoded(Image.fromarray(BLOCKS).convert("CMYK"), "jpeg"), e),
    "PNG": lambda e: encoded(BLOCKS, "png", exif=e),
    "grey PNG": lambda e: encoded(BLOCKS[..., :1], "png", exif=e),
    "WebP": lambda e: encoded(BLOCKS, "webp", exif=e),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", TURNED)
def test_a_turned_image_is_read_upright(form: str, orientation: int, channels: int) -> None:
    stored = decoded(TURNED[form](exif(1)), channels)
    assert stored.shape == (32, 48, channels)
    found = decoded(TURNED[form](exif(orientation)), channels)
    assert np.array_equal(found, UPRIGHT[orientation](stored))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_tiff_is_read_upright(orientation: int, compression: str | None) -> None:
    data = encoded(BLOCKS, "tiff", compression=compression, tiffinfo={0x0112: orientation})
    assert np.array_equal(decoded(data), UPRIGHT[orientation](BLOCKS))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_is_read_in_either_byte_order_and_width(order: str, kind: int) -> None:
    plain = encoded(BLOCKS, "jpeg")
    assert np.array_equal(
        decoded(with_exif(plain, exif(6, order, kind))), UPRIGHT[6](decoded(plain))
    )


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_exif_that_pillow_writes_is_understood(orientation: int) -> None:
    written = Image.Exif()
    written[0x010E] = "a text before it"
    written[0x0112] = orientation
    plain = encoded(BLOCKS, "jpeg")
    found = decoded(encoded(BLOCKS, "jpeg", exif=written))
    assert np.array_equal(found, UPRIGHT[orientation](decoded(plain)))


BEFORE = {
    "comment": segment(b"\xfe", b"a comment"),
    "profile": segment(b"\xe2", b"ICC_PROFILE\0" + bytes(60_000)) * 3,
    "XMP": segment(b"\xe1", b"http://ns.adobe.com/xap/1.0/\0<x/>"),
    "padding": b"\xff" * 5,
    "empty segment": segment(b"\xe5", b""),
}


@pytest.mark.parametrize("before", BEFORE)
def test_exif_is_found_behind_other_segments(before: str) -> None:
    plain = encoded(BLOCKS, "jpeg")
    data = with_exif(plain, exif(6), BEFORE[before])
    assert np.array_equal(decoded(data), UPRIGHT[6](decoded(plain)))


def test_exif_behind_the_pixels_of_a_png_is_found_without_decoding_them() -> None:
    plain = encoded(BLOCKS, "png")
    data = plain[:-12] + png_chunk(b"eXIf", exif(6)) + plain[-12:]
    assert np.array_equal(decoded(data), UPRIGHT[6](BLOCKS))
    start = data.index(b"IDAT") + 4
    broken = data[:start] + bytes(20) + data[start + 20 :]
    picture = open_picture(broken, 3)
    assert (picture.height, picture.width) == (48, 32)
    with pytest.raises(UnreadableSample):
        picture.pixels()


DAMAGED_EXIF = {
    "empty": b"",
    "no TIFF": b"garbage that is no EXIF at all",
    "cut in its head": exif(6)[:6],
    "cut in its directory": exif(6)[:24],
    "directory far outside": b"II*\0" + struct.pack("<I", 0x7FFFFFFF) + exif(6)[8:],
    "far too many entries": exif(6)[:8] + b"\xff\xff" + exif(6)[10:22],
    "orientation 0": exif(0),
    "orientation 9": exif(9),
    "orientation 65535": exif(65535),
}


@pytest.mark.parametrize("damage", DAMAGED_EXIF)
@pytest.mark.parametrize("form", TURNED)
def test_damaged_exif_says_nothing(form: str, damage: str) -> None:
    data = TURNED[form](DAMAGED_EXIF[damage])
    with warnings.catch_warnings():
        if form == "CMYK JPEG":  # Pillow reads the resolution from it, and warns
            warnings.simplefilter("ignore")
        assert np.array_equal(decoded(data), decoded(TURNED[form](exif(1))))


# Odd files, each with its pixels, and broken ones, each with the reason.


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def scan_of(jpeg: bytes) -> int:
    """Where the coded pixels begin."""
    at = jpeg.index(b"\xff\xda")
    return at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def palette_image(colours: np.ndarray, index: np.ndarray) -> Image.Image:
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    return image


RGB = noise(40, 31)
RGBA = noise(40, 31, 4)
GREY = noise(40, 31, 1)
WHITE = GREY > 127
COLOURS = noise(1, 256)[0]
INDEX = noise(40, 31, 1)[..., 0]
DEEP = np.linspace(0, 65535, 40 * 31 * 4).astype(np.uint16).reshape(40, 31, 4)
OTHERS = [Image.fromarray(255 - RGB), Image.fromarray(RGB[::-1].copy())]
JPEG, PNG, GIF = encoded(RGB, "jpeg"), encoded(RGB, "png"), encoded(RGB, "gif")
WEBP, TIFF = encoded(RGB, "webp", lossless=True), encoded(RGB, "tiff")
PALETTE_GIF = encoded(palette_image(COLOURS, INDEX), "gif")
JPEG_PIXELS = np.asarray(Image.open(io.BytesIO(JPEG)))
HUGE = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
SIZE_OF_JPEG = JPEG.index(b"\xff\xc0") + 5  # height and width, two bytes each
SCAN_PARAMETERS = scan_of(JPEG) - 3


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey, 3, 2)


def high_bytes(deep: np.ndarray) -> np.ndarray:
    return (deep >> 8).astype(np.uint8)


ODD: dict[str, tuple[bytes, np.ndarray]] = {
    "one pixel, PNG": (encoded(RGB[:1, :1], "png"), RGB[:1, :1]),
    "one pixel, GIF": (
        encoded(palette_image(COLOURS, INDEX[:1, :1]), "gif"),
        COLOURS[INDEX[:1, :1]],
    ),
    "one row": (encoded(RGB[:1], "png"), RGB[:1]),
    "black and white PNG": (encoded(WHITE, "png"), three(WHITE * np.uint8(255))),
    "black and white TIFF": (
        encoded(WHITE, "tiff", compression="group4"),
        three(WHITE * np.uint8(255)),
    ),
    "black and white BMP": (encoded(WHITE, "bmp"), three(WHITE * np.uint8(255))),
    "grey PNG": (encoded(GREY, "png"), three(GREY)),
    "grey PGM": (encoded(GREY, "ppm"), three(GREY)),
    "grey with a transparent value": (encoded(GREY, "png", transparency=7), three(GREY)),
    "RGB with a transparent colour": (
        encoded(RGB, "png", transparency=tuple(RGB[0, 0].tolist())),
        RGB,
    ),
    "palette": (encoded(palette_image(COLOURS, INDEX), "png"), COLOURS[INDEX]),
    "palette of 4 colours": (
        encoded(palette_image(COLOURS[:4], INDEX % 4), "png", bits=2),
        COLOURS[INDEX % 4],
    ),
    "palette with alpha": (
        encoded(palette_image(COLOURS, INDEX), "png", transparency=bytes(range(256))),
        COLOURS[INDEX],
    ),
    "palette with a transparent colour": (
        encoded(palette_image(COLOURS, INDEX), "png", transparency=9),
        COLOURS[INDEX],
    ),
    "GIF": (PALETTE_GIF, COLOURS[INDEX]),
    "GIF with a transparent colour": (
        encoded(palette_image(COLOURS, INDEX), "gif", transparency=9),
        COLOURS[INDEX],
    ),
    "RGBA PNG": (encoded(RGBA, "png"), RGBA[..., :3]),
    "RGBA TIFF": (encoded(RGBA, "tiff"), RGBA[..., :3]),
    "RGBA WebP": (encoded(RGBA, "webp", lossless=True, exact=True), RGBA[..., :3]),
    "grey with alpha": (
        encoded(Image.merge("LA", [Image.fromarray(GREY[..., 0])] * 2), "png"),
        three(GREY),
    ),
    "16 bits, grey PNG": (deep_png(DEEP[..., :1]), three(high_bytes(DEEP[..., :1]))),
    "16 bits, grey and alpha PNG": (deep_png(DEEP[..., :2]), three(high_bytes(DEEP[..., :1]))),
    "16 bits, RGB PNG": (deep_png(DEEP[..., :3]), high_bytes(DEEP[..., :3])),
    "16 bits, RGBA PNG": (deep_png(DEEP), high_bytes(DEEP[..., :3])),
    "16 bits, grey TIFF": (encoded(DEEP[..., 0], "tiff"), three(high_bytes(DEEP[..., :1]))),
    "16 bits, big-endian TIFF": (
        encoded(Image.frombytes("I;16B", (31, 40), DEEP[..., 0].astype(">u2").tobytes()), "tiff"),
        three(high_bytes(DEEP[..., :1])),
    ),
    "CMYK TIFF": (
        encoded(Image.fromarray(RGB).convert("CMYK"), "tiff"),
        np.asarray(Image.fromarray(RGB).convert("CMYK").convert("RGB")),
    ),
    "PPM with a comment": (b"P6 # a comment\n31 40\n255\n" + RGB.tobytes(), RGB),
    "animated GIF": (
        encoded(
            palette_image(COLOURS, INDEX),
            "gif",
            save_all=True,
            append_images=[palette_image(COLOURS, INDEX[::-1].copy())],
        ),
        COLOURS[INDEX],
    ),
    "animated WebP": (
        encoded(RGB, "webp", save_all=True, append_images=OTHERS, lossless=True),
        RGB,
    ),
    "animated PNG": (encoded(RGB, "png", save_all=True, append_images=OTHERS), RGB),
    "TIFF of three pages": (encoded(RGB, "tiff", save_all=True, append_images=OTHERS), RGB),
    "JPEG of three pictures": (
        encoded(RGB, "mpo", save_all=True, append_images=OTHERS),
        JPEG_PIXELS,
    ),
    "JPEG with garbage behind it": (JPEG + b"garbage \xff\xd8\xff" * 9, JPEG_PIXELS),
    "JPEG with padded markers": (JPEG[:2] + b"\xff\xff\xff" + JPEG[2:], JPEG_PIXELS),
    "JPEG of a camera that leaves the scan's parameters zero": (
        replaced(JPEG, SCAN_PARAMETERS, b"\0\0\0"),
        JPEG_PIXELS,
    ),
    "JPEG of an unknown JFIF version": (JPEG.replace(b"JFIF\0\1", b"JFIF\0\7"), JPEG_PIXELS),
    "PNG with garbage behind it": (PNG + b"garbage", RGB),
    "PNG with unknown chunks": (
        PNG[:33] + png_chunk(b"abCd", b"private") + png_chunk(b"eXIf", b"") + PNG[33:],
        RGB,
    ),
}

NOT_KNOWN = "of no known image format"
CUT = "truncated|Truncated|Premature|cut|read"
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "text": (b"not an image", NOT_KNOWN),
    "a page of an error": (b"<!DOCTYPE html><html>404</html>", NOT_KNOWN),
    "zeros": (bytes(5000), NOT_KNOWN),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOT_KNOWN),
    "PDF": (b"%PDF-1.7\n", NOT_KNOWN),
    "EPS, which Pillow gives to a program": (encoded(RGB, "eps"), NOT_KNOWN),
    "one letter, as of PPM": (b"P", "."),
    "two letters, as of BMP": (b"BM", "."),
    "only the start of a JPEG": (b"\xff\xd8", NOT_KNOWN),
    "JPEG behind other bytes": (b"\r\n" + JPEG, NOT_KNOWN),
    "JPEG cut in its head": (JPEG[:100], CUT),
    "JPEG cut in the middle": (JPEG[: len(JPEG) // 2], "Premature end of JPEG file"),
    "JPEG cut by 10 bytes": (JPEG[:-10], "Premature end of JPEG file"),
    "progressive JPEG cut in the middle": (
        encoded(RGB, "jpeg", progressive=True)[:999],
        "Premature|premature",
    ),
    "CMYK JPEG cut in the middle": (
        encoded(Image.fromarray(RGBA).convert("CMYK"), "jpeg")[:900],
        CUT,
    ),
    "JPEG with zeros for an end, as of a broken download": (
        JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2),
        "Premature|premature",
    ),
    "JPEG with flipped bits": (
        replaced(
            JPEG, scan_of(JPEG) + 99, bytes(b ^ 0xFF for b in JPEG[scan_of(JPEG) + 99 :][:60])
        ),
        "Corrupt JPEG data",
    ),
    "JPEG that ends in its middle": (
        replaced(JPEG, scan_of(JPEG) + 99, b"\xff\xd9"),
        "premature end of data segment",
    ),
    "JPEG with a broken Huffman table": (
        replaced(JPEG, JPEG.index(b"\xff\xc4") + 5, b"\xff" * 16),
        "broken data stream",
    ),
    "JPEG without height": (replaced(JPEG, SIZE_OF_JPEG, b"\0\0"), "."),
    "JPEG of 4 gigapixels": (
        replaced(JPEG, SIZE_OF_JPEG, b"\xff\xdc\xff\xdc"),
        "more than `max_pixels`",
    ),
    "PNG cut in its head": (PNG[:20], CUT),
    "PNG cut in the middle": (PNG[: len(PNG) // 2], CUT),
    "PNG with a broken length": (
        replaced(PNG, PNG.index(b"IDAT") - 4, struct.pack(">I", 100)),
        "broken",
    ),
    "PNG with a broken checksum in its head": (
        replaced(PNG, 29, b"\0\0\0\0"),
        "bad header checksum",
    ),
    "PNG with broken pixels": (replaced(PNG, PNG.index(b"IDAT") + 9, bytes(40)), "broken"),
    "PNG without pixels": (png(0, 5, 8, 2, b""), "none|zero|."),
    "PNG of 10 gigapixels": (
        PNG[:8] + png_chunk(b"IHDR", HUGE) + PNG[33:],
        "more than `max_pixels`",
    ),
    "GIF cut in its head": (GIF[:8], "."),
    "GIF cut in the middle": (GIF[: len(GIF) // 2], CUT),
    "GIF of 4 gigapixels": (replaced(GIF, 6, b"\xff\xff\xff\xff"), "more than `max_pixels`"),
    "GIF without a picture": (GIF[:13] + b";", "."),
    "WebP cut in its head": (WEBP[:14], "."),
    "WebP cut in the middle": (WEBP[: len(WEBP) // 2], "."),
    "TIFF cut in the middle": (TIFF[: len(TIFF) // 2], CUT),
    "TIFF of floats": (
        encoded(np.linspace(0, 1, 42, dtype=np.float32).reshape(6, 7), "tiff"),
        "mode 'F' has a range that is unknown; convert it to 8 bits",
    ),
    "TIFF of 32 bits": (
        encoded(np.arange(42, dtype=np.int32).reshape(6, 7), "tiff"),
        "mode 'I' has a range that is unknown",
    ),
    "PGM of 16 bits": (b"P5\n1 1\n65535\n\1\2", "mode 'I' has a range that is unknown"),
    "PPM with a broken head": (b"P6\n4x 4\n255\n" + bytes(48), "."),
    "PPM cut in the middle": (b"P6\n31 40\n255\n" + RGB.tobytes()[:999], CUT),
    "BMP cut in the middle": (encoded(RGB, "bmp")[:999], CUT),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_file_is_read_to_its_pixels(kind: str) -> None:
    data, expected = ODD[kind]
    assert np.array_equal(decoded(data), expected)
    if not kind.startswith("JPEG"):  # whose grey is stored
        assert_close(decoded(data, 1), grey_of(expected), 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_unreadable_for_a_reason_and_without_a_warning(
    kind: str, channels: int
) -> None:
    data, reason = BROKEN[kind]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # as errors, they would be taken for the reason
        with pytest.raises(UnreadableSample, match=reason) as caught:
            decoded(data, channels)
    assert not told
    assert "object at 0x" not in str(caught.value)


def mutations(data: bytes, count: int) -> list[bytes]:
    """Cut files, files with a few wrong bytes anywhere, and such with them in their first 100."""
    generator = np.random.default_rng(len(data))
    made = [data[: generator.integers(len(data))] for _ in range(count // 3)]
    for i in range(count - len(made)):
        broken = bytearray(data)
        for at in generator.integers(0, len(data) if i % 2 else min(100, len(data)), 3):
            broken[at] = generator.integers(256)
        made.append(bytes(broken))
    return made


@pytest.mark.parametrize(
    "data",
    [
        *(JPEG, PNG, GIF, WEBP, TIFF, TURNED["JPEG"](exif(6)), TURNED["PNG"](exif(6))),
        *(ODD[name][0] for name in ("animated GIF", "palette with alpha", "CMYK TIFF")),
    ],
    ids=[
        *("JPEG", "PNG", "GIF", "WebP", "TIFF", "turned JPEG", "turned PNG"),
        *("animated GIF", "palette with alpha", "CMYK TIFF"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's of damaged TIFF
def test_random_damage_gives_pixels_or_unreadable_image_and_nothing_else(data: bytes) -> None:
    reasons = []
    for broken in mutations(data, 150):
        try:
            picture = open_picture(broken, 3, max_pixels=10**6)
            assert picture.pixels().shape == (picture.height, picture.width, 3)
        except UnreadableSample as error:
            reasons.append(str(error))
    assert len(reasons) > 30
    assert all(reasons)


def test_max_pixels_is_the_largest_number_read_and_the_size_is_told() -> None:
    for data in (JPEG, PNG, TIFF):
        assert open_picture(data, 3, max_pixels=40 * 31).pixels().shape == (40, 31, 3)
        with pytest.raises(
            UnreadableSample, match="31 x 40 pixels are more than `max_pixels` 1,239"
        ):
            open_picture(data, 3, max_pixels=40 * 31 - 1)


def test_more_pixels_than_pillow_allows_are_read_without_a_warning_in_many_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # it warns above 500, and raises above 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(PNG))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(decoded, [PNG, GIF, JPEG, encoded(RGB, "bmp")] * 50))
    assert np.array_equal(found[0], RGB)
    assert Image.MAX_IMAGE_PIXELS == 500


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


# Memory used again.


@pytest.mark.parametrize("form", ["jpeg", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_in_memory_used_again_are_the_same_until_the_next_are_decoded(
    form: str, channels: int
) -> None:
    first, second = encoded(BLOCKS, form), encoded(BLOCKS[:20, :9], form)
    turned = with_exif(first, exif(6)) if form == "jpeg" else first
    own = decoded(first, channels)
    expected = own.copy()
    for data in (first, turned, second):
        again = open_picture(data, channels).pixels(reuse=True)
        assert np.array_equal(again, decoded(data, channels))
    assert np.array_equal(own, expected)


def test_threads_do_not_share_memory_used_again() -> None:
    files = [encoded(noise(40, 30 + i), "jpeg") for i in range(8)] * 20

    def brightness(data: bytes) -> np.ndarray:
        return open_picture(data, 3).pixels(reuse=True).mean((0, 1))

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(brightness, files))
    assert np.array_equal(found, [decoded(data).mean((0, 1)) for data in files])


# Crops: `resize` and `crop_rows` are compared with Pillow in test_crop_kernels.


CROPS = np.array(
    [
        [0, 0, 237, 253, 0],  # the whole image
        [5, 7, 111, 200, 0],  # one side shrinks, one grows
        [5, 7, 111, 200, 1],
        [230, 240, 7, 13, 1],  # a corner, both sides grow
        [236, 252, 1, 1, 0],  # one pixel
        [3, 2, 32, 32, 1],  # no resize of small views
        [3, 2, 128, 128, 1],  # nor of large ones
    ]
)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 128])  # small, and cut by a kernel of their own; large
def test_crops_are_those_of_pillow_within_1(size: int, channels: int) -> None:
    pixels = noise(237, 253, channels)
    out = np.empty((len(CROPS), size, size, channels), np.uint8)
    cut_crops(pixels, CROPS, size, out)
    for view, (top, left, height, width, flipped) in zip(out, CROPS.tolist(), strict=True):
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        image = ImageOps.mirror(image) if flipped else image
        assert_close(view, np.asarray(image).reshape(view.shape).astype(np.float64), 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 96])
def test_a_crop_of_the_view_size_is_copied_and_a_flip_mirrors_it(size: int, channels: int) -> None:
    pixels = noise(size + 7, size + 8, channels)
    out = np.empty((2, size, size, channels), np.uint8)
    cut_crops(pixels, np.array([[3, 5, size, size, 0], [3, 5, size, size, 1]]), size, out)
    part = pixels[3 : 3 + size, 5 : 5 + size]
    assert np.array_equal(out[0], part)
    assert np.array_equal(out[1], part[:, ::-1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [20, 80])
def test_a_flipped_crop_is_the_mirror_of_the_same_crop(size: int, channels: int) -> None:
    pixels = noise(200, 300, channels)
    for sides in ((200, 300), (100, 60), (30, 40)):
        out = np.empty((2, size, size, channels), np.uint8)
        cut_crops(pixels, np.array([[0, 0, *sides, 0], [0, 0, *sides, 1]]), size, out)
        assert np.array_equal(out[1], out[0][:, ::-1])
