"""Bundles that TensorFlow wrote, read without it; damage to any part is one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tensorflow_files import FOLDER, write

from simclr_pl.commands.tensor_bundle import Bundle, _crc
from simclr_pl.errors import InputError


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    """A checkpoint in two shards, of every kind of tensor."""
    for file in FOLDER.glob("kinds.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "kinds"


def test_tensors_of_every_kind_in_several_shards_are_read(kinds: Path) -> None:
    bundle = Bundle(kinds)
    expected = {
        "a/float": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
        "a/half": np.array([1.5, -2], np.float16),
        "a/bfloat16": np.array([1.5, -2, 0x7F620000], np.float32),
        "a/int64": np.int64(2**40),
        "a/empty": np.zeros((0, 4), np.float32),
        "b/bool": np.array([True, False]),
        "b/double": np.array([[0.1]]),
        "b/int32": np.array([-5], np.int32),
    }
    expected["a/bfloat16"][2] = np.array(0x7F62 << 16, np.uint32).view(np.float32)  # 3e38, rounded
    assert bundle.entries.keys() == {*expected, "b/text"}
    for name, value in expected.items():
        assert bundle.tensor(name).dtype == value.dtype
        np.testing.assert_array_equal(bundle.tensor(name), value)
    assert bundle.text("b/text") == b"x" * 300


def test_the_check_sum_is_crc_32c() -> None:
    assert _crc(0, np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720's table
    parts = _crc(_crc(0, np.frombuffer(b"12345", np.uint8)), np.frombuffer(b"6789", np.uint8))
    assert parts == 0xE3069283


def test_each_byte_of_an_index_is_guarded(kinds: Path) -> None:
    index = kinds.with_suffix(".index")
    content = index.read_bytes()
    before = Bundle(kinds).entries
    for i in range(len(content)):
        index.write_bytes(content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :])
        try:
            assert Bundle(kinds).entries == before  # of the footer's padding and unused block
        except InputError as error:
            assert "must be whole" in str(error)  # noqa: PT017


@pytest.mark.parametrize("size", [0, 47, 100, -1])
def test_a_cut_index_is_one_line(kinds: Path, size: int) -> None:
    index = kinds.with_suffix(".index")
    index.write_bytes(index.read_bytes()[:size])
    with pytest.raises(InputError, match=r"index .* must be whole; got .*kinds\.index"):
        Bundle(kinds)


def test_damaged_numbers_are_named(kinds: Path) -> None:
    for shard, name in (("00000", "a/float"), ("00001", "b/text")):
        bundle = Bundle(kinds)
        entry = bundle.entries[name]
        data = kinds.with_name(f"kinds.data-{shard}-of-00002")
        content = bytearray(data.read_bytes())
        content[entry.offset + entry.size - 1] ^= 1
        data.write_bytes(content)
        with pytest.raises(InputError, match=f"got '{name}' damaged or cut off"):
            bundle.text(name) if name == "b/text" else bundle.tensor(name)
        data.write_bytes(content[: entry.offset + entry.size - 1])
        with pytest.raises(InputError, match=f"got '{name}' damaged or cut off"):
            bundle.text(name) if name == "b/text" else bundle.tensor(name)
        data.unlink()
        with pytest.raises(InputError, match="must lie beside its index"):
            bundle.text(name) if name == "b/text" else bundle.tensor(name)


def test_text_is_no_tensor_and_numbers_are_no_text(kinds: Path) -> None:
    with pytest.raises(InputError, match="must hold numbers of its shape; got 'b/text'"):
        Bundle(kinds).tensor("b/text")
    with pytest.raises(InputError, match="got 'a/half' damaged"):
        Bundle(kinds).text("a/half")


def test_an_index_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must have an index; got .*nothing\.index"):
        Bundle(tmp_path / "nothing")


def test_the_numbers_of_a_whole_network_have_the_sums_that_tensorflow_wrote(tmp_path: Path) -> None:
    bundle = Bundle(write("resnet18", tmp_path / "model.ckpt-1234"))
    for name in bundle.entries:
        bundle.tensor(name)
    assert len(bundle.entries) == 122
