"""Read the metadata of an ONNX file without the onnx package, and without its weights.

An ONNX file is one protocol-buffer message, `ModelProto`: a sequence of fields, each a key (number
and wire type) and a value. Field 14 (`metadata_props`) holds pairs of texts: key in field 1, value
in field 2. All other fields, the graph with its weights among them, are stepped over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

__all__ = ["read_onnx_metadata"]

_METADATA = 14
_VARINT, _BYTES = 0, 2
_LENGTHS = {1: 8, 5: 4}
"""Wire type -> bytes, of numbers of fixed length."""


def read_onnx_metadata(path: Path, *, limit: int) -> dict[str, str]:
    """Return the texts that a model keeps by name.

    Parameters
    ----------
    limit : bytes of one pair; longer ones are left out.

    Raises
    ------
    ValueError
        If the file is no protocol-buffer message, or is cut short.
    """
    found = {}
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for _, content in _texts(file, size, wanted=(_METADATA,), limit=limit):
            pair = dict(_texts(BytesIO(content), len(content), wanted=(1, 2), limit=limit))
            found[pair.get(1, b"").decode()] = pair.get(2, b"").decode()
    return found


def _texts(
    file: BinaryIO, size: int, *, wanted: tuple[int, ...], limit: int
) -> Iterator[tuple[int, bytes]]:
    """Give number and content of the fields that are wanted; all others are stepped over."""
    while file.tell() < size:
        key = _varint(file)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _varint(file)
            continue
        if kind not in _LENGTHS and kind != _BYTES:
            raise ValueError(f"field {number} has the unknown wire type {kind}")
        length = _varint(file) if kind == _BYTES else _LENGTHS[kind]
        if file.tell() + length > size:
            raise ValueError(f"field {number} ends after the file")
        if kind == _BYTES and number in wanted and length <= limit:
            yield number, file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)


def _varint(file: BinaryIO) -> int:
    """Read a number of up to 64 bits, seven a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            return value
    raise ValueError("a number is longer than 64 bits")
