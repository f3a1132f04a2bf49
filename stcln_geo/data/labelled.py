"""Plans of labelled squares: the chips to train on, and the windows to be judged on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..cube.season import Season
from ..cube.stack import Stack
from ..grid import Lattice, Window
from .plan import ChipUnit
from .source import Source, source_of
from .targets import ChipChoice, SquareGrid, Targets, mark_squares

__all__ = ["plan_labelled_chips", "plan_training", "plan_windows", "repeat_units"]


def plan_labelled_chips(
    season: Season | Stack | Source,
    wanted: np.ndarray,
    *,
    chip: int,
    index: int = 0,
    within: ChipChoice | None = None,
) -> list[ChipUnit]:
    """List the chips that hold a pixel of a wanted field.

    Chips tile each site, or the cube, from its first pixel; the last ones reach beyond its edge.

    Parameters
    ----------
    wanted : (F,) bool over the season's fields.
    within
        Only pixels of these chips count; None for all.
    """
    targets = Targets(season, wanted, within=within)
    return _chip_units(targets.source, targets.squares(side=chip), chip=chip, index=index)


def plan_training(
    season: Season | Stack | Source,
    *,
    trained: np.ndarray,
    judged: np.ndarray,
    chip: int,
    lattice: Lattice,
    within: ChipChoice | None = None,
) -> tuple[list[ChipUnit], list[ChipUnit]]:
    """List the chips to train on and the windows to judge on, with one sweep over the labels.

    Parameters
    ----------
    trained, judged : (F,) bool over the season's fields.
    within
        Only pixels of these chips count; None for all.

    Returns
    -------
    What `plan_labelled_chips` gives of the one, and `plan_windows` of the other.
    """
    source = source_of(season)
    cores = _core_grid(source, lattice)
    chips, windows = mark_squares(
        [
            (Targets(source, trained, within=within), SquareGrid(chip)),
            (Targets(source, judged, within=within), cores),
        ]
    )
    return (
        _chip_units(source, chips, chip=chip, index=0),
        _window_units(windows, cores, lattice, index=0),
    )


def _chip_units(source: Source, hits: np.ndarray, *, chip: int, index: int) -> list[ChipUnit]:
    """Return the chips that were marked, those of a storage chunk together."""
    chunk, seen = source.chunk, source.clear.pixels > 0
    side = chunk if chunk % chip == 0 else chip
    # The chips of a unit lie in one storage chunk.
    groups: dict[tuple[int, int, int], list[Window]] = {}
    for site, down, right in np.argwhere(hits).tolist():
        part = Window(down * chip, right * chip, chip, chip)
        rows = slice(part.row // chunk, -(-(part.row + chip) // chunk))
        cols = slice(part.col // chunk, -(-(part.col + chip) // chunk))
        if seen[site, rows, cols].any():
            groups.setdefault((site, part.row // side, part.col // side), []).append(part)
    return [
        ChipUnit(season=index, window=_around(members), chips=tuple(members), site=site)
        for (site, _, _), members in groups.items()
    ]


def plan_windows(
    season: Season | Stack | Source,
    wanted: np.ndarray,
    *,
    lattice: Lattice,
    index: int = 0,
    within: ChipChoice | None = None,
) -> list[ChipUnit]:
    """List the lattice's windows whose core holds a pixel of a wanted field.

    Of a cube, these are the windows that prediction uses, so that figures hold for the map. Each
    site of a stack is a map of its own: there the lattice begins at the site's first pixel, and
    windows see nothing beyond its edge.

    Parameters
    ----------
    wanted : (F,) bool over the season's fields.
    within
        Only pixels of these chips count; None for all.
    """
    targets = Targets(season, wanted, within=within)
    grid = _core_grid(targets.source, lattice)
    hits = targets.squares(side=grid.side, offset_yx=grid.offset_yx)
    return _window_units(hits, grid, lattice, index=index)


def _core_grid(source: Source, lattice: Lattice) -> SquareGrid:
    """Return the cores of a lattice over a source."""
    first = source.window
    return SquareGrid(lattice.stride, (first.row % lattice.stride, first.col % lattice.stride))


def _window_units(
    hits: np.ndarray, grid: SquareGrid, lattice: Lattice, *, index: int
) -> list[ChipUnit]:
    """Return the windows of the cores that were marked."""
    units = []
    for site, down, right in np.argwhere(hits).tolist():
        core = Window(
            down * grid.side - grid.offset_yx[0], right * grid.side - grid.offset_yx[1],
            grid.side, grid.side,
        )  # fmt: skip
        window = lattice.window_of(core)
        units.append(ChipUnit(season=index, window=window, chips=(window,), site=site))
    return units


def repeat_units(units: Sequence[ChipUnit], season: Season | Stack | Source) -> list[ChipUnit]:
    """Return units as often as their sites are to be shown, one after the other."""
    weight = source_of(season).weight
    if weight is None:
        return list(units)
    return [unit for unit in units for _ in range(int(weight[unit.site]))]


def _around(chips: Sequence[Window]) -> Window:
    window = chips[0]
    for part in chips[1:]:
        window = window.union(part)
    return window
