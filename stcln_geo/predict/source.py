"""Where pixels come from when there is no cube: a search, kept in the folder of the map.

The search and the plan of the cube that would be built lie in ``search/``, written as ``cube
build`` writes them, so that a run that is resumed sees the very items it began with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cube.audit import merge_audits
from ..cube.contract import days_since
from ..cube.planned import CubePlan
from ..cube.season import Season
from ..cube.snapshot import write_items
from ..cube.store import writing
from ..cube.stored import (
    ITEMS_FILE,
    LEDGER_FILE,
    PLAN_FILE,
    load_plan,
    read_plan_file,
    season_fingerprint,
    store_plan,
)
from ..errors import InputError

__all__ = [
    "SEARCH_FOLDER",
    "Fetched",
    "PixelSource",
    "StoredPixels",
    "Supply",
    "left_out_of",
    "one_season",
    "open_supply",
    "planned_season",
    "read_search",
    "remove_search",
]

SEARCH_FOLDER = "search"
"""Where, in the folder of a map, the search lies that it was made from."""


@dataclass(frozen=True, kw_only=True)
class PixelSource:
    """Pixels that are fetched while the map is made, in place of a cube."""

    plan: CubePlan
    """Of the one season to map, for the whole region."""
    folder: Path
    """Where the search is kept, and the ledger of files that could not be read."""
    scratch: Path | None = None
    """Where workers keep pixels for a moment; None = their folder for temporary files."""
    memory: int
    """Bytes that a worker may use to fetch."""
    kept: bool = False
    """True where the search is that of an earlier call."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the pixels: items, what is made of them, the grid."""
        (season,) = self.plan.seasons
        return season_fingerprint(self.plan, season)

    @property
    def ledger(self) -> Path:
        """Where files that could not be read are listed."""
        return self.folder / LEDGER_FILE

    def store(self) -> None:
        """Keep the search, unless it is there."""
        with contextlib.suppress(InputError, OSError):
            if read_plan_file(self.folder)["fingerprint"] == self.plan.fingerprint:
                return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_items(self.folder / ITEMS_FILE, self.plan.items, self.plan.queries)
        store_plan(self.plan, self.folder)

    def to_json(self) -> dict[str, Any]:
        """Return what a worker needs beside the search, as plain values."""
        return {
            "folder": str(self.folder),
            "fingerprint": self.plan.fingerprint,
            "scratch": None if self.scratch is None else str(self.scratch),
            "memory": self.memory,
            "skip_failures": self.plan.spec.on_error == "skip",
        }

    def forgives(self, left_out: Sequence[str]) -> bool:
        """Return True where the plan lets these items be left out."""
        spec = self.plan.spec
        if not left_out or (spec.on_error == "skip" and spec.max_failed_fraction is None):
            return True
        share = spec.max_failed_fraction if spec.on_error == "skip" else 0.0
        return len(set(left_out)) <= (share or 0.0) * len(self.plan.scenes)

    def excess(self, left_out: Sequence[str]) -> str:
        """Say that more was left out than the plan allows, and what to do."""
        share = self.plan.spec.max_failed_fraction
        return (
            f"Cannot finish the map: {len(left_out)} of {len(self.plan.scenes)} scenes have an "
            f"asset that cannot be read ({', '.join(left_out)}), and the share of "
            f"--max-failed-fraction is {share:g}. The assets are listed in {self.ledger}. Run the "
            "same command again to retry them, or allow a larger share."
        )

    def describe(self, manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what ``run.json`` tells of where the pixels came from.

        Parameters
        ----------
        manifests
            Of the shards that are done.
        """
        plan = self.plan
        (season,) = plan.seasons
        scenes = plan.scenes
        offsets: dict[tuple[int, str], int] = {}
        for scene in scenes:
            rule = scene.bands[0].radiometry
            offsets[rule.offset, rule.source] = offsets.get((rule.offset, rule.source), 0) + 1
        told = [one.get("fetched") or {} for one in manifests]
        audits = merge_audits(told)
        return {
            "catalog": plan.catalog,
            "collection": plan.collection,
            "region": plan.region,
            "fingerprint": self.fingerprint,
            "spec": plan.spec.to_json(),
            "cloud_mask": plan.cloud_mask,
            "level": plan.level,
            "items": [scene.item for scene in scenes],
            "dates": [str(date.time) for date in season.dates],
            "offsets": [
                {"offset_dn": dn, "rule": rule, "scenes": count}
                for (dn, rule), count in sorted(offsets.items())
            ],
            "offset_suspects": sorted(
                scene.item
                for scene in scenes
                if scene.item in audits
                and audits[scene.item].contradicts(scene.bands[0].radiometry.offset)
            ),
            "left_out": left_out_of(manifests),
            "asset_windows": sum(one.get("asset_windows", 0) for one in told),
            "fetch_seconds": round(sum(one.get("fetch_seconds", 0.0) for one in told), 3),
            "waited_seconds": round(sum(one.get("waited_seconds", 0.0) for one in told), 3),
            "scratch_bytes": max((one.get("scratch_bytes", 0) for one in told), default=0),
        }


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What a worker fetches pixels by."""

    plan: CubePlan
    folder: Path
    """Where the ledger of failures lies."""
    scratch: Path | None
    memory: int
    """Bytes that one block may take while it is fetched."""
    skip_failures: bool
    """True leaves a scene out where one of its assets cannot be read."""


@dataclass(slots=True)
class Fetched:
    """What fetching came to; adds up over the windows of a task."""

    reads: int = 0
    """Asset windows read."""
    seconds: float = 0.0
    """Spent fetching, while others were labelled."""
    waited_seconds: float = 0.0
    """Spent waiting for pixels."""
    scratch_bytes: int = 0
    """The most that scratch held at a time."""
    left_out: set[str] = field(default_factory=set)
    """Items of which an asset could not be read."""
    audits: list[Mapping[str, Any]] = field(default_factory=list)
    """Counts of dark pixels by item, of each block."""

    def to_json(self) -> dict[str, Any]:
        """Return what a manifest keeps."""
        audits = merge_audits({"audit": one} for one in self.audits)
        return {
            "asset_windows": self.reads,
            "fetch_seconds": round(self.seconds, 3),
            "waited_seconds": round(self.waited_seconds, 3),
            "scratch_bytes": self.scratch_bytes,
            "left_out": sorted(self.left_out),
            "audit": {item: counts.to_json() for item, counts in audits.items()},
        }


class StoredPixels(contextlib.AbstractContextManager["StoredPixels"]):
    """The pixels of a cube: they are there."""

    def __init__(self, season: Season) -> None:
        """Take the season."""
        self._season = season

    def __exit__(self, *_: object) -> None:
        """Leave all as it is."""

    @contextlib.contextmanager
    def pixels_of(self, _: object) -> Iterator[Season]:
        """Give the season."""
        yield self._season

    def stopping(self) -> contextlib.AbstractContextManager[None]:
        """Return a context; nothing is to be stopped."""
        return contextlib.nullcontext()


def open_supply(told: Mapping[str, Any]) -> Supply:
    """Return what ``PixelSource.to_json`` told, with the plan that is kept beside it."""
    return Supply(
        plan=load_plan(told["folder"], told["fingerprint"]),
        folder=Path(told["folder"]),
        scratch=None if told["scratch"] is None else Path(told["scratch"]),
        memory=told["memory"],
        skip_failures=told["skip_failures"],
    )


def read_search(folder: Path, request: Mapping[str, Any]) -> CubePlan | None:
    """Return the plan of an earlier run of the same request, or None."""
    if not (folder / PLAN_FILE).is_file():
        return None
    content = read_plan_file(folder)
    if content.get("request") != json.loads(json.dumps(request, default=str)):
        return None
    return dataclasses.replace(CubePlan.from_json(content["plan"]), request=request)


def remove_search(folder: Path) -> None:
    """Remove the search of another run, if that is what a folder holds."""
    if (folder / PLAN_FILE).is_file():
        shutil.rmtree(folder)


def one_season(plan: CubePlan, season: str | None) -> CubePlan:
    """Return the part of a plan that is one season.

    Raises
    ------
    InputError
        If it has several and none was named, or not the one that was.
    """
    names = [one.name for one in plan.seasons]
    if season is None and len(names) > 1:
        raise InputError(
            f"Cannot map {len(names)} seasons at once: the images are of the seasons "
            f"{', '.join(names)} (a season begins on {plan.spec.season_start}, month-day), and a "
            "map is of one. Name one with --season, or ask for its dates with --time."
        )
    if season is not None and season not in names:
        raise InputError(
            f"Cannot map season {season!r}: the images that were found are of "
            f"{', '.join(names)}. Correct --season, or ask for its dates with --time."
        )
    chosen = plan.season(season or names[0])
    used = {scene.item for date in chosen.dates for scene in date.scenes}
    items = tuple(item for item in plan.items if item["id"] in used)
    return dataclasses.replace(plan, seasons=(chosen,), items=items)


def planned_season(source: PixelSource) -> Season:
    """Return what a cube's season would tell of itself; it has no pixels."""
    plan = source.plan
    (season,) = plan.seasons
    time = season.time
    return Season(
        cube=source.folder,
        name=season.name,
        folder=season.name,
        geobox=plan.geobox,
        time=time.astype("datetime64[ns]"),
        days=days_since(time, season.name),
        bands=plan.bands,
        layout=season.layout,
        reflectance=None,
        valid=None,
        coverage=None,
        overview=None,
        scl=None,
        observations=None,
        day_offset=None,
        labels=None,
        parcels=None,
        fields=None,
        legend=None,
        aoi=plan.aoi,
        attrs={},
    )


def left_out_of(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the items that shards had to do without."""
    told = [one.get("fetched") or {} for one in manifests]
    return sorted({item for one in told for item in one.get("left_out", ())})
