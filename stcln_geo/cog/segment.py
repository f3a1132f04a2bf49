"""The file of one prediction shard: its tiles and overviews, compressed as the map needs them.

A segment is a small tiled GeoTIFF that GDAL opens like any other. Its levels stand behind one
another, the coarsest first, so that each level can be copied into the map in one piece. Tiles that
hold nothing but the value of absent pixels (nodata for most maps) take no bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, MissingFileError, OutputError
from ..grid import Window, tiles
from ..storage import part_path
from .names import removed
from .pyramid import NODATA, Resampling, count_values, pyramid
from .template import COMPRESSION, PREDICTOR, map_fields, overview_fields
from .tiff import (
    CLASSIC_LIMIT,
    TILE_EXTRA,
    Directory,
    Field,
    header_size,
    make_header,
    read_directories,
    wrap_tile,
)
from .tiles import TileCodec
from .write import Source

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "LEVELS",
    "PlacedLevel",
    "Segment",
    "damaged",
    "is_whole",
    "level_directories",
    "read_levels",
    "write_segment",
]

LEVELS = 3
"""Overviews that a shard makes by itself: of 512 x 2^3 = 4096 px the third is one tile."""

_READ_BYTES = 1 << 20
_NOWHERE = 1 << 62  # where an empty level begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(Source):
    """A shard's file, where it lies in the map, and what its bytes must be."""

    head: str
    """SHA-256 of the bytes before the first tile, which say where each tile is."""
    head_bytes: int
    """Their number."""
    levels: tuple[str, ...]
    """SHA-256 of the bytes of each level, the finest first."""
    histogram: Mapping[int, int]
    """Pixels by value."""

    def to_json(self) -> dict[str, Any]:
        """Return all but path and place as plain values, less than a kilobyte as text."""
        return {
            "head": self.head,
            "head_bytes": self.head_bytes,
            "levels": list(self.levels),
            "histogram": {str(value): count for value, count in self.histogram.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, path: Path, window: Window) -> Segment:
        """Read what ``to_json`` wrote."""
        histogram = {int(key): int(count) for key, count in value["histogram"].items()}
        return cls(
            path=path,
            window=window,
            head=value["head"],
            head_bytes=int(value["head_bytes"]),
            levels=tuple(value["levels"]),
            histogram=histogram,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedLevel:
    """The tiles of one level, in one piece of a file."""

    start: int
    """First byte."""
    sizes: np.ndarray
    """Bytes of each tile's data, (tile rows, tile columns) uint32; 0 = all absent."""

    @property
    def length(self) -> int:
        """Bytes in all."""
        return int(self.sizes.sum(dtype=np.int64)) + TILE_EXTRA * int(np.count_nonzero(self.sizes))

    def offsets(self) -> np.ndarray:
        """Return where the data of each tile begins; 0 for a tile of absent pixels.

        Returns
        -------
        (tile rows, tile columns) uint64.
        """
        spans = np.where(self.sizes > 0, self.sizes.astype(np.int64) + TILE_EXTRA, 0).ravel()
        places = self.start + np.cumsum(spans) - spans + TILE_EXTRA // 2
        return np.where(spans > 0, places, 0).astype(np.uint64).reshape(self.sizes.shape)


def write_segment(
    values: np.ndarray,
    path: str | Path,
    *,
    window: Window,
    resampling: Resampling,
    codec: TileCodec | None = None,
    geobox: GeoBox | None = None,
    absent: int = NODATA,
    levels: int = LEVELS,
    finest: int = 0,
    threads: int = 1,
) -> Segment:
    """Write a shard with its overviews, ready to be copied into a map.

    Parameters
    ----------
    values : (H, W) uint8, 255 = nodata.
    path
        The file; it appears under this name only when it is whole.
    window
        The shard's place in the map (pixels from the map's first). ``assemble_cog`` takes it
        where its sides lie at multiples of ``codec.size * 2**levels`` or at the map's edge.
    resampling
        "mode" for classes, "average" for percents; see ``pyramid.halve``.
    geobox
        Grid of the shard, so that GIS programs show the file in its place.
    absent
        Value of the map's pixels that no shard holds; tiles of this value only are not stored.
    levels
        Overviews to make.
    finest
        The first level that is stored.
    threads
        Threads that compress; they do not change the file.

    Raises
    ------
    OutputError
        If a tile cannot be compressed, or the file cannot be written.
    """
    codec = codec or TileCodec()
    path = Path(path)
    if values.dtype != np.uint8 or values.shape != window.shape_yx:
        raise InputError(
            f"Cannot write {values.dtype} pixels of shape {values.shape} as the shard {window}: "
            "a shard holds uint8 pixels in the shape of its window. Convert or cut them first."
        )
    made = pyramid(values, levels, resampling)[finest:]
    with ThreadPoolExecutor(threads) as pool:
        encoded = [_encode(level, codec, absent, pool) for level in made]
    shapes = [level.shape for level in made]
    sizes = [
        _tile_grid([len(one) for one in data], shape, codec.size)
        for data, shape in zip(encoded, shapes, strict=True)
    ]
    fields = map_fields(geobox, codec, nodata=absent)
    unplaced = level_directories(sizes, sizes, shapes, codec, fields)
    tile_bytes = sum(PlacedLevel(start=0, sizes=one).length for one in sizes)
    big = header_size(unplaced, big=True) + tile_bytes >= CLASSIC_LIMIT
    start = header_size(unplaced, big=big)
    offsets: list[np.ndarray] = []
    for one in reversed(sizes):
        level = PlacedLevel(start=start, sizes=one)
        offsets.insert(0, level.offsets())
        start += level.length
    head = make_header(level_directories(offsets, sizes, shapes, codec, fields), big=big)
    digests = _write(path, head, encoded)
    return Segment(
        path=path,
        window=window,
        head=hashlib.sha256(head).hexdigest(),
        head_bytes=len(head),
        levels=digests,
        histogram=count_values(values),
    )


def level_directories(
    offsets: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    shapes: Sequence[tuple[int, int]],
    codec: TileCodec,
    fields: Mapping[int, Field],
) -> list[Directory]:
    """Return the TIFF directories of levels, the finest first.

    Parameters
    ----------
    offsets, sizes
        Place and bytes of each tile, (tile rows, tile columns) by level.
    shapes
        Rows and columns by level (pixels).
    fields
        Tags of the first level; those that matter for overviews are repeated in the others.
    """
    repeated = overview_fields(fields)
    return [
        Directory(
            shape_yx=shape,
            tile=codec.size,
            reduced=index > 0,
            fields=repeated if index else fields,
            offsets=place,
            sizes=size,
        )
        for index, (place, size, shape) in enumerate(zip(offsets, sizes, shapes, strict=True))
    ]


def read_levels(segment: Segment, codec: TileCodec) -> list[PlacedLevel]:
    """Return where the tiles of a segment are; its header is checked, its tiles are not.

    Parameters
    ----------
    codec
        How the tiles must have been written.

    Raises
    ------
    MissingFileError
        If the file does not exist.
    InputError
        If its header was changed, or its tiles were written in another way.
    """
    try:
        with segment.path.open("rb") as file:
            head = file.read(segment.head_bytes)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"Cannot assemble the map: the shard's file {segment.path} does not exist. Make it "
            "again: 'predict' labels the shards that lack when the same command is run again."
        ) from error
    if hashlib.sha256(head).hexdigest() != segment.head:
        raise damaged(segment, "its header has other bytes than when it was written.")
    directories = read_directories(io.BytesIO(head))
    for one in directories:
        found = (one.tile, one.number(COMPRESSION), one.number(PREDICTOR))
        if found != (codec.size, codec.tiff_compression, codec.tiff_predictor):
            raise InputError(
                f"Cannot assemble the map: the tiles of {segment.path} have (side, compression, "
                f"predictor) = {found}, those of the map must have "
                f"{(codec.size, codec.tiff_compression, codec.tiff_predictor)}. Write all shards "
                "of a map with one codec, and give it to the assembler."
            )
    return [
        PlacedLevel(
            start=int(one.offsets[one.sizes > 0].min(initial=_NOWHERE)) - TILE_EXTRA // 2,
            sizes=one.sizes,
        )
        for one in directories
    ]


def is_whole(segment: Segment, codec: TileCodec) -> bool:
    """Return True where every byte of a segment's file is as it was written."""
    try:
        levels = read_levels(segment, codec)
        for level, expected in zip(levels, segment.levels, strict=True):
            with segment.path.open("rb") as file:
                file.seek(level.start)
                digest = hashlib.sha256()
                left = level.length
                while left and (block := file.read(min(left, _READ_BYTES))):
                    digest.update(block)
                    left -= len(block)
            if left or digest.hexdigest() != expected:
                return False
    except (InputError, OSError):
        return False
    return True


def damaged(segment: Segment, how: str) -> InputError:
    """Return the error for a segment whose file is not what was written."""
    return InputError(
        f"Cannot assemble the map: the shard's file {segment.path} is damaged, {how} A map is made "
        "of checked bytes only. Make the shard again: 'predict' labels damaged shards when the "
        "same command is run again."
    )


def _encode(level: np.ndarray, codec: TileCodec, absent: int, pool: Executor) -> list[bytes]:
    """Return the data of a level's tiles, row by row; nothing for tiles of absent pixels only."""

    def encode(window: Window) -> bytes:
        tile = level[window.rows, window.cols]
        return codec.encode(tile) if (tile != absent).any() else b""

    return list(pool.map(encode, tiles(level.shape, codec.size)))


def _tile_grid(sizes: list[int], shape_yx: tuple[int, int], tile: int) -> np.ndarray:
    height, width = shape_yx
    return np.array(sizes, dtype=np.uint32).reshape(-(-height // tile), -(-width // tile))


def _write(path: Path, head: bytes, encoded: Sequence[Sequence[bytes]]) -> tuple[str, ...]:
    """Write header and levels, the coarsest first; return the levels' checksums."""
    digests = [hashlib.sha256() for _ in encoded]
    part = part_path(path)
    with removed(part):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(head)
                for digest, level in reversed(list(zip(digests, encoded, strict=True))):
                    for data in filter(None, level):
                        wrapped = wrap_tile(data)
                        digest.update(wrapped)
                        file.write(wrapped)
            os.replace(part, path)
        except OSError as error:
            raise OutputError(
                f"Cannot write the shard {path}: {error.strerror or error}. The folder must be "
                "writable and have room. Free some space, or choose another folder."
            ) from error
    return tuple(digest.hexdigest() for digest in digests)
