"""Which labelled images take part: the bank of evaluation, and a part of the labels to learn from.

Symbols: M images in a set.
"""

import math
from collections import defaultdict
from copy import copy
from pathlib import Path, PurePosixPath

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from simclr_pl.augmentation import Augmentation
from simclr_pl.data.sources import Images, ResidentImages, Source, as_source
from simclr_pl.errors import InputError
from simclr_pl.keyed_random import Stream, permutation


def labelled_part(images: Images, size: int, seed: int) -> Images:
    """The labelled images of a set, at most ``size`` of them; all of it where nothing is labelled.

    Args:
        images: the set.
        size: images to keep at most; a smaller part lies within a larger one.
        seed: of the run.
    """
    labelled = np.flatnonzero((images.labels >= 0) | (images.labels.max(initial=-1) < 0))
    order = permutation(len(labelled), seed, Stream.SPLIT)
    chosen = labelled[np.sort(order[:size])]
    return images if len(chosen) == len(images) else images.subset(chosen)


class LabelledSubset(Source):
    """A part of another source's labelled images, to learn from a few labels.

    Its bank is that part, too; the query is the other source's. The part is the same in every run, at
    every number of ranks.

    Args:
        source: the other one.
        fraction: share of the labelled images of each class to keep, in (0, 1]; at least one image of
            each class is kept. A smaller part lies within a larger one of the same seed.
        files: text file with one image a line, by its file's name or the end of its path, in place of
            ``fraction``; such as the lists of 1 % and 10 % of ImageNet that came with SimCLR.
        seed: which images a fraction keeps.
        keep_rest: also learn from the other images, without their labels.

    Raises:
        InputError: ``fraction`` is outside (0, 1], or both it and ``files`` are given; on opening, if
            nothing is labelled, or ``files`` cannot be read or names no image, or one line several.

    Attributes:
        missing: lines of ``files`` that no image has, after `open`.
    """

    def __init__(
        self,
        source: Source,
        fraction: float = 1.0,
        files: str | None = None,
        seed: int = 0,
        keep_rest: bool = False,
    ) -> None:
        if not 0 < fraction <= 1:
            raise InputError(
                f"`fraction` must be within (0, 1]; got {fraction}. Set it to, e.g., 0.1."
            )
        if files is not None and fraction != 1:
            raise InputError(
                f"either `fraction` or `files` chooses the labels; got {fraction} and {files!r}. "
                "Leave one of them out."
            )
        self.source = as_source(source)
        self.fraction, self.files, self.seed, self.keep_rest = fraction, files, seed, keep_rest
        self.channels, self.unit = self.source.channels, self.source.unit
        self.missing: list[str] = []

    def prepare(self) -> None:
        """Downloads what the other source misses."""
        self.source.prepare()

    def default_augment(self) -> Augmentation:
        """That of the other source."""
        return self.source.default_augment()

    def open(self) -> None:
        """Opens the other source and chooses its labelled images."""
        self.source.open()
        self.channels, self.classes = self.source.channels, self.source.classes
        self.left_out, self.converted = self.source.left_out, self.source.converted
        self.query = self.source.query
        images = self.source.train if self.keep_rest else self.source.bank
        if images.labels.max(initial=-1) < 0:
            raise InputError(
                f"a part of the labels needs labelled images; got none in "
                f"{type(self.source).__name__}. Give the images class folders."
            )
        if self.files is None:
            chosen = stratified(images.labels, self.fraction, self.seed)
        else:
            chosen = self._named(images, Path(self.files))
        self.train = self.bank = images.subset(chosen)
        if self.keep_rest:
            labels = np.full_like(images.labels, -1)
            labels[chosen] = images.labels[chosen]
            self.train = copy(images)  # of the same pixels
            self.train.labels = labels

    def _named(self, images: Images, files: Path) -> np.ndarray:
        """Positions of the labelled images that the lines of a file name, in order."""
        try:
            lines = [line.strip() for line in files.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"`files` must be a text file with one image a line; got {str(files)!r}: {error}. "
                "Check the path."
            ) from error
        wanted = {line: PurePosixPath(line).parts for line in lines if line}
        found = _ends(images, {parts[-1] for parts in wanted.values()})
        chosen, self.missing = set(), []
        for line, parts in wanted.items():
            matches = [i for i, path in found[parts[-1]] if path[-len(parts) :] == parts]
            if len(matches) > 1:
                raise InputError(
                    f"a line of `files` must name one image; got {len(matches)} for {line!r}. "
                    "Write more of its path, from the class's folder on."
                )
            chosen.update(matches)
            if not matches:
                self.missing.append(line)
        if not chosen:
            first = next(iter(wanted), "")
            raise InputError(
                f"`files` must name labelled images of the set; got none in {str(files)!r}, whose "
                f"first line is {first!r} while the first image is {_path(images, 0)!r}. Check both."
            )
        if self.missing:
            rank_zero_info(
                f"{len(self.missing):,} of {len(wanted):,} lines of {files} name no labelled image, "
                f"first {self.missing[0]!r}"
            )
        return np.array(sorted(chosen))


def stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Positions of a part of each class, in order.

    Args:
        labels: (M,) int64, -1 where there is none.
        fraction: share of each class, rounded to the nearest number of images, at least one.
        seed: which of them.
    """
    order = permutation(len(labels), seed, Stream.LABELS)
    kept = []
    for label in np.unique(labels[labels >= 0]):
        members = order[labels[order] == label]
        kept.append(members[: max(1, math.floor(fraction * len(members) + 0.5))])
    return np.sort(np.concatenate(kept))


def _ends(images: Images, names: set[str]) -> dict[str, list[tuple[int, tuple[str, ...]]]]:
    """For each of the names, the positions and the paths of the labelled images that end with it."""
    found = defaultdict(list)
    for i in np.flatnonzero(images.labels >= 0).tolist():
        path = _path(images, i)
        if path.rpartition("/")[2] in names:
            parts = PurePosixPath(path).parts
            found[parts[-1]].append((i, parts))
    return found


def _path(images: Images, i: int) -> str:
    if not isinstance(images, ResidentImages) and hasattr(images.reader, "path"):
        return str(images.reader.path(images.number(i)))  # packed: its name says the shard, too
    return images.name(i)
