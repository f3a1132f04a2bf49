"""Targets: what pixels are to be learnt as, or judged by, and where such pixels lie.

A pixel has a target where it belongs to a wanted row of the table of fields: to a field, or, of the
pixels that lie in no field, to those of its class and site. Classes that the legend ignores have no
row, and so no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..cube.contract import SPLITS
from ..cube.season import FieldTable, Season
from ..cube.stack import Stack
from ..errors import InputError, LabelError
from ..grid import Window
from ..legend import UNLABELLED
from .source import LabelReader, LabelTile, Source, source_of
from .split import check_labelled

__all__ = ["ChipChoice", "SquareGrid", "Targets", "fields_within", "mark_squares"]


@dataclass(frozen=True, slots=True)
class ChipChoice:
    """Some chips of the grid that tiles each site from its first pixel.

    Parameters
    ----------
    side
        Side of a chip (pixels).
    chips
        Row and column of each in the grid, from 0: ``((0, 0), (1, 1))`` are the first two of the
        diagonal.
    """

    side: int
    chips: tuple[tuple[int, int], ...]

    def check(self, source: Source) -> None:
        """Check that the sites of a source have such chips.

        Raises
        ------
        InputError
            If one lies outside of the grid, or none is named.
        """
        grid = tuple(-(-size // self.side) for size in source.shape_yx)
        wrong = [list(chip) for chip in self.chips if not _inside(chip, grid)]
        if wrong or not self.chips:
            raise InputError(
                f"Cannot use the chips {wrong} of {source}: with chips of {self.side} px, a "
                f"{'site' if source.kind == 'stack' else 'cube'} of {source.shape_yx[0]} x "
                f"{source.shape_yx[1]} px has {grid[0]} rows and {grid[1]} columns of them, "
                "counted from 0. Name at least one, all within, with labels.chips."
            )

    def holds(self, window: Window) -> np.ndarray:
        """Return which pixels of a window lie in a chosen chip: (H, W) bool."""
        row, col = (
            (start + np.arange(size)) // self.side
            for start, size in ((window.row, window.height), (window.col, window.width))
        )
        held = np.zeros(window.shape_yx, dtype=bool)
        for down, right in self.chips:
            held |= (row == down)[:, None] & (col == right)
        return held


@dataclass(frozen=True, slots=True)
class SquareGrid:
    """Squares that tile each site.

    Parameters
    ----------
    side
        Side of a square (pixels).
    offset_yx
        Rows and columns by which the first square begins before a site's first pixel.
    """

    side: int
    offset_yx: tuple[int, int] = (0, 0)

    def shape(self, shape_yx: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the squares over a site."""
        (height, width), (down, right) = shape_yx, self.offset_yx
        return -(-(height + down) // self.side), -(-(width + right) // self.side)

    def mark(self, hits: np.ndarray, carried: np.ndarray, tile: LabelTile) -> None:
        """Mark the squares that hold one of a tile's marked pixels; others stay as they are."""
        row, col = (
            (np.arange(size) + start + offset) // self.side
            for size, start, offset in (
                (tile.window.height, tile.window.row, self.offset_yx[0]),
                (tile.window.width, tile.window.col, self.offset_yx[1]),
            )
        )
        first_row, first_col = (np.flatnonzero(np.diff(n, prepend=-1)) for n in (row, col))
        marked = np.logical_or.reduceat(carried, first_row, axis=1)
        marked = np.logical_or.reduceat(marked, first_col, axis=2)
        sites = np.arange(tile.sites.start, tile.sites.stop)
        # A square may reach into several tiles.
        hits[np.ix_(sites, row[first_row], col[first_col])] |= marked


class Targets:
    """The pixels of a source that carry a target.

    Parameters
    ----------
    source
        A labelled season.
    wanted : (F,) bool over its fields.
    within
        Only pixels of these chips carry one; None for all.

    Raises
    ------
    LabelError
        If there are no labels, or ``wanted`` is no choice over their fields.
    """

    def __init__(
        self,
        source: Season | Stack | Source,
        wanted: np.ndarray,
        *,
        within: ChipChoice | None = None,
    ) -> None:
        self.source = source_of(source)
        self.within = within
        fields, legend = check_labelled(self.source)
        if len(wanted) != len(fields):
            raise LabelError(
                f"Cannot choose among {len(fields)} fields with a choice over {len(wanted)}: there "
                "must be one value a field. The labels were burnt again meanwhile: choose anew."
            )
        if within is not None:
            within.check(self.source)
        inside = np.asarray(fields.number) > 0
        # The last entry stands for numbers beyond: of fields without a labelled pixel.
        self._by_number = np.zeros(int(fields.number.max(initial=0)) + 2, dtype=bool)
        self._by_number[fields.number[inside]] = wanted[inside]
        self._by_class = np.zeros((self.source.sites, 256), dtype=bool)
        self._by_class[fields.site[~inside], fields.code[~inside]] = wanted[~inside]
        self._learnt = np.arange(256) < len(legend)
        # Of the time of the fields, which they must fit.
        self._labels = LabelReader(self.source)

    def read(self, window: Window, *, site: int = 0) -> np.ndarray:
        """Return the target of a window of a site: (H, W) uint8 class codes, 255 = none."""
        labels, parcels = self._labels.read(window, site=site)
        tile = LabelTile(
            sites=slice(site, site + 1), window=window, labels=labels[None], parcels=parcels[None]
        )
        return np.where(self.carried(tile)[0], labels, UNLABELLED).astype(np.uint8)

    def squares(self, *, side: int, offset_yx: tuple[int, int] = (0, 0)) -> np.ndarray:
        """Mark the squares of a grid over each site that hold a pixel with a target.

        Parameters
        ----------
        side, offset_yx
            As of `SquareGrid`.

        Returns
        -------
        (S, rows, columns) bool.
        """
        return mark_squares([(self, SquareGrid(side, offset_yx))])[0]

    def carried(self, tile: LabelTile) -> np.ndarray:
        """Return which pixels of a tile carry a target: (N, H, W) bool."""
        place = np.arange(tile.sites.start, tile.sites.stop)[:, None, None]
        number = np.clip(tile.parcels, 0, len(self._by_number) - 1)
        carried: np.ndarray = np.where(
            tile.parcels > 0, self._by_number[number], self._by_class[place, tile.labels]
        )
        carried &= self._learnt[tile.labels]
        if self.within is not None:
            carried &= self.within.holds(tile.window)
        return carried


def mark_squares(wanted: Sequence[tuple[Targets, SquareGrid]]) -> list[np.ndarray]:
    """Mark the squares that hold a pixel with a target, in one sweep over the labels of a source.

    Parameters
    ----------
    wanted
        Targets of one source, each with a grid of its own.

    Returns
    -------
    (S, rows, columns) bool of each.
    """
    source = wanted[0][0].source
    hits = [
        np.zeros((source.sites, *grid.shape(source.shape_yx)), dtype=bool) for _, grid in wanted
    ]
    for tile in source.label_tiles():
        if (tile.labels == UNLABELLED).all():
            continue
        for found, (targets, grid) in zip(hits, wanted, strict=True):
            grid.mark(found, targets.carried(tile), tile)
    return hits


def fields_within(source: Source, within: ChipChoice) -> FieldTable:
    """Return the table of fields as seen through some chips of each site.

    Fields to train on and to choose weights by keep the pixels that lie in these chips; those
    without any get the split ``unused``. Fields to test on stay as they are.
    """
    fields, legend = check_labelled(source)
    within.check(source)
    order = np.argsort(fields.number, kind="stable")
    numbers = fields.number[order]
    counted = np.zeros(len(fields), dtype=np.int64)
    classes = np.zeros((source.sites, 256), dtype=np.int64)
    for tile in source.label_tiles():
        known = within.holds(tile.window) & (tile.labels < len(legend))
        place, row, col = np.nonzero(known)
        number, code = tile.parcels[place, row, col], tile.labels[place, row, col]
        inside = number > 0
        row = order[np.searchsorted(numbers, number[inside])]
        counted += np.bincount(row, minlength=len(fields))
        np.add.at(classes, (place[~inside] + tile.sites.start, code[~inside]), 1)
    counted = np.where(fields.number > 0, counted, classes[fields.site, fields.code])
    tested = fields.split == SPLITS["test"]
    return replace(
        fields,
        pixels=np.where(tested, fields.pixels, counted).astype(np.int32),
        split=np.where(tested | (counted > 0), fields.split, SPLITS["unused"]).astype(np.uint8),
    )


def _inside(chip: Sequence[int], grid: tuple[int, ...]) -> bool:
    return len(chip) == 2 and all(
        0 <= place < size for place, size in zip(chip, grid, strict=False)
    )
