"""Where images come from.

A `Source` opens three sets of images: `train` for the views, `bank` (labelled training images) and
`query` (labelled images kept out of training) for evaluation. A set is `ResidentImages`, one uint8
tensor in memory, or `StoredImages`, read one by one.

Symbols: M images in a set, C channels, H x W pixels.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from simclr_pl.augment import Augment, digits, simclr_cifar, simclr_imagenet
from simclr_pl.data.decode import EXTENSIONS, read_image, to_pixels
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, keys, permutation, uniforms

DIGITS_SEED = 2002  # fixes the embedded set once, whatever the run's seed is
DIGITS_NOISE = 0.3  # of full brightness: raw pixels then lie between a random and a trained encoder


@dataclass
class ResidentImages:
    """Images of one size in memory.

    Attributes:
        pixels: (M, C, H, W) uint8.
        labels: (M,) int64, -1 where there is none.
    """

    pixels: Tensor
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "ResidentImages":
        """The images at ``index``, in that order."""
        return ResidentImages(self.pixels[torch.from_numpy(index)], self.labels[index])


@dataclass
class StoredImages:
    """Images of any size, read when needed.

    Attributes:
        read: maps a position in 0..M-1 to (H, W, C) uint8 pixels.
        labels: (M,) int64, -1 where there is none.
    """

    read: Callable[[int], np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "StoredImages":
        """The images at ``index``, in that order."""
        return StoredImages(partial(_read_at, self.read, index), self.labels[index])


Images = ResidentImages | StoredImages


def _read_at(read: Callable[[int], np.ndarray], index: np.ndarray, i: int) -> np.ndarray:
    return read(int(index[i]))


class Source(ABC):
    """Opens the images of a data set.

    Attributes:
        train: the images to learn from, after `open`.
        bank: labelled training images for evaluation.
        query: labelled images to evaluate on.
    """

    train: Images
    bank: Images
    query: Images
    channels: int = 3

    def prepare(self) -> None:  # noqa: B027 (most sources have nothing to fetch)
        """Downloads what is missing; called on one rank only."""

    @abstractmethod
    def open(self) -> None:
        """Fills `train`, `bank` and `query`."""

    def default_augment(self) -> Augment:
        """The augmentation used when none is configured."""
        return simclr_imagenet()


class Digits(Source):
    """The embedded set: scikit-learn's 1,797 handwritten digits, each somewhere on a noisy canvas.

    A digit (8x8 pixels, Alpaydin and Kaynak 1998, shipped inside scikit-learn) is drawn at 16x16
    pixels at a random place of a 32x32 canvas of noise. Place, noise and split depend on the digit's
    index alone, so the set is the same everywhere: 1,347 images to learn from and 450 to evaluate on.
    """

    channels = 1

    def open(self) -> None:
        """Draws the canvases."""
        pixels, labels = _digit_canvases()
        order = permutation(len(labels), DIGITS_SEED, Stream.SPLIT)
        everything = ResidentImages(pixels, labels)
        self.train = self.bank = everything.subset(np.sort(order[:1347]))
        self.query = everything.subset(np.sort(order[1347:]))

    def default_augment(self) -> Augment:
        """Crop, rotation and shift."""
        return digits()


def _digit_canvases() -> tuple[Tensor, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images / 16).float()[:, None]  # (M, 1, 8, 8) in [0, 1]
    drawn = torch.nn.functional.interpolate(small, size=16, mode="bilinear")[:, 0].numpy()
    index = np.arange(len(drawn))
    place = (uniforms(keys(DIGITS_SEED, Stream.DIGITS, 0, index), 2) * 17).astype(int)
    noise = uniforms(keys(DIGITS_SEED, Stream.DIGITS, 1, index), 32 * 32).reshape(-1, 32, 32)
    canvas = DIGITS_NOISE * noise
    for i, (top, left) in enumerate(place):
        spot = canvas[i, top : top + 16, left : left + 16]
        np.maximum(spot, drawn[i], out=spot)
    pixels = torch.from_numpy(np.round(canvas * 255).astype(np.uint8))[:, None]
    return pixels, data.target.astype(np.int64)


class _TorchvisionSource(Source):
    """A set that torchvision downloads and keeps in memory."""

    def __init__(self, root: str = "data", download: bool = True) -> None:
        self.root = root
        self.download = download

    @abstractmethod
    def _load(self, split: str, download: bool) -> ResidentImages:
        """Loads one split."""

    def prepare(self) -> None:
        """Downloads the archive if it is missing."""
        if self.download:
            for split in ("train", "test"):
                self._guarded(split, download=True)

    def open(self) -> None:
        """Loads the splits into memory."""
        self.train = self.bank = self._guarded("train", download=False)
        self.query = self._guarded("test", download=False)

    def _guarded(self, split: str, download: bool) -> ResidentImages:
        try:
            return self._load(split, download)
        except (RuntimeError, OSError) as error:  # missing or damaged files; no network
            raise InputError(
                f"`data.source.root` must hold {type(self).__name__}; got {self.root!r}: {error} "
                "Set `data.source.download` to true, or `data.source.root` to its folder."
            ) from error

    def default_augment(self) -> Augment:
        """The paper's augmentation for CIFAR-10."""
        return simclr_cifar()


class CIFAR10(_TorchvisionSource):
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels.

    Args:
        root: folder of the data, the parent of ``cifar-10-batches-py``.
        download: fetch it when it is missing.
    """

    def _load(self, split: str, download: bool) -> ResidentImages:
        import torchvision.datasets

        return _from_torchvision(
            torchvision.datasets.CIFAR10(self.root, split == "train", download=download)
        )


class CIFAR100(_TorchvisionSource):
    """CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32 pixels.

    Args:
        root: folder of the data, the parent of ``cifar-100-python``.
        download: fetch it when it is missing.
    """

    def _load(self, split: str, download: bool) -> ResidentImages:
        import torchvision.datasets

        return _from_torchvision(
            torchvision.datasets.CIFAR100(self.root, split == "train", download=download)
        )


class STL10(_TorchvisionSource):
    """STL-10 (Coates et al. 2011): 96x96 pixels; learns from the 105,000 training and unlabelled images.

    The 5,000 labelled training images are the bank, the 8,000 test images the query.

    Args:
        root: folder of the data, the parent of ``stl10_binary``.
        download: fetch it when it is missing.
    """

    def _load(self, split: str, download: bool) -> ResidentImages:
        import torchvision.datasets

        data = torchvision.datasets.STL10(self.root, split, download=download)
        return ResidentImages(torch.from_numpy(data.data), np.asarray(data.labels, np.int64))

    def open(self) -> None:
        """Loads the splits into memory."""
        self.train = self._guarded("train+unlabeled", download=False)
        self.bank = self._guarded("train", download=False)
        self.query = self._guarded("test", download=False)

    def default_augment(self) -> Augment:
        """The paper's augmentation at 96 pixels."""
        return simclr_imagenet(size=96, clean_fraction=1.0)


def _from_torchvision(data: Any) -> ResidentImages:
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ResidentImages(pixels, np.asarray(data.targets, np.int64))


class ImageFolder(Source):
    """Image files of a folder, with or without class folders.

    Understood are ``root/train/`` beside ``root/val/`` or ``root/test/``, each with one folder for each
    class; ``root/<class>/``, of which ``query_fraction`` is kept for evaluation; and files without class
    folders, which have no labels.

    Args:
        root: the folder.
        query_fraction: share of the labelled images kept for evaluation where no split is given.
        resident: decode all images once into memory; they must have one size.
        grey: read one channel instead of three.

    Raises:
        InputError: the folder is missing or holds no image, or ``query_fraction`` is not a share.
    """

    def __init__(
        self, root: str, query_fraction: float = 0.1, resident: bool = False, grey: bool = False
    ) -> None:
        if not 0 < query_fraction < 1:
            raise InputError(
                f"`query_fraction` must be within (0, 1); got {query_fraction}. Set "
                "`data.source.query_fraction`."
            )
        self.root = Path(root)
        self.query_fraction = query_fraction
        self.resident = resident
        self.channels = 1 if grey else 3

    def open(self) -> None:
        """Lists the files."""
        if not self.root.is_dir():
            raise InputError(
                f"`data.source.root` must be a folder of images; got {str(self.root)!r}, which "
                f"{'is a file' if self.root.exists() else 'does not exist'}. Give the folder."
            )
        split = next((s for s in ("val", "test", "validation") if (self.root / s).is_dir()), None)
        if (self.root / "train").is_dir() and split:
            classes = _class_names(self.root / "train")
            self.train = self.bank = self._images(self.root / "train", classes)
            self.query = self._images(self.root / split, classes)
            return
        root = self.root / "train" if (self.root / "train").is_dir() else self.root
        everything = self._images(root, _class_names(root))
        kept = _held_out(everything.labels, self.query_fraction)
        self.train = self.bank = everything.subset(np.flatnonzero(~kept))
        self.query = everything.subset(np.flatnonzero(kept))

    def _images(self, folder: Path, classes: list[str]) -> Images:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not paths:
            raise InputError(
                f"`data.source.root` must hold images ({', '.join(EXTENSIONS)}); got none under "
                f"{str(folder)!r}. Check the path."
            )
        number = {name: i for i, name in enumerate(classes)}
        first_part = (p.relative_to(folder).parts[0] for p in paths)
        labels = np.array([number.get(part, -1) for part in first_part], np.int64)
        # One numpy array of bytes, not a list of strings: workers share its pages, for reading a
        # list's items writes their reference counts and so copies the pages into every worker.
        names = np.array([os.fsencode(p) for p in paths])
        images = StoredImages(partial(_read_file, names, self.channels), labels)
        return _decode_all(images) if self.resident else images


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def _read_file(names: np.ndarray, channels: int, i: int) -> np.ndarray:
    return read_image(os.fsdecode(names[i]), channels)


def _held_out(labels: np.ndarray, fraction: float) -> np.ndarray:
    """(M,) bool: the share of the images kept for evaluation, the same in every run."""
    order = permutation(len(labels), DIGITS_SEED, Stream.SPLIT)
    kept = np.zeros(len(labels), bool)
    kept[order[: max(1, round(fraction * len(labels)))]] = True
    return kept


def _decode_all(images: StoredImages) -> ResidentImages:
    first = images.read(0)
    pixels = np.empty((len(images), *first.shape), np.uint8)
    for i in range(len(images)):
        one = images.read(i)
        if one.shape != first.shape:
            raise InputError(
                f"a resident set needs images of one size; got {one.shape[:2]} at position {i} and "
                f"{first.shape[:2]} at 0. Set `data.source.resident` to false."
            )
        pixels[i] = one
    return ResidentImages(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), images.labels)


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
        kept = _held_out(everything.labels, 0.1)
        self.train = self.bank = everything.subset(np.flatnonzero(~kept))
        self.query = everything.subset(np.flatnonzero(kept))

    def _images(self, dataset: Any, labels: Sequence[int] | None) -> StoredImages:
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
        read = partial(_read_item, dataset, self.channels)
        return StoredImages(read, table.astype(np.int64))


def _labels_of(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        labels = _labels_of(dataset.dataset)
        return None if labels is None else np.asarray(labels)[dataset.indices]
    return next(
        (v for n in ("targets", "labels") if (v := getattr(dataset, n, None)) is not None), None
    )


def _read_item(dataset: Any, channels: int, i: int) -> np.ndarray:
    item = dataset[i]
    return to_pixels(item[0] if isinstance(item, (tuple, list)) else item, channels)


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
