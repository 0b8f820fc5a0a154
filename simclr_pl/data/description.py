"""What a set holds, and the mean and standard deviation of its pixels.

Symbols: M samples in a set, C channels, H x W pixels of an image.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.folders import FileReader
from simclr_pl.data.shards import is_packed, load_index
from simclr_pl.data.sources import Images, ResidentImages, Source, StoredSamples
from simclr_pl.data.sweep import Bar, read, splits_of, sweep
from simclr_pl.durable import publish, temporary_of
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, permutation

_SAMPLE = 1000  # images whose sizes stand for a split's


class Moments(NamedTuple):
    """Statistics over the pixels of a set.

    Attributes:
        mean, std: of each channel, with pixels within [0, 1]; ``std`` is the population's.
        images: number of images read.
        pixels: number of pixels read.
        unreadable: images that could not be read.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    pixels: int
    unreadable: int

    def lines(self) -> list[str]:
        """``mean`` and ``std`` as YAML, with four digits."""
        named = {"mean": self.mean, "std": self.std}
        return [f"{k}: [{', '.join(f'{x:.4f}' for x in values)}]" for k, values in named.items()]


def moments(
    source: Source, max_images: int | None = None, seed: int = 0, workers: int | None = None
) -> Moments:
    """Mean and standard deviation of the training images' pixels, every pixel counting the same.

    The sums are integers, so the result depends neither on the order nor on the number of workers.

    Args:
        source: prepared and opened here.
        max_images: a sample of so many; by default all.
        seed: of the sample.
        workers: processes; by default one for each core.

    Raises:
        InputError: ``max_images`` is below 1, or no image can be read.
    """
    if max_images is not None and max_images < 1:
        raise InputError(f"`max_images` must be >= 1; got {max_images}. Leave it out to read all.")
    source.prepare()
    source.open()
    positions = _sample(len(source.train), max_images, seed)
    total = np.zeros((3, source.channels), object)  # of Python: 10^7 images overflow 64 bits
    images = 0
    with Bar("Reading", len(positions)) as bar:
        for sums in bar.over(sweep(source.train, _sums, positions, workers)):
            if sums is not None:
                total, images = total + sums, images + 1
    if not images:
        raise InputError(
            f"the training split must hold a readable image; got none of {len(positions):,}. Check the "
            "source with `simclr data check`."
        )
    count, first, second = total
    mean = first / count
    variance = (count * second - first * first) / (count * count)
    return Moments(
        tuple(float(x) / 255 for x in mean),
        tuple(float(x) ** 0.5 / 255 for x in variance),
        images,
        int(count[0]),
        len(positions) - images,
    )


def write_moments(file: Path, found: Moments, head: list[str]) -> None:
    """Writes a config of ``mean`` and ``std`` alone, without an augmentation's name.

    `simclr fit` puts the arguments of a later config into the class of an earlier one, whichever that is.

    Args:
        file: is replaced, if there is one.
        found: what to write.
        head: comments.

    Raises:
        InputError: a channel is the same in all pixels.
    """
    if min(found.std) < 5e-5:
        raise InputError(
            f"every channel must vary, as its deviation divides it; got std {found.std}. Check the "
            "source with `simclr data check`."
        )
    lines = ["data:", "  augment:", "    init_args:", *(f"      {line}" for line in found.lines())]
    temporary_of(file).write_text("\n".join([*head, *lines]) + "\n")
    publish(temporary_of(file), file)


def _sums(images: Images, i: int) -> np.ndarray | None:
    """(3, C) int64: number, sum and sum of squares of the pixels of each channel."""
    try:
        pixels = read(images, i)[1].pixels(reuse=True)
    except UnreadableSample:
        return None
    values = np.arange(256)
    planes = np.moveaxis(pixels, 2, 0)
    counts = np.stack([np.bincount(plane.ravel(), minlength=256) for plane in planes])  # (C, 256)
    return np.stack([counts.sum(1), counts @ values, counts @ values**2])


def _sample(count: int, limit: int | None, seed: int) -> np.ndarray:
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(permutation(count, seed, Stream.SAMPLE)[:limit])


@dataclass
class Contents:
    """What a split holds.

    Attributes:
        images: their number.
        classes: with at least one image; 0 without labels.
        bytes: of all samples as stored; None where that would mean reading them all.
        median_bytes: of a sample.
        median_size: width and height of images in pixels, of a sample; None if none of it is readable.
    """

    images: int
    classes: int
    bytes: int | None
    median_bytes: int
    median_size: tuple[int, int] | None


def contents(source: Source, workers: int | None = None) -> dict[str, Contents]:
    """What each split of a source holds; sizes are medians over a sample of 1,000 images.

    Args:
        source: prepared and opened here.
        workers: processes; by default one for each core.
    """
    source.prepare()
    source.open()
    found = {}
    root = getattr(source, "root", None)
    index = load_index(Path(root)) if root is not None and is_packed(Path(root)) else None
    for split, images in splits_of(source).items():
        sample = _sample(len(images), _SAMPLE, 0)
        work = _head if source.unit == "images" else _length
        rows = [row for row in sweep(images, work, sample, workers) if row is not None]
        sizes = np.array(rows).reshape(-1, 3)
        has_size = bool(rows) and source.unit == "images"
        labelled = images.labels[images.labels >= 0]
        if index is not None:
            total = sum(shard["bytes"] for shard in index["splits"][split])
        else:
            total = _total_bytes(images)
        found[split] = Contents(
            len(images),
            len(np.unique(labelled)),
            total,
            int(np.median(sizes[:, 0])) if rows else 0,
            (int(np.median(sizes[:, 1])), int(np.median(sizes[:, 2]))) if has_size else None,
        )
    return found


def _head(images: Images, i: int) -> tuple[int, int, int] | None:
    """Bytes, width and height."""
    try:
        data, picture = read(images, i)
    except UnreadableSample:
        return None
    channels = getattr(getattr(images, "reader", None), "channels", None)
    if isinstance(images, ResidentImages):
        channels = images.flat.shape[1]
    raw = picture.height * picture.width * (channels or 3)
    return raw if data is None else len(data), picture.width, picture.height


def _length(samples: Images, i: int) -> tuple[int, int, int] | None:
    """Bytes of a sample that is no image, of its file or of its numbers; no width and no height."""
    try:
        data = samples.encoded(i) if isinstance(samples, StoredSamples) else None
        return np.asarray(samples.open(i)).nbytes if data is None else len(data), 0, 0
    except UnreadableSample:
        return None


def _total_bytes(images: Images) -> int | None:
    if isinstance(images, ResidentImages):
        return images.flat.numel()
    if not isinstance(images.reader, FileReader):
        return None
    return sum(_size(images.name(i)) for i in range(len(images)))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
