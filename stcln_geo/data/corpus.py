"""What pre-training streams from: any mix of cubes, stacks and archives, as one set of chips."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..archive.index import INDEX_FILE, open_archive
from ..cube.season import choose_season, list_seasons
from ..errors import CubeError, InputError
from ..storage import Location, location
from .plan import ChipPlan, plan_source
from .reader import band_indices
from .site_choice import SiteChoice, choose_sites
from .source import Source, open_source

__all__ = ["MOST_AMPLIFICATION", "Corpus", "open_sources", "plan_corpus", "shared_bands"]

MOST_AMPLIFICATION = 8.0
"""How often a chunk may be decoded in an epoch before a layout is refused."""

_OPENED_AT_ONCE = 8
_LARGEST_UNIT = 16
"""A unit takes at most one part in so many of the memory, so that batches mix many places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Chips of many sources, planned, and what was left out of them."""

    sources: tuple[Source, ...]
    bands: tuple[str, ...]
    plan: ChipPlan
    empty: int
    """Chips left out as no date has a clear pixel there."""
    cloudy: int
    """Chips left out as too few dates are clear there."""
    notes: tuple[str, ...]
    used: tuple[np.ndarray, ...] | None = None
    """Of each source (S,) bool: the sites that are used; None for all."""

    @property
    def day_range(self) -> tuple[int, int]:
        """First and last day on which a site that is used was seen."""
        seen = [
            source.days[used][np.arange(source.days.shape[1]) < source.dates[used, None]]
            for source, used in zip(self.sources, self._used(), strict=True)
        ]
        days = np.concatenate(seen)
        return int(days.min()), int(days.max())

    @property
    def most_dates(self) -> int:
        """Dates of the site that has most, of those that are used."""
        pairs = zip(self.sources, self._used(), strict=True)
        return max(int(source.dates[used].max(initial=0)) for source, used in pairs)

    @property
    def sites(self) -> int:
        """Sites that are used."""
        return int(sum(used.sum() for used in self._used()))

    def _used(self) -> list[np.ndarray]:
        if self.used is not None:
            return list(self.used)
        return [np.ones(source.sites, dtype=bool) for source in self.sources]

    @property
    def dates(self) -> int:
        """Dates of all chips together, empty ones included."""
        return int((self._of_site() * self.plan.chips_per_unit).sum())

    @property
    def empty_dates(self) -> int:
        """Dates of chips whose storage chunk has no clear pixel on them: never loaded."""
        left = (self._of_site() - self.plan.dates) * self.plan.chips_per_unit
        return int(left.sum())

    def _of_site(self) -> np.ndarray:
        most = max(source.sites for source in self.sources)
        table = np.zeros((len(self.sources), most), dtype=np.int64)
        for number, source in enumerate(self.sources):
            table[number, : source.sites] = source.dates
        dates: np.ndarray = table[self.plan.season, self.plan.site]
        return dates

    def summary(self) -> dict[str, int]:
        """Return the counts that a run's records hold."""
        return {
            "sources": len(self.sources),
            "sites": self.sites,
            "chips_left_out_empty": self.empty,
            "chips_left_out_cloudy": self.cloudy,
            "chip_dates": self.dates,
            "chip_dates_empty": self.empty_dates,
        }


def open_sources(
    paths: Sequence[str | Path | Location], *, season: str | None = None
) -> tuple[Source, ...]:
    """Open the seasons of cubes, of stacks and of the members of archives, each once.

    Parameters
    ----------
    season
        Only seasons of this name, which every cube named must have; of an archive, the members
        that have it.

    Raises
    ------
    MissingFileError, CubeError
        If there is nothing at a path, or not the season.
    """
    wanted: dict[tuple[str, str], tuple[Location, str]] = {}
    for path in paths:
        place = location(path)
        found = _members(place, season) if (place / INDEX_FILE).is_file() else [
            (place, name) for name in _seasons(place, season)
        ]  # fmt: skip
        for member, name in found:
            wanted.setdefault((str(member.resolve()), name), (member, name))
    with ThreadPoolExecutor(_OPENED_AT_ONCE, thread_name_prefix="open") as pool:
        return tuple(pool.map(lambda place: open_source(*place), wanted.values()))


def _members(place: Location, season: str | None) -> list[tuple[Location, str]]:
    archive = open_archive(place)
    table = archive.index[["path", "season"]].drop_duplicates()
    found = [
        (archive.member(str(path)), str(name))
        for path, name in zip(table["path"], table["season"], strict=True)
        if season is None or name == season
    ]
    if not found:
        raise CubeError(
            f"Cannot open season {season!r} of the archive {place}: no member has it. The archive "
            f"has: {', '.join(sorted(set(table['season'])))}."
        )
    return found


def _seasons(place: Location, season: str | None) -> list[str]:
    if season is not None:
        return [choose_season(place, season)]
    return list_seasons(place) or [choose_season(place, None)]


def shared_bands(
    sources: Sequence[Source], wanted: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the bands of a run, and what there is to say of them.

    Parameters
    ----------
    wanted
        Bands that every source must have; by default those that all have, in the order of the
        first.

    Raises
    ------
    CubeError
        If a source lacks a band that is wanted, or there is no common one.
    """
    if wanted is not None:
        for source in sources:
            band_indices(source, wanted, wanted_by="pre-training")
        return tuple(wanted), ()
    every = dict.fromkeys(band for source in sources for band in source.bands)
    bands = tuple(band for band in every if all(band in source.bands for source in sources))
    if not bands:
        told = "; ".join(f"{source} has {', '.join(source.bands)}" for source in sources[:5])
        raise CubeError(
            f"Cannot pre-train on {len(sources)} sources without a common band: {told}. All must "
            "share at least one. Leave some out, or build them again with --bands."
        )
    left = [band for band in every if band not in bands]
    if not left:
        return bands, ()
    lacking = next(source for source in sources if set(left) - set(source.bands))
    return bands, (
        f"Bands: {', '.join(bands)}. Left out, as not all sources have them: {', '.join(left)} "
        f"(for example, {lacking} lacks {', '.join(b for b in left if b not in lacking.bands)}).",
    )


def plan_corpus(
    sources: Sequence[Source],
    *,
    chip: int,
    memory: int,
    bands: tuple[str, ...] | None = None,
    min_clear: float = 0.0,
    most_amplification: float | None = MOST_AMPLIFICATION,
    choice: SiteChoice | None = None,
) -> Corpus:
    """Plan the chips of all sources.

    Parameters
    ----------
    chip
        Side of a chip (pixels).
    memory
        Bytes that chips may take: decides how much of a large chunk is read at a time.
    bands
        Bands that every source must have; by default those that all have.
    min_clear
        Chips whose pixels have fewer clear dates, on average, are left out.
    most_amplification
        How often a chunk may be decoded in an epoch; None allows any.
    choice
        Which sites to use; None uses all.

    Raises
    ------
    CubeError
        If bands are missing, or lists of sites.
    InputError
        If a layout makes reading too wasteful, or no chip is left.
    """
    chosen, notes = shared_bands(sources, bands)
    found = None if choice is None else choose_sites(sources, choice)
    used = None if found is None else found.used
    parts = [
        plan_source(
            source,
            chip=chip,
            index=index,
            min_clear=min_clear,
            unit_bytes=memory // _LARGEST_UNIT,
            sites=None if used is None else used[index],
        )
        for index, source in enumerate(sources)
    ]
    for source, part in zip(sources, parts, strict=True):
        if most_amplification is not None and part.amplification > most_amplification:
            raise InputError(
                f"Cannot train on {source}: with chips of {chip} px, each of its chunks of "
                f"{source.chunk} px would be decoded {part.amplification:.0f} times an epoch, "
                f"since a whole one, with {int(source.dates.max())} dates, is too large for "
                f"{memory / 1e9:g} GB of chips. More than {most_amplification:g} times is refused. "
                "Copy it into smaller chunks with 'stcln-geo cube rechunk', give more --memory, "
                "or accept it with --allow-amplification."
            )
    plan = ChipPlan.join(part.plan for part in parts)
    empty, cloudy = sum(part.empty for part in parts), sum(part.cloudy for part in parts)
    if not len(plan):
        raise InputError(
            f"Cannot train on {len(sources)} sources: of their {empty + cloudy} chips, {empty} are "
            f"never clear and {cloudy} have fewer than {min_clear:g} clear dates. Chips must be "
            "clear often enough to be learnt from. Give more dates, or set data.min_clear lower."
        )
    corpus = Corpus(
        sources=tuple(sources),
        bands=chosen,
        plan=plan,
        empty=empty,
        cloudy=cloudy,
        notes=(*notes, *_differences(sources), *(() if found is None else found.notes)),
        used=used,
    )
    return replace(corpus, notes=(*corpus.notes, *_left_out(corpus, min_clear)))


def _differences(sources: Sequence[Source]) -> list[str]:
    """Say in what sources differ that a network does not see."""
    notes = []
    sizes = sorted({source.resolution for source in sources})
    if len(sizes) > 1:
        told = ", ".join(f"{size:g}" for size in sizes)
        notes.append(f"Pixels of {told} m are mixed: the network does not know their size.")
    if len({source.level for source in sources}) > 1:
        notes.append(
            "Reflectance of the surface and at the top of the atmosphere are mixed: the network "
            "does not know which it sees."
        )
    starts = sorted({source.season[5:] for source in sources})
    if len(starts) > 1:
        notes.append(
            f"Seasons begin on {', '.join(starts)}: days count from the first day of each."
        )
    return notes


def _left_out(corpus: Corpus, min_clear: float) -> list[str]:
    """Say which chips and dates are never shown."""
    notes = []
    if corpus.empty + corpus.cloudy:
        notes.append(
            f"Chips left out: {corpus.empty} never clear, {corpus.cloudy} with fewer than "
            f"{min_clear:g} clear dates."
        )
    if corpus.empty_dates:
        notes.append(
            f"Dates left out: {corpus.empty_dates} of {corpus.dates} of all chips, as their "
            "storage chunk has no clear pixel."
        )
    return notes
