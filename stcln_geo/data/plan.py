"""Plans of chips: which squares are read together, as arrays, not objects.

An archive of tens of thousands of sites has millions of chips. They are planned from the counts of
clear pixels per chunk that cubes and stacks keep, with a few array operations per source, and no
pixel is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from ..cube.store import Season
from ..errors import InputError
from ..grid import Window
from .source import Source, source_of

__all__ = ["ChipPlan", "ChipUnit", "SourcePlan", "plan_chips", "plan_source", "unit_side"]

_UNIT_BYTES = 64_000_000
"""Most memory of a unit that is not told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipUnit:
    """What one read fetches: a storage chunk with the chips in it, or one chip."""

    season: int
    """Position of the season in the dataset."""
    window: Window
    """What is read, counted from the first pixel of the season, or of the site."""
    chips: tuple[Window, ...]
    """The chips to cut from it, counted likewise."""
    site: int = 0
    """Position of the site in a stack; 0 in a cube."""
    dates: int | None = None
    """Most dates on which a chip has a valid pixel, where that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipPlan(Sequence[ChipUnit]):
    """Many units of chips of one size; a sequence of `ChipUnit`, kept as arrays."""

    chip: int
    """Side of a chip (pixels)."""
    season: np.ndarray
    """(U,) int32."""
    site: np.ndarray
    """(U,) int32."""
    dates: np.ndarray
    """(U,) int32: most dates on which a chip has a valid pixel."""
    starts: np.ndarray
    """(U + 1,) int64: position in ``row`` and ``col`` at which each unit's chips begin."""
    row: np.ndarray
    """(N,) int32: first row of each chip."""
    col: np.ndarray
    """(N,) int32: first column of each chip."""

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.season)

    @overload
    def __getitem__(self, index: int) -> ChipUnit: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChipUnit]: ...
    def __getitem__(self, index: int | slice) -> ChipUnit | list[ChipUnit]:
        """Return one unit, or a list of some."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"unit {index} of {len(self)}")
        index %= len(self)
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        rows, cols = self.row[part], self.col[part]
        top, left = int(rows.min()), int(cols.min())
        return ChipUnit(
            season=int(self.season[index]),
            window=Window(
                top, left,
                int(rows.max()) + self.chip - top, int(cols.max()) + self.chip - left,
            ),
            chips=tuple(
                Window(row, col, self.chip, self.chip)
                for row, col in zip(rows.tolist(), cols.tolist(), strict=True)
            ),
            site=int(self.site[index]),
            dates=int(self.dates[index]),
        )  # fmt: skip

    def __iter__(self) -> Iterator[ChipUnit]:
        """Yield the units."""
        return (self[index] for index in range(len(self)))

    @property
    def chips_per_unit(self) -> np.ndarray:
        """(U,) int64."""
        return np.diff(self.starts)

    def choose(self, wanted: np.ndarray) -> ChipPlan:
        """Return the plan of some chips alone; units without any are left out.

        Parameters
        ----------
        wanted : (N,) bool.
        """
        sums = np.concatenate([[0], np.cumsum(wanted, dtype=np.int64)])
        counts = np.diff(sums[self.starts])
        kept = counts > 0
        return ChipPlan(
            chip=self.chip,
            season=self.season[kept],
            site=self.site[kept],
            dates=self.dates[kept],
            starts=np.concatenate([[0], np.cumsum(counts[kept])]),
            row=self.row[wanted],
            col=self.col[wanted],
        )

    @staticmethod
    def join(plans: Iterable[ChipPlan]) -> ChipPlan:
        """Return several plans of one chip size as one."""
        plans = list(plans)
        counts = np.concatenate([plan.chips_per_unit for plan in plans])
        return ChipPlan(
            chip=plans[0].chip,
            season=np.concatenate([plan.season for plan in plans]),
            site=np.concatenate([plan.site for plan in plans]),
            dates=np.concatenate([plan.dates for plan in plans]),
            starts=np.concatenate([[0], np.cumsum(counts)]),
            row=np.concatenate([plan.row for plan in plans]),
            col=np.concatenate([plan.col for plan in plans]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """The chips of one source, and what was left out of them."""

    plan: ChipPlan
    empty: int
    """Chips left out as no date has a clear pixel there."""
    cloudy: int
    """Chips left out as too few dates are clear there."""
    amplification: float
    """How often each chunk is decoded in an epoch."""

    @property
    def chips(self) -> int:
        """Chips that are used."""
        return len(self.plan.row)


def plan_chips(season: Season, *, chip: int, index: int = 0) -> ChipPlan:
    """List all chips of a season that are ever seen, by storage chunk.

    Parameters
    ----------
    chip
        Side of a chip (pixels). Chips tile the season from its first pixel; the last ones
        reach beyond its edge, where nothing is valid.
    index
        The season's position in the dataset.
    """
    return plan_source(source_of(season), chip=chip, index=index).plan


def plan_source(
    source: Source,
    *,
    chip: int,
    index: int = 0,
    min_clear: float = 0.0,
    unit_bytes: int = _UNIT_BYTES,
    sites: np.ndarray | None = None,
) -> SourcePlan:
    """List the chips of a source that are clear often enough, by storage chunk.

    Whether a chip is clear is told by the chunks that it touches.

    Parameters
    ----------
    chip
        Side of a chip (pixels). Chips tile each site from its first pixel; the last ones reach
        beyond its edge, where nothing is valid.
    index
        The source's position in the dataset.
    min_clear
        Clear dates that the pixels must have, on average.
    unit_bytes
        Most memory that a unit may take: where whole chunks need more, they are read in parts.
    sites : (S,) bool. True for the sites to use; None uses all.
    """
    clear, chunk = source.clear, source.chunk
    pixel_bytes = int(source.dates.max()) * (2 * len(source.bands) + 1)
    side, amplification = unit_side(
        source.shape_yx, chip=chip, chunk=chunk, most_pixels=unit_bytes // max(pixel_bytes, 1)
    )
    low_y, high_y = _touched(source.shape_yx[0], chip, chunk)
    low_x, high_x = _touched(source.shape_yx[1], chip, chunk)
    sums = np.pad(clear.pixels, ((0, 0), (1, 0), (1, 0))).cumsum(axis=1).cumsum(axis=2)
    top, bottom = sums[:, low_y], sums[:, high_y]
    pixels = bottom[:, :, high_x] - bottom[:, :, low_x] - top[:, :, high_x] + top[:, :, low_x]
    height, width = (np.minimum(high * chunk, size) - low * chunk for low, high, size in (
        (low_y, high_y, source.shape_yx[0]), (low_x, high_x, source.shape_yx[1])
    ))  # fmt: skip
    often = pixels / (height[:, None] * width[None, :])
    seen = pixels > 0
    used = np.ones(source.sites, dtype=bool) if sites is None else sites
    wanted = seen & (often >= min_clear) & used[:, None, None]

    # Chips in the order of their units: (S, Y, X) -> (S, unit_y, unit_x, k, k).
    per = side // chip
    sites, down, across = wanted.shape
    units_y, units_x = -(-down // per), -(-across // per)
    grid = np.zeros((sites, units_y * per, units_x * per), dtype=bool)
    grid[:, :down, :across] = wanted
    grid = grid.reshape(sites, units_y, per, units_x, per).transpose(0, 1, 3, 2, 4)
    site, unit_y, unit_x, chip_y, chip_x = np.nonzero(grid)
    unit = (site * units_y + unit_y) * units_x + unit_x
    first = np.flatnonzero(np.diff(unit, prepend=-1))
    if chunk % side == 0:
        # The unit lies in one chunk, whose dates are counted.
        dates = clear.dates[site, unit_y * side // chunk, unit_x * side // chunk]
    else:
        dates = source.dates[site]
    return SourcePlan(
        plan=ChipPlan(
            chip=chip,
            season=np.full(len(first), index, dtype=np.int32),
            site=site[first].astype(np.int32),
            dates=dates[first].astype(np.int32),
            starts=np.append(first, len(unit)).astype(np.int64),
            row=((unit_y * per + chip_y) * chip).astype(np.int32),
            col=((unit_x * per + chip_x) * chip).astype(np.int32),
        ),
        empty=int((~seen[used]).sum()),
        cloudy=int((seen & ~wanted)[used].sum()),
        amplification=amplification,
    )


def unit_side(
    shape_yx: tuple[int, int], *, chip: int, chunk: int, most_pixels: int
) -> tuple[int, float]:
    """Choose the side of a unit: the smallest by which chunks are decoded as rarely as can be.

    Parameters
    ----------
    shape_yx
        Height and width of a site.
    most_pixels
        Pixels that a unit may hold; at least one chip is allowed.

    Returns
    -------
    The side, a multiple of ``chip``, and how often each chunk is decoded in an epoch.
    """
    if chip < 1 or chunk < 1:
        raise InputError(
            f"Cannot cut chips of {chip} px from chunks of {chunk} px: both must be 1 px or more. "
            "Use for example --chip 32."
        )
    fewest, chosen = math.inf, chip
    for side in range(chip, math.lcm(chip, chunk) + 1, chip):
        if side > chip and side * side > most_pixels:
            break
        decoded = 1.0
        for size in shape_yx:
            low, high = _touched(size, side, chunk)
            decoded *= int((high - low).sum()) / -(-size // chunk)
        if decoded < fewest - 1e-9:
            fewest, chosen = decoded, side
    return chosen, fewest


def _touched(size: int, side: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first chunk that each square along an axis touches, and the one after its last."""
    starts = np.arange(0, size, side)
    return starts // chunk, -(-np.minimum(starts + side, size) // chunk)
