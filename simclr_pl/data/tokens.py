"""From texts to numbers of tokens, by a `tokenizer.json` of Hugging Face's tokenizers.

Symbols: n tokens of a document.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from simclr_pl.data.sweep import Bar
from simclr_pl.durable import publish
from simclr_pl.errors import InputError

BYTES = 256  # tokens that byte-level BPE starts from


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """Reads a tokenizer.

    Args:
        path: its JSON file.
        vocab_size: tokens that it has at most.

    Raises:
        InputError: the file holds no tokenizer, it has more tokens, or the library is missing.
    """
    library = _library()
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise InputError(
            f"`tokenizer` must be a tokenizer.json of Hugging Face's tokenizers; got {str(path)!r}: "
            f"{error}. Set `data.source.tokenizer`, or remove the file to have one trained."
        ) from error
    # Of the numbers, not of the tokens: some files leave numbers out
    count = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if count > vocab_size:
        raise InputError(
            f"a tokenizer must have at most `vocab_size` {vocab_size:,} tokens; got {count:,} in "
            f"{str(path)!r}. Set `vocab_size` of `data.source` and `model.encoder` to {count}, or remove "
            "the file to have one trained."
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """The numbers of a text's tokens (n,) int32, without special ones."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def train_tokenizer(texts: Iterable[str], count: int, vocab_size: int) -> bytes:
    """Trains byte-level BPE (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    Letters are taken as small ones. Equal texts give equal bytes, in any process.

    Args:
        texts: documents.
        count: of them, for the bar.
        vocab_size: tokens at most, 256 of them for the single bytes.

    Returns:
        The content of a tokenizer.json.

    Raises:
        InputError: the library is missing.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    normalizers = library.normalizers
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A space before the first word, too: it is the same word anywhere
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # the library's own bar writes empty lines to where output goes
    )
    with _one_thread(), Bar("Training the tokenizer", count, "documents") as bar:
        tokenizer.train_from_iterator(bar.over(texts), trainer, count)
    return str(tokenizer.to_str(pretty=True)).encode()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The library's own threads would make it warn in every worker that is forked later."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def write_whole(path: Path, content: bytes, option: str) -> None:
    """Writes a file that is at all times the old or the new one, also where several processes write it.

    Args:
        path: the file; its folder is made where it is missing.
        content: of it.
        option: the one that says where it lies, for the message.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(content)
        os.chmod(file.name, 0o644)  # it is the owner's alone at first
        publish(Path(file.name), path)
    except OSError as error:
        raise InputError(
            f"{path.name} must be written to a folder that can be written to; got "
            f"{str(path.parent)!r}: {error.strerror}. Set `{option}`."
        ) from error


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise InputError(
            "text needs the package tokenizers; it is not installed. Run "
            "`pip install 'simclr_pl[text]'`."
        ) from error
    return tokenizers
