"""Packed sets in an object store, in litdata's format.

Chunks are written by litdata and fetched by its clients, so `litdata.StreamingDataset` reads them, too.
Here a chunk in the cache is memory-mapped and any of its images read in place.

Symbols: M images in a set, n in a chunk.
"""

import json
import mmap
import os
import shutil
import struct
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simclr_pl.data.decode import MAX_PIXELS
from simclr_pl.data.shards import (
    INDEX,
    Row,
    check_sizes,
    load_index,
)
from simclr_pl.data.sources import EncodedReader, Source, StoredSamples
from simclr_pl.durable import publish, temporary_of
from simclr_pl.errors import InputError

_INDEX_OF = "{}/index.json"  # of a split; litdata's
_LABELS_OF = "{}/labels.npy"  # (M,) int64; ours, for litdata keeps labels inside the chunks


class StreamedShards(Source):
    """A folder in an object store that `simclr data pack --format litdata` made.

    A chunk is fetched whole when its first image is asked for, and stays in the cache. Training takes
    images in a random order, so the first epoch fetches everything within its first steps, and the
    cache must have room for the whole set on each machine; after that, an image costs what it costs in
    `Shards`. (By its own random access, `litdata.StreamingDataset` takes 3.0 ms an image, or fetches
    each image by a request of its own.) Where the set can be copied to a local disk beforehand, do that
    and use `Shards`.

    Args:
        root: ``s3://...``, ``gs://...``, or a folder. Credentials are found as the store's own tools do.
        cache_dir: a local folder for the chunks; may be left out if ``root`` is a folder, which is then
            read in place.
        storage_options: for the store's client, as litdata takes them, e.g. ``endpoint_url``.
        max_pixels: larger images are taken for decompression bombs and not read.

    Raises:
        InputError: litdata is missing, or ``cache_dir`` where it is needed; on opening, if ``root`` holds
            no such set or cannot be read.
    """

    def __init__(
        self,
        root: str,
        cache_dir: str | None = None,
        storage_options: dict[str, Any] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if cache_dir is None and "://" in root:
            raise InputError(
                f"an object store needs a local folder for its chunks; got root {root!r} and no "
                "`cache_dir`. Set `data.source.cache_dir`."
            )
        if "://" in root:
            _litdata()
        self.root, self.cache_dir = root.rstrip("/"), cache_dir
        self.storage_options, self.max_pixels = storage_options, max_pixels

    def open(self) -> None:
        """Fetches the index and the labels."""
        store = _Store(self.root, self.root, self.storage_options)
        if self.cache_dir is not None:
            private = Path(self.cache_dir, f".{os.getpid()}")  # the store's may have changed
            store = _Store(self.root, str(private), self.storage_options)
            index = load_index(Path(store.fetch(INDEX)).parent)
            shutil.rmtree(private)
            cache = _within(self.cache_dir, index["fingerprint"][:16])
            store = _Store(self.root, cache, self.storage_options)
        else:
            index = load_index(Path(self.root))
        if index["format"] != "litdata":
            raise InputError(
                f"`StreamedShards` reads sets packed with `--format litdata`; got {index['format']!r} "
                f"in '{self.root}'. Use `Shards`."
            )
        if self.cache_dir is None:
            check_sizes(Path(self.root), index)
        self.channels, self.classes = index["channels"], index["classes"]
        self.fingerprint = index["fingerprint"]
        sets = {
            split: self._images(store, split, shards) for split, shards in index["splits"].items()
        }
        self.train, self.query = sets["train"], sets["query"]
        self.bank = sets.get("bank", self.train)

    def _images(self, store: "_Store", split: str, shards: list[dict[str, Any]]) -> StoredSamples:
        labels = np.load(store.fetch(_LABELS_OF.format(split)))
        return StoredSamples(ChunkReader(store, shards, self.channels, self.max_pixels), labels)


def _within(folder: str, name: str) -> str:
    """The path of a name that an index gives, in a folder of ours.

    Raises:
        InputError: it leads out of the folder.
    """
    path = os.path.join(folder, name)
    if os.path.relpath(path, folder).startswith(os.pardir):
        raise InputError(
            f"the files of a packed set must lie in its folder; got {name!r} from its index. Do not "
            "trust this set."
        )
    return path


class _Store:
    """Files of the set, each fetched when it is first asked for."""

    def __init__(self, root: str, local: str, options: dict[str, Any] | None) -> None:
        self.root, self.local, self.options = root, local, options
        self._client: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def fetch(self, name: str) -> str:
        """The local path of a file.

        Raises:
            InputError: it cannot be fetched, or the index names one outside of the set.
        """
        local = _within(self.local, name)
        if self.local == self.root or os.path.exists(local):
            return local
        from filelock import FileLock

        os.makedirs(os.path.dirname(local), exist_ok=True)
        with FileLock(f"{local}.lock"):
            if not os.path.exists(local):
                self._download(name, local)
        return local

    def _download(self, name: str, local: str) -> None:
        temporary, address = f"{local}.tmp", f"{self.root}/{name}"
        try:
            with open(temporary, "wb") as file:
                if "://" in self.root:
                    # not download_file: obstore, which it prefers, survives no fork and takes no http
                    self._downloader().download_fileobj(address, file)
                else:
                    with open(address, "rb") as original:
                        shutil.copyfileobj(original, file)
            os.replace(temporary, local)
        except Exception as error:  # each store's client has its own kinds
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else "no reason given"
            raise InputError(
                f"`data.source.root` must be readable; got {type(error).__name__} for {address!r}: "
                f"{reason}. Check the address and the credentials."
            ) from error

    def _downloader(self) -> Any:
        if self._client is None or self._client[0] != os.getpid():  # clients do not survive a fork
            _litdata()
            from litdata.streaming.downloader import get_downloader

            self._client = os.getpid(), get_downloader(self.root, self.local, [], self.options)
        return self._client[1]


class ChunkReader(EncodedReader):
    """Reads the images of one split, by number.

    Args:
        store: where the chunks are.
        shards: of the split, from the index.
        channels: 3 for RGB, 1 for grey.
        max_pixels: of one image.
    """

    def __init__(
        self,
        store: _Store,
        shards: Sequence[dict[str, Any]],
        channels: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(channels, max_pixels)
        self.store, self.files = store, [shard["file"] for shard in shards]
        self._starts = np.cumsum([0, *(shard["count"] for shard in shards)]).tolist()
        self._chunks: dict[int, mmap.mmap] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": {}}

    def _item(self, i: int) -> tuple[memoryview, tuple[int, ...]]:
        """The bytes of item ``i``, and where its four parts end in them.

        A chunk is n as uint32, n + 1 offsets as uint32, and the items; an item is the sizes of its parts
        as uint32, and the parts (litdata's writer.py and item_loader.py).
        """
        number = bisect_right(self._starts, i) - 1
        chunk = self._chunk(number)
        start, stop = struct.unpack_from("<2I", chunk, 4 + 4 * (i - self._starts[number]))
        item = memoryview(chunk)[start:stop]
        ends = np.cumsum([16, *struct.unpack_from("<4I", item)]).tolist()
        return item, tuple(ends)

    def _chunk(self, number: int) -> mmap.mmap:
        if (chunk := self._chunks.get(number)) is None:
            with open(self.store.fetch(self.files[number]), "rb") as file:
                chunk = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._chunks[number] = chunk
        return chunk

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image ``i``."""
        item, ends = self._item(i)
        return bytes(item[ends[0] : ends[1]])

    def path(self, i: int) -> str:
        """The path of image ``i`` in the set that was packed."""
        item, ends = self._item(i)
        return str(item[ends[2] : ends[3]], "utf-8", "replace")

    def name(self, i: int) -> str:
        """That path, and the chunk and row where the image lies now."""
        number = bisect_right(self._starts, i) - 1
        return f"{self.path(i)} ({self.files[number]}, row {i - self._starts[number]})"

    def checksum(self, i: int) -> int:
        """The CRC-32 that the bytes of image ``i`` had when they were packed."""
        item, ends = self._item(i)
        return int(struct.unpack_from("<q", item, ends[3])[0])


class LitdataChunks:
    """How `pack` writes and finds shards of this format.

    Beside each chunk lies a note of what is in it, until all chunks are there.
    """

    def __init__(self) -> None:
        _litdata()

    @staticmethod
    def name(split: str, number: int) -> str:
        """Of a chunk's file in the packed folder."""
        return f"{split}/chunk-0-{number}.bin"

    @staticmethod
    def write(file: Path, rows: Sequence[Row], header: dict[str, Any]) -> None:
        """Writes one chunk, durably and at once, and before it its note.

        Args:
            file: where.
            rows: its images, at least one.
            header: goes into the note.
        """
        from litdata.streaming.writer import BinaryWriter

        temporary = temporary_of(file)
        writer = BinaryWriter(str(temporary), chunk_size=len(rows))
        for i, row in enumerate(rows):
            writer.add_item(i, row)  # tuples: of dicts litdata makes Arrow files
        (made,) = writer.done()
        (chunk,) = json.loads((temporary / f"0.{INDEX}").read_text())["chunks"]
        chunk["filename"] = file.name
        note = {
            "header": header,
            "chunk": chunk,
            "config": {**writer.get_config(), "chunk_size": None},
            "labels": [row[1] for row in rows],
        }
        temporary_of(_note_of(file)).write_text(json.dumps(note))
        publish(temporary_of(_note_of(file)), _note_of(file))
        publish(Path(made), file)
        shutil.rmtree(temporary)

    @staticmethod
    def header(file: Path) -> dict[str, Any] | None:
        """What `write` was given as the header; None where there is no finished chunk."""
        try:
            note = json.loads(_note_of(file).read_text())
            whole = file.stat().st_size == note["chunk"]["chunk_bytes"]
            return note["header"] if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @staticmethod
    def join(out: Path, index: dict[str, Any]) -> None:
        """Writes litdata's index and the labels of each split."""
        for split, shards in index["splits"].items():
            notes = [json.loads(_note_of(out / shard["file"]).read_text()) for shard in shards]
            listing = {
                "chunks": [note["chunk"] for note in notes],
                "config": notes[0]["config"],
                # litdata has the time; a cache asks only for change
                "updated_at": index["fingerprint"],
            }
            file = out / _INDEX_OF.format(split)
            temporary_of(file).write_text(json.dumps(listing, sort_keys=True))
            publish(temporary_of(file), file)
            file = out / _LABELS_OF.format(split)
            with open(temporary_of(file), "wb") as stream:
                np.save(stream, np.array([label for n in notes for label in n["labels"]], np.int64))
            publish(temporary_of(file), file)

    @staticmethod
    def tidy(out: Path, finished: bool) -> None:
        """Deletes what a killed pack was writing, and the notes once the index is there."""
        for split in ("train", "query", "bank"):
            for rest in (out / split).glob(".*.tmp"):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
            for note in (out / split).glob(".chunk-*.json") if finished else ():
                note.unlink()


def _note_of(file: Path) -> Path:
    return file.with_name(f".{file.stem}.json")


def _litdata() -> None:
    """Makes sure that litdata is there.

    Raises:
        InputError: it is not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its dependencies
            import litdata  # noqa: F401
    except ImportError as error:
        raise InputError(
            "sets in object stores need litdata; got none. Run: pip install 'simclr_pl[streaming]'"
        ) from error
