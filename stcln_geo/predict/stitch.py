"""Who owns which pixel: the lattice's cores cut by a shard, and the pixels of the region.

Everything here counts in the absolute pixels of the CRS, so that no result depends on where a
shard, a cube or a region begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..grid import Lattice, Window

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["Group", "Piece", "cut_lines", "group_pieces", "pieces_of", "region_mask"]

_MASK_TILE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A window of the network and the part of a shard that it has a say in."""

    core: Window
    """Its square of the lattice (absolute pixels)."""
    seen: Window
    """What the network sees (absolute pixels)."""
    owned: Window
    """The pixels it labels, cut at the shard's edge (absolute pixels): those of its core; where
    windows are blended, all that it sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Windows that are read together."""

    cell: Window
    """The square of whole cores they belong to (absolute pixels)."""
    area: Window
    """What must be read (absolute pixels)."""
    pieces: tuple[Piece, ...]
    """Row by row."""


def cut_lines(start: int, length: int, *, size: int, stride: int) -> list[int]:
    """Return where one axis is cut into shards, both ends included.

    Parameters
    ----------
    start, length
        The axis (absolute pixels).
    size
        Side of a shard (pixels). Multiples of 4096 are kept exactly, counted from the start,
        so that overviews can be made shard by shard; other cuts move back to the next line of
        the lattice, so that no window is run for two shards.
    stride
        Side of a core (pixels).
    """
    end = start + length
    lines = range(start + size, end, size)
    inner = lines if size % 4096 == 0 else [line - line % stride for line in lines]
    return [start, *sorted({line for line in inner if start < line < end}), end]


def region_mask(geometry: BaseGeometry, window: Window, *, resolution: float) -> np.ndarray:
    """Return which pixels have their centre in a geometry.

    Parameters
    ----------
    geometry
        In the CRS of the grid.
    window
        Absolute pixels.
    resolution
        Pixel size (units of the CRS).

    Returns
    -------
    (H, W) bool. True where the centre lies inside or on the edge. Each centre is tested by
    itself, so that a pixel's answer is the same in every window.
    """
    import shapely

    shapely.prepare(geometry)
    height, width = window.shape_yx
    y = -(window.row + np.arange(height) + 0.5) * resolution
    x = (window.col + np.arange(width) + 0.5) * resolution

    # Squares wholly in or wholly out need no test of their pixels.
    rows = np.arange(0, height, _MASK_TILE)
    cols = np.arange(0, width, _MASK_TILE)
    last_rows = np.minimum(rows + _MASK_TILE, height) - 1
    last_cols = np.minimum(cols + _MASK_TILE, width) - 1
    boxes = shapely.box(
        x[cols][None, :], y[last_rows][:, None], x[last_cols][None, :], y[rows][:, None]
    )
    inside = shapely.contains_properly(geometry, boxes)
    touched = shapely.intersects(geometry, boxes)
    mask = np.repeat(np.repeat(inside, _MASK_TILE, axis=0), _MASK_TILE, axis=1)
    mask = np.ascontiguousarray(mask[:height, :width])
    for index in np.argwhere(touched & ~inside):
        row, col = (int(place) * _MASK_TILE for place in index)
        part = np.s_[row : row + _MASK_TILE, col : col + _MASK_TILE]
        grid_x, grid_y = np.meshgrid(x[part[1]], y[part[0]])
        mask[part] = shapely.intersects_xy(geometry, grid_x, grid_y)
    return mask


def pieces_of(
    shard: Window, lattice: Lattice, wanted: np.ndarray, *, blend: bool = False
) -> list[Piece]:
    """Return the windows that label a shard, row by row.

    Parameters
    ----------
    shard
        Absolute pixels.
    wanted : (H, W) bool, True where a label is asked for. Windows that have no say in such a
        pixel are left out.
    blend
        True: windows have a say in all that they see, not in their cores only.
    """
    pieces = []
    for core in lattice.cores(shard.expand(lattice.halo) if blend else shard):
        seen = lattice.window_of(core)
        owned = (seen if blend else core).intersection(shard)
        inside = owned.relative_to(shard)
        if wanted[inside.rows, inside.cols].any():
            pieces.append(Piece(core=core, seen=seen, owned=owned))
    return pieces


def group_pieces(pieces: Sequence[Piece], *, size: int, stride: int) -> list[Group]:
    """Group windows that are read together; row by row.

    Parameters
    ----------
    size
        About the side of a group (pixels); at least one core.
    """
    side = max(size // stride, 1) * stride
    members: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        members[piece.core.row // side, piece.core.col // side].append(piece)
    groups = []
    for key in sorted(members):
        area = members[key][0].seen
        for piece in members[key]:
            area = area.union(piece.seen)
        cell = Window(key[0] * side, key[1] * side, side, side)
        groups.append(Group(cell=cell, area=area, pieces=tuple(members[key])))
    return groups
