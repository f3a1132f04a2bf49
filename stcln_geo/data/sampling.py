"""The order of training samples: a pure function of the seed, the step and the rank.

Samples form one endless sequence, epoch after epoch. In an epoch the units (storage chunks) are
permuted and dealt out: first among the ranks, in runs of equal length, then within a rank into
groups that fit in memory; within a group the chips are permuted. So each epoch sees every chip
once, chunks are read whole and once, and training can go on from any step without replaying what
came before.

Where the chips of an epoch do not divide by the number of ranks, none is dropped and none is
repeated: the ranks that take one chip more change from epoch to epoch, and as batches run on over
the end of an epoch, all ranks make the same number of steps. Where a rank's run begins or ends
inside a unit, two ranks read that unit, each for chips of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

__all__ = ["Group", "Sample", "SampleOrder", "check_rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Units that are in memory together."""

    epoch: int
    index: int
    """Position of the group in its epoch."""
    units: tuple[int, ...]
    """Units, in the order of first use, which is that of reading."""
    samples: np.ndarray
    """(N, 2) int64: unit and position of the chip in it, in the order of use."""
    offset: int
    """Place of the first sample in its epoch, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of the endless sequence."""

    group: Group
    unit: int
    chip: int
    """Position of the chip in its unit."""
    epoch: int
    offset: int
    """Place of the sample in its epoch, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    """What one rank is dealt in an epoch."""

    number: int
    units: np.ndarray
    """(M,) int64: units, some more than once where they have weights."""
    starts: np.ndarray
    """(M + 1,) int64: place in the epoch, over all ranks, at which each unit's chips begin."""
    begin: int
    """Place of the rank's first chip; the first unit may begin before it."""
    end: int
    """Place after the rank's last chip."""
    cuts: np.ndarray
    """(G + 1,) int64: position in ``units`` at which each group begins."""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.cuts) - 1


class SampleOrder:
    """The endless shuffled sequence of chips of one rank.

    Parameters
    ----------
    chips_per_unit
        Chips of each unit.
    unit_bytes
        Memory of each unit.
    memory
        Bytes that all groups held at one time may take. If everything fits, there is one
        group; else groups of at most half, so that the next can be read while one is in use.
    rank, world_size
        Which share of each epoch, of how many.
    weights : (U,) float, optional
        How often an epoch shows each unit on average, 1 by default. With 2.5, epochs show it two
        or three times in turn; with 0.25, one of four does.
    """

    def __init__(
        self,
        chips_per_unit: Sequence[int] | np.ndarray,
        unit_bytes: Sequence[int] | np.ndarray,
        *,
        memory: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: np.ndarray | None = None,
    ) -> None:
        check_rank(rank, world_size)
        self._chips = np.asarray(chips_per_unit, dtype=np.int64)
        self._bytes = np.asarray(unit_bytes, dtype=np.int64)
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._weights = None if weights is None else np.asarray(weights, dtype=np.float64)
        # Each unit's place in its own rhythm, so that rare units do not all come in one epoch.
        self._phase = np.random.default_rng([seed, 0x77]).random(self._chips.size)
        shown = self._chips if weights is None else self._chips * (np.asarray(weights) > 0)
        if shown.sum() == 0:
            raise InputError(
                "Cannot make an order of samples: there is no chip. Check that the cube has clear "
                "dates (`stcln-geo cube info`) and, for fine-tuning, labelled training fields."
            )
        self.resident = bool(self._bytes.sum() <= memory)
        self._group_bytes = memory // 2
        self._epochs: dict[int, _Epoch] = {}

    @property
    def chips(self) -> int:
        """Number of different chips."""
        return int(self._chips.sum())

    def epoch(self, epoch: int) -> list[Group]:
        """Return the rank's groups of an epoch, in order."""
        dealt = self._dealt(epoch)
        return [self._group(dealt, index) for index in range(dealt.groups)]

    def after(self, group: Group) -> Group:
        """Return the group that follows, in a later epoch if need be."""
        dealt, index = self._dealt(group.epoch), group.index + 1
        while index >= dealt.groups:
            dealt, index = self._dealt(dealt.number + 1), 0
        return self._group(dealt, index)

    def samples(self, start: int) -> Iterator[Sample]:
        """Yield the rank's samples without end, from place ``start`` of its sequence."""
        number = self._epoch_of(start)
        dealt = self._dealt(number)
        place = dealt.begin + start - self._before(number, self._rank)
        # The last group that begins at or before the place.
        begins = np.maximum(dealt.starts[dealt.cuts[:-1]], dealt.begin)
        group = self._group(dealt, int(np.searchsorted(begins, place, side="right")) - 1)
        skipped = place - group.offset
        while True:
            for position in range(skipped, len(group.samples)):
                unit, chip = (int(value) for value in group.samples[position])
                yield Sample(
                    group=group,
                    unit=unit,
                    chip=chip,
                    epoch=group.epoch,
                    offset=group.offset + position,
                )
            skipped = 0
            group = self.after(group)

    def _times(self, epoch: int) -> np.ndarray:
        """Return how often each unit is shown before an epoch: (U,) int64."""
        if self._weights is None:
            return np.full(self._chips.size, epoch, dtype=np.int64)
        return np.floor(epoch * self._weights + self._phase).astype(np.int64)

    def _before(self, epoch: int, rank: int) -> int:
        """Return how many chips a rank is shown before an epoch.

        Over all ranks and epochs, chips are dealt like cards: one each, in turn.
        """
        total = int((self._times(epoch) * self._chips).sum())
        return max(-(-(total - rank) // self._world_size), 0)

    def _epoch_of(self, start: int) -> int:
        """Return the epoch that holds a place of the rank's sequence."""
        low, high = 0, 1
        while self._before(high, self._rank) <= start:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._before(middle, self._rank) <= start:
                low = middle
            else:
                high = middle
        return low

    def _dealt(self, epoch: int) -> _Epoch:
        """Return what the rank is dealt in an epoch; the last two are remembered."""
        if epoch not in self._epochs:
            # In one step, as two threads may ask.
            kept = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs = {**kept, epoch: self._deal(epoch)}
        return self._epochs[epoch]

    def _deal(self, epoch: int) -> _Epoch:
        shown = np.repeat(np.arange(self._chips.size), self._times(epoch + 1) - self._times(epoch))
        order = np.random.default_rng([self._seed, epoch]).permutation(shown)
        starts = np.concatenate([[0], np.cumsum(self._chips[order])])
        shares = [
            self._before(epoch + 1, rank) - self._before(epoch, rank)
            for rank in range(self._rank + 1)
        ]
        begin, end = sum(shares[:-1]), sum(shares)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        own = order[first:last] if end > begin else order[:0]
        return _Epoch(
            number=epoch,
            units=own,
            starts=starts[first : first + len(own) + 1],
            begin=begin,
            end=end,
            cuts=self._cut(own),
        )

    def _cut(self, units: np.ndarray) -> np.ndarray:
        """Cut an order of units into groups within the memory; at least one unit each."""
        if self.resident:
            return np.array([0, len(units)] if len(units) else [0])
        held = np.concatenate([[0], np.cumsum(self._bytes[units])])
        cuts = [0]
        while cuts[-1] < len(units):
            room = held[cuts[-1]] + self._group_bytes
            cuts.append(max(int(np.searchsorted(held, room, side="right")) - 1, cuts[-1] + 1))
        return np.array(cuts)

    def _group(self, dealt: _Epoch, index: int) -> Group:
        part = slice(int(dealt.cuts[index]), int(dealt.cuts[index + 1]))
        units = dealt.units[part]
        chips = self._chips[units]
        places = np.arange(int(chips.sum())) + dealt.starts[part.start]
        within = places - np.repeat(dealt.starts[part], chips)
        samples = np.stack([np.repeat(units, chips), within], axis=1)
        samples = samples[(places >= dealt.begin) & (places < dealt.end)]
        key = [self._seed, dealt.number, index, self._rank, self._world_size]
        samples = samples[np.random.default_rng(key).permutation(len(samples))]
        return Group(
            epoch=dealt.number,
            index=index,
            units=tuple(dict.fromkeys(samples[:, 0].tolist())),
            samples=samples,
            offset=max(int(dealt.starts[part.start]), dealt.begin),
        )


def check_rank(rank: int, world_size: int) -> None:
    """Check that there is such a rank.

    Raises
    ------
    InputError
        If there is not.
    """
    if not 0 <= rank < world_size:
        raise InputError(
            f"Cannot deal out samples to rank={rank} of world_size={world_size}: ranks count from "
            "0 to world_size - 1. Pass what the launcher of the processes says."
        )
