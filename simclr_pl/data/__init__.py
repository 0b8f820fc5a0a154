"""From files to batches of views."""

from simclr_pl.data.datamodule import ContrastiveDataModule
from simclr_pl.data.sources import (
    CIFAR10,
    CIFAR100,
    STL10,
    DatasetSource,
    Digits,
    ImageFolder,
    Source,
)

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "ContrastiveDataModule",
    "DatasetSource",
    "Digits",
    "ImageFolder",
    "Source",
]
