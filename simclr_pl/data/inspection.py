"""What is wrong with a set: unusable samples, duplicates, and what else a user should know of."""

import hashlib
import io
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from simclr_pl.augment import Augment
from simclr_pl.augmentation import Augmentation
from simclr_pl.data.decode import MAX_PIXELS, UnreadableSample
from simclr_pl.data.shards import all_shards, is_packed, load_index, sha256_of, size_problem
from simclr_pl.data.sources import Images, Source, StoredSamples
from simclr_pl.data.sweep import Bar, read, splits_of, sweep
from simclr_pl.errors import InputError

# What is found, from worst to harmless: unusable samples fail the check.
UNUSABLE = ("damaged", "empty", "truncated", "too large", "unreadable")
DOUBTFUL = ("duplicate", "tiny", "animated")
HARMLESS = ("channels", "converted")
KINDS = UNUSABLE + DOUBTFUL + HARMLESS

_DIGEST = 16  # bytes
_MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "RGBA": "alpha",
    "PA": "alpha",
}


class Finding(NamedTuple):
    """Something to know about one sample or shard.

    Attributes:
        kind: one of `KINDS`.
        split: "train", "query" or "bank"; empty for a shard.
        path: where it is.
        detail: what it is.
        position: of the image in its split; -1 for a shard.
    """

    kind: str
    split: str
    path: str
    detail: str
    position: int = -1


@dataclass
class Report:
    """The outcome of `examine`.

    Attributes:
        findings: by sample, those of the whole set and of shards first.
        images: number of samples in each split.
        classes: for each split with labels, the number of samples of each class.
        digests: (M, 2) uint64 of each split, of the content; zeros for a sample that cannot be read.
        unit: what the samples are.
    """

    findings: list[Finding] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    digests: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    unit: str = "images"

    @property
    def usable(self) -> bool:
        """Whether every sample can be learnt from."""
        return not any(finding.kind in UNUSABLE for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "usable": self.usable,
            self.unit: self.images,
            "counts": dict(Counter(finding.kind for finding in self.findings)),
            "classes": self.classes,
            "findings": [finding._asdict() for finding in self.findings],
        }


def examine(
    source: Source, tiny: int = 32, max_pixels: int = MAX_PIXELS, workers: int | None = None
) -> Report:
    """Reads every sample of a source, and every shard of a packed set.

    Args:
        source: prepared and opened here.
        tiny: a shorter side of an image below this is reported, in pixels.
        max_pixels: of one image.
        workers: processes; by default one for each core.

    Raises:
        InputError: the source cannot be opened, for another reason than a damaged shard.
    """
    report = Report(unit=source.unit)
    root = getattr(source, "root", None)
    if root is not None and is_packed(Path(root)):
        report.findings.extend(_damaged_shards(Path(root)))
    source.prepare()
    try:
        source.open()
    except InputError:
        if report.findings:
            return report  # it says what is damaged
        raise
    for name, reason in source.left_out:
        report.findings.append(Finding(_kind_of(reason), "", name, reason))
    for remark in source.converted:
        report.findings.append(Finding("converted", "", type(source).__name__, remark))
    work: Callable[[Images, int], _Examined] = partial(_examined, tiny=tiny, max_pixels=max_pixels)
    if not isinstance(augment := source.default_augment(), Augment):
        work = partial(_opened, augment=augment)
    splits = splits_of(source)
    with Bar("Checking", sum(map(len, splits.values())), source.unit) as bar:
        for split, images in splits.items():
            report.images[split] = len(images)
            if (images.labels >= 0).any():
                report.classes[split] = _class_counts(source, images)
            digests = np.zeros((len(images), _DIGEST // 8), np.uint64)
            report.digests[split] = digests
            for i, (digest, found) in enumerate(bar.over(sweep(images, work, workers=workers))):
                digests[i] = np.frombuffer(digest, np.uint64)
                for kind, detail in found:
                    report.findings.append(Finding(kind, split, images.name(i), detail, i))
    splits.pop("bank", None)  # training images once more
    report.findings.extend(_duplicates(splits, [report.digests[split] for split in splits]))
    return report


def _damaged_shards(root: Path) -> Iterator[Finding]:
    shards = all_shards(load_index(root))
    with Bar("Checking shards", len(shards), "shards") as bar:
        for shard in bar.over(shards):
            problem = size_problem(root, shard)
            if problem is None and sha256_of(root / shard["file"]) != shard["sha256"]:
                problem = "is not what was written: its SHA-256 differs from the index"
            if problem is not None:
                yield Finding("damaged", "", str(root / shard["file"]), f"the shard {problem}")


def _class_counts(source: Source, images: Images) -> dict[str, int]:
    counts = np.bincount(images.labels[images.labels >= 0], minlength=len(source.classes))
    names = source.classes if len(source.classes) >= len(counts) else range(len(counts))
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}


# One sample, in a worker: a digest of its content, zeros if it is unusable, and what was found.

_Examined = tuple[bytes, list[tuple[str, str]]]


def _opened(samples: Images, i: int, augment: Augmentation) -> _Examined:
    """Any sample, by what its views are made of."""
    try:
        data = samples.encoded(i) if isinstance(samples, StoredSamples) else None
        sample = samples.open(i)
        table = augment.prepare([sample], None)  # some content is not read before
    except UnreadableSample as error:
        return bytes(_DIGEST), [(_kind_of(str(error)), str(error))]
    if isinstance(sample, np.ndarray):  # all of it, where a view may have a part
        table = {"sample": sample}
    digest = hashlib.blake2b(data or b"", digest_size=_DIGEST)
    for name, value in sorted(table.items()) if data is None else ():
        digest.update(f"{name} {np.shape(value)}".encode() + np.asarray(value).tobytes())
    return digest.digest(), []


def _examined(images: Images, i: int, tiny: int, max_pixels: int) -> _Examined:
    """An image."""
    data = None
    try:
        data, picture = read(images, i, max_pixels)
        pixels = picture.pixels(reuse=True)
    except UnreadableSample as error:
        return bytes(_DIGEST), [*_wrong_checksum(images, i), (_kind_of(str(error)), str(error))]
    found = [*_wrong_checksum(images, i, data)]
    if (shortest := min(pixels.shape[:2])) < tiny:
        found.append(("tiny", f"{pixels.shape[1]} x {pixels.shape[0]} pixels; {shortest} < {tiny}"))
    if data is not None:
        found.extend(_about_file(data, pixels.shape[2]))
    content = str(pixels.shape).encode() + pixels.tobytes() if data is None else data
    return hashlib.blake2b(content, digest_size=_DIGEST).digest(), found


def _wrong_checksum(images: Images, i: int, data: bytes | None = None) -> Iterator[tuple[str, str]]:
    reader = getattr(images, "reader", None)
    if hasattr(reader, "checksum"):
        number = images.number(i)  # type: ignore[union-attr]
        data = reader.encoded(number) if data is None else data  # type: ignore[union-attr]
        if zlib.crc32(data) != reader.checksum(number):  # type: ignore[union-attr]
            yield "damaged", "its bytes are not what was packed: their CRC-32 differs"


def _kind_of(reason: str) -> str:
    reason = reason.lower()
    for word, kind in (("is empty", "empty"), ("max_pixels", "too large")):
        if word in reason:
            return kind
    return "truncated" if "truncated" in reason or "premature end" in reason else "unreadable"


def _about_file(data: bytes, channels: int) -> Iterator[tuple[str, str]]:
    """Animations, and channels that are converted on reading."""
    expected = "grey" if channels == 1 else "RGB"
    if data[:2] == b"\xff\xd8":  # without Pillow's overhead; its name for RGB is how JPEG keeps it
        colour = _jpeg_colour(data)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images; this one was read
            image = Image.open(io.BytesIO(data))
        if (frames := getattr(image, "n_frames", 1)) > 1:
            yield "animated", f"{frames} frames, of which the first is used"
        colour = _MODES.get(image.mode, image.mode)
        if "transparency" in image.info:
            colour = "alpha"
        elif image.mode == "P":
            colour = expected  # a palette of colours is how small files keep them
        elif image.mode.startswith("I"):
            colour = "grey of 16 bits"
    if colour != expected:
        yield "channels", f"{colour} in a set of {expected} images"


def _jpeg_colour(data: bytes) -> str:
    try:
        colour = simplejpeg.decode_jpeg_header(data)[2]
    except ValueError:
        return "an unusual JPEG"
    return {"YCbCr": "RGB", "Gray": "grey", "YCCK": "CMYK"}.get(colour, str(colour))


# All samples.


def groups_of(digests: np.ndarray) -> Iterator[np.ndarray]:
    """Images of equal content.

    Args:
        digests: (n, 2) uint64; zeros are equal to none.

    Returns:
        Iterator over the rows of each content that two or more have, in ascending order.
    """
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the earliest of equals comes first
    table = digests[order]
    starts = np.flatnonzero(np.r_[True, (table[1:] != table[:-1]).any(1)][: len(table)])
    sizes = np.diff(np.r_[starts, len(table)])
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        if table[start].any():
            yield order[start : start + size]


def _duplicates(splits: dict[str, Images], digests: list[np.ndarray]) -> Iterator[Finding]:
    """Every sample whose content an earlier one has, also across splits."""
    names, starts = list(splits), np.cumsum([0, *map(len, digests)])
    groups = groups_of(np.concatenate(digests))
    for pair in sorted((int(row), int(rows[0])) for rows in groups for row in rows[1:]):
        (split, i), (original, j) = (
            (names[k], int(row - starts[k]))
            for row in pair
            for k in [int(np.searchsorted(starts, row, "right")) - 1]
        )
        detail = f"the same bytes as {splits[original].name(j)}"
        if original != split:
            detail += f", in {original}"
        if splits[split].labels[i] != splits[original].labels[j]:
            detail += ", of another class"
        yield Finding("duplicate", split, splits[split].name(i), detail, i)
