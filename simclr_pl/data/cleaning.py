"""A set once more, without what `selection.plan` leaves out: hard links to its files, or another pack."""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import simclr_pl
from simclr_pl.data.folders import ImageFolder
from simclr_pl.data.inspection import Report
from simclr_pl.data.pack import pack_source
from simclr_pl.data.selection import LeftOut, draws_its_query, plan
from simclr_pl.data.shards import Shards, all_shards, load_index
from simclr_pl.data.sources import Source
from simclr_pl.data.sweep import Bar, splits_of
from simclr_pl.durable import flush, publish, temporary_of
from simclr_pl.errors import InputError

RECORD = "cleaning.json"


@dataclass
class Cleaned:
    """The outcome of `clean`.

    Attributes:
        left_out: what is not in it, by split and position.
        images: for each split, how many there were and how many are kept; one entry, "all", where the
            source draws its evaluation images itself.
        written: number and bytes of the files, by what they are: "hard links", "copies" or "shards".
    """

    left_out: dict[tuple[str, int], LeftOut]
    images: dict[str, tuple[int, int]]
    written: dict[str, tuple[int, int]]


def check_place(source: Source, out: str) -> None:
    """Makes sure, before the long work, that a set can be written without its faults.

    Raises:
        InputError: the source is of another kind; ``out`` is not new, or lies inside the source.
    """
    if type(source) not in (ImageFolder, Shards):  # others may keep their images anywhere
        raise InputError(
            "`fix` takes a folder of images or one packed as arrow; got "
            f"{type(source).__name__}. Pack it with `simclr data pack`, and fix the packed folder."
        )
    place, root = Path(out).resolve(), Path(source.root).resolve()  # type: ignore[attr-defined]
    if place.is_relative_to(root):
        raise InputError(
            f"`fix` must lie outside of the set; got {out!r} inside '{root}'. Give another folder."
        )
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(
            f"`fix` must be a new folder, or an empty one; got {out!r}, which "
            f"{'holds something' if place.is_dir() else 'is a file'}. Give another."
        )


def clean(
    source: Source,
    report: Report,
    out: str,
    arguments: dict[str, Any],
    max_pixels: int,
    workers: int | None = None,
) -> Cleaned:
    """Writes a set without its unusable images and copies. It is whole, or not there.

    Args:
        source: opened; see `check_place`.
        report: of `inspection.examine` on it.
        out: the new folder.
        arguments: what the record shows as asked for.
        max_pixels: of one image.
        workers: processes, where the set is packed.

    Raises:
        InputError: a shard is missing; a split would be empty; ``out`` cannot be written, or another
            process writes it.
    """
    if not report.digests:
        raise InputError(
            "a packed folder must have all its shards to be fixed; got "
            f"{report.findings[0].path!r}, of which {report.findings[0].detail}. Copy it again, or "
            "delete it and run the same `simclr data pack`: only it is made anew."
        )
    left_out = plan(source, report)
    kept = {
        split: np.setdiff1d(np.arange(len(images)), [i for s, i in left_out if s == split])
        for split, images in splits_of(source).items()
    }
    counts = _counts(source, report, kept)
    try:
        with _building(Path(out).resolve()) as folder:
            if isinstance(source, ImageFolder):
                written = _write_folder(source, kept, folder)
            else:
                written = _write_pack(source, kept, folder, max_pixels, workers)
            cleaned = Cleaned(left_out, counts, written)
            _write_record(folder, report, cleaned, arguments)
    except OSError as error:
        raise InputError(
            f"`fix` must be writable; got {error.strerror or error} for "
            f"'{error.filename2 or error.filename or out}'. Make room, or give another folder."
        ) from error
    return cleaned


def _counts(
    source: Source, report: Report, kept: dict[str, np.ndarray]
) -> dict[str, tuple[int, int]]:
    counts = {split: (report.images[split], len(kept[split])) for split in kept}
    least = 1
    if draws_its_query(source):
        counts, least = {"all": (sum(report.images.values()), sum(map(len, kept.values())))}, 2
    for split, (before, after) in counts.items():
        if after < least:
            raise InputError(
                f"every split must keep an image; got {after} of the {before:,} of `{split}`. See "
                "`simclr data check` without `--fix` for what is wrong."
            )
    return counts


# Writing.


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A folder that gets the name ``out`` when all is in it; what fails leaves nothing."""
    temporary = temporary_of(out)
    temporary.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a killed process it is free
        except OSError as error:
            raise InputError(
                f"one process at a time writes a folder; '{out}' is being written. Wait for it."
            ) from error
        try:
            _empty(temporary)
            yield temporary
            publish(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    """Deletes what a killed process has left."""
    for rest in folder.iterdir():
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def _write_folder(
    source: ImageFolder, kept: dict[str, np.ndarray], out: Path
) -> dict[str, tuple[int, int]]:
    has_train = (source.root / "train").is_dir()
    for name in source.classes:  # also those that lose all images: labels keep their numbers
        (out / ("train" if has_train else "") / name).mkdir(parents=True)
    written: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    with Bar("Writing", sum(map(len, kept.values()))) as bar:
        for split in kept:
            images = getattr(source, split)
            for i in bar.over(kept[split].tolist()):
                file = images.name(i)
                target = out / os.path.relpath(file, source.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                what = "hard links" if _link(file, target) else "copies"
                written[what] += 1
                sizes[what] += target.stat().st_size
    if written["copies"]:
        os.sync()  # all are on the disk before the folder has its name; one by one takes longer
    return {what: (written[what], sizes[what]) for what in written if written[what]}


def _link(file: str, target: Path) -> bool:
    """Makes a hard link, or else a copy; whether it is a link."""
    try:
        os.link(os.path.realpath(file), target)  # of the file, where the source has a symbolic link
    except FileExistsError:  # two names that are one there: a copy would write into SRC
        raise
    except OSError:  # another file system, one without links, a file of another user
        shutil.copy2(file, target)
        return False
    return True


class _Part(Source):
    """A packed set that is open, without some of its images."""

    def __init__(self, source: Source, kept: dict[str, np.ndarray], max_pixels: int) -> None:
        self.channels, self.classes = source.channels, source.classes
        self.fingerprint = source.fingerprint  # type: ignore[attr-defined]
        parts = {}
        for split, images in splits_of(source).items():
            images.reader.max_pixels = max_pixels  # type: ignore[union-attr]
            parts[split] = images.subset(kept[split])
        self.train, self.query = parts["train"], parts["query"]
        self.bank = parts.get("bank", self.train)

    def open(self) -> None:
        """It is open."""


def _write_pack(
    source: Source,
    kept: dict[str, np.ndarray],
    out: Path,
    max_pixels: int,
    workers: int | None,
) -> dict[str, tuple[int, int]]:
    options = load_index(Path(source.root))["options"]  # type: ignore[attr-defined]
    # By the options of the first pack, which leave what it made as it is.
    index = pack_source(_Part(source, kept, max_pixels), out, workers=workers, **options)
    shards = all_shards(index)
    return {"shards": (len(shards), sum(shard["bytes"] for shard in shards))}


def _write_record(out: Path, report: Report, cleaned: Cleaned, arguments: dict[str, Any]) -> None:
    record = {
        "simclr_pl": simclr_pl.__version__,
        "arguments": arguments,
        "images": {s: {"before": b, "after": a} for s, (b, a) in cleaned.images.items()},
        "counts": dict(Counter(item.kind for item in cleaned.left_out.values())),
        "written": {w: {"files": n, "bytes": size} for w, (n, size) in cleaned.written.items()},
        "damaged_shards": [f.path for f in report.findings if f.position < 0],
        "left_out": [item._asdict() for item in cleaned.left_out.values()],
    }
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    flush(out / RECORD)
