"""Shards as segments: what workers write so that the map is assembled without decoding.

Where the shard size is a multiple of 4096 px, a shard's tiles and first overviews need nothing
from its neighbours. Other shards are plain rasters, which GDAL assembles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cog import Segment, TileCodec, write_segment
from ..cog.segment import LEVELS, is_whole
from ..grid import Window, geobox_from_window

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["SEGMENT_SIDE", "segment_of", "segment_whole", "write_layer_segment"]

SEGMENT_SIDE = TileCodec().size << LEVELS
"""Shards of this side, or a multiple, can be assembled by copying (pixels)."""


def write_layer_segment(
    path: Path,
    values: np.ndarray,
    window: Window,
    *,
    layer: str,
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
        resampling="mode" if layer == "classes" else "average",
        codec=_codec(layer),
        geobox=geobox_from_window(window, crs=crs, resolution=resolution),
        threads=threads,
    )
    return segment.to_json()


def segment_of(
    value: Mapping[str, Any], path: Path, window: Window, plan: PredictionPlan
) -> Segment:
    """Return a shard's segment from what its manifest kept."""
    return Segment.from_json(value, path=path, window=window.relative_to(plan.extent))


def segment_whole(value: Mapping[str, Any], path: Path, window: Window, *, layer: str) -> bool:
    """Return True where a shard's file is what its manifest says, byte for byte."""
    return is_whole(Segment.from_json(value, path=path, window=window), _codec(layer))


def _codec(layer: str) -> TileCodec:
    return TileCodec(predictor=layer != "classes")
