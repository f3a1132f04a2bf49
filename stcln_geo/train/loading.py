"""From the recipe of pre-training to its data: what is read, how often, and in how much memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.chips import ChipDataset
from ..data.corpus import MOST_AMPLIFICATION, Corpus, open_sources, plan_corpus
from ..data.stream import OrderedStream, ProblemLog, TrainingStream
from ..data.weights import weigh_units
from ..errors import InputError
from ..model.checkpoint import CheckpointInfo
from .config import PretrainConfig
from .start import BandChoice, choose_shared_bands

__all__ = ["Loading", "hold_out", "load_problems", "plan_loading", "read_problems"]

_BATCHES_HELD = 4
"""Batches that are made ahead, or on their way to the device."""
_FEWEST_UNITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """The data of a pre-training run, not yet read."""

    corpus: Corpus
    config: PretrainConfig
    dataset: ChipDataset
    """What is trained on."""
    held_out: ChipDataset
    """What is judged on."""
    weights: np.ndarray | None
    """(U,) how often an epoch shows each unit of ``dataset``; None for once each."""
    choice: BandChoice | None = None
    """How the bands were chosen by those of a checkpoint; None where the run begins from none."""

    @property
    def epoch_chips(self) -> int:
        """Chips that an epoch shows on average."""
        counts = self.dataset.chips_per_unit
        return round(float((counts * (1 if self.weights is None else self.weights)).sum()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the data."""
        return (*self.corpus.notes, *(self.choice.notes if self.choice is not None else ()))

    @property
    def trained_days(self) -> tuple[int, int]:
        """First and last day that is seen."""
        return self.corpus.day_range

    @property
    def most_dates(self) -> int:
        """Dates of the site that has most."""
        return self.corpus.most_dates

    def describe(self) -> list[dict[str, Any]]:
        """Return what a run's records tell of each source."""
        return [source.describe() for source in self.corpus.sources]

    def identity(self) -> dict[str, str]:
        """Return what tells the sites that are used apart from others; nothing where all are."""
        if self.corpus.used is None:
            return {}
        packed = b"".join(np.packbits(used).tobytes() for used in self.corpus.used)
        return {"sites": hashlib.sha256(packed).hexdigest()}

    def summary(self) -> dict[str, Any]:
        """Return the counts that a run's records hold."""
        return {
            "chips": self.dataset.chips,
            "validation_chips": self.held_out.chips,
            "epoch_chips": self.epoch_chips,
            "data": self.corpus.summary(),
        }

    def streams(
        self,
        *,
        batch_size: int,
        workers: int,
        problems: ProblemLog | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> tuple[TrainingStream, OrderedStream | None]:
        """Return the batches to train on, and those to judge on where there are any.

        Raises
        ------
        InputError
            If the memory does not suffice to read and to mix a few units.
        """
        options, dataset = self.config.data, self.dataset
        working = self.working(batch_size=batch_size, workers=workers)
        least = working + 2 * _FEWEST_UNITS * int(dataset.bytes_per_unit.max())
        if options.memory < least:
            raise InputError(
                f"Cannot stream batches of {batch_size} chips in {options.memory / 1e9:g} GB with "
                f"{workers} threads: they need at least {least / 1e9:.2g} GB, for what is being "
                "read and for a few chunks to mix. Give more --memory, fewer --workers, or a "
                "smaller --batch-size."
            )
        stream = TrainingStream(
            dataset,
            batch_size=batch_size,
            seed=self.config.seed,
            memory=options.memory - working,
            threads=workers,
            augmentation=options.augmentation,
            weights=self.weights,
            problems=problems,
            rank=rank,
            world_size=world_size,
        )
        if not self.held_out.chips:
            return stream, None
        return stream, OrderedStream(
            self.held_out,
            batch_size=batch_size,
            memory=self._kept,
            threads=workers,
            problems=problems,
            rank=rank,
            world_size=world_size,
        )

    def working(self, *, batch_size: int, workers: int) -> int:
        """Return the bytes of what is in memory besides the chips that are mixed."""
        options, bands = self.config.data, len(self.corpus.bands)
        # While it is read, a unit is there with its empty dates and with all bands.
        reading = self._whole_unit_bytes() + max(
            source.chunk_bytes for source in self.corpus.sources
        )
        dates = min(self.most_dates, options.max_dates or self.most_dates)
        batch = batch_size * options.chip**2 * dates * (2 * bands + 1)
        return self._kept + workers * reading + _BATCHES_HELD * batch

    @property
    def _kept(self) -> int:
        """Bytes for chips to judge on, which are kept where they fit."""
        return min(int(self.held_out.bytes_per_unit.sum()), self.config.data.memory // 8)

    def _whole_unit_bytes(self) -> int:
        """Return the bytes of the largest unit with all dates and all bands of its source."""
        plan, sources = self.corpus.plan, self.corpus.sources
        pixel_bytes = np.array(
            [int(source.dates.max()) * (2 * len(source.bands) + 1) for source in sources]
        )
        return int((plan.chips_per_unit * pixel_bytes[plan.season]).max()) * plan.chip**2


def plan_loading(
    cubes: Sequence[str | Path], config: PretrainConfig, *, init: CheckpointInfo | None = None
) -> Loading:
    """Open what a run streams from and plan its chips; no pixel is read.

    Parameters
    ----------
    cubes
        Cubes, stacks and archives.
    init
        The checkpoint begun from: its bands are used, as far as all data have them, unless the
        recipe names others.
    """
    if not cubes:
        raise InputError(
            "Cannot pre-train without data: name at least one cube, stack or archive. Build a cube "
            "with 'stcln-geo cube build', or an archive with 'stcln-geo archive create'."
        )
    options = config.data
    sources = open_sources(cubes, season=config.season)
    choice = None
    if init is not None:
        choice = choose_shared_bands(sources, config.model.bands, init)
    corpus = plan_corpus(
        sources,
        chip=options.chip,
        memory=options.memory,
        bands=config.model.bands if choice is None else choice.bands,
        min_clear=options.min_clear,
        most_amplification=None if options.allow_amplification else MOST_AMPLIFICATION,
        choice=options.choice,
    )
    said = options.weights
    weights = weigh_units(
        corpus.plan, corpus.sources, cubes=said.cubes, years=said.years, regions=said.regions,
        balance=options.balance,
    )  # fmt: skip
    plan = corpus.plan
    if weights is not None:
        shown = weights > 0
        plan = plan.choose(np.repeat(shown, plan.chips_per_unit))
        weights = weights[shown]
    held = hold_out(len(plan.row), most=config.validation.chips, seed=config.seed)
    if weights is not None:
        counts = np.add.reduceat(~held, plan.starts[:-1].astype(np.intp), dtype=np.int64)
        weights = weights[counts > 0]
    trained, judged = (
        ChipDataset(corpus.sources, part, bands=corpus.bands, bad_chunks=options.bad_chunks)
        for part in (plan.choose(~held), plan.choose(held))
    )
    return Loading(
        corpus=corpus,
        config=config,
        dataset=trained,
        held_out=judged,
        weights=weights,
        choice=choice,
    )


def hold_out(chips: int, *, most: int, seed: int) -> np.ndarray:
    """Take chips out of training to judge on: at most ``most``, and an eighth of all.

    Returns
    -------
    (N,) bool. True for the chips to judge on.
    """
    held = np.zeros(chips, dtype=bool)
    order = np.random.default_rng([seed, 0x48]).permutation(chips)
    held[order[: min(most, chips // 8)]] = True
    return held


def load_problems(file: Path, loading: Loading) -> ProblemLog:
    """Return the log of a run's damaged chunks, kept in a file over resumptions."""
    lock = threading.Lock()

    def note(problem: str) -> None:
        with lock, file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"problem": problem}) + "\n")

    reads = len(loading.dataset.units) + len(loading.held_out.units)
    return ProblemLog(
        read_problems(file), most=int(loading.config.data.max_bad_fraction * reads), note=note
    )


def read_problems(file: Path) -> list[str]:
    """Return the damaged chunks that a run has met, sorted; a line cut short is left out."""
    known: set[str] = set()
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                known.add(str(json.loads(line)["problem"]))
            except (ValueError, KeyError, TypeError):
                continue
    return sorted(known)
