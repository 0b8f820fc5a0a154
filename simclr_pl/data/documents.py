"""Documents of a file, first the lines of one. None is kept in memory as text.

Symbols: M documents.
"""

import csv
import os
from abc import ABC, abstractmethod
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.sweep import Bar
from simclr_pl.distributed import rank

_MARK = b"\xef\xbb\xbf"  # some programs begin UTF-8 with it


class Documents(ABC):
    """The usable documents of a file.

    Attributes:
        path: the file.
        lines: (M,) int64, the line that each begins in, or its row in a parquet file, from 1.
        classes: (M,) int64, numbers in ``values``; empty where there is no label column.
        values: the labels that occur, in the order of their first documents.
        left_out: name and reason of each document that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out: list[tuple[str, str]] = []
        self.values: dict[str, int] = {}
        self._lines, self._classes = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lines(self) -> np.ndarray:
        """(M,) int64."""
        return np.frombuffer(self._lines, np.int64)

    @property
    def classes(self) -> np.ndarray:
        """(M,) int64, or (0,)."""
        return np.frombuffer(self._classes, np.int64)

    def name(self, i: int) -> str:
        """The path and the line of document ``i``."""
        return f"{self.path}:{self._lines[i]}"

    @abstractmethod
    def encoded(self, i: int) -> bytes:
        """The text of document ``i`` in UTF-8.

        Raises:
            UnreadableSample: it cannot be read any more.
        """

    def text(self, i: int) -> str:
        """The text of document ``i``.

        Raises:
            UnreadableSample: it cannot be used.
        """
        raw = self.encoded(i)
        if fault := fault_of(raw, len(raw)):
            raise UnreadableSample(fault)
        return raw.decode().strip()

    def keep(self, line: int, fault: str | None, label: str | None) -> bool:
        """Whether a document is usable; keeps its line and class, or says why it is not.

        Args:
            line: that it begins in.
            fault: what is wrong with it, or None.
            label: "" where it is missing, None where there are none.
        """
        if fault is None and label == "":
            fault = "it has no label"
        if fault is None and label is not None and not _is_utf8(label):
            fault = "its label is not UTF-8"
        if fault is not None:
            self.left_out.append((f"{self.path}:{line}", fault))
            return False
        self._lines.append(line)
        if label is not None:
            self._classes.append(self.values.setdefault(label, len(self.values)))
        return True


def fault_of(raw: bytes, max_bytes: int) -> str | None:
    """Why a text cannot be used, or None."""
    if len(raw) > max_bytes:
        return too_long(max_bytes)
    if b"\0" in raw:
        return f"byte {raw.index(0) + 1} is NUL: it is no text"
    try:
        return None if raw.decode().strip() else "it is empty"
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} is not UTF-8"


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text)


def too_long(max_bytes: int) -> str:
    """What `fault_of` says of long texts."""
    return f"it is longer than `max_bytes` {max_bytes:,}"


class Scan:
    """Lines of a file, one after the other; one that is too long raises, and the next call goes on.

    Attributes:
        begin, end: of the last line in the file, in bytes, its line end included.
        line: its number, from 1.
    """

    def __init__(self, file: BinaryIO, max_bytes: int, bar: Bar) -> None:
        self.file, self.max_bytes, self.bar = file, max_bytes, bar
        self.begin = self.line = 0
        self.end = len(_MARK) if file.read(len(_MARK)) == _MARK else 0
        file.seek(self.end)

    def __iter__(self) -> "Scan":
        return self

    def __next__(self) -> str:
        """The line; what is not UTF-8 is kept as surrogates."""
        return self.raw().decode("utf-8", "surrogateescape")

    def raw(self) -> bytes:
        """The line's bytes."""
        limit = self.max_bytes + 2  # with its end
        raw = self.file.readline(limit)
        if not raw:
            raise StopIteration
        self.begin, self.end, self.line = self.end, self.end + len(raw), self.line + 1
        whole = len(raw) < limit or raw.endswith(b"\n")
        part = raw
        while not part.endswith(b"\n") and (part := self.file.readline(limit)):
            self.end += len(part)
        self.bar.advance(self.end - self.begin)
        if not whole:
            raise csv.Error(too_long(self.max_bytes))
        return raw

    def go_on_after(self, begin: int, line: int) -> None:
        """Goes back to the line after the one of that place and number."""
        self.file.seek(begin)
        self.end, self.line = begin, line - 1
        with suppress(csv.Error):
            self.raw()


class Lines(Documents):
    """The lines of a text file.

    The file is read where a document is wanted; kept are the places, 24 bytes a document. Reading by
    place shares the pages of the file among all workers and ranks as a memory map does, and a file
    that was cut in the meantime is an error of its documents, not the end of the process.

    Args:
        path: the file.
        max_bytes: of a line.
    """

    unit = "lines"

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(path)
        self.max_bytes = max_bytes
        self._begins, self._ends = array("q"), array("q")
        self._file: int | None = None
        with (
            open(path, "rb") as file,
            Bar(f"Reading {path.name}", os.stat(path).st_size, "bytes", rank() > 0) as bar,
        ):
            self.look(Scan(file, max_bytes, bar))

    def look(self, scan: Scan) -> None:
        """Looks through the file."""
        while True:
            try:
                raw = scan.raw()
            except StopIteration:
                return
            except csv.Error as error:
                self.keep(scan.line, str(error), None)
                continue
            if self.keep(scan.line, fault_of(raw.rstrip(b"\r\n"), self.max_bytes), None):
                self.place(scan.begin, scan.end)

    def place(self, begin: int, end: int) -> None:
        """Notes where a usable document is, in bytes."""
        self._begins.append(begin)
        self._ends.append(end)

    def encoded(self, i: int) -> bytes:
        """The line."""
        begin, end = self._begins[i], self._ends[i]
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
            raw = os.pread(self._file, end - begin, begin)
        except OSError as error:
            raise UnreadableSample(error.strerror or str(error)) from error
        if len(raw) < end - begin:
            raise UnreadableSample("the file has been cut since it was opened")
        return raw.rstrip(b"\r\n")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a process of its own opens it anew
