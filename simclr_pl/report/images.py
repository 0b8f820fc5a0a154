"""Pictures as text within the page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

_WIDEST = 1280  # pixels, of a picture on the page
_SHEET_BYTES = 1_500_000  # of a sheet of thumbnails

T = TypeVar("T")


def picture(file: Path) -> tuple[str, int, int]:
    """A picture as an address that holds it, and its width and height in pixels.

    Args:
        file: any format that Pillow reads.

    Raises:
        OSError: it is no picture.
    """
    with Image.open(file) as found:
        image = found.convert("RGB")
    if image.width > _WIDEST:
        image = image.resize((_WIDEST, round(image.height * _WIDEST / image.width)))
    forms = {"image/webp": _encoded(image, "WEBP", quality=88)}
    forms["image/png"] = _encoded(
        image, "PNG", optimize=True
    )  # smaller where there are few colours
    kind = min(forms, key=lambda name: len(forms[name]))
    return address(kind, forms[kind]), image.width, image.height


def sheet(file: Path, count: int, kept: Sequence[int]) -> tuple[str, int]:
    """A sheet of thumbnails of some of the images, and its columns.

    Args:
        file: `count` square cells, row by row, in as many columns as make a square.
        count: of images.
        kept: positions of those that are wanted, ascending.

    Raises:
        OSError: it is no picture.
        ValueError: it has too few cells.
    """
    columns = int(np.ceil(np.sqrt(count)))
    with Image.open(file) as found:
        pixels = np.asarray(found.convert("RGB"))
    side = pixels.shape[1] // columns
    if side < 1 or pixels.shape[0] < side * -(-count // columns):
        raise ValueError(f"it has fewer than {count} thumbnails")
    if len(kept) < count:
        across = int(np.ceil(np.sqrt(len(kept))))
        new = np.zeros((-(-len(kept) // across) * side, across * side, 3), np.uint8)
        for i, place in enumerate(kept):
            (y, x), (v, u) = divmod(i, across), divmod(place, columns)
            cell = pixels[v * side : (v + 1) * side, u * side : (u + 1) * side]
            new[y * side : (y + 1) * side, x * side : (x + 1) * side] = cell
        pixels, columns = new, across
    image = Image.fromarray(pixels)
    for quality in (85, 70, 50):
        encoded = _encoded(image, "JPEG", quality=quality)
        if len(encoded) <= _SHEET_BYTES:
            break
    return address("image/jpeg", encoded), columns


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of some items, the first and the last among them, at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def address(kind: str, content: bytes) -> str:
    """A data: URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, form: str, **options: int | bool) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()
