"""Tokenizers: read, trained to the same bytes anywhere, and refused where they do not fit."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from simclr_pl import InputError
from simclr_pl.data import tokens
from simclr_pl.data.tokens import encode, load_tokenizer, train_tokenizer, write_whole

TEXTS = [f"the {i} quick foxes and {i * 7} lazy dogs, naïve or not" for i in range(60)]


def test_training_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = f"""
import sys
from simclr_pl.data.tokens import train_tokenizer
sys.stdout.buffer.write(train_tokenizer(iter({TEXTS!r}), 60, 300))
"""
    ours = train_tokenizer(iter(TEXTS), 60, 300)
    options = {"env": {"PYTHONHASHSEED": "77", "PATH": ""}, "capture_output": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], **options)
    assert done.stdout == ours
    assert not done.stderr


def test_any_text_is_encoded_and_letters_are_small_ones(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(train_tokenizer(TEXTS, len(TEXTS), 300))
    tokenizer = load_tokenizer(file, 300)
    for text in ("quick foxes", "漢字 ☃ \x07", "naïve"):
        numbers = encode(tokenizer, text)
        assert numbers.dtype == np.int32
        assert tokenizer.decode(numbers.tolist()).strip() == text
    assert encode(tokenizer, "Quick FOXES").tolist() == encode(tokenizer, "quick foxes").tolist()
    first, second = encode(tokenizer, "quick"), encode(tokenizer, "the quick")
    assert second[-len(first) :].tolist() == first.tolist()


def test_special_tokens_truncation_and_padding_of_a_file_are_left_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"[CLS]": 0, "a": 1, "b": 2, "[UNK]": 7}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", 8)
    assert encode(loaded, "a b c b").tolist() == [1, 2, 7, 2]
    with pytest.raises(
        InputError, match=r"at most `vocab_size` 7 tokens; got 8 in .* to 8, or remove"
    ):
        load_tokenizer(tmp_path / "tokenizer.json", 7)


def test_a_file_of_something_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": "none"}))
    with pytest.raises(InputError, match=r"`tokenizer` must be a tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json", 300)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"`pip install 'simclr_pl\[text\]'`"):
        tokens._library()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "tokenizer.json"
    write_whole(file, b"one", "data.source.tokenizer")
    write_whole(file, b"two", "data.source.tokenizer")
    assert file.read_bytes() == b"two"
    assert [f.name for f in file.parent.iterdir()] == ["tokenizer.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can be written to; got .*Set `data.source.tokenizer`"):
        write_whole(tmp_path / "file" / "tokenizer.json", b"", "data.source.tokenizer")
