"""Packed sets: a folder of Arrow files, read by memory map.

A packed folder holds ``<split>-<number>.arrow`` and ``index.json``. Each shard is an uncompressed
Arrow IPC file of one record batch, so that an image is a slice of the mapped file: columns ``image``
(large_binary, the encoded bytes), ``label`` (int64), ``path`` (string) and ``crc32`` (uint32, of
``image``). A shard's schema metadata says what it was packed from, which part of the listing it covers
and which images of that part are missing from it: a pack can be resumed from the shards alone.

Symbols: M images in a set, n in a shard.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simclr_pl.data.decode import MAX_PIXELS
from simclr_pl.data.sources import EncodedReader, Source, StoredSamples
from simclr_pl.durable import publish, temporary_of
from simclr_pl.errors import InputError

FORMAT_VERSION = 1
INDEX = "index.json"

Row = tuple[bytes, int, str, int]  # encoded image, label, path, crc32 of the image


class Shards(Source):
    """A folder that `simclr data pack` made: the quickest source of images that do not fit into memory.

    The files are memory-mapped: any image in any order costs about 0.01 ms when the operating system has
    the page in memory, and workers and ranks of one machine share those pages.

    Args:
        root: the packed folder.
        max_pixels: larger images are taken for decompression bombs and not read.

    Raises:
        InputError: on opening, if the folder is not packed, or a shard is missing, of a wrong size or
            damaged.
    """

    def __init__(self, root: str, max_pixels: int = MAX_PIXELS) -> None:
        self.root = Path(root)
        self.max_pixels = max_pixels

    @cached_property
    def channels(self) -> int:  # type: ignore[override]
        """Of the packed images, before the set is opened, too."""
        return int(load_index(self.root)["channels"])

    def open(self) -> None:
        """Reads the index and the labels, and compares the sizes of all shards with the index."""
        index = load_index(self.root)
        if index["format"] != "arrow":
            raise InputError(
                f"`Shards` reads sets packed with `--format arrow`; got {index['format']!r} in "
                f"'{self.root}'. Use `StreamedShards`."
            )
        check_sizes(self.root, index)
        self.classes = index["classes"]
        self.fingerprint = index["fingerprint"]
        self.train = self.bank = self._images(index["splits"]["train"])
        self.query = self._images(index["splits"]["query"])
        if "bank" in index["splits"]:
            self.bank = self._images(index["splits"]["bank"])

    def _images(self, shards: list[dict[str, Any]]) -> StoredSamples:
        files = [shard["file"] for shard in shards]
        counts = [shard["count"] for shard in shards]
        reader = ShardReader(str(self.root), files, counts, self.channels, self.max_pixels)
        return StoredSamples(reader, reader.labels())


class ShardReader(EncodedReader):
    """Reads the images of one split, by number.

    Each process maps a shard when it first needs it; a pickled reader carries no map along.

    Args:
        root: the packed folder.
        files: names of the shards, in order.
        counts: images of each.
        channels: 3 for RGB, 1 for grey.
        max_pixels: of one image.
    """

    def __init__(
        self,
        root: str,
        files: Sequence[str],
        counts: Sequence[int],
        channels: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(channels, max_pixels)
        self.root, self.files, self.counts = root, list(files), list(counts)
        self._starts = np.cumsum([0, *counts]).tolist()
        self._shards: dict[int, _Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def _at(self, i: int) -> tuple["_Shard", int]:
        number = bisect_right(self._starts, i) - 1
        return self._shard(number), i - self._starts[number]

    def _shard(self, number: int) -> "_Shard":
        if (shard := self._shards.get(number)) is None:
            shard = _Shard(os.path.join(self.root, self.files[number]), self.counts[number])
            self._shards[number] = shard
        return shard

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image ``i``."""
        shard, row = self._at(i)
        return shard.image(row)

    def path(self, i: int) -> str:
        """The path of image ``i`` in the set that was packed."""
        shard, row = self._at(i)
        return shard.path(row)

    def name(self, i: int) -> str:
        """That path, and the shard and row where the image lies now."""
        number = bisect_right(self._starts, i) - 1
        row = i - self._starts[number]
        return f"{self.path(i)} ({self.files[number]}, row {row})"

    def checksum(self, i: int) -> int:
        """The CRC-32 that the bytes of image ``i`` had when they were packed."""
        shard, row = self._at(i)
        return int(shard.crc32[row])

    def labels(self) -> np.ndarray:
        """(M,) int64."""
        parts = [self._shard(k).labels for k in range(len(self.files))]
        return np.concatenate([np.zeros(0, np.int64), *parts])


class _Shard:
    """One mapped file.

    The buffers are sliced here, not by Arrow, which would trust offsets of a damaged file and crash.
    """

    def __init__(self, file: str, count: int) -> None:
        import pyarrow as pa

        try:
            with pa.memory_map(file) as mapped:  # the buffers keep the map, not a file descriptor
                batch = pa.ipc.open_file(mapped).get_batch(0)
            image, label, path, crc32 = (batch.column(name).buffers() for name in COLUMNS)
            self._image_ends = np.frombuffer(image[1], np.int64, count + 1)
            self._path_ends = np.frombuffer(path[1], np.int32, count + 1)
            self.labels = np.frombuffer(label[1], np.int64, count)
            self.crc32 = np.frombuffer(crc32[1], np.uint32, count)
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"a shard must be an Arrow file of {count} images; got {file!r}: {reason}. Delete it and "
                "pack again: only it is made anew."
            ) from error
        self._images, self._paths = memoryview(image[2]), memoryview(path[2])

    def image(self, row: int) -> bytes:
        return bytes(self._images[self._image_ends[row] : self._image_ends[row + 1]])

    def path(self, row: int) -> str:
        return str(self._paths[self._path_ends[row] : self._path_ends[row + 1]], "utf-8", "replace")


# Writing.

COLUMNS = ("image", "label", "path", "crc32")


class ArrowFiles:
    """How `pack` writes and finds shards of this format."""

    @staticmethod
    def name(split: str, number: int) -> str:
        """Of a shard's file in the packed folder."""
        return f"{split}-{number:05d}.arrow"

    @staticmethod
    def write(file: Path, rows: Sequence[Row], header: dict[str, Any]) -> None:
        """Writes one shard, durably and at once: the file is whole or not there.

        Args:
            file: where.
            rows: its images, at least one.
            header: goes into the schema's metadata.
        """
        import pyarrow as pa

        types = (pa.large_binary(), pa.int64(), pa.string(), pa.uint32())
        fields = [pa.field(n, t, nullable=False) for n, t in zip(COLUMNS, types, strict=True)]
        schema = pa.schema(fields, {"simclr_pl": json.dumps(header, sort_keys=True)})
        columns = zip(*rows, strict=True)
        arrays = [pa.array(list(c), t) for c, t in zip(columns, types, strict=True)]
        temporary = temporary_of(file)
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        publish(temporary, file)

    @staticmethod
    def header(file: Path) -> dict[str, Any] | None:
        """What `write` was given as the header; None where there is no readable shard."""
        import pyarrow as pa

        try:
            with pa.memory_map(str(file)) as mapped:
                metadata = pa.ipc.open_file(mapped).schema.metadata
            return json.loads(metadata[b"simclr_pl"])  # type: ignore[no-any-return]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return None

    @staticmethod
    def join(out: Path, index: dict[str, Any]) -> None:
        """Nothing is left to do once all shards are there."""

    @staticmethod
    def tidy(out: Path, finished: bool) -> None:
        """Deletes what a killed pack was writing."""
        for rest in out.glob(".*.arrow.tmp"):
            rest.unlink()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# The index.


def write_index(root: Path, index: dict[str, Any]) -> None:
    """Writes ``index.json``, durably and at once; a folder without it is not yet packed."""
    file = root / INDEX
    temporary_of(file).write_text(json.dumps(index, indent=1) + "\n")
    publish(temporary_of(file), file)


def is_packed(root: Path) -> bool:
    """Whether a folder is packed."""
    try:
        return "simclr_pl" in json.loads((root / INDEX).read_text())
    except (OSError, ValueError, TypeError):
        return False


def load_index(root: Path) -> dict[str, Any]:
    """Reads ``index.json``.

    Returns:
        "simclr_pl" (the format's version), "format" ("arrow" or "litdata"), "fingerprint", "channels",
        "classes", "options", "splits" (for each, a list of shards with "file", "count", "bytes" and
        "sha256") and "skipped" (a list of "split", "path" and "reason").

    Raises:
        InputError: there is none, or it is not ours, or of a later version.
    """
    if not is_packed(root):
        what = "has no index.json of a finished pack" if root.is_dir() else "does not exist"
        raise InputError(
            f"`data.source.root` must be a packed folder; got '{root}', which {what}. Make one with "
            "`simclr data pack`."
        )
    index = json.loads((root / INDEX).read_text())
    if index["simclr_pl"] != FORMAT_VERSION:
        raise InputError(
            f"a packed folder must have format {FORMAT_VERSION}; got {index['simclr_pl']} in '{root}'. "
            "Pack it again, or use the version of simclr_pl that made it."
        )
    return index  # type: ignore[no-any-return]


def check_sizes(root: Path, index: dict[str, Any]) -> None:
    """Compares the files with the index.

    Raises:
        InputError: one is missing or of another size.
    """
    for shard in all_shards(index):
        if (problem := size_problem(root, shard)) is not None:
            raise InputError(
                f"every shard must be as the index says; got '{root / shard['file']}', which {problem}. "
                "Copy it again, or delete it and run the same `simclr data pack`: only it is made anew."
            )


def all_shards(index: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards of all splits."""
    return [shard for shards in index["splits"].values() for shard in shards]


def size_problem(root: Path, shard: dict[str, Any]) -> str | None:
    """What is wrong with a shard's size, if anything."""
    try:
        size = os.stat(root / shard["file"]).st_size
    except OSError:
        return "is missing"
    return None if size == shard["bytes"] else f"has {size:,} bytes for {shard['bytes']:,}"
