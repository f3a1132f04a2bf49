"""Plans of labelled squares: the chips to train on, and the windows to be judged on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..cube.season import Season
from ..cube.stack import Stack
from ..grid import Lattice, Window
from .plan import ChipUnit
from .source import Source, source_of
from .targets import ChipChoice, Targets

__all__ = ["plan_labelled_chips", "plan_windows", "repeat_units"]


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
    source = source_of(season)
    hits = Targets(source, wanted, within=within).squares(side=chip)
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
    source = source_of(season)
    cores = lattice.cores(source.window)
    if not cores:
        return []
    origin = cores[0].relative_to(source.window)
    hits = Targets(source, wanted, within=within).squares(
        side=lattice.stride, offset_yx=(-origin.row, -origin.col)
    )
    units = []
    for site, down, right in np.argwhere(hits).tolist():
        core = Window(
            origin.row + down * lattice.stride, origin.col + right * lattice.stride,
            lattice.stride, lattice.stride,
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
