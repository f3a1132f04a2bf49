"""The bytes of a TIFF's header: read its directories, or lay out those of a tiled pyramid.

TIFF 6.0, and BigTIFF beyond 4 GB; little-endian. A directory (IFD) is a list of fields, one for
each tag. Written files are laid out as a cloud-optimized GeoTIFF wants it: all directories, then
the tables of tile places, then the tiles.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..errors import InputError

__all__ = [
    "CLASSIC_LIMIT",
    "TILE_EXTRA",
    "Directory",
    "Field",
    "header_size",
    "make_header",
    "read_directories",
    "wrap_tile",
]

CLASSIC_LIMIT = 2**32
"""Bytes from which on a file must be a BigTIFF."""

TILE_EXTRA = 8
"""Bytes around a tile's data: its size before it, its last four bytes again behind it."""

Field = tuple[int, int, bytes]
"""Type, count and little-endian bytes of a tag's value."""

# GDAL reads this text behind the file's first bytes. It promises what is true here: directories
# come first, and every tile has its size before it and its last bytes repeated behind it. It does
# not promise BLOCK_ORDER=ROW_MAJOR, as tiles stand shard by shard and empty tiles share their
# bytes. GDAL replaces "NO\n " by "YES\n" should it ever edit the file.
_LAYOUT = (
    b"LAYOUT=IFDS_BEFORE_DATA\nBLOCK_LEADER=SIZE_AS_UINT4\n"
    b"BLOCK_TRAILER=LAST_4_BYTES_REPEATED\nKNOWN_INCOMPATIBLE_EDITION=NO\n "
)
_GHOST = b"GDAL_STRUCTURAL_METADATA_SIZE=%06d bytes\n" % len(_LAYOUT) + _LAYOUT

_SHORT, _LONG, _LONG8 = 3, 4, 16
_TYPE_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8,
    18: 8,
}  # fmt: skip
_TYPE_CODES = {1: "u1", 3: "<u2", 4: "<u4", 13: "<u4", 16: "<u8", 18: "<u8"}

_SUBFILE, _WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 254, 256, 257, 322, 323
_OFFSETS, _SIZES = 324, 325
_REDUCED = 1


@dataclass(frozen=True, kw_only=True)
class Directory:
    """One level of a tiled file."""

    shape_yx: tuple[int, int]
    """Rows and columns (pixels)."""
    tile: int
    """Side of a tile (pixels)."""
    reduced: bool
    """True for an overview."""
    fields: Mapping[int, Field]
    """All other tags."""
    offsets: np.ndarray
    """Place of each tile's data in the file, (tile rows, tile columns) uint64; 0 = no bytes."""
    sizes: np.ndarray
    """Bytes of each tile's data, (tile rows, tile columns) uint32; 0 = all nodata."""

    def number(self, tag: int) -> int:
        """Return a tag's first value, 1 where the tag is absent (TIFF's default of those used)."""
        return int(_numbers(self.fields[tag])[0]) if tag in self.fields else 1


def wrap_tile(data: bytes) -> bytes:
    """Return a tile's data between its size and its last four bytes."""
    return b"".join([struct.pack("<I", len(data)), data, data[-4:]])


def header_size(directories: Sequence[Directory], *, big: bool) -> int:
    """Return the length of ``make_header`` (bytes); offsets and sizes may still be empty."""
    return _Layout(directories, big=big).size


def make_header(directories: Sequence[Directory], *, big: bool) -> bytes:
    """Return everything before the first tile.

    Parameters
    ----------
    directories
        Full resolution first.
    big
        Make a BigTIFF.
    """
    return _Layout(directories, big=big).to_bytes()


class _Layout:
    """Where each part of a header goes."""

    def __init__(self, directories: Sequence[Directory], *, big: bool) -> None:
        self._big = big
        self._offset_format = "<Q" if big else "<I"
        self._inline = 8 if big else 4
        self._all = [self._complete(one) for one in directories]
        position = (16 if big else 8) + len(_GHOST)
        position += position % 2
        self._starts: list[int] = []
        self._values: list[dict[int, int]] = []
        for fields in self._all:
            self._starts.append(position)
            position += self._directory_size(len(fields))
            places = {}
            for tag, field in fields.items():
                if tag not in (_OFFSETS, _SIZES) and len(field[2]) > self._inline:
                    places[tag] = position
                    position += _even(len(field[2]))
            self._values.append(places)
        # Tables of tile places, the smallest level's first: a reader that fetches the head of
        # the file has what it needs for a first picture.
        for fields, places in reversed(list(zip(self._all, self._values, strict=True))):
            for tag in (_OFFSETS, _SIZES):
                if len(fields[tag][2]) > self._inline:
                    position += -position % 8
                    places[tag] = position
                    position += _even(len(fields[tag][2]))
        self.size = position

    def to_bytes(self) -> bytes:
        header = bytearray(self.size)
        start = struct.pack(self._offset_format, self._starts[0])
        magic = struct.pack("<2sHHH", b"II", 43, 8, 0) if self._big else b"II*\0"
        head = magic + start + _GHOST
        header[: len(head)] = head
        ends = [*self._starts[1:], 0]
        for fields, places, at, following in zip(
            self._all, self._values, self._starts, ends, strict=True
        ):
            entries = [struct.pack("<Q" if self._big else "<H", len(fields))]
            for tag, (kind, count, data) in fields.items():
                entries.append(struct.pack("<HHQ" if self._big else "<HHI", tag, kind, count))
                if tag in places:
                    entries.append(struct.pack(self._offset_format, places[tag]))
                    header[places[tag] : places[tag] + len(data)] = data
                else:
                    entries.append(data.ljust(self._inline, b"\0"))
            entries.append(struct.pack(self._offset_format, following))
            block = b"".join(entries)
            header[at : at + len(block)] = block
        return bytes(header)

    def _directory_size(self, count: int) -> int:
        return 8 + 20 * count + 8 if self._big else _even(2 + 12 * count + 4)

    def _complete(self, level: Directory) -> dict[int, Field]:
        """Return all tags of a level, in the increasing order that TIFF demands."""
        height, width = level.shape_yx
        kind, code = (_LONG8, "<u8") if self._big else (_LONG, "<u4")
        fields: dict[int, Field] = {
            **level.fields,
            _WIDTH: (_LONG, 1, struct.pack("<I", width)),
            _HEIGHT: (_LONG, 1, struct.pack("<I", height)),
            _TILE_WIDTH: (_SHORT, 1, struct.pack("<H", level.tile)),
            _TILE_HEIGHT: (_SHORT, 1, struct.pack("<H", level.tile)),
            _OFFSETS: (kind, level.offsets.size, level.offsets.astype(code).tobytes()),
            _SIZES: (_LONG, level.sizes.size, level.sizes.astype("<u4").tobytes()),
        }
        if level.reduced:
            fields[_SUBFILE] = (_LONG, 1, struct.pack("<I", _REDUCED))
        return dict(sorted(fields.items()))


def read_directories(file: BinaryIO) -> list[Directory]:
    """Return the directories of a tiled, little-endian TIFF, in the order of the file.

    Raises
    ------
    InputError
        If the file is no such TIFF, or is cut short.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    try:
        big = head[:4] == b"II+\0"
        if not big and head[:4] != b"II*\0":
            raise ValueError("it does not begin like a little-endian TIFF")
        (position,) = struct.unpack("<Q", head[8:16]) if big else struct.unpack("<I", head[4:8])
        found = []
        while position:
            fields, position = _read_directory(file, position, end, big=big)
            found.append(_tiled(fields))
    except (ValueError, KeyError, struct.error) as error:
        raise InputError(
            f"Cannot read a TIFF directory: {error}. Its bytes were changed; write the file again."
        ) from error
    return found


def _read_directory(
    file: BinaryIO, position: int, end: int, *, big: bool
) -> tuple[dict[int, Field], int]:
    """Return the fields of a directory, and where the next one is."""
    file.seek(position)
    (count,) = struct.unpack("<Q" if big else "<H", file.read(8 if big else 2))
    entry_size, inline = (20, 8) if big else (12, 4)
    offset_format = "<Q" if big else "<I"
    if count * entry_size > end:
        raise ValueError(f"it claims {count} tags")
    entries = file.read(count * entry_size)
    (following,) = struct.unpack(offset_format, file.read(inline))
    fields: dict[int, Field] = {}
    for start in range(0, len(entries), entry_size):
        entry = entries[start : start + entry_size]
        tag, kind, number = struct.unpack("<HHQ" if big else "<HHI", entry[:-inline])
        size = number * _TYPE_BYTES[kind]
        data = entry[-inline:][:size]
        if size > inline:
            (place,) = struct.unpack(offset_format, entry[-inline:])
            if place + size > end:
                raise ValueError(f"tag {tag} reaches beyond the end of the file")
            file.seek(place)
            data = file.read(size)
        fields[tag] = (kind, number, data)
    return fields, following


def _tiled(fields: dict[int, Field]) -> Directory:
    """Make a level of the fields of a directory."""
    height, width, tile = (
        int(_numbers(fields.pop(tag))[0]) for tag in (_HEIGHT, _WIDTH, _TILE_WIDTH)
    )
    fields.pop(_TILE_HEIGHT)
    offsets, sizes = _numbers(fields.pop(_OFFSETS)), _numbers(fields.pop(_SIZES))
    grid = (-(-height // tile), -(-width // tile))
    return Directory(
        shape_yx=(height, width),
        tile=tile,
        reduced=_SUBFILE in fields and int(_numbers(fields.pop(_SUBFILE))[0]) == _REDUCED,
        fields=fields,
        offsets=offsets.astype(np.uint64).reshape(grid),
        sizes=sizes.astype(np.uint32).reshape(grid),
    )


def _numbers(field: Field) -> np.ndarray:
    return np.frombuffer(field[2], dtype=_TYPE_CODES[field[0]])


def _even(size: int) -> int:
    return size + size % 2
