"""Shards as segments: what workers write so that the map is assembled without decoding.

Where the shard size is a multiple of 4096 px, a shard's tiles and first overviews need nothing
from its neighbours. Other shards, and layers of several bands, are plain rasters, which GDAL
assembles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cog import Segment, TileCodec, write_segment
from ..cog.segment import LEVELS, is_whole
from ..grid import Window, geobox_from_window
from .outputs import Layer

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = [
    "SEGMENT_SIDE",
    "codec_of",
    "segment_of",
    "segment_whole",
    "takes_segments",
    "write_layer_segment",
]

SEGMENT_SIDE = TileCodec().size << LEVELS
"""Shards of this side, or a multiple, can be assembled by copying (pixels)."""


def takes_segments(layer: Layer, shard_size: int) -> bool:
    """Return True where a layer's shards of a size (pixels) are written as segments."""
    return not layer.per_class and shard_size % SEGMENT_SIDE == 0


def write_layer_segment(
    path: Path,
    values: np.ndarray,
    window: Window,
    *,
    layer: Layer,
    extent: Window,
    crs: str,
    resolution: float,
    threads: int,
) -> dict[str, Any]:
    """Write one layer of a shard, (H, W) uint8, and return what its manifest keeps.

    Parameters
    ----------
    window, extent
        The shard and the map (absolute pixels).
    """
    segment = write_segment(
        values,
        path,
        window=window.relative_to(extent),
        resampling="mode" if layer.kind == "classes" else "average",
        codec=codec_of(layer),
        absent=layer.absent,
        geobox=geobox_from_window(window, crs=crs, resolution=resolution),
        threads=threads,
    )
    return segment.to_json()


def segment_of(
    value: Mapping[str, Any], path: Path, window: Window, plan: PredictionPlan
) -> Segment:
    """Return a shard's segment from what its manifest kept."""
    return Segment.from_json(value, path=path, window=window.relative_to(plan.extent))


def segment_whole(value: Mapping[str, Any], path: Path, window: Window, *, layer: Layer) -> bool:
    """Return True where a shard's file is what its manifest says, byte for byte."""
    return is_whole(Segment.from_json(value, path=path, window=window), codec_of(layer))


def codec_of(layer: Layer) -> TileCodec:
    """Return how the tiles of a layer are compressed."""
    return TileCodec(predictor=layer.kind != "classes")
