"""Sources of sounds: folders of files, and spoken digits.

Symbols: M clips in a set.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simclr_pl.audio_augment import AudioAugment
from simclr_pl.data.clips import AUDIO_EXTENSIONS, AudioReader, heads_of
from simclr_pl.data.folders import SampleFolder, list_files
from simclr_pl.data.sources import Source, StoredSamples
from simclr_pl.errors import InputError


class _AudioSource(Source):
    """What sources of sounds share: one channel of one rate, and remarks on what is converted."""

    channels = 1
    unit = "clips"

    def __init__(self, sample_rate: int, max_seconds: float) -> None:
        for name, value in (("sample_rate", sample_rate), ("max_seconds", max_seconds)):
            if not value > 0:
                raise InputError(f"`{name}` must be > 0; got {value}. Set `data.source.{name}`.")
        self.sample_rate, self.max_seconds = sample_rate, max_seconds

    def reader(self, names: np.ndarray) -> AudioReader:
        """Reads the files as clips."""
        return AudioReader(names, self.sample_rate, self.max_seconds)

    def remark(self, names: np.ndarray) -> None:
        """Reads the heads of all files, and notes what is converted."""
        other: list[tuple[str, int]] = []
        several: list[tuple[str, int]] = []
        for name, head in zip(names, heads_of(names), strict=True):
            if head is None:
                continue  # whoever opens it finds out why
            if head[0] != self.sample_rate:
                other.append((os.fsdecode(name), head[0]))
            if head[2] > 1:
                several.append((os.fsdecode(name), head[2]))
        remarks = []
        if other:
            remarks.append(
                f"{len(other):,} of {len(names):,} clips are resampled to {self.sample_rate} Hz, first "
                f"{other[0][0]!r} of {other[0][1]} Hz"
            )
        if several:
            remarks.append(
                f"{len(several):,} of {len(names):,} clips become one channel by averaging, first "
                f"{several[0][0]!r} of {several[0][1]} channels"
            )
        self.converted = remarks


class AudioFolder(_AudioSource, SampleFolder):
    """Sound files of a folder (WAV, FLAC, Ogg, Opus, MP3), with or without class folders.

    The layouts are those of `ImageFolder`: ``root/train/`` beside ``root/val/`` or ``root/test/``, each
    with one folder for each class; ``root/<class>/``, of which ``query_fraction`` is kept for
    evaluation; and files without class folders, which have no labels. Files of another rate are
    resampled, several channels are averaged.

    Args:
        root: the folder.
        sample_rate: of the clips, in hertz; that of the augmentation, too.
        query_fraction: share of the labelled clips kept for evaluation where no split is given.
        max_seconds: longer files are reported and not used; cut them.

    Raises:
        InputError: the folder is missing or holds no sound, a number is out of its range, or soundfile
            or soxr is not installed.
    """

    extensions = AUDIO_EXTENSIONS

    def __init__(
        self,
        root: str,
        sample_rate: int = 16000,
        query_fraction: float = 0.1,
        max_seconds: float = 3600.0,
    ) -> None:
        _AudioSource.__init__(self, sample_rate, max_seconds)
        SampleFolder.__init__(self, root, query_fraction)

    def open(self) -> None:
        """Lists the files and reads their heads."""
        SampleFolder.open(self)
        names = [s.reader.names for s in (self.train, self.query)]  # type: ignore[union-attr]
        self.remark(np.unique(np.concatenate(names)))  # they may share one reader

    def default_augment(self) -> AudioAugment:
        """Views of two seconds."""
        return AudioAugment(self.sample_rate)


class SpokenDigits(_AudioSource):
    """Spoken digits, evaluated on speakers that are not learned from.

    The layout is that of the Free Spoken Digit Dataset (Jackson et al. 2018,
    github.com/Jakobovski/free-spoken-digit-dataset): files ``digit_speaker_number.wav`` in ``root`` or
    ``root/recordings``.

    Args:
        root: the folder.
        sample_rate: of the clips, in hertz; that of the augmentation, too.
        query_speakers: whom to keep for evaluation; by default one in six, the last by alphabet.
        max_seconds: longer files are reported and not used.

    Raises:
        InputError: the folder is missing or holds no such file, an unknown speaker, nobody left to learn
            from, or soundfile or soxr is not installed.
    """

    classes = tuple("0123456789")

    def __init__(
        self,
        root: str,
        sample_rate: int = 8000,
        query_speakers: Sequence[str] = (),
        max_seconds: float = 60.0,
    ) -> None:
        super().__init__(sample_rate, max_seconds)
        self.root, self.query_speakers = Path(root), query_speakers

    def open(self) -> None:
        """Lists the files, splits them by speaker, and reads their heads."""
        inner = self.root / "recordings"
        folder = inner if inner.is_dir() else self.root
        names, _ = list_files(str(folder), (), AUDIO_EXTENSIONS)
        found = [re.fullmatch(r"([0-9])_(.+)_[0-9]+", Path(os.fsdecode(n)).stem) for n in names]
        self.left_out = [
            (os.fsdecode(name), "its name is not digit_speaker_number")
            for name, match in zip(names, found, strict=True)
            if not match
        ]
        names = names[[match is not None for match in found]]
        labels = np.array([int(match[1]) for match in found if match], np.int64)
        speakers = np.array([match[2] for match in found if match])
        if not len(names):
            raise InputError(
                "`data.source.root` must be a folder of files named digit_speaker_number.wav; got none "
                f"under {str(folder)!r}. Check the path."
            )
        query = np.isin(speakers, self._query(sorted(set(speakers.tolist()))))
        everything = StoredSamples(self.reader(names), labels)
        self.train = self.bank = everything.subset(np.flatnonzero(~query))
        self.query = everything.subset(np.flatnonzero(query))
        self.remark(names)

    def _query(self, speakers: list[str]) -> list[str]:
        """Who of the speakers is kept for evaluation."""
        asked = list(self.query_speakers) or speakers[-max(1, round(len(speakers) / 6)) :]
        if not set(asked) < set(speakers):
            raise InputError(
                f"`query_speakers` must be some of the speakers {', '.join(speakers)}, and leave one to "
                f"learn from; got {', '.join(asked)}. Set `data.source.query_speakers`."
            )
        return asked

    def default_augment(self) -> AudioAugment:
        """Views of one second."""
        return AudioAugment(self.sample_rate, seconds=1.0, n_mels=40)
