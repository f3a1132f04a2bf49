"""Cut what windows need into blocks that are fetched one after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cube.cost import MAX_BLOCK, count_reads, grid_bytes, read_bytes
from ..cube.layout import Layout, plan_layout
from ..cube.planned import CubePlan
from ..errors import InputError
from ..grid import Window

__all__ = ["Block", "FetchCost", "cut_blocks", "fetch_cost", "fetch_layout", "plan_fetch"]

_SHARD = 256
_WIDEST = MAX_BLOCK + _SHARD
"""A prediction shard of 4096 px and its margins make two blocks a row."""

_HIGHEST = 1024 + _SHARD
"""Lower than wide: windows are labelled row by row, the first while the others are fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A rectangle whose assets are read at once."""

    area: Window
    """Counted from the grid's first pixel."""
    cells: tuple[Window, ...]
    """The storage shards in it that are needed, likewise."""
    first: int
    """The first of the areas that need it."""
    last: int


def fetch_layout(plan: CubePlan, shape_yx: tuple[int, int]) -> Layout:
    """Return how fetched pixels are stored: quick to write and to read, in small shards."""
    (season,) = plan.seasons
    usual = plan_layout(len(season.dates), len(plan.bands), shape_yx)
    return Layout(chunk=usual.chunk, shard=min(usual.shard, _SHARD), codec="lz4")


def plan_fetch(
    plan: CubePlan, shape_yx: tuple[int, int], *, layout: Layout, memory: int
) -> tuple[int, int]:
    """Return height and width of blocks (pixels, whole storage shards) of a grid.

    Parameters
    ----------
    shape_yx
        Of the grid.
    memory
        Bytes that one block may take while it is fetched.

    Raises
    ------
    InputError
        If the memory does not suffice for one storage shard.
    """
    side = layout.shard
    height, width = shape_yx
    cols = _even(width, _WIDEST, side)
    while cols > side and _cost(plan, side, cols, layout) > memory:
        cols = _even(width, cols - side, side)
    need = _cost(plan, side, cols, layout)
    if need > memory:
        raise InputError(
            f"Cannot fetch pixels with {memory / 1e9:.2g} GB of memory, half of what a worker has: "
            f"season {plan.seasons[0].name} needs {need / 1e9:.2g} GB for {side} px of "
            f"{len(plan.seasons[0].dates)} dates. Give more --memory."
        )
    rows = side
    # At least two where that can be, so that one is labelled while the other is fetched.
    most = min(_HIGHEST, _up(-(-height // 2), side))
    while rows + side <= most and _cost(plan, rows + side, cols, layout) <= memory:
        rows += side
    return _even(height, rows, side), cols


def cut_blocks(
    areas: Sequence[Window], grid: Window, *, shape_yx: tuple[int, int], shard: int
) -> list[Block]:
    """Return the blocks that hold all pixels of areas, in the order of the areas.

    Parameters
    ----------
    areas
        Absolute pixels; what lies beyond the grid is left out.
    grid
        Absolute pixels.
    shape_yx
        Height and width of a block (pixels, whole storage shards).
    shard
        Side of a storage shard (pixels).
    """
    rows, cols = -(-grid.height // shard), -(-grid.width // shard)
    first = np.full((rows, cols), -1)
    last = np.full((rows, cols), -1)
    for index, area in enumerate(areas):
        inside = area.intersection(grid)
        if inside.is_empty:
            continue
        near = inside.relative_to(grid)
        here = np.s_[
            near.row // shard : -(-(near.row + near.height) // shard),
            near.col // shard : -(-(near.col + near.width) // shard),
        ]
        first[here] = np.where(first[here] < 0, index, first[here])
        last[here] = index
    whole = Window(0, 0, *grid.shape_yx)
    high, wide = (size // shard for size in shape_yx)
    blocks = []
    for top in range(0, rows, high):
        for left in range(0, cols, wide):
            part = np.s_[top : top + high, left : left + wide]
            needed = np.argwhere(first[part] >= 0)
            if not len(needed):
                continue
            cells = tuple(
                Window(
                    (top + int(row)) * shard, (left + int(col)) * shard, shard, shard
                ).intersection(whole)
                for row, col in needed
            )
            area = cells[0]
            for cell in cells:
                area = area.union(cell)
            begins = first[part][first[part] >= 0].min()
            blocks.append(
                Block(area=area, cells=cells, first=int(begins), last=int(last[part].max()))
            )
    return sorted(blocks, key=lambda block: (block.first, block.area.row, block.area.col))


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchCost:
    """What it costs to fetch the pixels of shards; of regions with gaps, at most."""

    windows: int = 0
    """Asset windows to read."""
    bytes: int = 0
    """About how many bytes of pixels, uncompressed."""
    overlap: float = 1.0
    """Pixels that are read, as a multiple of those that any shard needs."""
    scratch_bytes: int = 0
    """The most that one task holds at a time, before compression."""


def fetch_cost(plan: CubePlan, areas: Sequence[Window], *, memory: int) -> FetchCost:
    """Return what fetching costs.

    Parameters
    ----------
    areas
        What each shard needs (absolute pixels).
    memory
        As in ``plan_fetch``.

    Raises
    ------
    InputError
        If the memory does not suffice.
    """
    (season,) = plan.seasons
    grids = [area.intersection(plan.window) for area in areas]
    shapes: dict[tuple[int, int], tuple[Layout, tuple[int, int]]] = {}
    blocks = []
    for grid in grids:
        if grid.shape_yx not in shapes:
            layout = fetch_layout(plan, grid.shape_yx)
            cut = plan_fetch(plan, grid.shape_yx, layout=layout, memory=memory)
            shapes[grid.shape_yx] = layout, cut
        layout, cut = shapes[grid.shape_yx]
        place = grid.relative_to(plan.window)
        blocks += [
            block.area.shift(place.row, place.col)
            for block in cut_blocks([grid], grid, shape_yx=cut, shard=layout.shard)
        ]
    read = sum(grid.area for grid in grids)
    together = functools.reduce(Window.union, grids)
    pixel = len(season.dates) * (2 * len(plan.bands) + 1)
    return FetchCost(
        windows=count_reads(plan, season, blocks),
        bytes=round(read_bytes(plan, season) * read / plan.window.area),
        overlap=read / min(together.area, read),
        scratch_bytes=max(grid.area for grid in grids) * pixel,
    )


def _cost(plan: CubePlan, height: int, width: int, layout: Layout) -> int:
    """Return the memory (bytes) of fetching a block."""
    (season,) = plan.seasons
    return grid_bytes(
        dataclasses.replace(plan, window=Window(0, 0, height, width)),
        dataclasses.replace(season, layout=layout),
        max(height, width),
    )


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _even(length: int, most: int, step: int) -> int:
    """Return a size, in whole steps, that cuts a length into few and about equal parts."""
    parts = -(-length // max(most, step))
    return _up(-(-length // parts), step)
