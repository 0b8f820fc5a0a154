"""Small folders of images and packs of them, for the tests of the packed sets."""

import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.pack import pack_source


def picture(seed: int, height: int = 40, width: int = 50, channels: int = 3) -> np.ndarray:
    """Smooth enough for JPEG, and different for each seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, channels), dtype=np.uint8)
    image = Image.fromarray(small if channels == 3 else small[..., 0])
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return pixels if channels == 3 else pixels[..., None]


def image_folder(root: Path, count: int = 24, **size: int) -> Path:
    """`count` training and count / 4 query images of two classes, as JPEG and, every third, as PNG."""
    for split, number in (("train", count), ("test", count // 4)):
        for i in range(number):
            folder = root / split / ("ants" if i % 2 else "bees")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = picture(1000 * (split == "test") + i, **size)
            image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
            image.save(folder / f"{i:03d}.{'png' if i % 3 == 0 else 'jpg'}")
    return root


def packed(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"workers": 0, "shard_mb": 0.005, **options}
    return pack_source(ImageFolder(str(source)), out, **options)


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip_byte(file: Path, needle: bytes) -> None:
    """Changes one byte in the middle of the first occurrence of ``needle``."""
    data = bytearray(file.read_bytes())
    data[data.index(needle) + len(needle) // 2] ^= 0xFF
    file.write_bytes(data)


def started(function: Any, *arguments: Any, **options: Any) -> BaseProcess:
    """A call in a process of its own."""
    process = multiprocessing.get_context("fork").Process(None, function, None, arguments, options)
    process.start()
    return process
