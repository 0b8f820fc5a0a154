"""Folders of files.

Symbols: M samples in a set.
"""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simclr_pl.data.decode import EXTENSIONS, MAX_PIXELS, UnreadableSample
from simclr_pl.data.sources import EncodedReader, Reader, Source, StoredSamples, held_out
from simclr_pl.errors import InputError

_QUERY_FOLDERS = ("val", "test", "validation")


class SampleFolder(Source):
    """Files of a folder in one of three layouts; subclasses say which files, and read them.

    Args:
        root: the folder.
        query_fraction: share of the samples kept for evaluation where no split is given.

    Raises:
        InputError: the folder is missing or holds no such file, or ``query_fraction`` is not a share.
    """

    extensions: Sequence[str]

    def __init__(self, root: str, query_fraction: float) -> None:
        if not 0 < query_fraction < 1:
            raise InputError(
                f"`query_fraction` must be within (0, 1); got {query_fraction}. Set "
                "`data.source.query_fraction`."
            )
        self.root = Path(root)
        self.query_fraction = query_fraction

    @abstractmethod
    def reader(self, names: np.ndarray) -> Reader:
        """What reads the files ``names`` (M,), paths as bytes."""

    def open(self) -> None:
        """Lists the files."""
        if not self.root.is_dir():
            raise InputError(
                f"`data.source.root` must be a folder of {self.unit}; got {str(self.root)!r}, which "
                f"{'is a file' if self.root.exists() else 'does not exist'}. Give the folder."
            )
        split = next((s for s in _QUERY_FOLDERS if (self.root / s).is_dir()), None)
        has_train = (self.root / "train").is_dir()
        folder = self.root / "train" if has_train else self.root
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if has_train and split:
            self.train = self.bank = self.samples(folder)
            self.query = self.samples(self.root / split)
            return
        everything = self.samples(folder)
        kept = held_out(len(everything), self.query_fraction)
        self.train = self.bank = everything.subset(np.flatnonzero(~kept))
        self.query = everything.subset(np.flatnonzero(kept))

    def samples(self, folder: Path) -> StoredSamples:
        """All files below a folder.

        Raises:
            InputError: there is none.
        """
        names, labels = list_files(str(folder), self.classes, self.extensions)
        if not len(names):
            raise InputError(
                f"`data.source.root` must hold {self.unit} ({', '.join(self.extensions)}); got none "
                f"under {str(folder)!r}. Check the path."
            )
        return StoredSamples(self.reader(names), labels)


class ImageFolder(SampleFolder):
    """Image files of a folder, with or without class folders.

    Understood are ``root/train/`` beside ``root/val/`` or ``root/test/``, each with one folder for each
    class; ``root/<class>/``, of which ``query_fraction`` is kept for evaluation; and files without class
    folders, which have no labels.

    Args:
        root: the folder.
        query_fraction: share of the labelled images kept for evaluation where no split is given.
        grey: read one channel instead of three.
        max_pixels: larger images are taken for decompression bombs and not read.

    Raises:
        InputError: the folder is missing or holds no image, or ``query_fraction`` is not a share.
    """

    extensions = EXTENSIONS

    def __init__(
        self,
        root: str,
        query_fraction: float = 0.1,
        grey: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(root, query_fraction)
        self.channels = 1 if grey else 3
        self.max_pixels = max_pixels

    def reader(self, names: np.ndarray) -> "FileReader":
        """Reads them as images."""
        return FileReader(names, self.channels, self.max_pixels)


def list_files(
    folder: str, classes: Sequence[str], extensions: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the files of some kinds below a folder, in a fixed order.

    Links to folders are followed, but not back to a folder that they lie in.

    Args:
        folder: where to look.
        classes: names of its subfolders that are classes.
        extensions: of the files, in small letters and with the dot.

    Returns:
        (M,) paths as bytes and (M,) int64 labels, -1 outside the class folders.
    """
    names: list[bytes] = []
    labels: list[int] = []
    number = {name: i for i, name in enumerate(classes)}
    above: dict[str, frozenset[tuple[int, int]]] = {}
    for at, folders, files in os.walk(folder, followlinks=True):
        line = above.pop(at, frozenset()) | {_identity(at)}
        folders[:] = sorted(f for f in folders if _identity(os.path.join(at, f)) not in line)
        above.update((os.path.join(at, f), line) for f in folders)
        found = sorted(f for f in files if os.path.splitext(f)[1].lower() in extensions)
        names.extend(os.fsencode(os.path.join(at, f)) for f in found)
        first_part = os.path.relpath(at, folder).split(os.sep)[0]
        labels.extend([number.get(first_part, -1)] * len(found))
    # One numpy array of bytes, not a list of strings: workers share its pages, for reading a list's
    # items writes their reference counts and so copies the pages into every worker.
    return np.array(names), np.array(labels, np.int64)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class FileReader(EncodedReader):
    """Reads image files.

    Args:
        names: (M,) paths as bytes.
        channels: 3 for RGB, 1 for grey.
        max_pixels: of one image.
    """

    def __init__(self, names: np.ndarray, channels: int, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(channels, max_pixels)
        self.names = names

    def name(self, i: int) -> str:
        """The path."""
        return os.fsdecode(self.names[i])

    def encoded(self, i: int) -> bytes:
        """The file's content."""
        try:
            with open(self.names[i], "rb") as file:
                return file.read()
        except OSError as error:
            raise UnreadableSample(error.strerror or str(error)) from error
