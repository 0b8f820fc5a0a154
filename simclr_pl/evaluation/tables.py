"""Tables on disk, written block by block in constant memory: Parquet and npz.

Symbols: n rows of a block, M rows of the table, E width of a column of vectors.
"""

import json
import os
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simclr_pl.errors import InputError

Block = dict[str, Any]  # (n,) and (n, E) arrays, and lists of n strings, by column
_COPIED = 2**20  # bytes copied at a time


class TableWriter(ABC):
    """Writes a table block by block; the file appears when it is whole.

    Args:
        path: of the file; what is there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
        self._unfinished = Path(self._folder.name, "whole")
        self.rows = 0

    def write(self, block: Block) -> None:
        """Adds the rows of a block; every block has the same columns."""
        self._write(block)
        self.rows += len(next(iter(block.values())))

    def close(self) -> None:
        """Finishes the file and puts it in its place."""
        self._finish()
        os.replace(self._unfinished, self.path)
        self._folder.cleanup()

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._folder.cleanup()

    @abstractmethod
    def _write(self, block: Block) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


def table_writer(path: Path) -> TableWriter:
    """A writer of the format that the suffix says.

    Raises:
        InputError: it is neither .parquet nor .npz.
    """
    return writer_class(path)(path)


def writer_class(path: Path) -> type[TableWriter]:
    """The class that writes the format of a path's suffix.

    Raises:
        InputError: it is neither .parquet nor .npz.
    """
    formats: dict[str, type[TableWriter]] = {".parquet": ParquetWriter, ".npz": NpzWriter}
    if path.suffix not in formats:
        raise InputError(
            f"a table's file must end in {' or '.join(formats)}; got {str(path)!r}. Set `out`."
        )
    return formats[path.suffix]


class ParquetWriter(TableWriter):
    """Parquet: vectors as lists of fixed size, compressed by zstd, one row group for a block."""

    _writer: pq.ParquetWriter | None = None

    def _write(self, block: Block) -> None:
        table = pa.table({name: _column(value) for name, value in block.items()})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._unfinished, table.schema, compression="zstd")
        self._writer.write_table(table)

    def _finish(self) -> None:
        if self._writer is None:
            raise InputError("a table must have rows; got none. Check the data.")
        self._writer.close()

    def discard(self) -> None:
        """Leaves nothing behind."""
        if self._writer is not None:
            self._writer.close()
        super().discard()


def _column(value: Any) -> pa.Array:
    if isinstance(value, list):
        return pa.array(value, pa.string())
    flat = pa.array(np.ascontiguousarray(value).reshape(-1))
    if value.ndim == 1:
        return flat
    return pa.FixedSizeListArray.from_arrays(flat, value.shape[1])


class NpzWriter(TableWriter):
    """A zip of .npy files, as `numpy.load` reads it, without pickled objects.

    The head of a .npy says how many rows follow, which is known at the end only: each column grows in a
    file of its own first.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files: dict[str, BinaryIO] = {}
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def _write(self, block: Block) -> None:
        for name, value in block.items():
            if name not in self._files:
                self._files[name] = open(Path(self._folder.name, f"{name}.column"), "w+b")  # noqa: SIM115
            array = np.asarray(value, np.str_) if isinstance(value, list) else np.asarray(value)
            dtype, _ = self._kinds.setdefault(name, (array.dtype, array.shape[1:]))
            if isinstance(value, list):  # as lines: the width of the longest is known at the end
                width = max(dtype, array.dtype, key=lambda kind: kind.itemsize)
                self._kinds[name] = width, ()
                self._files[name].writelines(f"{json.dumps(text)}\n".encode() for text in value)
            else:
                array.tofile(self._files[name])

    def _finish(self) -> None:
        with zipfile.ZipFile(self._unfinished, "w") as archive:
            for name, file in self._files.items():
                dtype, inner = self._kinds[name]
                info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                if dtype.kind == "U":  # padded: nearly all of it is zeros
                    info.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(info, "w", force_zip64=True) as member:
                    head = {
                        "descr": np.lib.format.dtype_to_descr(dtype),
                        "fortran_order": False,
                        "shape": (self.rows, *inner),
                    }
                    np.lib.format.write_array_header_1_0(member, head)
                    file.seek(0)
                    if dtype.kind == "U":
                        for line in file:
                            member.write(np.array(json.loads(line), dtype).tobytes())
                    else:
                        shutil.copyfileobj(file, member, _COPIED)
        self._close_columns()

    def _close_columns(self) -> None:
        for file in self._files.values():
            file.close()

    def discard(self) -> None:
        """Leaves nothing behind."""
        self._close_columns()
        super().discard()
