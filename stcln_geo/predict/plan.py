"""Decide what a prediction will do, before a pixel is read."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .. import __version__
from ..cube.store import Season
from ..data.reader import band_indices
from ..errors import CubeError, InputError
from ..grid import Lattice, Window, bounds_window, geobox_from_window
from ..legend import Legend
from ..model.device import Device, Precision
from ..storage import Location
from .checks import fingerprint, legend_of, mismatches
from .segments import SEGMENT_SIDE
from .stitch import cut_lines

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

    from ..model.checkpoint import CheckpointInfo
    from ..region import Region

__all__ = ["PredictSpec", "PredictionPlan", "plan_prediction"]

CogWriter = Literal["auto", "parallel", "gdal"]
"""What makes the maps of the shards."""

_SHARD = 4096
_SMALLEST_AUTO_SHARD = 256
_ENOUGH_SHARDS = 16
_READ = 1024
_DEFAULT_MEMORY = 4 * 2**30
_BLOCKS_IN_MEMORY = 4  # one at work, one waiting, and two copies while one is decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictSpec:
    """How to predict; nothing here but ``window``, ``halo`` and ``min_dates`` changes the map.

    Parameters
    ----------
    window
        Side of what the network sees (pixels); None = the chip it was trained on.
    halo
        Context on each side that is seen but labelled by the neighbour (pixels); None = what the
        checkpoint was chosen with, else 4.
    min_dates
        Pixels with fewer valid dates are nodata.
    shard_size
        Side of the squares that are labelled and kept on their own (pixels); None = 4096, less
        for small regions.
    device, precision
        "auto" takes a GPU if there is one, and bf16 where the hardware multiplies it fast.
    batch_size
        Windows per batch on a GPU; None = as many as fit, at most 64.
    memory
        Bytes that one worker may use for pixels; None = 4 GiB.
    keep_shards
        Keep the shards' files once the map is whole.
    cog_writer
        "parallel" copies what the workers compressed, and needs shards that are a multiple of
        4096 px; "gdal" decodes and compresses all pixels again; "auto" is parallel where it can.
    """

    window: int | None = None
    halo: int | None = None
    min_dates: int = 1
    shard_size: int | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    batch_size: int | None = None
    memory: int | None = None
    keep_shards: bool = False
    cog_writer: CogWriter = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = {
            "min_dates": 1, "shard_size": 1, "batch_size": 1, "memory": 1, "window": 1, "halo": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(
                    f"Cannot predict with {name}={value}: it must be {smallest} or more. "
                    f"Correct --{name.replace('_', '-')}."
                )
        for name, kind in (
            ("device", Device), ("precision", Precision), ("cog_writer", CogWriter),
        ):  # fmt: skip
            choices = get_args(kind)
            if getattr(self, name) not in choices:
                raise InputError(
                    f"Cannot predict with {name}={getattr(self, name)!r}: it must be one of "
                    f"{', '.join(choices)}. Correct --{name.replace('_', '-')}."
                )
        if self.cog_writer == "parallel" and (self.shard_size or SEGMENT_SIDE) % SEGMENT_SIDE:
            raise InputError(
                f"Cannot write the maps with cog_writer='parallel' and shard_size="
                f"{self.shard_size}: its shards are multiples of {SEGMENT_SIDE} px, so that they "
                "make overviews without their neighbours. Leave --shard-size out, or take "
                "--cog-writer gdal."
            )


@dataclass(frozen=True, kw_only=True)
class PredictionPlan:
    """What will be labelled, by what, and in which pieces."""

    cube: Location
    season: str
    checkpoint: Path
    sha256: str
    """Of the checkpoint's file."""
    legend: Legend
    bands: tuple[str, ...]
    crs: str
    """Name or WKT of the CRS."""
    resolution: float
    """Pixel size (units of the CRS)."""
    extent: Window
    """The product's grid (absolute pixels): the bounding box of the region."""
    aoi: BaseGeometry
    """The region, in the CRS; pixels whose centre lies outside are nodata."""
    lattice: Lattice
    dates: tuple[str, ...]
    """First and last date of the season."""
    date_count: int
    shard_size: int
    spec: PredictSpec
    fingerprint: str
    """Of the season's content."""
    warnings: tuple[str, ...]
    """What fits badly though it can be done."""
    notes: tuple[str, ...]
    """What is worth knowing and needs no action."""

    def __str__(self) -> str:
        """Describe the plan for people."""
        height, width = self.extent.shape_yx
        lattice = self.lattice
        skipped = len(self.all_shards) - len(self.shards)
        lines = [
            f"Prediction of season {self.season} of {self.cube}",
            f"  checkpoint  {self.checkpoint} ({len(self.legend)} classes, "
            f"{', '.join(self.bands)}; sha256 {self.sha256[:12]})",
            f"  grid        {height} x {width} px of {self.resolution:g} m, {self.crs_name}; "
            f"{self.region_km2:.4g} km2 to label",
            f"  windows     about {self.window_count:,} of {lattice.window} px, halo "
            f"{lattice.halo} px, stride {lattice.stride} px",
            f"  dates       {self.date_count} ({' to '.join(self.dates)}); those empty in a window "
            "are left out there",
            f"  shards      {len(self.shards)} of about {self.shard_size} px"
            + (f", {skipped} more lie outside the region" if skipped else ""),
            f"  memory      about {_size(self.memory_bytes)} per worker for pixels, besides "
            "torch and the network",
            f"  disk        at most {_size(self.disk_bytes)}",
        ]
        lines += [f"  warning     {text}" for text in self.warnings]
        lines += [f"  note        {text}" for text in self.notes]
        return "\n".join(lines)

    @property
    def geobox(self) -> GeoBox:
        """The product's grid."""
        return geobox_from_window(self.extent, crs=self.crs, resolution=self.resolution)

    @property
    def crs_name(self) -> str:
        """The CRS in a word, such as ``EPSG:32631``."""
        return self.crs if self.crs.startswith("EPSG:") else "a CRS without an EPSG code"

    @cached_property
    def all_shards(self) -> tuple[Window, ...]:
        """All shards of the extent (absolute pixels), row by row."""
        stride = self.lattice.stride
        rows = cut_lines(self.extent.row, self.extent.height, size=self.shard_size, stride=stride)
        cols = cut_lines(self.extent.col, self.extent.width, size=self.shard_size, stride=stride)
        return tuple(
            Window(top, left, bottom - top, right - left)
            for top, bottom in pairwise(rows)
            for left, right in pairwise(cols)
        )

    @cached_property
    def shards(self) -> tuple[Window, ...]:
        """The shards that touch the region."""
        import shapely

        shapely.prepare(self.aoi)
        return tuple(
            shard for shard in self.all_shards
            if shapely.intersects(self.aoi, _box(shard, self.resolution))
        )  # fmt: skip

    @cached_property
    def window_count(self) -> int:
        """About the number of windows: cores that touch the region."""
        import rasterio.features

        stride = self.lattice.stride
        cores = self.lattice.cover(self.extent).expand(-self.lattice.halo)
        coarse = Window(
            cores.row // stride, cores.col // stride, cores.height // stride, cores.width // stride
        )
        geobox = geobox_from_window(coarse, crs=self.crs, resolution=self.resolution * stride)
        touched = rasterio.features.rasterize(
            [self.aoi], out_shape=coarse.shape_yx, transform=geobox.affine, all_touched=True
        )
        return int(np.count_nonzero(touched))

    @property
    def parallel_cog(self) -> bool:
        """True where the maps are assembled from what the workers compressed."""
        return self.spec.cog_writer != "gdal" and self.shard_size % SEGMENT_SIDE == 0

    @property
    def region_km2(self) -> float:
        """Area to label (square kilometres)."""
        return float(self.aoi.area) / 1e6

    @property
    def block_size(self) -> int:
        """Side of what is read at once (pixels), as the memory allows."""
        memory = self.spec.memory or _DEFAULT_MEMORY
        side = math.isqrt(max(memory // (_BLOCKS_IN_MEMORY * self._pixel_bytes), 1))
        return max(min(_READ, side) - 2 * self.lattice.halo, self.lattice.stride)

    @property
    def memory_bytes(self) -> int:
        """About what one worker holds of pixels (bytes)."""
        side = min(
            self.block_size + 2 * self.lattice.halo,
            max(self.extent.shape_yx) + self.lattice.window,
        )
        shard = min(self.shard_size, max(self.extent.shape_yx))
        return _BLOCKS_IN_MEMORY * side**2 * self._pixel_bytes + 4 * shard**2

    @property
    def disk_bytes(self) -> int:
        """At most what the folder holds while it is written (bytes): shards, maps, overviews."""
        return 5 * self.extent.area

    @property
    def _pixel_bytes(self) -> int:
        return self.date_count * (2 * len(self.bands) + 1)

    @cached_property
    def run_hash(self) -> str:
        """Identity of the run: what it reads, what it does, how it is cut."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "checkpoint": self.sha256,
            "season": self.season,
            "fingerprint": self.fingerprint,
            "bands": list(self.bands),
            "extent": list(astuple(self.extent)),
            "aoi": self.aoi.wkb_hex,
            "window": self.lattice.window,
            "halo": self.lattice.halo,
            "min_dates": self.spec.min_dates,
            "shard_size": self.shard_size,
            "device": self.spec.device,
            "precision": self.spec.precision,
        }

    def to_json(self) -> dict[str, Any]:
        """Return what a worker needs, as plain values."""
        return {
            "run": self.run_hash,
            "identity": self._identity(),
            "cube": str(self.cube),
            "checkpoint": str(self.checkpoint),
            "crs": self.crs,
            "resolution": self.resolution,
            "block_size": self.block_size,
            "batch_size": self.spec.batch_size,
        }


def plan_prediction(
    season: Season,
    checkpoint: CheckpointInfo,
    spec: PredictSpec,
    *,
    region: Region | None = None,
) -> PredictionPlan:
    """Plan the labelling of a season's region.

    Parameters
    ----------
    region
        A part of the cube's region; by default all of it.

    Raises
    ------
    CheckpointError
        If the checkpoint is not a classifier with a legend.
    CubeError
        If the cube lacks a band that the network needs.
    InputError
        If the region does not meet the cube, or the numbers of ``spec`` do not fit.
    """
    legend = legend_of(checkpoint)
    bands = tuple(checkpoint.config.bands)
    band_indices(season, bands, wanted_by=f"checkpoint {str(checkpoint.path)!r}")
    crs = crs_name(season)
    aoi = _area_of(season, region, crs)
    lattice = _lattice_of(spec, checkpoint)
    extent = bounds_window(aoi.bounds, resolution=season.resolution).intersection(season.window)
    return PredictionPlan(
        cube=season.cube.resolve(),
        season=season.name,
        checkpoint=Path(checkpoint.path).resolve(),
        sha256=checkpoint.sha256,
        legend=legend,
        bands=bands,
        crs=crs,
        resolution=season.resolution,
        extent=extent,
        aoi=aoi,
        lattice=lattice,
        dates=(str(season.time[0])[:10], str(season.time[-1])[:10]),
        date_count=len(season.time),
        shard_size=spec.shard_size
        or (_SHARD if spec.cog_writer == "parallel" else _auto_shard_size(extent)),
        spec=spec,
        fingerprint=fingerprint(season),
        warnings=tuple(mismatches(season, checkpoint, lattice)),
        notes=tuple(_notes(season, lattice, extent)),
    )


def _lattice_of(spec: PredictSpec, checkpoint: CheckpointInfo) -> Lattice:
    usual = Lattice()
    halo = spec.halo if spec.halo is not None else checkpoint.halo
    return Lattice(
        window=spec.window or checkpoint.chip or usual.window,
        halo=usual.halo if halo is None else halo,
    )


def crs_name(season: Season) -> str:
    """Return the CRS of a season: ``EPSG:...`` where it has a code, else WKT."""
    crs = season.geobox.crs
    if crs is None:
        raise CubeError(
            f"Cannot predict over {season.cube}: its grid has no CRS, so the map has no place. "
            "Write the cube again from data with a CRS."
        )
    return f"EPSG:{crs.epsg}" if crs.epsg else str(crs.to_wkt())


def _notes(season: Season, lattice: Lattice, extent: Window) -> list[str]:
    if season.window.contains(lattice.cover(extent)):
        return []
    return [
        f"Windows of {lattice.window} px at the region's rim reach beyond the cube and see no data "
        f"there: up to {lattice.window - lattice.halo} px from the cube's edge, a cube of more "
        "land may give other labels."
    ]


def _area_of(season: Season, region: Region | None, crs: str) -> BaseGeometry:
    """Return the polygons to label: the cube's region, or the part of it that was asked for."""
    import shapely
    from shapely.geometry import MultiPolygon

    within = season.aoi.intersection(_box(season.window, season.resolution))
    wanted = within if region is None else within.intersection(region.to_crs(crs))
    polygons = [
        part for part in shapely.get_parts(wanted, return_index=False)
        if part.geom_type == "Polygon" and part.area > 0
    ]  # fmt: skip
    if not polygons:
        bounds = ", ".join(f"{value:.0f}" for value in within.bounds)
        raise InputError(
            f"Cannot predict over {region.source if region else 'the region of the cube'}: it does "
            f"not meet the region of {season.cube} (bounds {bounds} in {crs[:40]}). Give a region "
            "inside the cube's, or build a cube of this one."
        )
    return polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)


def _box(window: Window, resolution: float) -> BaseGeometry:
    """Return the outline of absolute pixels, in the CRS."""
    from shapely.geometry import box

    return box(
        window.col * resolution,
        -(window.row + window.height) * resolution,
        (window.col + window.width) * resolution,
        -window.row * resolution,
    )


def _auto_shard_size(extent: Window) -> int:
    """Return 4096, or less where that gives too few shards to share out or to resume from."""
    size = _SHARD
    while size > _SMALLEST_AUTO_SHARD and extent.area < _ENOUGH_SHARDS * size**2:
        size //= 2
    return size


def _size(number: int) -> str:
    """Return bytes for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
