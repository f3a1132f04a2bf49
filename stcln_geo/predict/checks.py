"""Check that a checkpoint and a season fit together, and that a season is still the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING

import numpy as np

from ..cube.contract import OVERVIEW_STEP
from ..cube.store import Season, shards_of
from ..errors import CheckpointError, InputError
from ..grid import Lattice
from ..legend import Legend
from ..region import footprint

if TYPE_CHECKING:
    from ..model.checkpoint import CheckpointInfo

__all__ = ["check_dates", "fingerprint", "legend_of", "mismatches"]

_DAYS_SLACK = 30
_MISSING = 0.25
"""A season that lacks more than this share of the trained days, at one end, is worth a word."""
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


def check_dates(season: Season, min_clear: int) -> None:
    """Raise InputError where a season has fewer dates than a class needs."""
    if len(season.time) < min_clear:
        raise InputError(
            f"Cannot predict season {season.name} of {season.cube}: it has {len(season.time)} "
            f"date(s), and a pixel needs {min_clear} clear ones to get a class. Add dates to the "
            f"cube, or pass --min-clear {len(season.time)} if that is enough for you."
        )


def mismatches(season: Season, checkpoint: CheckpointInfo, lattice: Lattice) -> list[str]:
    """Return what fits badly though it can be done.

    Compared are the window with the training chip, the season's start, its dates, resolution and
    kind of reflectance with those that the network was trained on, as far as the checkpoint knows
    them.
    """
    found = []
    if checkpoint.chip and lattice.window != checkpoint.chip:
        found.append(
            f"The windows are {lattice.window} px but the network was trained on chips of "
            f"{checkpoint.chip} px; its attention sees the whole window. Use --window "
            f"{checkpoint.chip} unless you have measured otherwise."
        )
    found += _date_mismatches(season, checkpoint)
    trained = [cube for cube in checkpoint.provenance.get("cubes", ()) if isinstance(cube, Mapping)]
    resolutions = sorted({float(cube["resolution"]) for cube in trained if "resolution" in cube})
    if resolutions and not any(
        math.isclose(season.resolution, one, rel_tol=0.01) for one in resolutions
    ):
        found.append(
            f"The pixels are {season.resolution:g} m but the network was trained on pixels of "
            f"{', '.join(f'{one:g}' for one in resolutions)} m, so that fields are of another size "
            f"to it. Build the cube with --resolution {resolutions[0]:g}, or fine-tune on this one."
        )
    if checkpoint.levels and season.level not in checkpoint.levels:
        found.append(
            f"The season holds {season.level} reflectance but the network was trained on "
            f"{checkpoint.levels[0]} reflectance: through haze the same crop looks another. Build "
            "the cube from the same product level, or fine-tune on this one."
        )
    return found


def _date_mismatches(season: Season, checkpoint: CheckpointInfo) -> list[str]:
    found = []
    if checkpoint.config.positions == "days":
        if checkpoint.trained_days is not None:
            first, last = checkpoint.trained_days
            low, high = int(season.days.min()), int(season.days.max())
            if low < first - _DAYS_SLACK or high > last + _DAYS_SLACK:
                found.append(
                    f"The season's dates are days {low} to {high} of the season, but the network "
                    f"was trained on days {first} to {last}; it has not seen that part of the "
                    "year. Expect errors, or fine-tune on a whole season."
                )
            elif high < last - _MISSING * (last - first) or low > first + _MISSING * (last - first):
                found.append(
                    f"The season's dates are days {low} to {high} of the season, a part of days "
                    f"{first} to {last} that the network was trained on; crops that differ only "
                    "in the rest of the year cannot be told apart. Add the missing dates to the "
                    "cube, or fine-tune on a season that is as short."
                )
    else:
        trained = sorted(
            {
                int(cube["dates"])
                for cube in checkpoint.provenance.get("cubes", ())
                if isinstance(cube, Mapping) and "dates" in cube
            }
        )
        if trained and len(season.time) not in trained:
            found.append(
                f"The season has {len(season.time)} dates but the network was trained on "
                f"{', '.join(map(str, trained))}, and it knows dates by their number only "
                "(positions: index): the same number means another day here. Build a composite "
                "with as many dates, or use a network that counts days."
            )
    start = checkpoint.season_start
    wanted = checkpoint.season_start_at(footprint(season.geobox).centroid.y)
    if wanted and wanted != start and wanted != season.name[5:]:
        found.append(
            f"The season starts on {season.name[5:]} (month-day), and the network counts days from "
            f"{start} on the other hemisphere, where summer is half a year off. Build the cube "
            f"with --season-start {wanted}, or fine-tune on fields of this one."
        )
    elif wanted and wanted != season.name[5:]:
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
