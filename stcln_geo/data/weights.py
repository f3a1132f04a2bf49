"""How often chips are shown, by cube, by year and by region."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from ..errors import InputError
from ..region import LONLAT, Region
from .plan import ChipPlan
from .source import Source

__all__ = ["Balance", "weigh_units"]

Balance = Literal["chips", "sources"]
"""Whether all chips are shown equally often, or all sources, however many chips they have."""

_BOX = re.compile(r"\s*-?[\d.]+(\s*,\s*-?[\d.]+){3}\s*")


def weigh_units(
    plan: ChipPlan,
    sources: Sequence[Source],
    *,
    cubes: Mapping[str, float] | None = None,
    years: Mapping[str, float] | None = None,
    regions: Mapping[str, float] | None = None,
    balance: Balance = "chips",
) -> np.ndarray | None:
    """Return how often an epoch shows each unit on average: (U,) float64; None for once each.

    What fits a unit is multiplied.

    Parameters
    ----------
    cubes
        By name, path or pattern (``alps*``) of a cube or stack.
    years
        By the year in which seasons begin, or their first day.
    regions
        By polygon file or ``W,S,E,N`` in degrees, which hold the unit's first chip.

    Raises
    ------
    InputError
        If a weight is negative or fits nothing, or if none is above 0.
    """
    if balance not in get_args(Balance):
        raise InputError(
            f"Cannot balance by {balance!r}: it must be {' or '.join(get_args(Balance))}. "
            "Correct data.balance."
        )
    if not (cubes or years or regions) and balance == "chips":
        return None
    of_source = np.ones(len(sources))
    for key, weight in (cubes or {}).items():
        fits = [_is_named(source, key) for source in sources]
        names = sorted({source.path.name for source in sources})
        of_source[_checked(fits, "cubes", key, weight, names)] *= weight
    for key, weight in (years or {}).items():
        fits = [source.season.startswith(key) for source in sources]
        names = sorted({source.season for source in sources})
        of_source[_checked(fits, "years", key, weight, names)] *= weight
    counts = np.bincount(plan.season, weights=plan.chips_per_unit, minlength=len(sources))
    if balance == "sources":
        shown = counts > 0
        of_source[shown] *= counts.sum() / shown.sum() / counts[shown]
    weights: np.ndarray = of_source[plan.season]
    if regions:
        lon, lat = _centres(plan, sources)
        for key, weight in regions.items():
            inside = _inside(key, lon, lat)
            bounds = [f"{lon.min():.2f},{lat.min():.2f},{lon.max():.2f},{lat.max():.2f}"]
            weights[_checked(inside, "regions", key, weight, bounds)] *= weight
    if not (weights > 0).any():
        raise InputError(
            f"Cannot train with these weights: all of {len(weights)} units get 0. Give at least "
            "one cube, year or region a data.weights above 0."
        )
    return weights


def _is_named(source: Source, key: str) -> bool:
    names = (source.path.name, source.path.stem, str(source.path), str(source.path.resolve()))
    return any(fnmatch.fnmatchcase(name, key) for name in names)


def _checked(
    fits: Sequence[bool] | np.ndarray, section: str, key: str, weight: float, known: list[str]
) -> np.ndarray:
    """Return what a weight holds for, which must be something."""
    found = np.asarray(fits, dtype=bool)
    if not found.any() or not 0 <= weight < np.inf:
        told = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
        raise InputError(
            f"Cannot use data.weights.{section} {key!r} = {weight:g}: a weight must be 0 or more "
            f"and hold for something. There is: {told}. Correct the name or the weight."
        )
    return found


def _inside(key: str, lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    import shapely

    region = Region.from_bbox(key) if _BOX.fullmatch(key) else Region.from_file(key)
    shapely.prepare(region.geometry)
    found: np.ndarray = shapely.contains_xy(region.geometry, lon, lat)
    return found


def _centres(plan: ChipPlan, sources: Sequence[Source]) -> tuple[np.ndarray, np.ndarray]:
    """Return longitude and latitude of each unit's first chip: two of (U,) float64, degrees."""
    from pyproj import Transformer

    first = plan.starts[:-1]
    row, col = plan.row[first] + plan.chip / 2, plan.col[first] + plan.chip / 2
    lon, lat = np.zeros(len(plan)), np.zeros(len(plan))
    for number, source in enumerate(sources):
        for crs in sorted(set(source.crs)):
            here = np.array([name == crs for name in source.crs])
            units = np.flatnonzero(plan.season == number)
            units = units[here[plan.site[units]]]
            if not len(units):
                continue
            a, _, c, _, e, f = source.transform[plan.site[units]].T
            move = Transformer.from_crs(crs, LONLAT, always_xy=True)
            lon[units], lat[units] = move.transform(c + a * col[units], f + e * row[units])
    return lon, lat
