"""Stacks on disk: a season of many small sites of one size, written by whole sites.

A stack is a folder with one Zarr v3 group per season, as a cube is, but its arrays have a leading
dimension ``site``. Each site has its own CRS, transform and dates: ``time (site, time)`` ends with
NaT where a site has fewer dates than others. One inner chunk holds all dates and bands of a square
of one site; one shard holds whole sites, so that a chip costs one read and a shard has one writer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from .. import __version__
from ..errors import CubeError, InputError
from ..legend import Legend
from .contract import FILL, SCALE, check_bands, days_since
from .layout import block_sum, create_array, plan_layout
from .store import choose_season, finish_season, quiet_zarr, writing

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "NO_DAY",
    "Stack",
    "StackLayout",
    "create_stack",
    "finish_stack",
    "is_stack",
    "open_building_stack",
    "open_stack",
    "plan_stack_layout",
    "write_sites",
]

NO_DAY = -1
"""What ``days`` holds where ``time`` is NaT."""

_SHARD_BYTES = 128_000_000
"""Raw reflectance per shard: well below the 400 MB of cubes, since a stopped task starts anew."""

_TABLE_ROWS = 1024


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

    path: Path
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
    """(S, T, chunk_y, chunk_x) uint16 zarr array; valid pixels per chunk."""
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


def create_stack(
    path: str | Path,
    name: str,
    *,
    site_id: Sequence[str],
    crs: Sequence[str],
    transform: np.ndarray,
    shape_yx: tuple[int, int],
    time: np.ndarray,
    bands: Sequence[str],
    layout: StackLayout | None = None,
    days: np.ndarray | None = None,
    fold: np.ndarray | None = None,
    legend: Legend | None = None,
    with_parcels: bool = False,
    with_scl: bool = False,
    with_observations: bool = False,
    attrs: Mapping[str, Any] | None = None,
    date_attrs: Mapping[str, np.ndarray] | None = None,
) -> Stack:
    """Create an empty stack under the name ``<name>.building``, ready for ``write_sites``.

    Parameters
    ----------
    name
        First day of the season, ``YYYY-MM-DD``.
    transform : (S, 6) float64, affine order, north-up with square pixels.
    time : (S, T) datetime64, UTC; the dates of a site increase strictly and end with NaT.
    days : (S, T) int32, by default counted from ``name``; for sites whose season began elsewhen.
    fold : (S,) small integers, if the sites belong to folds.
    legend
        Given, the stack has ``labels``; with ``with_parcels`` also ``parcels``.
    date_attrs : (S, T) text or flags under each name, kept as coordinates.

    Raises
    ------
    CubeError
        If sites, bands or times break the contract.
    OutputError
        If the folder cannot be written.
    """
    bands = tuple(str(band) for band in bands)
    check_bands(bands)
    time = np.asarray(time).astype("datetime64[s]")
    transform = np.asarray(transform, dtype=np.float64)
    _check_sites(name, site_id, crs, transform, time)
    sites, dates = time.shape
    layout = layout or plan_stack_layout(dates, len(bands), shape_yx)
    path = Path(path)
    folder = path / f"{name}.building"
    with writing(path), quiet_zarr():
        path.mkdir(parents=True, exist_ok=True)
        zarr.open_group(path, mode="a", zarr_format=3, attributes={"stcln_geo": __version__})
        shutil.rmtree(folder, ignore_errors=True)
        group = zarr.create_group(folder, zarr_format=3)
        _create_arrays(
            group, layout, (sites, dates, len(bands), *shape_yx),
            scl=with_scl, observations=with_observations, labels=legend is not None,
            parcels=legend is not None and with_parcels,
        )  # fmt: skip
        elapsed = _days(time, name) if days is None else np.asarray(days, dtype=np.int32)
        columns: dict[str, np.ndarray] = {
            "site_id": np.asarray(list(site_id), dtype=np.dtypes.StringDType()),
            "crs": np.asarray(list(crs), dtype=np.dtypes.StringDType()),
            "footprint": _footprints(crs, transform, shape_yx),
            "transform": transform,
            "time": time.astype("int64"),
            "days": elapsed,
            **{key: np.asarray(values) for key, values in (date_attrs or {}).items()},
        }
        if fold is not None:
            columns["fold"] = np.asarray(fold, dtype=np.int8)
        for key, values in columns.items():
            _write_column(group, key, values, name)
        group.create_array(
            "band", data=np.asarray(bands, dtype=np.dtypes.StringDType()), chunks=(len(bands),),
            dimension_names=("band",),
        )  # fmt: skip
        # Written last: a folder without them was left half-created.
        group.attrs.put(
            {
                **(attrs or {}),
                "kind": "stack",
                "Conventions": "CF-1.11",
                "coordinates": " ".join(columns),
                "stcln_geo": __version__,
                "season": name,
                "bands": list(bands),
                "layout": {"chunk": layout.chunk, "sites": layout.sites},
                **({"legend": legend.to_json()} if legend is not None else {}),
            }
        )
    return _open(path, name, folder.name, mode="r+")


def write_sites(
    stack: Stack,
    first: int,
    *,
    reflectance: np.ndarray,
    valid: np.ndarray,
    scl: np.ndarray | None = None,
    observations: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    parcels: np.ndarray | None = None,
) -> None:
    """Write one whole shard of a stack, with its coverage.

    Parameters
    ----------
    first
        Position of its first site, a multiple of the sites per shard.
    reflectance : (N, T, C, Y, X) int16.
    valid : (N, T, Y, X) bool, True where usable; False where the site has no such date.
    scl, observations : (N, T, Y, X) uint8, if the stack keeps them.
    labels, parcels : (N, Y, X) uint8 and int32, if the stack has them.
    """
    count = len(reflectance)
    if first % stack.layout.sites or count != min(stack.layout.sites, len(stack) - first):
        raise InputError(
            f"Cannot write {count} sites from site {first} as a shard: shards of this stack are "
            f"{stack.layout.sites} sites from its first, fewer only at its end. Write one whole "
            "shard at a time."
        )
    here = slice(first, first + count)
    height, width = stack.shape_yx
    sums = block_sum(valid.reshape(-1, height, width), stack.layout.chunk)
    with writing(stack.path):
        stack.reflectance[here] = reflectance
        stack.valid[here] = valid
        stack.coverage[here] = sums.reshape(*valid.shape[:2], *sums.shape[1:]).astype(np.uint16)
        for array, values in (
            (stack.scl, scl), (stack.observations, observations), (stack.labels, labels),
            (stack.parcels, parcels),
        ):  # fmt: skip
            if array is not None and values is not None:
                array[here] = values


def finish_stack(path: str | Path, name: str) -> None:
    """Give a wholly written stack its name: from now on it opens as complete."""
    finish_season(path, name)


def is_stack(path: str | Path, season: str | None = None) -> bool:
    """Return True where a folder of seasons is a stack, False where it is a cube."""
    name = choose_season(path, season)
    return _attributes(Path(path) / name).get("kind") == "stack"


def open_stack(path: str | Path, season: str | None = None, *, mode: str = "r") -> Stack:
    """Open one season of a stack; by default the only one.

    Raises
    ------
    MissingFileError
        If there is nothing at the path.
    CubeError
        If the season does not exist, none was named among several, or it is a cube.
    """
    name = choose_season(path, season)
    return _open(Path(path), name, name, mode=mode)


def open_building_stack(path: str | Path, name: str) -> Stack | None:
    """Open an unfinished stack for writing, or return None if there is none."""
    folder = f"{name}.building"
    if "season" not in _attributes(Path(path) / folder):
        return None
    return _open(Path(path), name, folder, mode="r+")


def _attributes(group: Path) -> dict[str, Any]:
    if not (group / "zarr.json").is_file():
        return {}
    content = json.loads((group / "zarr.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = content.get("attributes", {})
    return found


def _open(path: Path, name: str, folder: str, *, mode: str) -> Stack:
    # Consolidated metadata is for readers over a network; here it could be older than the arrays.
    with quiet_zarr():
        group: Any = zarr.open_group(
            path / folder, mode="r" if mode == "r" else "r+", use_consolidated=False
        )
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
        legend=Legend.from_json(attrs["legend"]) if "legend" in attrs else None,
        attrs=attrs,
    )


def _check_sites(
    name: str,
    site_id: Sequence[str],
    crs: Sequence[str],
    transform: np.ndarray,
    time: np.ndarray,
) -> None:
    sites = len(site_id)
    if not sites or len(set(site_id)) != sites:
        raise CubeError(
            f"Cannot create the stack {name} of {sites} sites: there must be at least one, and "
            "each needs an id of its own. Make the ids unique."
        )
    if len(crs) != sites or transform.shape != (sites, 6) or time.shape[:1] != (sites,):
        raise CubeError(
            f"Cannot create the stack {name}: {sites} ids come with {len(crs)} CRS, transforms of "
            f"shape {transform.shape} and times of shape {time.shape}; they must be {sites}, "
            f"({sites}, 6) and ({sites}, dates). Give one of each per site."
        )
    absent = np.isnat(time)
    numbers = np.where(absent, np.iinfo(np.int64).max, time.astype("int64"))
    later = np.diff(numbers, axis=1)
    if time.shape[1] == 0 or absent[:, 0].any() or not ((later > 0) | absent[:, 1:]).all():
        raise CubeError(
            f"Cannot create the stack {name}: every site needs at least one date, its dates must "
            "increase strictly, and NaT may only follow the last. Sort them, and leave out sites "
            "without dates."
        )


def _create_arrays(
    group: Any, layout: StackLayout, shape: tuple[int, int, int, int, int], **wanted: bool
) -> None:
    """Create the empty arrays; ``shape`` is sites, dates, bands, rows, columns."""
    sites, dates, bands, height, width = shape
    chunk, several = layout.chunk, min(layout.sites, sites)
    down, across = -(-height // chunk), -(-width // chunk)
    whole = (down * chunk, across * chunk)
    create_array(
        group, "reflectance", shape, (1, dates, bands, chunk, chunk),
        (several, dates, bands, *whole), dtype="int16", fill=FILL,
        dims=("site", "time", "band", "y", "x"),
        attrs={"scale_factor": SCALE, "add_offset": 0.0, "_FillValue": FILL,
               "standard_name": "surface_bidirectional_reflectance", "units": "1"},
    )  # fmt: skip
    dated = {"scl": "uint8", "observations": "uint8"}
    for name, dtype in {"valid": "bool", **dated}.items():
        if name == "valid" or wanted[name]:
            create_array(
                group, name, (sites, dates, height, width), (1, dates, chunk, chunk),
                (several, dates, *whole), dtype=dtype, fill=0, dims=("site", "time", "y", "x"),
            )  # fmt: skip
    create_array(
        group, "coverage", (sites, dates, down, across), (several, dates, down, across), None,
        dtype="uint16", fill=0, dims=("site", "time", "chunk_y", "chunk_x"),
        attrs={"units": "valid pixels per chunk"},
    )  # fmt: skip
    for name, dtype, fill in (("labels", "uint8", 255), ("parcels", "int32", 0)):
        if wanted[name]:
            create_array(
                group, name, (sites, height, width), (1, chunk, chunk), (several, *whole),
                dtype=dtype, fill=fill, dims=("site", "y", "x"),
            )  # fmt: skip


def _write_column(group: Any, name: str, values: np.ndarray, season: str) -> None:
    dims = {"transform": ("site", "affine")}.get(name, ("site", "time")[: values.ndim])
    attrs: dict[str, dict[str, Any]] = {
        "time": {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
        "days": {"long_name": f"whole days elapsed after {season}; -1 where there is no date"},
        "transform": {
            "long_name": "a, b, c, d, e, f: x = a col + b row + c, y = d col + e row + f"
        },
        "footprint": {"long_name": "outline in OGC:CRS84, as WKT"},
    }
    if values.dtype.kind in "UO":
        values = values.astype(np.dtypes.StringDType())
    group.create_array(
        name,
        data=values,
        chunks=(min(len(values), _TABLE_ROWS), *values.shape[1:]),
        dimension_names=dims,
        attributes=attrs.get(name, {}),
    )


def _days(time: np.ndarray, season: str) -> np.ndarray:
    absent = np.isnat(time)
    return np.where(
        absent, NO_DAY, days_since(np.where(absent, np.datetime64(0, "s"), time), season)
    )


def _footprints(crs: Sequence[str], transform: np.ndarray, shape_yx: tuple[int, int]) -> np.ndarray:
    from affine import Affine
    from odc.geo.geobox import GeoBox

    from ..region import footprint

    outlines = [
        footprint(GeoBox(shape_yx, Affine(*map(float, values)), system)).wkt
        for system, values in zip(crs, transform, strict=True)
    ]
    return np.asarray(outlines, dtype=np.dtypes.StringDType())
