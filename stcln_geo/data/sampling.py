"""The order of training samples: a pure function of the seed and the step.

Samples form one endless sequence, epoch after epoch. Within an epoch the units (storage chunks)
are permuted and dealt into groups that fit in memory; within a group the chips are permuted. So
each epoch sees every chip once, chunks are read whole and once, and training can go on from any
step without replaying what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

__all__ = ["Group", "Sample", "SampleOrder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Units that are in memory together."""

    epoch: int
    index: int
    """Position of the group in its epoch."""
    units: tuple[int, ...]
    """Units, in the order of reading."""
    samples: np.ndarray
    """(N, 2) int64: unit and position of the chip in it, in the order of use."""
    first: int
    """Place of the first sample in the endless sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of the endless sequence."""

    group: Group
    unit: int
    chip: int
    """Position of the chip in its unit."""
    epoch: int
    offset: int
    """Place of the sample in its epoch."""


class SampleOrder:
    """The endless shuffled sequence of chips.

    Parameters
    ----------
    chips_per_unit
        Chips of each unit.
    unit_bytes
        Memory of each unit.
    memory
        Bytes that all groups held at one time may take. If everything fits, there is one
        group; else groups of at most half, so that the next can be read while one is in use.
    """

    def __init__(
        self,
        chips_per_unit: Sequence[int] | np.ndarray,
        unit_bytes: Sequence[int] | np.ndarray,
        *,
        memory: int,
        seed: int,
    ) -> None:
        self._chips = np.asarray(chips_per_unit, dtype=np.int64)
        self._bytes = np.asarray(unit_bytes, dtype=np.int64)
        self._seed = seed
        if self._chips.sum() == 0:
            raise InputError(
                "Cannot make an order of samples: there is no chip. Check that the cube has clear "
                "dates (`stcln-geo cube info`) and, for fine-tuning, labelled training fields."
            )
        self.resident = bool(self._bytes.sum() <= memory)
        self._group_bytes = memory if self.resident else memory // 2
        self._last: tuple[int, list[Group]] | None = None

    @property
    def chips(self) -> int:
        """Number of chips in an epoch."""
        return int(self._chips.sum())

    def epoch(self, epoch: int) -> list[Group]:
        """Return the groups of an epoch, in order."""
        if self._last is not None and self._last[0] == epoch:
            return self._last[1]
        generator = np.random.default_rng([self._seed, epoch])
        groups: list[Group] = []
        first = epoch * self.chips
        for units in self._deal(generator.permutation(self._chips.size)):
            samples = np.array(
                [(unit, chip) for unit in units for chip in range(self._chips[unit])],
                dtype=np.int64,
            ).reshape(-1, 2)
            samples = samples[generator.permutation(len(samples))]
            groups.append(
                Group(epoch=epoch, index=len(groups), units=units, samples=samples, first=first)
            )
            first += len(samples)
        self._last = (epoch, groups)
        return groups

    def after(self, group: Group) -> Group:
        """Return the group that follows, in the next epoch if need be."""
        groups = self.epoch(group.epoch)
        if group.index + 1 < len(groups):
            return groups[group.index + 1]
        return self.epoch(group.epoch + 1)[0]

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield samples without end, from place ``start`` of the sequence."""
        epoch, skipped = divmod(start, self.chips)
        group = self.epoch(epoch)[0]
        while skipped >= len(group.samples):
            skipped -= len(group.samples)
            group = self.after(group)
        while True:
            for place in range(skipped, len(group.samples)):
                unit, chip = (int(value) for value in group.samples[place])
                yield Sample(
                    group=group,
                    unit=unit,
                    chip=chip,
                    epoch=group.epoch,
                    offset=group.first - group.epoch * self.chips + place,
                )
            skipped = 0
            group = self.after(group)

    def _deal(self, order: np.ndarray) -> Iterator[tuple[int, ...]]:
        """Cut an order of units into groups within the memory; at least one unit each."""
        units: list[int] = []
        held = 0
        for unit in order:
            size = int(self._bytes[unit])
            if units and held + size > self._group_bytes:
                yield tuple(units)
                units, held = [], 0
            units.append(int(unit))
            held += size
        if units:
            yield tuple(units)
