"""Chips: the squares the network sees in training, and the windows it is judged on.

A plan is a sequence of units, each of which is what one read fetches; a `ChipDataset` reads them.
Nothing here depends on the order of reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..cube.contract import FILL
from ..cube.stack import Stack
from ..cube.store import Season
from ..errors import ChunkError, InputError
from ..grid import Window
from ..legend import UNLABELLED
from .dates import DateChoice
from .labelled import plan_labelled_chips, plan_windows
from .plan import ChipPlan, ChipUnit, plan_chips
from .process import HomeProcess
from .reader import Block, band_indices
from .source import ChipSource, Source, source_of
from .targets import ChipChoice, Targets

__all__ = [
    "BadChunks",
    "BandStatistics",
    "Chip",
    "ChipDataset",
    "ChipSource",
    "ChipUnit",
    "band_statistics",
    "plan_chips",
    "plan_labelled_chips",
    "plan_windows",
]

BadChunks = Literal["fail", "skip"]
"""What to do where stored bytes are damaged: stop, or show nothing in their place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One sample, without the dates on which none of its pixels is valid."""

    reflectance: np.ndarray
    """(T, C, H, W) int16; reflectance / 0.0001, -32768 = no data."""
    valid: np.ndarray
    """(T, H, W) bool; True where usable."""
    days: np.ndarray
    """(T,) int32: days since the season's first day."""
    target: np.ndarray | None = None
    """(H, W) uint8 class codes, 255 = not to be learnt from or judged; None without labels."""
    source: ChipSource | None = None
    """Where it was cut from."""
    problem: str | None = None
    """Why the chip is blank, where its stored bytes are damaged and such chunks are skipped."""
    shift: int = 0
    """Days that augmentation has added to all of ``days``."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        target = 0 if self.target is None else self.target.nbytes
        return self.reflectance.nbytes + self.valid.nbytes + self.days.nbytes + target


@dataclass(frozen=True, slots=True, kw_only=True)
class BandStatistics:
    """Mean and standard deviation of each band over valid pixels, in reflectance."""

    mean: np.ndarray
    """(C,) float64."""
    std: np.ndarray
    """(C,) float64, above 0."""
    observations: int
    """Valid pixel-dates counted."""


class ChipDataset:
    """Chips of one or more seasons, of cubes or stacks, read as int16.

    Parameters
    ----------
    seasons
        Opened seasons that all have ``bands``.
    units
        What to read, as planned.
    bands
        Bands by name, in the order the network takes them.
    wanted
        For each season (F,) bool: the fields whose pixels carry a target; all other pixels get
        255. None gives chips without a target.
    within
        Only pixels of these chips of each site carry a target; None for all.
    halo
        Pixels at each side of a chip that get the target 255 whatever their field.
    dates
        Which of a chip's dates are used, of those on which a pixel of it is valid; None for all.
    bad_chunks
        ``skip`` gives blank chips in place of those whose stored bytes are damaged, which add
        nothing to any loss or figure; ``fail`` raises.
    """

    def __init__(
        self,
        seasons: Sequence[Season | Stack | Source],
        units: Sequence[ChipUnit],
        *,
        bands: tuple[str, ...],
        wanted: Sequence[np.ndarray] | None = None,
        within: ChipChoice | None = None,
        halo: int = 0,
        dates: DateChoice | None = None,
        bad_chunks: BadChunks = "fail",
    ) -> None:
        self.sources = tuple(source_of(season) for season in seasons)
        self.units = units if isinstance(units, ChipPlan) else tuple(units)
        self.bands = tuple(bands)
        self.halo = halo
        self._dates = dates
        self._bad_chunks = bad_chunks
        self._home = HomeProcess()
        self._indices: list[np.ndarray | None] = []
        for source in self.sources:
            indices = band_indices(source, self.bands, wanted_by="the dataset")
            whole = indices == list(range(len(source.bands)))
            self._indices.append(None if whole else np.array(indices))
        self._targets: tuple[Targets, ...] | None = None
        if wanted is not None:
            self._targets = tuple(
                Targets(source, chosen, within=within)
                for source, chosen in zip(self.sources, wanted, strict=True)
            )

    @property
    def chips(self) -> int:
        """Number of chips."""
        return int(self.chips_per_unit.sum())

    @property
    def chips_per_unit(self) -> np.ndarray:
        """Chips of each unit: (U,) int64."""
        if isinstance(self.units, ChipPlan):
            return self.units.chips_per_unit
        return np.array([len(unit.chips) for unit in self.units], dtype=np.int64)

    @property
    def bytes_per_unit(self) -> np.ndarray:
        """Most bytes that the chips of each unit can take in memory: (U,) int64."""
        date_bytes = 2 * len(self.bands) + 1
        if isinstance(self.units, ChipPlan):
            pixels = self.chips_per_unit * self.units.chip**2
            return pixels * (self.units.dates.astype(np.int64) * date_bytes + 1)
        return np.array([self._bytes_of(unit) for unit in self.units], dtype=np.int64)

    def unit_bytes(self, unit: int) -> int:
        """Return the most bytes the chips of a unit can take in memory."""
        return self._bytes_of(self.units[unit])

    def _bytes_of(self, plan: ChipUnit) -> int:
        dates = plan.dates
        if dates is None:
            dates = int(self.sources[plan.season].dates[plan.site])
        return sum(part.area for part in plan.chips) * (dates * (2 * len(self.bands) + 1) + 1)

    def read(self, unit: int) -> list[Chip]:
        """Read the chips of a unit; safe to call from several threads.

        Raises
        ------
        ChunkError
            If stored bytes are damaged, unless such chunks are to be skipped.
        """
        self._home.check()
        plan = self.units[unit]
        source = self.sources[plan.season]
        try:
            block = source.read(plan.window, site=plan.site)
        except ChunkError as error:
            if self._bad_chunks == "fail":
                raise
            return [self.blank_chip(problem=str(error))] * len(plan.chips)
        indices = self._indices[plan.season]
        chips = []
        for part in plan.chips:
            cut = _cut(block, part)
            target = None
            if self._targets is not None:
                target = self._targets[plan.season].read(part, site=plan.site)
                _forget_edge(target, self.halo)
            # Copies, so that a chip does not keep its whole block in memory.
            kept = np.flatnonzero(cut.valid.any(axis=(1, 2)))
            if self._dates is not None:
                kept = kept[self._dates.positions(cut.days[kept])]
            if indices is not None:
                reflectance = cut.reflectance[kept[:, None], indices]
            else:
                reflectance = cut.reflectance[kept]
            chips.append(
                Chip(
                    reflectance=reflectance,
                    valid=cut.valid[kept],
                    days=cut.days[kept],
                    target=target,
                    source=source.name_chip(part, plan.site),
                )
            )
        return chips

    def blank_chip(self, *, problem: str | None = None) -> Chip:
        """Return a chip in the shape of the others, with one date and no valid pixel."""
        height, width = self.units[0].chips[0].shape_yx
        return Chip(
            reflectance=np.full((1, len(self.bands), height, width), FILL, dtype=np.int16),
            valid=np.zeros((1, height, width), dtype=bool),
            days=np.zeros(1, dtype=np.int32),
            target=None
            if self._targets is None
            else np.full((height, width), UNLABELLED, dtype=np.uint8),
            problem=problem,
        )


def band_statistics(dataset: ChipDataset, *, seed: int = 0, most_units: int = 64) -> BandStatistics:
    """Measure mean and standard deviation of each band over valid pixels of sampled units.

    Sums are whole numbers, so the result does not depend on the order of reading.
    """
    count = len(dataset.units)
    order = np.random.default_rng(seed).permutation(count)[:most_units]
    observations = 0
    sums = np.zeros(len(dataset.bands), dtype=np.int64)
    squares = np.zeros(len(dataset.bands), dtype=np.int64)
    for unit in np.sort(order):
        for chip in dataset.read(int(unit)):
            values = np.moveaxis(chip.reflectance, 1, -1)[chip.valid].astype(np.int64)
            observations += len(values)
            sums += values.sum(axis=0)
            squares += (values * values).sum(axis=0)
    if observations < 2:
        raise InputError(
            f"Cannot measure the bands' mean and deviation: {observations} valid pixels in "
            f"{len(order)} of {count} sampled units; at least 2 are needed. Check the cube's "
            "clouds with `stcln-geo cube info`, or give a cube with more dates."
        )
    mean = sums / observations
    variance = np.maximum(squares / observations - mean**2, 0.0)
    # A constant band has no deviation: 1e-4 is one digital number.
    return BandStatistics(
        mean=mean * 1e-4, std=np.maximum(np.sqrt(variance), 1.0) * 1e-4, observations=observations
    )


def _forget_edge(target: np.ndarray, halo: int) -> None:
    """Take the target away from the pixels at each side of a chip."""
    edge = np.ones(target.shape, dtype=bool)
    edge[halo : target.shape[0] - halo, halo : target.shape[1] - halo] = False
    target[edge] = UNLABELLED


def _cut(block: Block, part: Window) -> Block:
    place = part.relative_to(block.window)
    return Block(
        reflectance=block.reflectance[:, :, place.rows, place.cols],
        valid=block.valid[:, place.rows, place.cols],
        days=block.days,
        window=part,
    )
