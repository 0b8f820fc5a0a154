"""From files to batches of views."""

from simclr_pl.data.datamodule import ContrastiveDataModule
from simclr_pl.data.digits import Digits
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.shards import Shards
from simclr_pl.data.sources import DatasetSource, Source
from simclr_pl.data.streaming import StreamedShards
from simclr_pl.data.torchvision_sets import CIFAR10, CIFAR100, STL10

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "ContrastiveDataModule",
    "DatasetSource",
    "Digits",
    "ImageFolder",
    "Shards",
    "Source",
    "StreamedShards",
]
