"""Make one cloud-optimized GeoTIFF of the bytes of its shards, without decoding them.

The workers have compressed the tiles of their shards and of the overviews that need no neighbour
(``segment``). What is left is the coarser overviews, made of each shard's last one, the header,
and a copy of bytes whose places are known beforehand, so that many threads can copy at once.

The file is laid out as: header, directories, tables of tile places; the tiles, the coarsest level
first, shard by shard within a level. Each level ends with a single tile of absent pixels, which all
its empty tiles share. The file does not depend on the order of the shards or the number of threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, OutputError, StclnGeoError
from ..execution import available_cores
from ..grid import Window
from ..legend import Legend
from .names import CLASS_BANDS, Bands, map_tags, removed, write_names
from .pyramid import NODATA, Resampling, level_shapes
from .segment import (
    LEVELS,
    PlacedLevel,
    Segment,
    damaged,
    level_directories,
    read_levels,
    write_segment,
)
from .template import map_fields
from .tiff import CLASSIC_LIMIT, TILE_EXTRA, Field, header_size, make_header, wrap_tile
from .tiles import TileCodec

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = ["assemble_cog"]

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The tiles of one level that one segment holds."""

    segment: Segment
    checksum: str
    placed: PlacedLevel
    """Its place in the segment's file."""
    row: int
    col: int
    """Its first tile in the map's level (tiles)."""

    def of(self, table: np.ndarray) -> np.ndarray:
        """Return the part of a level's table, (tile rows, tile columns), that is this piece's."""
        rows, cols = self.placed.sizes.shape
        return table[self.row : self.row + rows, self.col : self.col + cols]


def assemble_cog(
    segments: Sequence[Segment],
    path: str | Path,
    *,
    geobox: GeoBox,
    legend: Legend | None,
    bands: Bands | None = None,
    tags: Mapping[str, str] | None = None,
    absent: int = NODATA,
    codec: TileCodec | None = None,
    levels: int = LEVELS,
    threads: int | None = None,
) -> Path:
    """Assemble the segments of shards into one cloud-optimized GeoTIFF.

    Parameters
    ----------
    segments
        What ``write_segment`` returned, in any order. Their sides lie at multiples of
        ``codec.size * 2**levels`` pixels or at the map's edge; pixels without a segment become
        ``absent``.
    path
        The COG; it appears under this name only when it is whole.
    geobox
        Grid of the COG, kept to the pixel: nothing is padded.
    legend
        The classes of a class map, whose overviews were made by mode. None for a raster of
        numbers, whose overviews average.
    bands
        The one band of a raster of numbers; None: confidences (percent).
    tags
        More text tags for the TIFF.
    absent
        As the segments were written: 255 is nodata.
    codec, levels
        How the segments were written.
    threads
        Threads that read, compress and copy; None = all cores. Each holds one square of
        ``codec.size * 2**levels`` pixels and its overviews.

    Returns
    -------
    Path
        The COG, a BigTIFF from 4 GB on. A class map has a sidecar ``<name>.aux.xml`` beside it.

    Raises
    ------
    MissingFileError
        If the file of a segment does not exist; it is named.
    InputError
        If segments overlap, lie elsewhere, or hold other bytes than when they were written.
    OutputError
        If the COG cannot be written; an existing one is left as it is.
    """
    path = Path(path)
    codec = codec or TileCodec(predictor=legend is None)
    threads = threads or available_cores()
    shape = (int(geobox.shape[0]), int(geobox.shape[1]))
    _check_places(segments, shape, codec.size << levels)
    shapes = level_shapes(shape, codec.size)
    resampling: Resampling = "average" if legend is None else "mode"
    bands = bands or (Bands() if legend is None else CLASS_BANDS)
    fields = map_fields(
        geobox, codec, legend=legend, tags=map_tags(legend, bands, tags), bands=bands
    )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _writing(path), contextlib.ExitStack() as cleanup:
        path.parent.mkdir(parents=True, exist_ok=True)
        cleanup.enter_context(removed(part))
        pieces = _pieces_of(segments, codec, levels, shapes, base=0)
        for base in range(levels, len(shapes) - 1, levels):
            blocks = _blocks(pieces[base], shapes[base], codec, levels)
            names = [part.with_name(f"{part.name}.{base}.{index}") for index in range(len(blocks))]
            cleanup.enter_context(removed(*names))
            shrink = partial(
                _shrink, codec=codec, levels=levels, resampling=resampling, absent=absent
            )
            with ThreadPoolExecutor(threads) as pool:
                coarser = list(pool.map(shrink, blocks, names))
            pieces += _pieces_of(coarser, codec, levels, shapes, base=base)
        plan = _lay_out(pieces, shapes, codec, fields, absent)
        _check_space(path, plan.end)
        with part.open("wb") as file:
            file.write(plan.head)
            for start in plan.blanks:
                file.seek(start)
                file.write(plan.blank_tile)
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda copy: _copy(*copy, part=part), plan.copies):
                pass
        if legend is not None:
            write_names(path, legend)
        os.replace(part, path)
    return path


def _check_places(segments: Sequence[Segment], shape: tuple[int, int], step: int) -> None:
    """Raise where segments overlap or do not lie on the squares that levels can be copied by."""
    whole = Window(0, 0, *shape)
    taken: dict[tuple[int, int], Segment] = {}
    for segment in segments:
        window = segment.window
        ends = (window.row + window.height, window.col + window.width)
        aligned = not (window.row % step or window.col % step) and all(
            end == side or not end % step for end, side in zip(ends, shape, strict=True)
        )
        if window.is_empty or not whole.contains(window) or not aligned:
            raise InputError(
                f"Cannot assemble the shard {segment.path.name} at {window} into a map of {shape} "
                f"(rows, columns): shards must begin and end at multiples of {step} px from the "
                "map's first pixel, or at its edge. Choose such a shard size, or the GDAL writer."
            )
        for row in range(window.row // step, -(-ends[0] // step)):
            for col in range(window.col // step, -(-ends[1] // step)):
                other = taken.setdefault((row, col), segment)
                if other is not segment:
                    raise InputError(
                        f"Cannot assemble the shards {other.path.name} and {segment.path.name}: "
                        "they overlap, and each pixel has one owner. Give each shard once."
                    )


def _pieces_of(
    segments: Sequence[Segment],
    codec: TileCodec,
    levels: int,
    shapes: Sequence[tuple[int, int]],
    *,
    base: int,
) -> list[list[_Piece]]:
    """Return what segments hold of the map, by level, the finest first; then row by row.

    Parameters
    ----------
    base
        Level whose pixels the segments' windows count. Segments of level 0 store it; those of
        others begin with the next one.
    """
    finest = 0 if base == 0 else 1
    found: list[list[_Piece]] = [[] for _ in shapes[base + finest : base + levels + 1]]
    for segment in sorted(segments, key=lambda one: (one.window.row, one.window.col)):
        placed = read_levels(segment, codec)
        for index, level in enumerate(found):
            span = codec.size << (finest + index)  # side of a tile in pixels of the base
            level.append(
                _Piece(
                    segment=segment,
                    checksum=segment.levels[index],
                    placed=placed[index],
                    row=segment.window.row // span,
                    col=segment.window.col // span,
                )
            )
    return found


def _blocks(
    pieces: Sequence[_Piece], shape: tuple[int, int], codec: TileCodec, levels: int
) -> list[tuple[Window, list[_Piece]]]:
    """Return the squares that give coarser levels, each with the pieces that reach into it.

    Squares without a piece are absent pixels, and left out.
    """
    reaching: dict[tuple[int, int], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        rows, cols = piece.placed.sizes.shape
        for row in range(piece.row >> levels, (piece.row + rows - 1 >> levels) + 1):
            for col in range(piece.col >> levels, (piece.col + cols - 1 >> levels) + 1):
                reaching[row, col].append(piece)
    side = codec.size << levels
    whole = Window(0, 0, *shape)
    return [
        (Window(row * side, col * side, side, side).intersection(whole), reaching[row, col])
        for row, col in sorted(reaching)
    ]


def _shrink(
    block: tuple[Window, list[_Piece]],
    path: Path,
    *,
    codec: TileCodec,
    levels: int,
    resampling: Resampling,
    absent: int,
) -> Segment:
    """Decode one square of a level, and write the levels that follow it as a segment."""
    window, pieces = block
    values = np.full(window.shape_yx, absent, dtype=np.uint8)
    for piece in pieces:
        data = b"".join(_checked_bytes(piece))
        offsets = replace(piece.placed, start=0).offsets()
        for (row, col), size in np.ndenumerate(piece.placed.sizes):
            corner = ((piece.row + row) * codec.size, (piece.col + col) * codec.size)
            tile = Window(*corner, codec.size, codec.size).intersection(window)
            if not size or tile.is_empty:
                continue
            start = int(offsets[row, col])
            pixels = codec.decode(data[start : start + int(size)])
            target = tile.relative_to(window)
            values[target.rows, target.cols] = pixels[: tile.height, : tile.width]
    return write_segment(
        values, path, window=window, resampling=resampling, codec=codec, absent=absent,
        levels=levels, finest=1,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where everything goes."""

    head: bytes
    copies: list[tuple[_Piece, int]]
    """Each piece and its first byte in the map."""
    blanks: list[int]
    """First bytes of the tiles of absent pixels: one for each level with empty tiles."""
    blank_tile: bytes
    """Such a tile."""
    end: int
    """Bytes of the map."""


def _lay_out(
    pieces: Sequence[Sequence[_Piece]],
    shapes: Sequence[tuple[int, int]],
    codec: TileCodec,
    fields: Mapping[int, Field],
    absent: int,
) -> _Plan:
    """Place header, levels and pieces.

    Each level has a blank tile of its own, so that no tile of a finer level stands before one of
    a coarser level, also where an empty tile covers tiles that are not (quality codes, by mode).
    """
    grids = [tuple(-(-side // codec.size) for side in shape) for shape in shapes]
    sizes = [np.zeros(grid, dtype=np.uint32) for grid in grids]
    offsets = [np.zeros(grid, dtype=np.uint64) for grid in grids]
    for table, level in zip(sizes, pieces, strict=True):
        for piece in level:
            piece.of(table)[...] = piece.placed.sizes
    blank = codec.encode(np.full((codec.size, codec.size), absent, dtype=np.uint8))
    blank_tile = wrap_tile(blank)

    unplaced = level_directories(offsets, sizes, shapes, codec, fields)
    tile_bytes = sum(piece.placed.length for level in pieces for piece in level)
    blank_bytes = len(blank_tile) * sum(bool((table == 0).any()) for table in sizes)
    big = header_size(unplaced, big=True) + tile_bytes + blank_bytes >= CLASSIC_LIMIT
    position = header_size(unplaced, big=big)
    copies, blanks = [], []
    for bytes_of, places, level in reversed(list(zip(sizes, offsets, pieces, strict=True))):
        for piece in level:
            piece.of(places)[...] = replace(piece.placed, start=position).offsets()
            if piece.placed.length:
                copies.append((piece, position))
            position += piece.placed.length
        empty = bytes_of == 0
        if empty.any():
            places[empty] = position + TILE_EXTRA // 2
            bytes_of[empty] = len(blank)
            blanks.append(position)
            position += len(blank_tile)
    head = make_header(level_directories(offsets, sizes, shapes, codec, fields), big=big)
    return _Plan(head=head, copies=copies, blanks=blanks, blank_tile=blank_tile, end=position)


def _check_space(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OutputError(
            f"Cannot write {path}: it takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. "
            "The shards must stay until the map is whole. Free some space, and run it again."
        )


def _copy(piece: _Piece, start: int, *, part: Path) -> None:
    """Copy a piece to its place in the map, checking its bytes on the way."""
    with part.open("r+b", buffering=0) as target:
        target.seek(start)
        for data in _checked_bytes(piece):
            target.write(data)


def _checked_bytes(piece: _Piece) -> Iterator[bytes]:
    """Yield the bytes of a piece; at their end, raise if they are not those that were written."""
    digest = hashlib.sha256()
    left = piece.placed.length
    if not left:
        return
    try:
        with piece.segment.path.open("rb", buffering=0) as source:
            source.seek(piece.placed.start)
            while left and (data := source.read(min(left, _COPY_BYTES))):
                digest.update(data)
                left -= len(data)
                yield data
    except OSError as error:
        raise damaged(piece.segment, f"it cannot be read: {error.strerror or error}.") from error
    if left:
        raise damaged(piece.segment, f"it ends {left} bytes too early.")
    if digest.hexdigest() != piece.checksum:
        raise damaged(piece.segment, "its tiles have other bytes than when they were written.")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn refusals of the file system into one clear error."""
    try:
        yield
    except StclnGeoError:
        raise
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. The folder must be writable and have "
            "room for the map. Free some space or choose another folder; the shards are kept."
        ) from error
