"""Sources of chips: one season of a cube or of a stack, seen alike.

A cube is a source of one site; its dates are those of all its pixels. What a source is asked for
while training (pixels) goes through `BlockReader`s resolved here; what planning asks for (clear
pixels per chunk) is read once, as a whole. Labels and fields, where there are any, are those of
the cube or stack.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..cube.contract import FILL
from ..cube.season import FieldTable, choose_season
from ..cube.stack import Stack, is_stack, open_stack
from ..cube.store import Season, open_season
from ..errors import CubeError
from ..grid import Window, absolute_window, tiles
from ..legend import UNLABELLED, Legend
from ..storage import Location, location
from .blocks import BlockReader, open_reader
from .reader import Block

__all__ = [
    "ChipSource",
    "ClearCounts",
    "LabelReader",
    "LabelTile",
    "Source",
    "open_source",
    "source_of",
]

_LABEL_TILE = 1024
"""Side of the squares by which labels are read for planning; of small sites as many as fill one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearCounts:
    """How clear each chunk of each site is."""

    pixels: np.ndarray
    """(S, chunk_y, chunk_x) int64: clear pixels, over all dates."""
    dates: np.ndarray
    """(S, chunk_y, chunk_x) int32: dates with a clear pixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipSource:
    """Where a chip was cut from."""

    cube: str
    season: str
    window: Window
    """Counted from the first pixel of the season, or of the site."""
    site: str | None = None
    """The site of a stack."""

    def __str__(self) -> str:
        """Name the chip for people."""
        part, site = self.window, f", site {self.site}" if self.site is not None else ""
        return (
            f"{self.cube}, season {self.season}{site}, "
            f"rows {part.row} to {part.row + part.height}, "
            f"columns {part.col} to {part.col + part.width}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTile:
    """Labels of a rectangle of some sites."""

    sites: slice
    """Their positions."""
    window: Window
    """Counted from the first pixel of a site."""
    labels: np.ndarray
    """(N, H, W) uint8 class codes, 255 = unlabelled."""
    parcels: np.ndarray
    """(N, H, W) int32 field numbers, 0 = none."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One season of a cube or stack, ready to be read from several threads."""

    path: Location
    """The cube's or stack's folder."""
    season: str
    """First day of the season, ``YYYY-MM-DD``."""
    kind: Literal["cube", "stack"]
    bands: tuple[str, ...]
    shape_yx: tuple[int, int]
    """Height and width of a site (pixels)."""
    chunk: int
    """Side of the storage chunk (pixels)."""
    days: np.ndarray
    """(S, T) int32: days since the season's first day; what follows a site's last date is cut."""
    dates: np.ndarray
    """(S,) int64: dates of each site."""
    site_id: tuple[str, ...]
    """(S,) name of each site; empty for a cube."""
    crs: tuple[str, ...]
    """(S,) CRS of each site."""
    transform: np.ndarray
    """(S, 6) float64: a, b, c, d, e, f of each site's grid."""
    reflectance: BlockReader
    valid: BlockReader
    coverage: Any
    """(T, cy, cx) or (S, T, cy, cx) uint16 or uint32 zarr array: clear pixels per chunk."""
    origin_yx: tuple[int, int] = (0, 0)
    """Absolute row and column of the first pixel of a cube. Of a stack (0, 0): there the lattice
    of windows begins at the first pixel of each site, which is a map of its own."""
    labels: Any | None = None
    """(Y, X) or (S, Y, X) uint8 zarr array of class codes, 255 = unlabelled, if there are any."""
    parcels: Any | None = None
    """(Y, X) or (S, Y, X) int32 zarr array of field numbers, 0 = none, if there are any."""
    folder: Location | None = None
    """Where the arrays lie, for labels to be read past Zarr; None where it does all reading."""
    fields: FieldTable | None = None
    """The labelled fields of all sites, if there are any."""
    legend: Legend | None = None
    fold: np.ndarray | None = None
    """(S,) fold of each site, if there are folds."""
    weight: np.ndarray | None = None
    """(S,) uint16: how often an epoch of training shows each site; None for once each."""
    level: str = "surface"
    """``surface`` or ``top-of-atmosphere`` reflectance."""
    built: str | None = None
    """SHA-256 of all that the season was built from; None where no build or import made it."""

    def __str__(self) -> str:
        return f"{self.path}, season {self.season}"

    @property
    def sites(self) -> int:
        """Number of sites; 1 for a cube."""
        return len(self.dates)

    @property
    def window(self) -> Window:
        """The pixels of a site, as the lattice of windows counts them."""
        return Window(*self.origin_yx, *self.shape_yx)

    @property
    def day_range(self) -> tuple[int, int]:
        """First and last day on which a site was seen."""
        seen = self.days[np.arange(self.days.shape[1]) < self.dates[:, None]]
        return int(seen.min()), int(seen.max())

    @property
    def resolution(self) -> float:
        """Pixel size of the first site (units of its CRS)."""
        return float(self.transform[0, 0])

    @property
    def latitude(self) -> float | None:
        """Latitude of the first site's centre (degrees); None where its CRS is not known."""
        from pyproj import Transformer
        from pyproj.exceptions import CRSError

        a, b, c, d, e, f = self.transform[0]
        row, col = (side / 2 for side in self.shape_yx)
        try:
            change = Transformer.from_crs(self.crs[0], "EPSG:4326", always_xy=True)
        except CRSError:
            return None
        latitude = change.transform(a * col + b * row + c, d * col + e * row + f)[1]
        return float(latitude) if np.isfinite(latitude) else None

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of a chunk of one site, at most."""
        return int(self.dates.max()) * (2 * len(self.bands) + 1) * self.chunk**2

    @cached_property
    def _counted(self) -> tuple[ClearCounts, str]:
        values = np.asarray(self.coverage[:])
        if self.kind == "cube":
            values = values[None]
        counts = ClearCounts(
            pixels=values.sum(axis=1, dtype=np.int64),
            dates=(values > 0).sum(axis=1, dtype=np.int32),
        )
        return counts, hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()

    @property
    def clear(self) -> ClearCounts:
        """How clear each chunk is; read at first use."""
        return self._counted[0]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of sites, grids, dates, bands and cloud counts."""
        described = [self.kind, self.season, self.bands, self.shape_yx, self.crs, self._counted[1]]
        digest = hashlib.sha256(json.dumps(described).encode())
        for values in (self.transform, self.days):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    @cached_property
    def label_pixels(self) -> str:
        """A hash of class and field number of each pixel; reads all labels."""
        digest = hashlib.sha256()
        for tile in self.label_tiles():
            for values in (tile.labels, tile.parcels):
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a run's records tell of the source."""
        systems = sorted(set(self.crs))
        return {
            "cube": str(self.path.resolve()),
            "season": self.season,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "built": self.built,
            "sites": self.sites,
            "resolution": self.resolution,
            "level": self.level,
            "dates": int(self.dates.max()),
            "crs": systems[0] if len(systems) == 1 else systems,
        }

    def read(self, window: Window, *, site: int = 0) -> Block:
        """Read all dates and bands of a rectangle; beyond the site is no data.

        Parameters
        ----------
        window
            Counted from the site's first pixel; may reach beyond the site.
        """
        dates = int(self.dates[site])
        inside = window.intersection(Window(0, 0, *self.shape_yx))
        place = (slice(0, dates), inside.rows, inside.cols)
        values = self._read(
            self.reflectance, (place[0], slice(0, len(self.bands)), *place[1:]), site
        )
        usable = self._read(self.valid, place, site)
        if inside != window:
            values = _pad(values, inside, window, FILL)
            usable = _pad(usable, inside, window, False)
        return Block(reflectance=values, valid=usable, days=self.days[site, :dates], window=window)

    def read_labels(self, window: Window, *, site: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read the labels and field numbers of a rectangle.

        Returns
        -------
        (H, W) uint8 class codes and (H, W) int32 field numbers; 255 and 0 beyond the site.
        """
        return LabelReader(self).read(window, site=site)

    def label_tiles(self) -> Iterator[LabelTile]:
        """Yield all labels, in pieces that fit into memory."""
        return LabelReader(self).tiles()

    def name_chip(self, window: Window, site: int) -> ChipSource:
        """Return where a chip lies."""
        return ChipSource(
            cube=str(self.path),
            season=self.season,
            window=window,
            site=self.site_id[site] if self.site_id else None,
        )

    def site_of(self, chip: ChipSource) -> int:
        """Return the position of the site that a chip was cut from; 0 of a cube."""
        return 0 if chip.site is None else self._places[chip.site]

    @cached_property
    def _places(self) -> dict[str, int]:
        """Position of each site by its name."""
        return {name: place for place, name in enumerate(self.site_id)}

    def _read(self, reader: BlockReader, place: tuple[slice, ...], site: int) -> np.ndarray:
        if self.kind == "cube":
            return reader.read(place)
        values: np.ndarray = reader.read((slice(site, site + 1), *place))[0]
        return values


class LabelReader:
    """Reads the labels of a source many times; safe to call from several threads.

    It keeps where their chunks lie, so that labels that are burnt anew need another one.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._readers = tuple(
            None
            if array is None or source.folder is None
            else open_reader(array, source.folder / name)
            for array, name in ((source.labels, "labels"), (source.parcels, "parcels"))
        )

    def read(self, window: Window, *, site: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Read the labels and field numbers of a rectangle, as ``Source.read_labels`` does."""
        inside = window.intersection(Window(0, 0, *self.source.shape_yx))
        tile = self._tile(slice(site, site + 1), inside)
        labels, parcels = tile.labels[0], tile.parcels[0]
        if inside != window:
            labels = _pad(labels, inside, window, UNLABELLED)
            parcels = _pad(parcels, inside, window, 0)
        return labels, parcels

    def tiles(self) -> Iterator[LabelTile]:
        """Yield all labels, in pieces that fit into memory."""
        source = self.source
        shards = None if source.labels is None or source.kind == "cube" else source.labels.shards
        most = max(_LABEL_TILE**2 // (source.shape_yx[0] * source.shape_yx[1]), 1)
        step = min(shards[0], most) if shards else 1
        for first in range(0, source.sites, step):
            for window in tiles(source.shape_yx, _LABEL_TILE):
                yield self._tile(slice(first, min(first + step, source.sites)), window)

    def _tile(self, sites: slice, window: Window) -> LabelTile:
        """Read the labels of a rectangle of some sites, which lies in them."""
        source = self.source
        place: tuple[slice, ...] = (sites, window.rows, window.cols)
        shape = (sites.stop - sites.start, *window.shape_yx)
        found = []
        for array, reader, fill, dtype in (
            (source.labels, self._readers[0], UNLABELLED, np.uint8),
            (source.parcels, self._readers[1], 0, np.int32),
        ):
            if array is None or window.is_empty:
                found.append(np.full(shape, fill, dtype=dtype))
            else:
                inner = place if source.kind == "stack" else place[1:]
                values = array[inner] if reader is None else reader.read(inner)
                found.append(values if source.kind == "stack" else values[None])
        return LabelTile(sites=sites, window=window, labels=found[0], parcels=found[1])


def open_source(path: str | Path | Location | Source, season: str | None = None) -> Source:
    """Open a season of a cube or stack as a source; by default the only one.

    A source that is open already is given back.

    Raises
    ------
    MissingFileError, CubeError
        If there is nothing at the path, or not the season, or none was named among several.
    """
    if isinstance(path, Source):
        if season not in (None, path.season):
            raise CubeError(
                f"Cannot use {path} as season {season}: one season was opened. Open that one."
            )
        return path
    place = location(path)
    name = choose_season(place, season)
    return source_of(open_stack(place, name) if is_stack(place, name) else open_season(place, name))


def source_of(season: Season | Stack | Source) -> Source:
    """Return an opened season of a cube or stack as a source."""
    if isinstance(season, Source):
        return season
    if isinstance(season, Stack):
        folder = season.path / season.folder
        return Source(
            path=season.path, season=season.name, kind="stack", bands=season.bands,
            shape_yx=season.shape_yx, chunk=season.layout.chunk, days=season.days,
            dates=season.dates, site_id=season.site_id, crs=season.crs,
            transform=np.asarray(season.transform),
            reflectance=open_reader(season.reflectance, folder / "reflectance"),
            valid=open_reader(season.valid, folder / "valid"), coverage=season.coverage,
            labels=season.labels, parcels=season.parcels, folder=folder, fields=season.fields,
            legend=season.legend, fold=season.fold, weight=season.weight,
            level=season.level, built=season.attrs.get("fingerprint"),
        )  # fmt: skip
    if season.geobox.crs is None:
        raise CubeError(
            f"Cannot read {season.cube}, season {season.name}: its grid has no CRS. Write the cube "
            "again from a dataset that has one."
        )
    folder = season.cube / season.folder
    epsg = season.geobox.crs.epsg
    whole = absolute_window(season.geobox)
    return Source(
        path=season.cube, season=season.name, kind="cube", bands=season.bands,
        shape_yx=season.shape_yx, chunk=season.layout.chunk, days=season.days[None],
        dates=np.array([len(season.time)]), site_id=(),
        crs=(f"EPSG:{epsg}" if epsg else str(season.geobox.crs),),
        transform=np.array([tuple(season.geobox.affine)[:6]], dtype=np.float64),
        reflectance=open_reader(season.reflectance, folder / "reflectance"),
        valid=open_reader(season.valid, folder / "valid"), coverage=season.coverage,
        origin_yx=(whole.row, whole.col), labels=season.labels, parcels=season.parcels,
        folder=folder, fields=season.fields, legend=season.legend, level=season.level,
        built=season.attrs.get("fingerprint"),
    )  # fmt: skip


def _pad(values: np.ndarray, inside: Window, window: Window, fill: Any) -> np.ndarray:
    """Return the values of a window of which those of a part were read."""
    padded = np.full((*values.shape[:-2], *window.shape_yx), fill, dtype=values.dtype)
    if not inside.is_empty:
        target = inside.relative_to(window)
        padded[..., target.rows, target.cols] = values
    return padded
