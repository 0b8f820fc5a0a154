"""Sets that torchvision downloads and that fit into memory."""

from abc import abstractmethod
from typing import Any

import numpy as np
import torch

from simclr_pl.augment import Augment, simclr_cifar, simclr_imagenet
from simclr_pl.data.sources import ResidentImages, Source
from simclr_pl.errors import InputError


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
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    return ResidentImages(pixels, np.asarray(data.targets, np.int64))
