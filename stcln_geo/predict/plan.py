"""Decide what a prediction will do, before a pixel is read."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..cube.store import Season
from ..data.reader import band_indices
from ..errors import CubeError, InputError
from ..execution import available_cores
from ..grid import Lattice, Window, bounds_window, geobox_from_window
from ..legend import Legend
from ..storage import Location
from .blocks import FetchCost, fetch_cost
from .checks import check_dates, fingerprint, legend_of, mismatches
from .forward import window_bytes
from .mask import SkipMask, open_mask
from .outputs import EMBEDDINGS, layers_for
from .segments import SEGMENT_SIDE, takes_segments
from .sieve import SIEVED, Sieve, sieve_for
from .smooth import Smoothing
from .spec import PredictSpec
from .stitch import cut_lines

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

    from ..model.checkpoint import CheckpointInfo
    from ..region import Region
    from .source import PixelSource

__all__ = ["DEFAULT_MEMORY", "PredictionPlan", "crs_name", "lattice_of", "plan_prediction"]

_SHARD = 4096
_SMALLEST_AUTO_SHARD = 256
_ENOUGH_SHARDS = 16
_READ = 1024
_SMALLEST_FETCHED_SHARD = 1024
_ENOUGH_FETCHED_SHARDS = 4
DEFAULT_MEMORY = 4 * 2**30
"""Bytes that one worker may use, where none are given."""

_LEAST_CHUNKS = 2  # a side of what is read at once, however little memory there is
_PROCESS_BYTES = 450_000_000  # of a worker with torch, GDAL and Dask before it has read a pixel


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
    smoothing: Smoothing | None
    sieve: Sieve | None
    mask: SkipMask | None
    embedding_dim: int
    """Length of an embedding."""
    window_bytes: int
    """What the network takes while it runs on a window, on a CPU."""
    threads: int
    """Windows that a worker runs side by side."""
    stored_bands: int
    """Of the cube: all of them are decoded."""
    chunk: int
    """Side of a chunk of the cube (pixels)."""
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
    source: PixelSource | None = None
    """Set where pixels are fetched while the map is made, and there is no cube."""

    def __str__(self) -> str:
        """Describe the plan for people."""
        height, width = self.extent.shape_yx
        lattice = self.lattice
        skipped = len(self.all_shards) - len(self.shards)
        lines = [
            f"Prediction of season {self.season} of {self.cube}"
            if self.source is None
            else f"Prediction of season {self.season}, directly from {self.source.plan.catalog}",
            f"  checkpoint  {self.checkpoint} ({len(self.legend)} classes, "
            f"{', '.join(self.bands)}; sha256 {self.sha256[:12]})",
            f"  grid        {width} x {height} px of {self.resolution:g} m, {self.crs_name}; "
            f"{self.region_km2:.4g} km2 to label",
            f"  windows     about {self.window_count:,} of {lattice.window} px, halo "
            f"{lattice.halo} px, stride {lattice.stride} px; "
            + ("blended where they overlap" if self.spec.blend else "merged by their cores"),
            f"  dates       {self.date_count} ({' to '.join(self.dates)}); those empty in a window "
            f"are left out there; a class needs {self.spec.min_clear} clear ones",
            f"  shards      {len(self.shards)} of about {self.shard_size} px"
            + (f", {skipped} more lie outside the region" if skipped else ""),
            f"  layers      {', '.join(self.layer_names)}",
            f"  COG writer  {self._writer}",
            f"  memory      about {_size(self.memory_bytes)} per worker at most, of which "
            f"{_size(self.fixed_bytes)} whatever is read at once",
            f"  disk        at most {_size(self.disk_bytes)}",
        ]
        if self.smoothing is not None:
            lines.append(f"  smoothing   {self.smoothing.method}, {self.smoothing.window} px")
        if self.sieve is not None:
            lines.append(
                f"  patches     of fewer than {self.sieve.pixels} px ({self.sieve.hectares:g} ha) "
                f"are merged, each as the {self.sieve.reach} px around it say"
            )
        if self.mask is not None:
            values = self.mask.values
            wanted = "all but 0 and nodata" if values is None else ", ".join(map(str, values))
            lines.append(f"  mask        {self.mask.path}: mapped where it holds {wanted}")
        if self.source is not None:
            work = self.fetching
            lines += [
                f"  fetching    at most {work.windows:,} asset windows, about {_size(work.bytes)} "
                f"of pixels ({work.overlap:.3g} times the region's, for the shards' margins); at "
                f"most {_size(self.source.memory)} of memory per worker",
                f"  scratch     at most {_size(work.scratch_bytes)} per worker, before "
                "compression, in "
                f"{self.source.scratch or 'the folder for temporary files'}; nothing stays",
                f"  search      kept in {self.source.folder}, for resuming",
            ]
        lines += [f"  warning     {text}" for text in self.warnings]
        if self.memory_bytes > self.memory:
            lines.append(
                f"  note        a worker takes more than the {_size(self.memory)} of --memory, "
                "however little it reads at once: choose a smaller --shard-size, or fewer threads"
            )
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
    def _writer(self) -> str:
        if not self.parallel_cog:
            return "gdal: all pixels are compressed again"
        other = [
            layer.name for layer in layers_for(self.spec.outputs)
            if not takes_segments(layer, self.shard_size)
        ]  # fmt: skip
        return "parallel: copies what the workers compressed" + (
            f"; gdal for {', '.join(other)}, of several bands" if other else ""
        )

    @property
    def region_km2(self) -> float:
        """Area to label (square kilometres)."""
        return float(self.aoi.area) / 1e6

    @cached_property
    def fetching(self) -> FetchCost:
        """What fetching the shards' pixels costs."""
        if self.source is None:
            return FetchCost()
        seen = [
            self.lattice.cover(shard.expand(self.lattice.halo) if self.spec.blend else shard)
            for shard in self.shards
        ]
        return fetch_cost(self.source.plan, seen, memory=self.source.memory)

    @property
    def block_size(self) -> int:
        """Side of what is read at once (pixels), as the memory allows."""
        left = max(self.memory - self.fixed_bytes - self._fetch_bytes, 0)
        square, line = self._pixel_bytes, self._line_bytes
        side = int((math.sqrt(line**2 + 4 * square * left) - line) / (2 * square))
        # Chunks are decoded whole: to read less than a few of them at once only takes longer.
        least = max(_LEAST_CHUNKS * self.chunk, self.lattice.stride)
        return max(min(_READ, side) - 2 * self.lattice.halo, least)

    @property
    def memory(self) -> int:
        """What one worker may use (bytes)."""
        return self.spec.memory or DEFAULT_MEMORY

    @property
    def fixed_bytes(self) -> int:
        """About what one worker holds besides what it reads (bytes): itself, network, a shard."""
        shard = min(self.shard_size, max(self.extent.shape_yx))
        layers = (self._layer_bytes + 8) * shard**2
        return _PROCESS_BYTES + self.threads * self.window_bytes + layers

    @property
    def _fetch_bytes(self) -> int:
        """What one worker may use to fetch pixels (bytes)."""
        return 0 if self.source is None else self.source.memory

    @property
    def memory_bytes(self) -> int:
        """About what one worker holds at most (bytes)."""
        side = min(
            self.block_size + 2 * self.lattice.halo,
            max(self.extent.shape_yx) + self.lattice.window,
        )
        reading = side**2 * self._pixel_bytes + self._line_bytes * side
        return self.fixed_bytes + self._fetch_bytes + reading

    @property
    def disk_bytes(self) -> int:
        """At most what the folder holds while it is written (bytes): shards, maps, overviews."""
        embedded = 2 * self.embedding_dim if EMBEDDINGS in self.spec.outputs else 0
        return (5 * self._layer_bytes // 2 + 2 * embedded) * self.extent.area

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers of the product."""
        rasters = tuple(layer.name for layer in layers_for(self.spec.outputs))
        return rasters + ((EMBEDDINGS,) if EMBEDDINGS in self.spec.outputs else ())

    @property
    def _layer_bytes(self) -> int:
        """Bytes of a pixel in all layers."""
        layers = layers_for(self.spec.outputs)
        twice = 0 if self.sieve is None else len(SIEVED)
        return sum(len(self.legend) if layer.per_class else 1 for layer in layers) + twice

    @property
    def _line_bytes(self) -> int:
        """Bytes of the sums of one row of a shard, while windows are blended."""
        if not self.spec.blend:
            return 0
        return 2 * 4 * len(self.legend) * min(self.shard_size, self.extent.width)

    @property
    def _pixel_bytes(self) -> int:
        """Bytes of a pixel that is read, all dates: at work, waiting, and while it is decoded."""
        chosen, stored = 2 * len(self.bands) + 1, 2 * self.stored_bands + 1
        return self.date_count * (2 * chosen + 2 * stored)

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
            "min_clear": self.spec.min_clear,
            "blend": self.spec.blend,
            "smoothing": None if self.smoothing is None else self.smoothing.to_json(),
            "sieve": None if self.sieve is None else self.sieve.to_json(),
            "mask": None if self.mask is None else self.mask.to_json(),
            "outputs": sorted(set(self.spec.outputs)),
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
            "source": None if self.source is None else self.source.to_json(),
        }


def plan_prediction(
    season: Season,
    checkpoint: CheckpointInfo,
    spec: PredictSpec,
    *,
    region: Region | None = None,
    source: PixelSource | None = None,
    threads: int | None = None,
) -> PredictionPlan:
    """Plan the labelling of a season's region.

    Parameters
    ----------
    region
        A part of the cube's region; by default all of it.
    source
        Where pixels are fetched from, if the season is only planned and has none.
    threads
        Windows that a worker will run side by side, which its memory depends on; by default as
        many as there are cores.

    Raises
    ------
    CheckpointError
        If the checkpoint is not a classifier with a legend.
    CubeError
        If the cube lacks a band that the network needs.
    InputError
        If the season has fewer dates than a class needs, the region does not meet the cube, or
        the numbers of ``spec`` do not fit.
    """
    legend = legend_of(checkpoint)
    bands = tuple(checkpoint.config.bands)
    band_indices(season, bands, wanted_by=f"checkpoint {str(checkpoint.path)!r}")
    check_dates(season, spec.min_clear)
    crs = crs_name(season)
    aoi = _area_of(season, region, crs)
    lattice = lattice_of(spec, checkpoint)
    fetched = source is not None
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
        smoothing=spec.smoothing(lattice.halo),
        sieve=None
        if spec.min_mapping_unit is None
        else sieve_for(spec.min_mapping_unit, resolution=season.resolution),
        mask=None if spec.mask is None else open_mask(spec.mask, spec.mask_values),
        embedding_dim=checkpoint.config.dim,
        window_bytes=window_bytes(checkpoint.config, lattice.window, len(season.time)),
        threads=threads or available_cores(),
        stored_bands=len(season.bands),
        chunk=season.layout.chunk,
        dates=(str(season.time[0])[:10], str(season.time[-1])[:10]),
        date_count=len(season.time),
        shard_size=spec.shard_size
        or (_SHARD if spec.cog_writer == "parallel" else _auto_shard_size(extent, fetched=fetched)),
        spec=spec,
        fingerprint=fingerprint(season) if source is None else source.fingerprint,
        warnings=tuple(mismatches(season, checkpoint, lattice)),
        notes=(
            *_notes(season, lattice, extent, blend=spec.blend),
            *_say_temperature(checkpoint.temperature),
        ),
        source=source,
    )


def lattice_of(spec: PredictSpec, checkpoint: CheckpointInfo) -> Lattice:
    """Return the windows: as asked for, else as the checkpoint was trained and chosen with."""
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


def _notes(season: Season, lattice: Lattice, extent: Window, *, blend: bool) -> list[str]:
    seen = extent.expand(lattice.halo) if blend else extent
    if season.window.contains(lattice.cover(seen)):
        return []
    return [
        f"Windows of {lattice.window} px at the region's rim reach beyond the cube and see no data "
        f"there: up to {lattice.window - lattice.halo} px from the cube's edge, a cube of more "
        "land may give other labels."
    ]


def _say_temperature(temperature: float | None) -> list[str]:
    if temperature is None:
        return []
    return [f"Confidence is calibrated by the checkpoint's temperature, {temperature:.3f}."]


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


def _auto_shard_size(extent: Window, *, fetched: bool) -> int:
    """Return 4096, or less where that gives too few shards to share out or to resume from.

    Where pixels are fetched shards stay larger: each is a read of every image, with its margins.
    """
    size = _SHARD
    smallest = _SMALLEST_FETCHED_SHARD if fetched else _SMALLEST_AUTO_SHARD
    enough = _ENOUGH_FETCHED_SHARDS if fetched else _ENOUGH_SHARDS
    while size > smallest and extent.area < enough * size**2:
        size //= 2
    return size


def _size(number: int) -> str:
    """Return bytes for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
