"""One search per MGRS tile and season, shared by all sites in it, and kept on disk.

Beside each search lie its items, the plan of the tile (grid, dates, scenes: from which the plan of
each site is cut) and a summary of what each site will take. All three follow from the recipe and
the items, so a second run searches nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from ..catalog import Catalog, load_catalog
from ..cube.granules import SCL, band_assets, describe_item
from ..cube.plan import crop_plan, default_bands, plan_cube
from ..cube.planned import CubePlan
from ..cube.search import search_items, select_items
from ..cube.snapshot import ItemSnapshot, read_items, write_items
from ..cube.static_catalog import walk_static
from ..cube.store import write_json
from ..cube.stored import read_manifest
from ..errors import NothingFoundError, SearchError
from ..execution import ProgressHook
from ..grid import Window, geobox_from_window
from ..region import Region, footprint
from ..storage import Location, location, make_folder
from .sites import Site
from .spec import ArchiveSpec

__all__ = [
    "Group",
    "GroupSummary",
    "SiteCost",
    "load_group_plan",
    "make_groups",
    "plan_groups",
    "search_groups",
    "sha256",
]

SEARCHES = "searches"
_AT_ONCE = 4
"""Searches under way at any time; servers count requests per client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The sites of one MGRS tile in one season: what one search serves."""

    cell: str
    crs: str
    season: str
    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.cell}_{self.season}"

    @property
    def window(self) -> Window:
        """The smallest window that holds all its sites."""
        return functools.reduce(Window.union, [site.window for site in self.sites])

    @property
    def region(self) -> Region:
        """What is searched."""
        grid = geobox_from_window(self.window, crs=self.crs, resolution=self.sites[0].resolution)
        return Region(
            geometry=footprint(grid), source=f"{len(self.sites)} sites in tile {self.cell}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCost:
    """What a site takes in a season."""

    dates: int
    windows: int
    """Asset windows to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """What a search found, and what its sites will take."""

    cell: str
    crs: str
    season: str
    fingerprint: str
    """SHA-256 of all that decides the pixels of its sites."""
    items: int
    dropped: Mapping[str, int]
    """Items left out, by reason."""
    keeps_scl: bool
    collection: str | None
    sites: Mapping[str, SiteCost]
    """By id; sites without a scene are not there."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.cell}_{self.season}"


@dataclass(slots=True)
class Provider:
    """A catalog that is loaded when it is first needed: a second run needs none."""

    spec: ArchiveSpec
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _catalog: Catalog | None = None
    _walked: dict[str, list[dict[str, Any]]] | None = None

    @property
    def catalog(self) -> Catalog:
        """The catalog."""
        with self._lock:
            if self._catalog is None:
                self._catalog = load_catalog(self.spec.catalog).allowing(self.spec.allow_hosts)
            return self._catalog

    def search(self, group: Group) -> ItemSnapshot:
        """Return the scenes of a group; a static catalog is walked once for all."""
        spec, catalog = self.spec, self.catalog
        times = spec.time_range(group.season)
        if catalog.kind == "api":
            return search_items(
                catalog, spec.collection, group.region, times, selection=spec.selection
            )
        collection = spec.collection or catalog.default_collection()
        return select_items(
            self._of_season(group.season), catalog, collection, group.region, times,
            selection=spec.selection,
        )  # fmt: skip

    def _of_season(self, season: str) -> list[dict[str, Any]]:
        with self._lock:
            if self._walked is None:
                profile = self.catalog.profile(self.spec.collection)
                # Other things that a catalog lists may have no time.
                found = [
                    item
                    for item in walk_static(self.catalog)
                    if set(band_assets(item, profile)) - {SCL}
                ]
                times = [describe_item(item, profile).time for item in found]
                self._walked = {
                    name: [
                        item
                        for item, time in zip(found, times, strict=True)
                        if self.spec.time_range(name).holds(time)
                    ]
                    for name in self.spec.seasons
                }
            return self._walked[season]


def make_groups(sites: Iterable[Site], spec: ArchiveSpec) -> list[Group]:
    """Return the groups, season by season, zone by zone, tile by tile."""
    cells: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in sites:
        cells[(site.crs, site.cell)].append(site)
    return [
        Group(cell=cell, crs=crs, season=season, sites=tuple(found))
        for season in spec.seasons
        for (crs, cell), found in sorted(cells.items())
    ]


def search_groups(
    groups: Sequence[Group],
    provider: Provider,
    path: Location,
    *,
    progress: ProgressHook | None = None,
) -> int:
    """Search for every group that has no search on disk yet; return how many that were.

    Raises
    ------
    SearchError
        If the catalog cannot be searched.
    """
    missing = [
        group
        for group in groups
        if _record(path, group).get("fingerprint") != _search_fingerprint(group, provider.spec)
    ]
    if not missing:
        return 0
    # An unknown catalog is told before anything is begun.
    _ = provider.catalog
    if progress is not None:
        progress(0, len(missing), "search")
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        running = [pool.submit(_search, group, provider, path) for group in missing]
        for done, future in enumerate(as_completed(running), 1):
            future.result()
            if progress is not None:
                progress(done, len(missing), "search")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return len(missing)


def _search(group: Group, provider: Provider, path: Location) -> None:
    folder = path / SEARCHES / group.name
    make_folder(folder)
    try:
        snapshot = provider.search(group)
    except NothingFoundError as error:
        content: dict[str, Any] = {"items": 0, "seen": 0, "dropped": {str(error): 1}, "bands": []}
    else:
        write_items(folder / "items.parquet", snapshot.items)
        content = {
            "items": len(snapshot),
            "seen": snapshot.seen,
            "dropped": dict(Counter(_reason(entry.reason) for entry in snapshot.dropped)),
            "bands": default_bands(snapshot),
            "collection": snapshot.collection,
        }
    # Written last: a search without it is repeated.
    fingerprint = _search_fingerprint(group, provider.spec)
    write_json(folder / "search.json", {"fingerprint": fingerprint, **content})


def common_bands(groups: Sequence[Group], provider: Provider, path: Location) -> tuple[str, ...]:
    """Return the bands of an archive: those asked for, or those that all searches have.

    Raises
    ------
    SearchError
        If no search found anything, or no band is in all.
    """
    records = [_record(path, group) for group in groups]
    found = [record["bands"] for record in records if record["items"]]
    if not found:
        example = next(iter(records[0]["dropped"]), "")
        raise SearchError(
            f"Cannot make an archive: none of {len(groups)} searches found a usable scene. The "
            f"first: {example}"
        )
    if provider.spec.cube.bands is not None:
        return provider.spec.cube.bands
    shared = tuple(band for band in found[0] if all(band in other for other in found))
    if not shared:
        raise SearchError(
            f"Cannot choose the bands of the archive: no band is in the scenes of all "
            f"{len(found)} searches. Name some with --bands, or split the sites by catalog."
        )
    return shared


def plan_groups(
    groups: Sequence[Group],
    bands: tuple[str, ...],
    provider: Provider,
    path: Location,
    *,
    progress: ProgressHook | None = None,
) -> list[GroupSummary]:
    """Return what every group will take; plans that are not on disk are made from its items."""
    summaries = []
    for number, group in enumerate(groups, 1):
        summaries.append(_plan_group(group, bands, provider, path))
        if progress is not None:
            progress(number, len(groups), "plan")
    return summaries


@functools.lru_cache(maxsize=8)
def load_group_plan(path: str, name: str, fingerprint: str) -> CubePlan:
    """Read the plan of a group, which a process keeps while it works on the group's sites."""
    del fingerprint  # Part of the cache's key alone.
    file = location(path) / SEARCHES / name / "plan.json"
    return CubePlan.from_json(json.loads(file.read_text(encoding="utf-8")))


def group_items(path: Location, name: str) -> list[dict[str, Any]]:
    """Return the items that a search found."""
    return read_items(path / SEARCHES / name / "items.parquet")


def sha256(content: Any) -> str:
    """Return the SHA-256 of JSON values."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _plan_group(
    group: Group, bands: tuple[str, ...], provider: Provider, path: Location
) -> GroupSummary:
    folder, record = path / SEARCHES / group.name, _record(path, group)
    asked = sha256(
        [
            record["fingerprint"],
            provider.spec.to_json()["cube"],
            bands,
            [(site.id, dataclasses.astuple(site.window)) for site in group.sites],
        ]
    )
    stored = read_manifest(folder / "sites.json")
    if stored.get("asked") != asked:
        stored = {"asked": asked, **_make_plan(group, bands, provider, folder, record)}
        write_json(folder / "sites.json", stored)
    return GroupSummary(
        cell=group.cell,
        crs=group.crs,
        season=group.season,
        fingerprint=stored["fingerprint"],
        items=record["items"],
        dropped=record["dropped"],
        keeps_scl=stored["keeps_scl"],
        collection=record.get("collection"),
        sites={name: SiteCost(**cost) for name, cost in stored["sites"].items()},
    )


def _make_plan(
    group: Group,
    bands: tuple[str, ...],
    provider: Provider,
    folder: Location,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the group's plan and return the summary."""
    nothing = {"fingerprint": "", "keeps_scl": True, "sites": {}}
    if not record["items"]:
        return nothing
    spec = dataclasses.replace(provider.spec.cube, crs=group.crs, bands=bands)
    snapshot = select_items(
        read_items(folder / "items.parquet"), provider.catalog, record["collection"]
    )
    try:
        plan = plan_cube(snapshot, group.region, spec, window=group.window)
    except NothingFoundError:
        return nothing
    write_json(folder / "plan.json", plan.to_json())
    costs = {}
    for site in group.sites:
        part = crop_plan(plan, site.window, region=site.id)
        for season in part.seasons:
            scenes = [scene for date in season.dates for scene in date.scenes]
            windows = sum(len(scene.assets) for scene in scenes)
            costs[site.id] = {"dates": len(season.dates), "windows": windows}
    return {"fingerprint": plan.fingerprint, "keeps_scl": plan.keeps_scl, "sites": costs}


def _record(path: Location, group: Group) -> dict[str, Any]:
    return read_manifest(path / SEARCHES / group.name / "search.json")


def _search_fingerprint(group: Group, spec: ArchiveSpec) -> str:
    asked = spec.to_json()
    keys = ("catalog", "collection", "selection", "allow_hosts")
    window = dataclasses.astuple(group.window)
    resolution = group.sites[0].resolution
    return sha256([group.crs, window, resolution, group.season, [asked[key] for key in keys]])


def _reason(text: str) -> str:
    return "older processing of another" if text.startswith("older") else text
