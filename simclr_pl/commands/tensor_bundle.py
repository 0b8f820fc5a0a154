"""TensorFlow's checkpoints ("tensor bundles"), read without TensorFlow.

A bundle is an index, `NAME.index`, and one or more files of numbers, `NAME.data-00000-of-00001`. The
index is a sorted table in LevelDB's format: blocks of entries, each a name and a protocol buffer that
says type, shape, place and check sum (tensorflow/core/protobuf/tensor_bundle.proto). All sums are
checked.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simclr_pl.cpu import compiled
from simclr_pl.errors import InputError

_MAGIC = 0xDB4775248B80FB57
_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 19: "<f2"}
_STRING, _BFLOAT16 = 7, 14


@dataclass
class Entry:
    """Where a tensor lies.

    Attributes:
        dtype: TensorFlow's number of its type.
        shape: of the tensor.
        shard: of the bundle's data files.
        offset: of its first byte there.
        size: bytes.
        checksum: of these, masked.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


class Bundle:
    """A checkpoint of TensorFlow.

    Args:
        prefix: the path without `.index`.

    Attributes:
        entries: where each tensor lies, by name.

    Raises:
        InputError: the index is missing, damaged, or of a kind that TensorFlow no longer writes.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = prefix.with_name(prefix.name + ".index")
        try:
            table = dict(_table(index.read_bytes()))
            header = message_fields(table.pop(b""))
            self._shards = _number(header, 1, 1)
            if _number(header, 2) != 0:
                raise ValueError("its numbers are big-endian")
            self.entries = {name.decode(): _entry(value) for name, value in table.items()}
        except OSError as error:
            raise InputError(
                f"a checkpoint of TensorFlow must have an index; got {str(index)!r}: {error.strerror}. "
                "Give the path without `.index`."
            ) from error
        except (ValueError, IndexError, KeyError, struct.error) as error:
            raise InputError(
                f"the index of a checkpoint of TensorFlow must be whole; got {str(index)!r}: {error}. "
                "Copy it again."
            ) from error

    def tensor(self, name: str) -> np.ndarray:
        """The numbers of a tensor, checked.

        Args:
            name: one of ``entries``.

        Raises:
            InputError: its file is missing or damaged, or its type is not one of numbers.
        """
        entry = self.entries[name]
        kind = "<u2" if entry.dtype == _BFLOAT16 else _TYPES.get(entry.dtype)
        if kind is None or np.dtype(kind).itemsize * np.prod(entry.shape, dtype=int) != entry.size:
            raise InputError(
                f"a tensor must hold numbers of its shape; got {name!r}, type {entry.dtype}, shape "
                f"{list(entry.shape)}, {entry.size} bytes, in {str(self.prefix)!r}. Copy it again."
            )
        raw = self._read(name, entry)
        if _masked(_crc(0, raw)) != entry.checksum:
            raise self._damaged(name)
        array = raw.view(kind).reshape(entry.shape)
        if entry.dtype == _BFLOAT16:  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def text(self, name: str) -> bytes:
        """The bytes of a scalar of type string, checked.

        Args:
            name: one of ``entries``.

        Raises:
            InputError: its file is missing or damaged, or it is no such tensor.
        """
        entry = self.entries[name]
        raw = self._read(name, entry)
        try:
            length, place = _varint(raw.tobytes()[:10], 0)
        except IndexError:
            length, place = -1, 0
        if entry.dtype != _STRING or entry.shape != () or place + 4 + length != entry.size:
            raise self._damaged(name)
        # The sum is of the length as a number of 4 bytes, of that sum, and of the text.
        lengths = np.frombuffer(struct.pack("<I", length), np.uint8)
        if _masked(_crc(_crc(0, lengths), raw[place:])) != entry.checksum:
            raise self._damaged(name)
        return raw[place + 4 :].tobytes()

    def _read(self, name: str, entry: Entry) -> np.ndarray:
        file = self.prefix.with_name(
            f"{self.prefix.name}.data-{entry.shard:05d}-of-{self._shards:05d}"
        )
        try:
            raw = np.fromfile(file, np.uint8, entry.size, offset=entry.offset)
        except OSError as error:
            raise InputError(
                f"the files of a checkpoint must lie beside its index; got {str(file)!r}: "
                f"{error.strerror}. Copy it there."
            ) from error
        if len(raw) != entry.size:
            raise self._damaged(name)
        return raw

    def _damaged(self, name: str) -> InputError:
        return InputError(
            f"a checkpoint must be whole; got {name!r} damaged or cut off in {str(self.prefix)!r}. "
            "Copy its data file again."
        )


def _entry(value: bytes) -> Entry:
    fields = message_fields(value)
    if 7 in fields:
        raise ValueError("it has variables in slices, which are not supported")
    dims = message_fields(_last_bytes(fields, 2)).get(2, [])
    shape = tuple(_number(message_fields(dim), 1) for dim in dims if isinstance(dim, bytes))
    return Entry(
        dtype=_number(fields, 1),
        shape=shape,
        shard=_number(fields, 3),
        offset=_number(fields, 4),
        size=_number(fields, 5),
        checksum=_number(fields, 6),
    )


# The table.


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(content) < 48 or struct.unpack("<Q", content[-8:])[0] != _MAGIC:
        raise ValueError("it is no table, or was cut off")
    place = 0
    for _ in range(2):  # the block of metadata, which is empty, and its size
        _, place = _varint(content[-48:], place)
    offset, place = _varint(content[-48:], place)
    size, _ = _varint(content[-48:], place)
    for _, handle in _block(content, offset, size):
        offset, place = _varint(handle, 0)
        size, _ = _varint(handle, place)
        yield from _block(content, offset, size)


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    body = content[offset : offset + size + 1]
    (checksum,) = struct.unpack("<I", content[offset + size + 1 : offset + size + 5])
    if _masked(_crc(0, np.frombuffer(body, np.uint8))) != checksum:
        raise ValueError("a block does not have its check sum")
    if body[-1] != 0:
        raise ValueError("it is compressed, which TensorFlow has not done since 1.2")
    (restarts,) = struct.unpack("<I", body[-5:-1])
    end, place, key = size - 4 - 4 * restarts, 0, b""
    while place < end:
        shared, place = _varint(body, place)
        own, place = _varint(body, place)
        length, place = _varint(body, place)
        key = key[:shared] + body[place : place + own]
        yield key, body[place + own : place + own + length]
        place += own + length


# Protocol buffers.

Fields = dict[int, list[int | bytes]]


def message_fields(message: bytes) -> Fields:
    """The fields of a protocol buffer: numbers and bytes, by field number.

    Args:
        message: its bytes.

    Raises:
        ValueError: it has a field of no known type, or is cut off.
        IndexError: it is cut off within a number.
    """
    fields: Fields = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        value: int | bytes
        if tag & 7 == 0:
            value, place = _varint(message, place)
        else:
            if tag & 7 == 2:
                size, place = _varint(message, place)
            elif tag & 7 in (1, 5):
                size = 8 if tag & 7 == 1 else 4
            else:
                raise ValueError(f"a message has a field of type {tag & 7}")
            value, place = message[place : place + size], place + size
            if place > len(message):
                raise ValueError("a message was cut off")
            if tag & 7 != 2:
                value = int.from_bytes(value, "little")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: Fields, field: int, default: int = 0) -> int:
    value = fields.get(field, [default])[-1]
    if isinstance(value, bytes):
        raise ValueError(f"field {field} of a message is no number")
    return value


def _last_bytes(fields: Fields, field: int) -> bytes:
    value = fields.get(field, [b""])[-1]
    if isinstance(value, int):
        raise ValueError(f"field {field} of a message is a number")
    return value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


# CRC-32C, eight bytes at a time: the weights of a large model are gigabytes.


def _crc_tables() -> np.ndarray:
    tables = np.zeros((8, 256), np.uint32)
    numbers = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        numbers = (numbers >> 1 ^ 0x82F63B78 * (numbers & 1)).astype(np.uint32)
    tables[0] = numbers
    for i in range(1, 8):
        tables[i] = tables[0][tables[i - 1] & 255] ^ (tables[i - 1] >> 8)
    return tables


_TABLES = _crc_tables()


def _crc(crc: int, data: np.ndarray) -> int:
    return int(_extend(np.uint32(crc), data, _TABLES))


@compiled()
def _extend(crc: np.uint32, data: np.ndarray, tables: np.ndarray) -> np.uint32:
    crc = crc ^ np.uint32(0xFFFFFFFF)
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):
        mixed = np.uint32(0)
        for k in range(4):
            mixed ^= tables[7 - k, (crc >> np.uint32(8 * k) & np.uint32(255)) ^ data[i + k]]
            mixed ^= tables[3 - k, data[i + 4 + k]]
        crc = mixed
    for i in range(whole, len(data)):
        crc = tables[0, (crc ^ data[i]) & np.uint32(255)] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)


def _masked(crc: int) -> int:
    """As they are stored: a sum of data that holds sums is a poor one."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
