"""Documents of tables: rows of .csv, .tsv and .parquet files.

Symbols: M documents.
"""

import csv
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.documents import Documents, Lines, Scan, fault_of
from simclr_pl.data.sweep import Bar
from simclr_pl.distributed import rank
from simclr_pl.errors import InputError

_BATCH = 4096  # rows of a parquet file that are looked at together


def _columns(
    names: Sequence[str], texts: Sequence[str], column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """The columns of texts and labels, among ``names`` of a table, ``texts`` of them of strings."""
    for option, name in (("column", column), ("label_column", label_column)):
        if name is not None and name not in names:
            raise InputError(
                f"`{option}` must be a column of the table; got {name!r}, where there are "
                f"{', '.join(map(repr, names))}. Set `data.source.{option}`."
            )
    others = [name for name in texts if name != label_column]
    found = column or ("text" if "text" in others else None)
    if found is None and len(others) == 1:
        found = others[0]
    if found is None or found not in texts:
        got = f"{found!r} of another type" if found else f"{len(others)} to choose from"
        raise InputError(
            f"the texts must be a column of strings; got {got}, among {', '.join(map(repr, names))}. "
            "Set `data.source.column`."
        )
    return found, label_column


class TableRows(Lines):
    """The rows of a .csv or .tsv file with a head.

    Args:
        path: the file.
        column: of the texts.
        label_column: of the labels.
        max_bytes: of a row.
    """

    def __init__(
        self,
        path: Path,
        column: str | None,
        label_column: str | None,
        max_bytes: int,
    ) -> None:
        self.wanted = (column, label_column)
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        # For the whole process: csv knows no other, and raises no more than the memory's need
        csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
        super().__init__(path, max_bytes)

    def _reader(self, lines: Iterator[str] | list[str]) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def look(self, scan: Scan) -> None:
        """Looks through the rows.

        Raises:
            InputError: the head cannot be read, or lacks a column.
        """
        try:
            head = next(self._reader(scan), [])
        except csv.Error as error:
            raise InputError(
                f"a table must begin with the names of its columns; got {str(self.path)!r}, line 1: "
                f"{error}. Check `data.source.path`."
            ) from error
        column, label_column = _columns(head, head, *self.wanted)
        self._column = head.index(column)
        label = None if label_column is None else head.index(label_column)
        rows = self._reader(scan)
        while True:
            begin, line = scan.end, scan.line + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                self.keep(line, str(error), None)
                scan.go_on_after(begin, line)  # a quote without its partner takes all that follows
                rows = self._reader(scan)
                continue
            if len(row) != len(head):
                fault = f"it has {len(row)} fields, the head {len(head)}" if row else "it is empty"
                self.keep(line, fault, None)
                continue
            raw = row[self._column].encode("utf-8", "surrogateescape")
            known = None if label is None else row[label].strip()
            if self.keep(line, fault_of(raw, self.max_bytes), known):
                self.place(begin, scan.end)

    def encoded(self, i: int) -> bytes:
        """The text."""
        record = _decoded(super().encoded(i))
        try:
            row = next(self._reader([record]), [])
        except csv.Error as error:
            raise UnreadableSample(str(error)) from error
        if len(row) <= self._column:
            raise UnreadableSample("the file has changed since it was opened")
        return row[self._column].encode("utf-8", "surrogateescape")


class ParquetRows(Documents):
    """The rows of a parquet file, in Arrow's memory.

    Args:
        path: the file.
        column: of the texts.
        label_column: of the labels.
        max_bytes: of a text.

    Raises:
        InputError: it is no parquet file.
    """

    def __init__(
        self,
        path: Path,
        column: str | None,
        label_column: str | None,
        max_bytes: int,
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(path)
        try:
            schema = pq.read_schema(path)
            kinds = {name: schema.field(name).type for name in schema.names}
            texts = [name for name, kind in kinds.items() if _is_text(kind)]
            column, label_column = _columns(schema.names, texts, column, label_column)
            wanted = [column] if label_column is None else [column, label_column]
            table = pq.read_table(path, columns=wanted, memory_map=True)
            # As bytes, for Arrow's strings may be no UTF-8
            self.column, *labels = (
                table[name].cast(pa.large_string()).cast(pa.large_binary()) for name in wanted
            )
        except pa.ArrowException as error:
            raise InputError(
                f"`data.source.path` must be a parquet file that can be read; got {str(path)!r}: "
                f"{error}. Check the file."
            ) from error
        self._row = array("q")
        with Bar(f"Reading {path.name}", len(self.column), "rows", rank() > 0) as bar:
            for first in range(0, len(self.column), _BATCH):
                batch = self.column.slice(first, _BATCH).to_pylist()
                known = [v for c in labels for v in c.slice(first, _BATCH).to_pylist()]
                for i, raw in enumerate(batch):
                    fault = "it is empty" if raw is None else fault_of(raw, max_bytes)
                    label = _decoded(known[i] or b"") if labels else None
                    if self.keep(first + i + 1, fault, label):
                        self._row.append(first + i)
                bar.advance(len(batch))

    def encoded(self, i: int) -> bytes:
        """The text."""
        return self.column[self._row[i]].as_py()  # type: ignore[no-any-return]


def _decoded(raw: bytes) -> str:
    """Text, in which what is not UTF-8 is kept as surrogates."""
    return raw.decode("utf-8", "surrogateescape")


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    checks: tuple[Callable[[Any], bool], ...] = (types.is_string, types.is_large_string)
    return any(check(kind) for check in checks) or str(kind) == "string_view"
