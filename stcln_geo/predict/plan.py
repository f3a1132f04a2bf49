"""What a prediction will do: its pieces, and what they take."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..grid import Lattice, Window, geobox_from_window
from ..legend import Legend
from ..storage import Location
from .blocks import FetchCost, fetch_cost
from .mask import SkipMask
from .outputs import EMBEDDINGS, layers_for
from .segments import SEGMENT_SIDE, takes_segments
from .sieve import SIEVED, Sieve
from .smooth import Smoothing
from .spec import PredictSpec
from .stitch import cut_lines

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

    from .source import PixelSource

__all__ = ["DEFAULT_MEMORY", "PredictionPlan", "outline"]

_READ = 1024
DEFAULT_MEMORY = 4 * 2**30
"""Bytes that one worker may use, where none are given."""

_LEAST_CHUNKS = 2  # a side of what is read at once, however little memory there is
_PROCESS_BYTES = 450_000_000  # of a worker with torch, GDAL and Dask before it has read a pixel


@dataclass(frozen=True, kw_only=True)
class PredictionPlan:
    """What will be labelled, by what, and in which pieces."""

    cube: Location
    season: str
    checkpoint: Location
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
            if shapely.intersects(self.aoi, outline(shard, self.resolution))
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

    def worker_bytes(self, shards: int) -> int:
        """About what one worker holds at most that labels so many shards at once (bytes)."""
        return _PROCESS_BYTES + shards * (self.memory_bytes - _PROCESS_BYTES)

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


def outline(window: Window, resolution: float) -> BaseGeometry:
    """Return the outline of absolute pixels, in a CRS with pixels of that size (its units)."""
    from shapely.geometry import box

    return box(
        window.col * resolution,
        -(window.row + window.height) * resolution,
        (window.col + window.width) * resolution,
        -window.row * resolution,
    )


def _size(number: int) -> str:
    """Return bytes for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
