"""From files to batches of views."""

from typing import TYPE_CHECKING, Any

from simclr_pl.data.audio import AudioFolder, SpokenDigits
from simclr_pl.data.digits import Digits
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.package_docs import PackageDocs
from simclr_pl.data.shards import Shards
from simclr_pl.data.sources import DatasetSource, Source, in_memory
from simclr_pl.data.streaming import StreamedShards
from simclr_pl.data.text import TextFile
from simclr_pl.data.torchvision_sets import CIFAR10, CIFAR100, STL10

if TYPE_CHECKING:
    from simclr_pl.data.datamodule import ContrastiveDataModule as ContrastiveDataModule

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "STL10",
    "AudioFolder",
    "ContrastiveDataModule",
    "DatasetSource",
    "Digits",
    "ImageFolder",
    "PackageDocs",
    "Shards",
    "Source",
    "SpokenDigits",
    "StreamedShards",
    "TextFile",
    "in_memory",
]


def __getattr__(name: str) -> Any:
    """The data module alone needs Lightning, whose import takes seconds: `simclr data` does without."""
    if name == "ContrastiveDataModule":
        from simclr_pl.data.datamodule import ContrastiveDataModule

        return ContrastiveDataModule
    raise AttributeError(f"module 'simclr_pl.data' has no attribute {name!r}")
