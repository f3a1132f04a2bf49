"""Read stacks: a season of many small sites of one size, opened as raw Zarr arrays.

A stack is a folder, on disk or in object storage, with one Zarr v3 group per season, as a cube is,
but its arrays have a leading dimension ``site``. Each site has its own CRS, transform and dates:
``time (site, time)`` ends with NaT where a site has fewer dates than others. One inner chunk holds
all dates and bands of a square of one site; one shard holds whole sites, so that a chip costs one
read and a shard has one writer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from ..errors import CubeError, InputError
from ..legend import Legend
from ..storage import Location, location
from .layout import plan_layout
from .season import FieldTable, choose_season, unchanged
from .stack_radar import StackRadar, open_radar
from .store import quiet_zarr
from .zarr_store import zarr_store

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "FIELD_MARK",
    "NO_DAY",
    "SPLITS_FILE",
    "Stack",
    "StackLayout",
    "is_stack",
    "open_building_stack",
    "open_stack",
    "open_stack_folder",
    "plan_stack_layout",
    "published_list",
]

NO_DAY = -1
"""What ``days`` holds where ``time`` is NaT."""

FIELD_MARK = "fields"
"""Attribute that says how many fields the stack's table has; without it there is no whole table."""

SPLITS_FILE = "splits.json"
"""Beside the seasons: the site ids of each list that a set was published with, by season."""

_SHARD_BYTES = 128_000_000
"""Raw reflectance per shard: well below the 400 MB of cubes, since a stopped task starts anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackLayout:
    """How a stack is cut: the side of the inner chunk (pixels), and the sites of a shard."""

    chunk: int
    sites: int

    def __post_init__(self) -> None:
        """Check that there is something to cut."""
        if self.chunk < 1 or self.sites < 1:
            raise InputError(
                f"Cannot lay out chunks of {self.chunk} px in shards of {self.sites} sites: both "
                "must be at least 1. Leave the layout out to have one chosen."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """An opened stack: raw Zarr arrays, the table of sites in memory."""

    path: Location
    """The stack's folder."""
    name: str
    """First day of the season, ``YYYY-MM-DD``."""
    folder: str
    """Name of its group: the season's, or ``<name>.building``."""
    site_id: tuple[str, ...]
    crs: tuple[str, ...]
    """CRS of each site, such as ``EPSG:32631``."""
    transform: np.ndarray
    """(S, 6) float64: a, b, c, d, e, f of each site's grid, in the order of affine."""
    footprint: tuple[str, ...]
    """WKT of each site's outline in lon/lat (OGC:CRS84)."""
    time: np.ndarray
    """(S, T) datetime64[ns], UTC; NaT after a site's last date."""
    days: np.ndarray
    """(S, T) int32: whole days since the season's first day; -1 where ``time`` is NaT."""
    bands: tuple[str, ...]
    layout: StackLayout
    reflectance: Any
    """(S, T, C, Y, X) int16 zarr array; reflectance / 0.0001, -32768 = no data."""
    valid: Any
    """(S, T, Y, X) bool zarr array; True where usable."""
    coverage: Any
    """(S, T, chunk_y, chunk_x) uint16 or uint32 zarr array; valid pixels per chunk."""
    scl: Any | None
    """(S, T, Y, X) uint8 zarr array of scene classes, if kept."""
    observations: Any | None
    """(S, T, Y, X) uint8 zarr array, clear observations per pixel, if the dates are composites."""
    labels: Any | None
    """(S, Y, X) uint8 zarr array of class codes, 255 = unlabelled, if there are any."""
    parcels: Any | None
    """(S, Y, X) int32 zarr array of field numbers, 0 = none, if there are any."""
    fold: np.ndarray | None
    """(S,) int8: number of the fold a published split puts the site in, if there is one."""
    radar: StackRadar | None
    """Sentinel-1, with times of its own, if there is any."""
    fields: FieldTable | None
    """The labelled fields of all sites, if they were counted (`stack_fields`)."""
    weight: np.ndarray | None
    """(S,) uint16: how often an epoch of training shows each site, if fields were counted."""
    legend: Legend | None
    attrs: dict[str, Any]

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self.site_id)

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Height and width of a site (pixels)."""
        return int(self.reflectance.shape[3]), int(self.reflectance.shape[4])

    @property
    def level(self) -> str:
        """``surface`` or ``top-of-atmosphere`` reflectance."""
        return str(self.attrs.get("level", "surface"))

    @property
    def dates(self) -> np.ndarray:
        """(S,) int64: number of dates of each site."""
        counts: np.ndarray = (~np.isnat(self.time)).sum(axis=1)
        return counts

    @property
    def shards(self) -> list[range]:
        """The sites of each shard."""
        step = self.layout.sites
        return [range(first, min(first + step, len(self))) for first in range(0, len(self), step)]

    def geobox(self, site: int) -> GeoBox:
        """Return the grid of a site, given by its position."""
        from affine import Affine
        from odc.geo.geobox import GeoBox

        values = [float(value) for value in self.transform[site]]
        return GeoBox(self.shape_yx, Affine(*values), self.crs[site])


def plan_stack_layout(dates: int, bands: int, shape_yx: tuple[int, int]) -> StackLayout:
    """Choose the chunk as for a cube, and as many sites per shard as stay below 128 MB, raw."""
    chunk = min(plan_layout(dates, bands, shape_yx).chunk, max(shape_yx))
    site = max(dates * bands * 2 * shape_yx[0] * shape_yx[1], 1)
    return StackLayout(chunk=chunk, sites=max(_SHARD_BYTES // site, 1))


def is_stack(path: str | Location, season: str | None = None) -> bool:
    """Return True where a folder of seasons is a stack, False where it is a cube."""
    name = choose_season(path, season)
    return _attributes(location(path) / name).get("kind") == "stack"


def open_stack(path: str | Location, season: str | None = None, *, mode: str = "r") -> Stack:
    """Open one season of a stack; by default the only one.

    Raises
    ------
    MissingFileError
        If there is nothing at the path.
    CubeError
        If the season does not exist, none was named among several, or it is a cube.
    """
    name = choose_season(path, season)
    where = location(path)
    with unchanged(where, name):
        return open_stack_folder(where, name, name, mode=mode)


def published_list(path: Location, season: str, name: str) -> tuple[str, ...]:
    """Return the site ids of a list that a set was published with, such as ``train_fold0``.

    Raises
    ------
    CubeError
        If its importer kept no such list in the stack.
    """
    file = path / SPLITS_FILE
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    lists: dict[str, list[str]] = told.get(season, {})
    if name not in lists:
        known = f"it has {', '.join(sorted(lists))}" if lists else f"it has no {SPLITS_FILE}"
        raise CubeError(
            f"Cannot find the list {name!r} of sites in {path}, season {season}: {known}. Such "
            "lists come with a published set, by `stcln-geo import`. Import the set with its "
            "lists, or name sites by their ids."
        )
    return tuple(str(one) for one in lists[name])


def open_building_stack(path: str | Location, name: str) -> Stack | None:
    """Open an unfinished stack for writing, or return None if there is none."""
    folder = f"{name}.building"
    if "season" not in _attributes(location(path) / folder):
        return None
    return open_stack_folder(location(path), name, folder, mode="r+")


def _attributes(group: Location) -> dict[str, Any]:
    if not (group / "zarr.json").is_file():
        return {}
    content = json.loads((group / "zarr.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content.get("attributes", {})
    return found


def open_stack_folder(path: Location, name: str, folder: str, *, mode: str) -> Stack:
    """Open a stack's group under whatever name it has."""
    # Consolidated metadata is for readers over a network; here it could be older than the arrays.
    with quiet_zarr():
        group: Any = zarr.open_group(
            zarr_store(path / folder), mode="r" if mode == "r" else "r+", zarr_format=3,
            use_consolidated=False,
        )  # fmt: skip
    attrs = dict(group.attrs)
    if attrs.get("kind") != "stack":
        raise CubeError(
            f"Cannot open season {name} of {path} as a stack: it has no dimension 'site', so it "
            "is a cube. Open it with open_season or open_cube."
        )
    return Stack(
        path=path,
        name=name,
        folder=folder,
        site_id=tuple(str(value) for value in group["site_id"][:]),
        crs=tuple(str(value) for value in group["crs"][:]),
        transform=group["transform"][:],
        footprint=tuple(str(value) for value in group["footprint"][:]),
        time=np.asarray(group["time"][:]).astype("datetime64[s]").astype("datetime64[ns]"),
        days=group["days"][:],
        bands=tuple(attrs["bands"]),
        layout=StackLayout(**attrs["layout"]),
        reflectance=group["reflectance"],
        valid=group["valid"],
        coverage=group["coverage"],
        scl=group.get("scl"),
        observations=group.get("observations"),
        labels=group.get("labels"),
        parcels=group.get("parcels"),
        fold=group["fold"][:] if "fold" in group else None,
        radar=open_radar(group),
        fields=_fields(group) if FIELD_MARK in attrs else None,
        weight=group["site_weight"][:] if FIELD_MARK in attrs else None,
        legend=Legend.from_json(attrs["legend"]) if "legend" in attrs else None,
        attrs=attrs,
    )


def _fields(group: Any) -> FieldTable:
    return FieldTable(
        number=group["field_number"][:],
        code=group["field_code"][:],
        pixels=group["field_pixels"][:],
        split=group["field_split"][:],
        site=group["field_site"][:],
    )
