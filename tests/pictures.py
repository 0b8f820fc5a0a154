"""Small images, files of them, and what a set of images holds, for the tests of the data."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simclr_pl.data import Source
from simclr_pl.data.sources import Images


def noise(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    """The content of a file of Pillow's format ``form``."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def write(path: Path, pixels: np.ndarray) -> None:
    """An image file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, counts: dict[str, int], seed: int = 0) -> dict[bytes, str]:
    """Noise images ``root/<class>/<i>.png``; returns pixels -> class."""
    written = {}
    for name, count in counts.items():
        for i in range(count):
            seed += 1
            write(root / name / f"{i}.png", noise(seed))
            written[noise(seed).tobytes()] = name
    return written


def opened(source: Source) -> Source:
    """The source, ready."""
    source.prepare()
    source.open()
    return source


def pixels_of(images: Images) -> list[np.ndarray]:
    """(H, W, C) uint8 of every image."""
    return [images.open(i).pixels() for i in range(len(images))]


def content(images: Images) -> list[tuple[bytes, int]]:
    """Pixels and label of every image."""
    return [(p.tobytes(), label) for p, label in zip(pixels_of(images), images.labels, strict=True)]
