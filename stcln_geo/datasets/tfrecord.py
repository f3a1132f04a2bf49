"""Read TFRecord files of ``tf.train.Example`` without TensorFlow.

A TFRecord is a row of records: the length as 8 bytes, a checksum of these, the content, a checksum
of it. Checksums are CRC-32C, rotated and shifted by a constant so that a checksum of data that hold
checksums stays sound. An Example is a protocol buffer: a map of names to lists of bytes, floats or
whole numbers; only lists of bytes and of whole numbers are read here.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from ..errors import InputError

__all__ = ["Features", "masked_crc", "parse_example", "read_records"]

Features = dict[str, list[bytes] | list[int]]
"""The features of an Example by name."""

_HEAD = struct.Struct("<QI")
_TAIL = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a TFRecord file, gzipped or not, each checked.

    Raises
    ------
    InputError
        If the file is cut short, is no TFRecord, or a checksum does not fit.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, f"its gzip stream is broken ({error})") from error
    position = 0
    while position < len(content):
        if len(content) - position < _HEAD.size:
            raise _damaged(path, f"it ends within the head of a record, at byte {position}")
        length, crc = _HEAD.unpack_from(content, position)
        if masked_crc(content[position : position + 8]) != crc:
            raise _damaged(path, f"the checksum of a length, at byte {position}, does not fit")
        start = position + _HEAD.size
        position = start + length + _TAIL.size
        if position > len(content):
            raise _damaged(path, f"it ends within a record of {length} bytes")
        record = content[start : start + length]
        if masked_crc(record) != _TAIL.unpack_from(content, start + length)[0]:
            raise _damaged(path, f"the checksum of the record at byte {start} does not fit")
        yield record


def masked_crc(content: bytes) -> int:
    """Return the checksum that TFRecord stores for bytes."""
    crc = int(google_crc32c.value(content))
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def parse_example(record: bytes) -> Features:
    """Return the features of a serialized ``tf.train.Example``.

    Raises
    ------
    ValueError
        If the bytes are no Example.
    """
    found: Features = {}
    for number, features in _fields(record):
        if number != 1 or isinstance(features, int):
            continue
        for _, entry in _fields(features):
            name, feature = "", b""
            for key, value in _fields(_as_bytes(entry)):
                if key == 1:
                    name = _as_bytes(value).decode()
                elif key == 2:
                    feature = _as_bytes(value)
            found[name] = _values(feature)
    return found


def _values(feature: bytes) -> list[bytes] | list[int]:
    """Return the list in a Feature: 1 holds bytes, 2 floats, 3 whole numbers."""
    for kind, content in _fields(feature):
        if kind == 1:
            return [_as_bytes(value) for _, value in _fields(_as_bytes(content))]
        if kind == 3:
            return _integers(_as_bytes(content))
    return []


def _integers(content: bytes) -> list[int]:
    """Return whole numbers, packed or one by one."""
    values: list[int] = []
    for _, value in _fields(content):
        if isinstance(value, int):
            values.append(_signed(value))
            continue
        position = 0
        while position < len(value):
            number, position = _varint(value, position)
            values.append(_signed(number))
    return values


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and content of each field of a protocol buffer message."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        kind = key & 7
        if kind == _VARINT:
            value: int | bytes
            value, position = _varint(content, position)
        else:
            if kind == _BYTES:
                length, position = _varint(content, position)
            elif kind in {_FIXED64, _FIXED32}:
                length = 8 if kind == _FIXED64 else 4
            else:
                raise ValueError(f"a field of the unknown kind {kind}")
            if position + length > len(content):
                raise ValueError("a field that is longer than its message")
            value = content[position : position + length]
            position += length
        yield key >> 3, value


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, the least first, and the position after it."""
    number = shift = 0
    while True:
        if position >= len(content) or shift > 63:
            raise ValueError("a number that does not end")
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, position
        shift += 7


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"Cannot read {path}: {why}. It must be a TFRecord file, whole. Fetch it again."
    )
