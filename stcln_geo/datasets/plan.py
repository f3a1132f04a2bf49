"""What an import would write: the sites of each season, and what was found wrong in the source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..cube.stack import StackLayout, plan_stack_layout
from ..legend import Legend

__all__ = [
    "Finding",
    "Findings",
    "Form",
    "ImportPlan",
    "SeasonImport",
    "SitePixels",
    "SiteSource",
    "size_text",
]

Form = Literal["pastis", "mtlcc-tif", "mtlcc-tfrecord"]
"""How a set lies on disk, which decides who reads its pixels."""

_FORM = 1
"""Number of the way pixels are converted; a change makes shards of older imports stale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSource:
    """One site as it lies in the source; small, so that it travels well to a worker."""

    id: str
    path: str
    """File, or folder of files, that holds the site's dates."""
    time: tuple[str, ...]
    """Dates as ``YYYY-MM-DD``, strictly increasing."""
    frames: tuple[int, ...]
    """Place of each date among the frames of the source."""
    crs: str
    transform: tuple[float, float, float, float, float, float]
    """a, b, c, d, e, f of the grid, north-up with square pixels."""
    georeference: str
    """The rule that placed the site."""
    offset_m: float = 0.0
    """Largest distance of a corner from where the source puts it (metres)."""
    tile: str = ""
    """Tile of the Sentinel-2 grid, where the source names it."""
    fold: int = 0
    """Number of the published fold; 0 where there is none."""
    first_parcel: int = 0
    """Number of the site's first parcel in the stack, 0 where it has none."""
    labelled: bool = True
    radar: tuple[tuple[str, str, int], ...] = ()
    """Date, direction of flight and frame of each Sentinel-1 image, in order of time."""
    stamp: str = ""
    """Sizes and times of change of the site's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePixels:
    """What was read of a site."""

    reflectance: np.ndarray
    """(T, C, Y, X) int16, reflectance / 0.0001; -32768 where nothing was measured."""
    valid: np.ndarray
    """(T, Y, X) bool. True where every band was measured."""
    labels: np.ndarray
    """(Y, X) uint8 class codes, 255 = unlabelled."""
    parcels: np.ndarray | None = None
    """(Y, X) int32, numbers that are unique over the stack, 0 = none."""
    parcel_ids: tuple[int, ...] = ()
    """Number in the source of each parcel, in order of the stack's numbers."""
    backscatter: np.ndarray | None = None
    """(T1, P, Y, X) float32 in decibels, NaN where nothing was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something in the source that was left out, changed or is doubtful."""

    kind: str
    """A word for programs."""
    text: str
    """What is wrong with the items and what became of them, for people."""
    items: tuple[str, ...]

    def __str__(self) -> str:
        named = ", ".join(self.items[:5]) + (", ..." if len(self.items) > 5 else "")
        return f"{self.text}: {len(self.items)} ({named})"


class Findings:
    """Gathers findings while a source is looked through."""

    def __init__(self) -> None:
        self._items: dict[str, list[str]] = {}
        self._texts: dict[str, str] = {}

    def add(self, kind: str, item: str, text: str) -> None:
        """Note an item under its kind; the first text of a kind stands for all."""
        self._texts.setdefault(kind, text)
        self._items.setdefault(kind, []).append(item)

    def all(self) -> tuple[Finding, ...]:
        """Return one finding per kind, in order of their first appearance."""
        return tuple(
            Finding(kind=kind, text=self._texts[kind], items=tuple(items))
            for kind, items in self._items.items()
        )


@dataclass(frozen=True, kw_only=True)
class SeasonImport:
    """A season of a stack to write."""

    name: str
    """First day, ``YYYY-MM-DD``."""
    form: Form
    bands: tuple[str, ...]
    shape_yx: tuple[int, int]
    sites: tuple[SiteSource, ...]
    legend: Legend
    with_parcels: bool = False
    pols: tuple[str, ...] = ()
    """Polarisations of Sentinel-1; empty where no site has any."""
    attrs: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Site ids of each published split."""
    findings: tuple[Finding, ...] = ()
    """What was left out, changed or is doubtful."""

    @property
    def dates(self) -> int:
        """Dates of the site that has most."""
        return max(len(site.time) for site in self.sites)

    @property
    def frames(self) -> int:
        """Dates of all sites together."""
        return sum(len(site.time) for site in self.sites)

    @property
    def images(self) -> int:
        """Sentinel-1 images of all sites together."""
        return sum(len(site.radar) for site in self.sites)

    @property
    def raw_bytes(self) -> int:
        """Size before compression."""
        optical = self.frames * (2 * len(self.bands) + 1)
        radar = self.images * 4 * len(self.pols)
        return (optical + radar) * self.shape_yx[0] * self.shape_yx[1]

    @property
    def layout(self) -> StackLayout:
        """How the stack is cut."""
        return plan_stack_layout(self.dates, len(self.bands), self.shape_yx)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the season's content."""
        content = {
            "form": [_FORM, self.form],
            "name": self.name,
            "bands": self.bands,
            "shape": self.shape_yx,
            "layout": asdict(self.layout),
            "legend": self.legend.to_json(),
            "pols": self.pols,
            "sites": [
                [getattr(site, column.name) for column in fields(site) if column.name != "path"]
                for site in self.sites
            ],
            "attrs": dict(self.attrs),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """Return a line for people."""
        height, width = self.shape_yx
        fewest = min(len(site.time) for site in self.sites)
        first = min(site.time[0] for site in self.sites)
        last = max(site.time[-1] for site in self.sites)
        shards = -(-len(self.sites) // self.layout.sites)
        radar = ""
        if self.pols:
            most = max(len(site.radar) for site in self.sites)
            radar = f"; Sentinel-1 ({', '.join(self.pols)}) with up to {most} images each"
        return (
            f"Season {self.name}: {len(self.sites)} sites of {height} x {width} px, "
            f"{len(self.bands)} bands, {fewest} to {self.dates} dates each from {first} to {last}"
            f"{radar}; shards: {shards}; {size_text(self.raw_bytes)} before compression."
        )


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """All that an import would write."""

    dataset: Literal["pastis", "mtlcc"]
    source: str
    seasons: tuple[SeasonImport, ...]
    notes: tuple[str, ...]
    """What holds for the whole set, for people."""


def size_text(size: float) -> str:
    """Return bytes as a text such as ``3.4 GB``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
