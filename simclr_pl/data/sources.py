"""Where samples come from: images mostly, or sounds, texts, and whatever an augmentation makes views of.

A `Source` opens three sets: `train` for the views, `bank` (labelled training samples) and `query`
(labelled samples kept out of training) for evaluation. A set is `ResidentImages`, one uint8 tensor in
memory, or `StoredSamples`, read one by one.

Symbols: M samples in a set, C channels, H x W pixels of an image, P pixels of all images of a set.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from simclr_pl.augment import simclr_imagenet
from simclr_pl.augmentation import Augmentation
from simclr_pl.data.decode import MAX_PIXELS, Picture, UnreadableSample, open_picture, to_pixels
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, permutation

SPLIT_SEED = 2002  # which images are held out is the same in every run


class Reader(ABC):
    """Gives access to stored samples by their number."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What a message calls sample ``i``, e.g. its path."""

    @abstractmethod
    def open(self, i: int) -> Any:
        """Opens sample ``i``: a `Picture` of an image, else what the augmentation takes.

        Raises:
            UnreadableSample: it cannot be used.
        """

    def encoded(self, i: int) -> bytes | None:
        """The bytes of the sample's file, where it has one.

        Raises:
            UnreadableSample: the file cannot be read.
        """
        return None


class EncodedReader(Reader):
    """A reader of encoded images.

    Args:
        channels: 3 for RGB, 1 for grey.
        max_pixels: of one image.
    """

    def __init__(self, channels: int, max_pixels: int = MAX_PIXELS) -> None:
        self.channels, self.max_pixels = channels, max_pixels

    def open(self, i: int) -> Picture:
        """Reads the bytes and the head of image ``i``."""
        data = self.encoded(i)
        assert data is not None
        return open_picture(data, self.channels, self.max_pixels)


class ResidentImages:
    """Images in memory.

    Args:
        pixels: (M, C, H, W) uint8; or, where ``sides`` is given, (P, C) uint8, the P pixels of images of
            any sizes, row by row, one image behind the other.
        labels: (M,) int64, -1 where there is none.
        unreadable: positions of images that could not be read, each with its name and the reason.
        sides: (M, 2) int64, height and width of each image.

    Attributes:
        flat: (P, C) uint8, contiguous; it shares the memory of pixels whose channels are last in theirs.
        start: (M,) int64, the first pixel of each image in ``flat``.
        one_size: height and width, where all images have the same; else None.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: np.ndarray,
        unreadable: dict[int, tuple[str, str]] | None = None,
        sides: np.ndarray | None = None,
    ) -> None:
        if sides is None:
            sides = np.tile(np.array(pixels.shape[2:], np.int64), (len(labels), 1))
            pixels = pixels.permute(0, 2, 3, 1).reshape(-1, pixels.shape[1])
        ends = sides.prod(1).cumsum()
        assert len(pixels) == (ends[-1] if len(ends) else 0)
        self.flat, self.labels, self.sides = pixels.contiguous(), labels, sides
        self.unreadable = unreadable or {}
        self.start = ends - sides.prod(1)
        first = tuple(sides[0].tolist()) if len(sides) else (0, 0)
        self.one_size: tuple[int, int] | None = first if (sides == first).all() else None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def pixels(self) -> Tensor:
        """(M, C, H, W) uint8 of images of one size, the channels last in memory, as crops are cut."""
        return self.shaped(self.flat)

    def shaped(self, flat: Tensor) -> Tensor:
        """``flat``, or a copy of it on a device, as `pixels`."""
        assert self.one_size is not None
        return flat.view(len(self), *self.one_size, flat.shape[1]).permute(0, 3, 1, 2)

    def name(self, i: int) -> str:
        """What a message calls the image at position ``i``."""
        return self.unreadable[i][0] if i in self.unreadable else f"image {i}"

    def open(self, i: int) -> Picture:
        """The image at position ``i``."""
        if i in self.unreadable:
            raise UnreadableSample(self.unreadable[i][1])
        pixels = self._pixels(i)
        return Picture(pixels.shape[0], pixels.shape[1], lambda reuse=False: pixels)

    def _pixels(self, i: int) -> np.ndarray:
        """(H, W, C), of the memory of all."""
        height, width = self.sides[i].tolist()
        first = int(self.start[i])
        return self.flat[first : first + height * width].numpy().reshape(height, width, -1)

    def subset(self, index: np.ndarray) -> "ResidentImages":
        """The images at ``index``, in that order."""
        unreadable = {
            new: self.unreadable[old]
            for new, old in enumerate(index.tolist() if self.unreadable else ())
            if old in self.unreadable
        }
        flat, lengths = self.flat.numpy(), self.sides.prod(1)
        parts = zip(self.start[index].tolist(), lengths[index].tolist(), strict=True)
        copy = np.concatenate([flat[:0], *(flat[first : first + n] for first, n in parts)])
        return ResidentImages(
            torch.from_numpy(copy), self.labels[index], unreadable, self.sides[index]
        )


@dataclass
class StoredSamples:
    """Samples of any size, read when needed.

    Attributes:
        reader: gives access to them.
        labels: (M,) int64, -1 where there is none.
        index: (M,) int64, the reader's number of each sample; by default 0..M-1.
    """

    reader: Reader
    labels: np.ndarray
    index: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def number(self, i: int) -> int:
        """The reader's number of the sample at position ``i``."""
        return i if self.index is None else int(self.index[i])

    def name(self, i: int) -> str:
        """What a message calls the sample at position ``i``."""
        return self.reader.name(self.number(i))

    def open(self, i: int) -> Any:
        """Opens the sample at position ``i``.

        Raises:
            UnreadableSample: it cannot be used.
        """
        return self.reader.open(self.number(i))

    def encoded(self, i: int) -> bytes | None:
        """The bytes of the sample's file, where it has one.

        Raises:
            UnreadableSample: the file cannot be read.
        """
        return self.reader.encoded(self.number(i))

    def subset(self, index: np.ndarray) -> "StoredSamples":
        """The samples at ``index``, in that order."""
        numbers = index if self.index is None else self.index[index]
        return StoredSamples(self.reader, self.labels[index], numbers)


Images = ResidentImages | StoredSamples


class _InMemory(Reader):
    """Hands out what a sequence holds."""

    def __init__(self, values: Any, what: str) -> None:
        self.values, self.what = values, what

    def name(self, i: int) -> str:
        return f"{self.what} {i}"

    def open(self, i: int) -> Any:
        return self.values[i]


def in_memory(
    values: Any, labels: Sequence[int] | np.ndarray, what: str = "sample"
) -> StoredSamples:
    """A set of what an array or a list holds, each item a sample.

    Args:
        values: M items, such as the rows of an array.
        labels: (M,), -1 where there is none.
        what: a message calls an item, before its number.

    Raises:
        InputError: there are not as many labels as items.
    """
    table = np.asarray(labels, np.int64)
    if table.shape != (len(values),):
        raise InputError(
            f"there must be one label for each {what}; got {table.shape} labels for {len(values)}. "
            "Pass `labels` of the same length, -1 where there is none."
        )
    return StoredSamples(_InMemory(values, what), table)


class Source(ABC):
    """Opens the samples of a data set, images unless it says otherwise.

    Attributes:
        train: the samples to learn from, after `open`.
        bank: labelled training samples for evaluation.
        query: labelled samples to evaluate on.
        channels: of images, and of what an augmentation makes look like images.
        classes: names of the classes, by label; empty where they have none.
        unit: what messages call the samples, in the plural.
        left_out: name and reason of what was found unusable in opening, and is in no set.
        converted: remarks on samples that are usable after a conversion.
    """

    train: Images
    bank: Images
    query: Images
    channels: int = 3
    classes: Sequence[str] = ()
    unit: str = "images"
    left_out: Sequence[tuple[str, str]] = ()
    converted: Sequence[str] = ()

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to fetch)
        """Downloads what is missing; called on one rank only."""

    @abstractmethod
    def open(self) -> None:
        """Fills `train`, `bank` and `query`."""

    def default_augment(self) -> Augmentation:
        """The augmentation used when none is configured."""
        return simclr_imagenet()


def held_out(count: int, fraction: float) -> np.ndarray:
    """(M,) bool: the share of the samples kept for evaluation, the same in every run."""
    kept = np.zeros(count, bool)
    kept[permutation(count, SPLIT_SEED, Stream.SPLIT)[: max(1, round(fraction * count))]] = True
    return kept


class DatasetSource(Source):
    """A `torch.utils.data.Dataset` of your own.

    Items are images or (image, label) pairs; an image is a PIL image, an (H, W, C) or (H, W) uint8
    array, or a (C, H, W) uint8 tensor.

    Args:
        train: the images to learn from, without augmentation.
        query: the images to evaluate on; by default a tenth of ``train`` is kept for that.
        labels: labels of ``train``; by default its ``targets`` or ``labels`` attribute, else none.
        channels: 3 or 1.
    """

    def __init__(
        self,
        train: Dataset[Any],
        query: Dataset[Any] | None = None,
        labels: Sequence[int] | None = None,
        channels: Literal[1, 3] = 3,
    ) -> None:
        self.datasets = (train, query)
        self.labels = labels
        self.channels = channels

    def open(self) -> None:
        """Reads the labels; images are read when needed."""
        train, query = self.datasets
        everything = self._images(train, self.labels)
        if query is not None:
            self.train = self.bank = everything
            self.query = self._images(query, None)
            return
        kept = held_out(len(everything), 0.1)
        self.train = self.bank = everything.subset(np.flatnonzero(~kept))
        self.query = everything.subset(np.flatnonzero(kept))

    def _images(self, dataset: Any, labels: Sequence[int] | None) -> StoredSamples:
        labels = _labels_of(dataset) if labels is None else labels
        count = len(dataset)
        if count == 0:
            raise InputError("a data set must hold images; got an empty one. Check `data.source`.")
        table = np.full(count, -1) if labels is None else np.asarray(labels)
        if table.shape != (count,):
            raise InputError(
                f"there must be one label for each image; got {table.shape} labels for {count} "
                "images. Pass `labels` of the same length."
            )
        return StoredSamples(_ItemReader(dataset, self.channels), table.astype(np.int64))


class _ItemReader(Reader):
    """Reads the items of a user's data set."""

    def __init__(self, dataset: Any, channels: int) -> None:
        self.dataset, self.channels = dataset, channels

    def name(self, i: int) -> str:
        return f"item {i} of {type(self.dataset).__name__}"

    def open(self, i: int) -> Picture:
        try:
            item = self.dataset[i]
        except Exception as error:  # a user's code, on a damaged file: any kind
            raise UnreadableSample(f"{type(error).__name__}: {error}") from error
        pixels = to_pixels(item[0] if isinstance(item, (tuple, list)) else item, self.channels)
        return Picture(pixels.shape[0], pixels.shape[1], lambda reuse=False: pixels)


def _labels_of(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        labels = _labels_of(dataset.dataset)
        return None if labels is None else np.asarray(labels)[dataset.indices]
    return next(
        (v for n in ("targets", "labels") if (v := getattr(dataset, n, None)) is not None), None
    )


def as_source(source: Source | Dataset[Any]) -> Source:
    """A source as it is; a data set as a `DatasetSource`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(source, Source):
        return source
    is_path = isinstance(source, str)  # text has a length and items, too
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not is_path:
        return DatasetSource(source)
    raise InputError(
        f"`data.source` must be a Source or a Dataset with a length; got {type(source).__name__}. "
        "Wrap a data set in `simclr_pl.data.DatasetSource`, a folder in `ImageFolder`."
    )
