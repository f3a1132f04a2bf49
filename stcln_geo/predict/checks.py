"""Check that a checkpoint and a season fit together, and that a season is still the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from typing import TYPE_CHECKING

import numpy as np

from ..cube.contract import OVERVIEW_STEP
from ..cube.store import Season, shards_of
from ..errors import CheckpointError
from ..grid import Lattice
from ..legend import Legend

if TYPE_CHECKING:
    from ..model.checkpoint import CheckpointInfo

__all__ = ["fingerprint", "legend_of", "mismatches"]

_DAYS_SLACK = 30
_SAMPLES = 16


def legend_of(checkpoint: CheckpointInfo) -> Legend:
    """Return the classes of a checkpoint, or say why it has none."""
    if checkpoint.kind != "classifier" or checkpoint.legend is None:
        raise CheckpointError(
            f"Cannot predict with {checkpoint.path}: it is "
            + (
                f"the result of pre-training (a {checkpoint.kind}), which knows no classes"
                if checkpoint.kind != "classifier"
                else "a classifier without a legend, so its classes have no names"
            )
            + ". A map needs a fine-tuned classifier. Run 'stcln-geo finetune CUBE --init "
            f"{checkpoint.path}' first, then predict with what it writes."
        )
    legend = Legend.from_json(checkpoint.legend)
    if len(legend) != checkpoint.config.classes:
        raise CheckpointError(
            f"Cannot predict with {checkpoint.path}: its legend names {len(legend)} classes but "
            f"the network gives {checkpoint.config.classes}. Each output needs a name: fine-tune "
            "again."
        )
    return legend


def mismatches(season: Season, checkpoint: CheckpointInfo, lattice: Lattice) -> list[str]:
    """Return what fits badly though it can be done."""
    found = []
    if checkpoint.chip and lattice.window != checkpoint.chip:
        found.append(
            f"The windows are {lattice.window} px but the network was trained on chips of "
            f"{checkpoint.chip} px; its attention sees the whole window. Use --window "
            f"{checkpoint.chip} unless you have measured otherwise."
        )
    if checkpoint.trained_days is not None and checkpoint.config.positions == "days":
        first, last = checkpoint.trained_days
        low, high = int(season.days.min()), int(season.days.max())
        if low < first - _DAYS_SLACK or high > last + _DAYS_SLACK:
            found.append(
                f"The season's dates are days {low} to {high} of the season, but the network was "
                f"trained on days {first} to {last}; it has not seen that part of the year. "
                "Expect errors, or fine-tune on a whole season."
            )
    start = checkpoint.season_start
    if start and start != season.name[5:]:
        found.append(
            f"The season starts on {season.name[5:]} (month-day) but the network counts days from "
            f"{start}, so that every date is shifted. Build the cube with --season-start {start}."
        )
    return found


def fingerprint(season: Season) -> str:
    """Hash a season's grid, dates, clear-pixel counts and a sample of its overviews."""
    digest = hashlib.sha256()
    head = {
        "name": season.name,
        "bands": season.bands,
        "window": astuple(season.window),
        "resolution": season.resolution,
        "crs": season.geobox.crs.to_wkt() if season.geobox.crs is not None else None,
    }
    digest.update(json.dumps(head).encode())
    digest.update(season.time.tobytes())
    digest.update(np.ascontiguousarray(season.coverage[:]).tobytes())
    shards = shards_of(season)
    step = max(len(shards) / _SAMPLES, 1.0)
    side = season.layout.shard // OVERVIEW_STEP
    for index in range(min(len(shards), _SAMPLES)):
        shard = shards[int(index * step)]
        row, col = shard.row // OVERVIEW_STEP, shard.col // OVERVIEW_STEP
        sample = season.overview[:, :, row : row + side, col : col + side]
        digest.update(np.ascontiguousarray(sample).tobytes())
    return digest.hexdigest()
