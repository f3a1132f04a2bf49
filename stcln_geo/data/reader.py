"""Read blocks of a season as NumPy arrays, by band name, also beyond the season's edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..cube.contract import FILL
from ..cube.store import Season
from ..errors import CubeError
from ..grid import Window

if TYPE_CHECKING:
    from .source import Source

__all__ = ["Block", "band_indices", "drop_empty_dates", "read_block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """All dates of a rectangle of a season."""

    reflectance: np.ndarray
    """(T, C, H, W) int16; reflectance / 0.0001, -32768 = no data."""
    valid: np.ndarray
    """(T, H, W) bool; True where usable."""
    days: np.ndarray
    """(T,) int32: days since the season's first day."""
    window: Window
    """The rectangle, counted from the season's first pixel."""


def band_indices(season: Season | Source, bands: tuple[str, ...], *, wanted_by: str) -> list[int]:
    """Return the positions of bands in a season of a cube or stack.

    Raises
    ------
    CubeError
        If the season lacks a band; ``wanted_by`` says in the message who needs it.
    """
    missing = [band for band in bands if band not in season.bands]
    if missing:
        place = season.cube if isinstance(season, Season) else season.path
        raise CubeError(
            f"Cannot read {place}: the cube lacks {'band' if len(missing) == 1 else 'bands'} "
            f"{', '.join(repr(band) for band in missing)} required by {wanted_by} (bands: "
            f"{', '.join(bands)}). The cube has: {', '.join(season.bands)}. Rebuild it with "
            "--bands, or choose another checkpoint."
        )
    return [season.bands.index(band) for band in bands]


def read_block(
    season: Season,
    window: Window,
    *,
    bands: tuple[str, ...] | None = None,
    dates: np.ndarray | None = None,
) -> Block:
    """Read a rectangle; what lies beyond the season is no data and not valid.

    Parameters
    ----------
    window
        The rectangle, counted from the season's first pixel; may reach beyond it.
    bands
        Names in the order wanted; by default all, as stored.
    dates : (N,) int, optional
        Positions of the dates wanted, increasing; by default all.
    """
    chosen = season.bands if bands is None else bands
    indices = band_indices(season, chosen, wanted_by="the request")
    picked = np.arange(len(season.time)) if dates is None else np.asarray(dates, dtype=np.intp)
    height, width = window.shape_yx
    inside = window.intersection(Window(0, 0, *season.shape_yx))
    if inside == window and picked.size:
        reflectance, valid = _read(season, inside, picked, indices)
    else:
        reflectance = np.full((len(picked), len(chosen), height, width), FILL, dtype=np.int16)
        valid = np.zeros((len(picked), height, width), dtype=bool)
        if picked.size and not inside.is_empty:
            target = inside.relative_to(window)
            values, usable = _read(season, inside, picked, indices)
            reflectance[:, :, target.rows, target.cols] = values
            valid[:, target.rows, target.cols] = usable
    return Block(reflectance=reflectance, valid=valid, days=season.days[picked], window=window)


def _read(
    season: Season, inside: Window, dates: np.ndarray, bands: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return reflectance and valid of a rectangle of the season, copied no more than needed."""
    # A chunk holds all dates and bands: read it whole, then choose.
    values = season.reflectance[:, :, inside.rows, inside.cols]
    usable = season.valid[:, inside.rows, inside.cols]
    if len(dates) < len(season.time):
        usable = usable[dates]
    if len(dates) < len(season.time) or bands != list(range(len(season.bands))):
        values = values[np.ix_(dates, np.asarray(bands, dtype=np.intp))]
    return values, usable


def drop_empty_dates(block: Block) -> Block:
    """Return the block without the dates on which none of its pixels is valid."""
    kept = block.valid.any(axis=(1, 2))
    if kept.all():
        return block
    return Block(
        reflectance=block.reflectance[kept],
        valid=block.valid[kept],
        days=block.days[kept],
        window=block.window,
    )
