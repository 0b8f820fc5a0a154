"""Which images of a set are left out: those that cannot be used, and copies.

Copies are images of the same content. Of them stay:

- in one split, the first that has a class, else the first;
- of a training image that is an evaluation image, too, the latter: the former is a leak;
- of training images that are one image in several classes, none: nobody can say which class is right. The
  same holds for such evaluation images; those that only training images contradict stay.

Where a source draws its evaluation images itself, all images count as training images: from what is left,
they are drawn anew.

Symbols: n images of the two splits that are compared.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simclr_pl.data.inspection import UNUSABLE, Report, groups_of
from simclr_pl.data.listing import path_of
from simclr_pl.data.sources import Images, Source, StoredSamples
from simclr_pl.data.sweep import splits_of

COPIES = ("duplicate", "leak", "conflict")


class LeftOut(NamedTuple):
    """An image that is left out.

    Attributes:
        kind: one of `inspection.UNUSABLE` or of `COPIES`.
        split: "train", "query" or "bank".
        path: below the source's folder.
        reason: in words.
        kept: path of the image that stands for it; None where none does.
    """

    kind: str
    split: str
    path: str
    reason: str
    kept: str | None


def draws_its_query(source: Source) -> bool:
    """Whether the source draws its evaluation images itself, from among its images."""
    return getattr(source.train, "reader", None) is getattr(source.query, "reader", None)


def plan(source: Source, report: Report) -> dict[tuple[str, int], LeftOut]:
    """The images to leave out, by split and position."""
    splits = splits_of(source)
    found: dict[tuple[str, int], LeftOut] = {}
    digests = {split: table.copy() for split, table in report.digests.items()}
    for kind, split, _, detail, i in report.findings:
        if kind in UNUSABLE and i >= 0 and (split, i) not in found:
            path = path_of(source, splits[split], i)
            found[split, i] = LeftOut(kind, split, path, detail, None)
            digests[split][i] = 0  # stands for nothing, even if it can be read
    for split in splits.keys() - {"query"}:
        rows = _Compared(source, splits, split, digests)
        for group in groups_of(rows.digests):
            for row, kind, stands in _verdicts(group, rows.labels, rows.query):
                of, i = rows.place(row)
                if kind == "conflict":
                    other = next(k for k in group if rows.labels[k] not in (-1, rows.labels[row]))
                    reason = f"the same bytes as {rows.path(other)}, of another class"
                else:
                    assert stands is not None
                    leak = ", in query" if kind == "leak" else ""
                    reason = f"the same bytes as {rows.path(stands)}{leak}"
                by = None if stands is None else rows.path(stands)
                found[of, i] = LeftOut(kind, of, rows.path(row), reason, by)
    order = list(splits)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


class _Compared:
    """The query images and those of another split, as one table; in the listing's order if drawn.

    Attributes:
        digests: (n, 2) uint64.
        labels: (n,) int64.
        query: (n,) bool, whether an image must be kept out of training.
    """

    def __init__(
        self, source: Source, splits: dict[str, Images], split: str, digests: dict[str, np.ndarray]
    ) -> None:
        self._source, self._sets = source, {name: splits[name] for name in ("query", split)}
        names = np.repeat(list(self._sets), [len(images) for images in self._sets.values()])
        position = np.concatenate([np.arange(len(images)) for images in self._sets.values()])
        drawn = draws_its_query(source)
        order = np.arange(len(names))
        if drawn:
            number = [i for images in self._sets.values() for i in _numbers(images)]
            order = np.argsort(number)
        self._names, self._position = names[order], position[order]
        self.digests = np.concatenate([digests[name] for name in self._sets])[order]
        self.labels = np.concatenate([images.labels for images in self._sets.values()])[order]
        self.query = (self._names == "query") & (not drawn)

    def place(self, row: int) -> tuple[str, int]:
        """Split and position of a row's image."""
        return str(self._names[row]), int(self._position[row])

    def path(self, row: int) -> str:
        """Of a row's image, below the source's folder."""
        split, i = self.place(row)
        return path_of(self._source, self._sets[split], i)


def _numbers(images: Images) -> Iterator[int]:
    assert isinstance(images, StoredSamples)
    return (images.number(i) for i in range(len(images)))


def _verdicts(
    group: np.ndarray, labels: np.ndarray, query: np.ndarray
) -> Iterator[tuple[int, str, int | None]]:
    """Which of several copies are left out: row, kind, and the row that stands for it, if one does."""
    evaluated, trained = group[query[group]], group[~query[group]]
    stands: int | None = None
    if len(evaluated):
        at_odds = _at_odds(labels[evaluated])
        stands = None if at_odds else _first(evaluated, labels)
        kind = "conflict" if at_odds else "duplicate"
        yield from ((row, kind, stands) for row in evaluated if row != stands)
    if _at_odds(labels[group]):
        kind = "conflict"
    elif len(evaluated):
        kind = "leak"
    else:
        kind, stands = "duplicate", _first(trained, labels)
    yield from ((row, kind, stands) for row in trained if row != stands)


def _at_odds(labels: np.ndarray) -> bool:
    return len(np.unique(labels[labels >= 0])) > 1


def _first(rows: np.ndarray, labels: np.ndarray) -> int:
    return int(rows[np.argmax(labels[rows] >= 0)])  # 0 where none has a class
