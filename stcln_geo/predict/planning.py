"""Decide what a prediction will do, before a pixel is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cube.store import Season
from ..data.reader import band_indices
from ..errors import CubeError, InputError
from ..execution import available_cores
from ..grid import Lattice, Window, bounds_window
from .checks import check_dates, fingerprint, legend_of, mismatches
from .forward import window_bytes
from .mask import open_mask
from .plan import PredictionPlan, outline
from .sieve import sieve_for
from .spec import PredictSpec

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from ..model.checkpoint import CheckpointInfo
    from ..region import Region
    from .source import PixelSource

__all__ = ["crs_name", "lattice_of", "plan_prediction"]

_SHARD = 4096
_SMALLEST_AUTO_SHARD = 256
_ENOUGH_SHARDS = 16
_SMALLEST_FETCHED_SHARD = 1024
_ENOUGH_FETCHED_SHARDS = 4


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
        checkpoint=checkpoint.path.resolve(),
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
        embedding_dim=checkpoint.members * checkpoint.config.dim,
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
            *_say_confidence(checkpoint),
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


def _say_confidence(checkpoint: CheckpointInfo) -> list[str]:
    if checkpoint.members > 1:
        return [
            f"{checkpoint.members} networks label together, by the mean of their probabilities; "
            f"that takes {checkpoint.members} times as long as one."
        ]
    if checkpoint.temperature is None:
        return []
    told = f"{checkpoint.temperature:.3f}"
    return [f"Confidence is calibrated by the checkpoint's temperature, {told}."]


def _area_of(season: Season, region: Region | None, crs: str) -> BaseGeometry:
    """Return the polygons to label: the cube's region, or the part of it that was asked for."""
    import shapely
    from shapely.geometry import MultiPolygon

    within = season.aoi.intersection(outline(season.window, season.resolution))
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
