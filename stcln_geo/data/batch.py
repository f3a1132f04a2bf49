"""From chips to a batch on a device: augmentation, padding, decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..cube.contract import FILL, SCALE
from ..errors import InputError
from ..legend import UNLABELLED
from .chips import Chip, ChipSource

__all__ = ["IGNORE_INDEX", "Augmentation", "Batch", "augment", "collate", "decode_reflectance"]

IGNORE_INDEX = -100
"""Target of a pixel that neither loss nor metrics see (PyTorch's own default)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Chips padded to one number of dates."""

    reflectance: torch.Tensor
    """(B, T, C, H, W) int16; reflectance / 0.0001, -32768 = no data."""
    valid: torch.Tensor
    """(B, T, H, W) bool; True where usable, False on padded dates."""
    days: torch.Tensor
    """(B, T) float32: days since the season's first day; 0 on padded dates."""
    target: torch.Tensor | None
    """(B, H, W) int64 class codes, -100 = ignored; None without labels."""
    sources: tuple[ChipSource | None, ...] = ()
    """Where each chip was cut from; empty where that is not known."""
    samples: tuple[int, ...] = ()
    """Place of each chip in its stream (in training: epoch * 2**40 + place in the epoch), whatever
    the batch size; empty for blank chips and outside of streams."""
    shifts: tuple[int, ...] = ()
    """Days that were added to those of each chip; empty where none were."""

    def __len__(self) -> int:
        """Return the number of chips."""
        return int(self.reflectance.shape[0])

    def images(self) -> torch.Tensor:
        """Return (B, T, C, H, W) float32 reflectance, 0 where not valid."""
        return decode_reflectance(self.reflectance, self.valid)

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Return the batch on another device; arguments as of ``torch.Tensor.to``."""
        return replace(
            self,
            reflectance=self.reflectance.to(*args, **kwargs),
            valid=self.valid.to(*args, **kwargs),
            days=self.days.to(*args, **kwargs),
            target=None if self.target is None else self.target.to(*args, **kwargs),
        )

    def part(self, first: int, last: int) -> Batch:
        """Return the chips ``first`` to ``last - 1`` as a batch; a view."""
        chosen = slice(first, last)
        return replace(
            self,
            reflectance=self.reflectance[chosen],
            valid=self.valid[chosen],
            days=self.days[chosen],
            target=None if self.target is None else self.target[chosen],
            sources=self.sources[chosen],
            samples=self.samples[chosen],
            shifts=self.shifts[chosen],
        )

    def describe(self, chip: int) -> str:
        """Name a chip for people: where it was cut from, and its dates."""
        source = self.sources[chip] if self.sources else None
        seen = self.valid[chip].flatten(1).any(1).cpu().numpy()
        days = self.days[chip].cpu().numpy()[seen] - (self.shifts[chip] if self.shifts else 0)
        if source is None:
            return f"chip {chip} of the batch, {len(days)} dates"
        if not len(days):
            return f"{source}, without a clear date"
        first, last = (
            np.datetime64(source.season) + np.timedelta64(int(day), "D")
            for day in (days.min(), days.max())
        )
        return f"{source}, {len(days)} dates from {first} to {last}"


def decode_reflectance(reflectance: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Turn digital numbers into reflectance, on whatever device they are.

    Parameters
    ----------
    reflectance : (B, T, C, H, W) int16.
    valid : (B, T, H, W) bool. True where usable.

    Returns
    -------
    (B, T, C, H, W) float32, 0 where not valid or without data.
    """
    usable = valid.unsqueeze(2) & (reflectance != FILL)
    return torch.where(usable, reflectance.float() * SCALE, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Random changes of training chips."""

    max_dates: int | None = None
    """Keep a random choice of so many dates, in order; None keeps all."""
    dihedral: bool = True
    """Apply one of the eight symmetries of the square to the pixels."""
    prefix: float = 0.0
    """Share of the chips that end at a random date, as a season does that is still going on."""
    drop_dates: float = 0.0
    """Leave out up to this share of the dates: how many and which is random."""
    min_dates: int = 4
    """Dates that ``prefix`` and ``drop_dates`` leave, where a chip has them."""
    shift_days: int = 0
    """Move all days of a chip by one random number of days, at most so many, to and fro."""


def augment(chip: Chip, generator: np.random.Generator, options: Augmentation) -> Chip:
    """Cut, thin out, turn, mirror and move a chip at random; pixels and targets turn together."""
    reflectance, valid, days, target = chip.reflectance, chip.valid, chip.days, chip.target
    dates = _choose_dates(len(days), generator, options)
    if dates is not None:
        reflectance, valid, days = reflectance[dates], valid[dates], days[dates]
    if options.dihedral:
        turns, mirrored = int(generator.integers(4)), bool(generator.integers(2))
        reflectance, valid = (
            _turn(array, turns, mirrored=mirrored) for array in (reflectance, valid)
        )
        target = None if target is None else _turn(target, turns, mirrored=mirrored)
    shift = 0
    if options.shift_days:
        shift = int(generator.integers(-options.shift_days, options.shift_days + 1))
        days = days + days.dtype.type(shift)
    return replace(
        chip, reflectance=reflectance, valid=valid, days=days, target=target, shift=shift
    )


def _choose_dates(
    dates: int, generator: np.random.Generator, options: Augmentation
) -> np.ndarray | None:
    """Return the positions of the dates that a chip keeps, increasing; None for all."""
    least = min(options.min_dates, dates)
    end = dates
    if options.prefix and generator.random() < options.prefix:
        end = int(generator.integers(least, dates + 1))
    keep = end
    if options.drop_dates:
        keep = max(round(end * (1 - options.drop_dates * generator.random())), min(least, end))
    if options.max_dates is not None:
        keep = min(keep, options.max_dates)
    if keep == dates:
        return None
    return np.sort(generator.choice(end, size=keep, replace=False))


def collate(chips: Sequence[Chip], *, samples: Sequence[int] = ()) -> Batch:
    """Stack chips, with as many dates as the longest; padded dates are not valid.

    A chip without any date takes part, with no valid pixel. ``samples`` are the chips' places in
    their stream.
    """
    if not chips or len({chip.reflectance.shape[1:] for chip in chips}) != 1:
        shapes = sorted({chip.reflectance.shape[1:] for chip in chips})
        raise InputError(
            f"Cannot stack {len(chips)} chips of the shapes {shapes} (bands, rows, columns): a "
            "batch needs at least one chip, and all of one shape. Use one chip size and one set "
            "of bands."
        )
    dates = max(max(len(chip.days) for chip in chips), 1)
    bands, height, width = chips[0].reflectance.shape[1:]
    reflectance = np.full((len(chips), dates, bands, height, width), FILL, dtype=np.int16)
    valid = np.zeros((len(chips), dates, height, width), dtype=bool)
    days = np.zeros((len(chips), dates), dtype=np.float32)
    target: np.ndarray | None = None
    if chips[0].target is not None:
        target = np.full((len(chips), height, width), IGNORE_INDEX, dtype=np.int64)
    for index, chip in enumerate(chips):
        own = len(chip.days)
        reflectance[index, :own] = chip.reflectance
        valid[index, :own] = chip.valid
        days[index, :own] = chip.days
        if target is not None and chip.target is not None:
            known = chip.target != UNLABELLED
            target[index][known] = chip.target[known]
    return Batch(
        reflectance=torch.from_numpy(reflectance),
        valid=torch.from_numpy(valid),
        days=torch.from_numpy(days),
        target=None if target is None else torch.from_numpy(target),
        sources=tuple(chip.source for chip in chips),
        samples=tuple(samples),
        shifts=tuple(chip.shift for chip in chips) if any(chip.shift for chip in chips) else (),
    )


def _turn(array: np.ndarray, turns: int, *, mirrored: bool) -> np.ndarray:
    """Rotate the last two axes by quarter turns, then mirror the last."""
    turned = np.rot90(array, turns, axes=(-2, -1))
    return turned[..., ::-1] if mirrored else turned
