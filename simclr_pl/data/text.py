"""Documents as a source: tokens of lines of text, or of rows of a table.

Symbols: M documents in a set, n tokens of one.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from simclr_pl.data.decode import UnreadableSample
from simclr_pl.data.documents import Documents, Lines
from simclr_pl.data.sources import Reader, Source, StoredSamples, held_out
from simclr_pl.data.text_tables import ParquetRows, TableRows
from simclr_pl.data.tokens import BYTES, encode, load_tokenizer, train_tokenizer, write_whole
from simclr_pl.errors import InputError
from simclr_pl.text_augment import TextAugment

_log = logging.getLogger(__name__)

_SUFFIXES = (".txt", ".csv", ".tsv", ".parquet")
_QUERY_NAMES = ("val", "test", "validation")
_KEPT_TOKENS = 2**24  # in each process: 64 MiB
_TRAINING_BYTES = 2**27  # of text that a tokenizer is trained on: 128 MiB tell the frequent words


def open_documents(
    path: Path, column: str | None, label_column: str | None, max_bytes: int
) -> Documents:
    """Looks through a file once.

    Args:
        path: a .txt, .csv, .tsv or .parquet file.
        column: of a table, that of the texts; by default "text", or the only one.
        label_column: that of the labels.
        max_bytes: of a document.

    Raises:
        InputError: there is no such file or column, or no document in it can be used.
    """
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        what = "which is none" if path.exists() else "which does not exist"
        raise InputError(
            f"`data.source.path` must be a file ({', '.join(_SUFFIXES)}) or a folder with train and test "
            f"files; got {str(path)!r}, {what}. Check the path."
        )
    if path.suffix.lower() == ".txt":
        if column or label_column:
            raise InputError(
                f"`column` and `label_column` must be of a table; got a .txt file, {str(path)!r}. Leave "
                "them out of `data.source`, or give a .csv, .tsv or .parquet file."
            )
        documents: Documents = Lines(path, max_bytes)
    elif path.suffix.lower() == ".parquet":
        documents = ParquetRows(path, column, label_column, max_bytes)
    else:
        documents = TableRows(path, column, label_column, max_bytes)
    if not len(documents):
        reason = f", first {': '.join(documents.left_out[0])}" if documents.left_out else ""
        raise InputError(
            f"a file must hold documents; got none in {str(path)!r} that can be used{reason}. "
            "Check `data.source.path`."
        )
    return documents


class TextFile(Source):
    """Documents of a file, or of a folder with two.

    Understood are .txt files with a document on each line, .csv and .tsv files with a head, .parquet
    files, and a folder with ``train`` and ``test`` or ``val`` of one of these kinds. Texts are UTF-8.
    What is empty, too long, no UTF-8, or without a label where there is a label column, is left out and
    reported once, with its line.

    Args:
        path: the file or folder.
        column: of the texts in a table; by default "text", or the only column of strings.
        label_column: of the classes in a table, numbers or words; by default there are none.
        tokenizer: a tokenizer.json of Hugging Face's tokenizers. If the file does not exist, byte-level
            BPE is trained on the training documents and written there; by default beside the documents.
        vocab_size: tokens of the tokenizer at most; the encoder has the same number.
        query: file of the documents to evaluate on.
        query_fraction: share of the documents kept for evaluation where no such file is given.
        max_bytes: longer documents are not read.

    Raises:
        InputError: a number out of its range; there is no such file, column or usable document; the
            tokenizer's file is of no use or cannot be written.
    """

    channels = 1
    unit = "documents"

    def __init__(
        self,
        path: str,
        column: str | None = None,
        label_column: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 8192,
        query: str | None = None,
        query_fraction: float = 0.1,
        max_bytes: int = 2**20,
    ) -> None:
        if not 0 < query_fraction < 1:
            raise InputError(
                f"`query_fraction` must be within (0, 1); got {query_fraction}. Set "
                "`data.source.query_fraction`."
            )
        for name, value, least in (("vocab_size", vocab_size, BYTES), ("max_bytes", max_bytes, 1)):
            if value < least:
                raise InputError(
                    f"`{name}` must be >= {least}; got {value}. Set `data.source.{name}`."
                )
        self.path = Path(path)
        self.columns = (column, label_column)
        self.vocab_size = vocab_size
        self.query_path = None if query is None else Path(query)
        self.query_fraction = query_fraction
        self.max_bytes = max_bytes
        # A folder has no suffix of its own: "docs.csv" -> "docs.tokenizer.json"
        is_file = self.path.suffix.lower() in _SUFFIXES
        beside = (
            self.path.with_suffix(".tokenizer.json") if is_file else self.path / "tokenizer.json"
        )
        self.tokenizer_path = beside if tokenizer is None else Path(tokenizer)
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Trains the tokenizer where its file is missing."""
        if self.tokenizer_path.is_file():
            return
        documents = self._documents(self._files()[0])
        _log.info("Training a tokenizer of %d tokens for %s", self.vocab_size, self.path)
        chosen = np.arange(len(documents))[:: _stride(documents)]
        if self.query_path is None and self._files()[1] is None:
            chosen = chosen[~held_out(len(documents), self.query_fraction)[chosen]]
        texts = (documents.text(i) for i in chosen.tolist())
        content = train_tokenizer(texts, len(chosen), self.vocab_size)
        write_whole(self.tokenizer_path, content, "data.source.tokenizer")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the file, that every rank and every resumed run reads; see `prepare`."""
        if self._tokenizer is None:
            if not self.tokenizer_path.is_file():
                self.prepare()  # where no trainer has done it
            self._tokenizer = load_tokenizer(self.tokenizer_path, self.vocab_size)
        return self._tokenizer

    def open(self) -> None:
        """Looks through the documents, and reads the tokenizer."""
        tokenizer = self.tokenizer
        train_file, query_file = self._files()
        documents = [self._documents(file) for file in (train_file, query_file) if file is not None]
        self.classes = _sorted_classes(documents)
        self.left_out = [found for each in documents for found in each.left_out]
        sets = [
            StoredSamples(DocumentReader(each, tokenizer), _labels(each, self.classes))
            for each in documents
        ]
        if len(sets) == 2:
            self.train = self.bank = sets[0]
            self.query = sets[1]
            return
        kept = held_out(len(sets[0]), self.query_fraction)
        self.train = self.bank = sets[0].subset(np.flatnonzero(~kept))
        self.query = sets[0].subset(np.flatnonzero(kept))

    def default_augment(self) -> TextAugment:
        """Crops and deletion of tokens."""
        return TextAugment(vocab_size=self.vocab_size)

    def _documents(self, file: Path) -> Documents:
        return open_documents(file, *self.columns, self.max_bytes)

    def _files(self) -> tuple[Path, Path | None]:
        """The files to learn from and to evaluate on."""
        if not self.path.is_dir():
            return self.path, self.query_path
        train = _file_of(self.path, "train")
        if train is None:
            raise InputError(
                f"a folder must hold train{{{','.join(_SUFFIXES)}}}; got {str(self.path)!r} without. "
                "Give a file as `data.source.path`, or another folder."
            )
        found = (_file_of(self.path, name) for name in _QUERY_NAMES)
        return train, self.query_path or next((file for file in found if file), None)


class DocumentReader(Reader):
    """Gives the tokens of documents, and keeps them as long as there is room.

    A byte-level tokenizer takes a millisecond for a kilobyte: a small encoder on a CPU would spend
    a third of its time waiting for it, epoch after epoch.

    Args:
        documents: of a file.
        tokenizer: of Hugging Face's tokenizers.
    """

    def __init__(self, documents: Documents, tokenizer: Any) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self._kept: dict[int, np.ndarray] = {}
        self._room = _KEPT_TOKENS

    def name(self, i: int) -> str:
        """The path and the line."""
        return self.documents.name(i)

    def open(self, i: int) -> np.ndarray:
        """The tokens (n,) int32.

        Raises:
            UnreadableSample: the document cannot be used.
        """
        if (tokens := self._kept.get(i)) is None:
            tokens = encode(self.tokenizer, self.documents.text(i))
            if not len(tokens):
                raise UnreadableSample("the tokenizer finds no token in it")
            if len(tokens) <= self._room:
                self._kept[i] = tokens
                self._room -= len(tokens)
        return tokens

    def encoded(self, i: int) -> bytes:
        """The document itself, in UTF-8."""
        return self.documents.encoded(i)


def _file_of(folder: Path, name: str) -> Path | None:
    files = (folder / f"{name}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _stride(documents: Documents) -> int:
    """1, or more where the file is too large for a tokenizer to need all of it."""
    return max(1, -(-documents.path.stat().st_size // _TRAINING_BYTES))


def _sorted_classes(files: list[Documents]) -> list[str]:
    """The labels of all files, numbers by size and words by the alphabet."""
    values = {value for each in files for value in each.values}
    try:
        return sorted(values, key=int)
    except ValueError:
        return sorted(values)


def _labels(documents: Documents, classes: list[str]) -> np.ndarray:
    """(M,) int64, -1 where there are none."""
    if not documents.values:
        return np.full(len(documents), -1)
    number = {name: i for i, name in enumerate(classes)}
    place = np.array([number[value] for value in documents.values])  # of each value
    labels: np.ndarray = place[documents.classes]
    return labels
