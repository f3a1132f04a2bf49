"""Labelled stacks for tests: squares of a cube, cut out and written as sites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stcln_geo.cube.stack import Stack, StackLayout, open_stack
from stcln_geo.cube.stack_fields import write_stack_split
from stcln_geo.cube.stack_store import create_stack, finish_stack, write_sites
from stcln_geo.cube.store import Season, open_season
from stcln_geo.grid import Window, crop_geobox
from stcln_geo.legend import UNLABELLED, Legend

RUBBISH = 7777
"""What reflectance holds on dates that a site does not have."""


def whole_fields(season: Season, window: Window) -> np.ndarray:
    """Return the numbers of the fields that lie wholly in a window."""
    assert season.fields is not None
    inside = np.bincount(
        season.parcels[window.rows, window.cols].ravel(),  # type: ignore[index]
        minlength=len(season.fields) + 1,
    )
    number = season.fields.number
    return number[inside[number] == season.fields.pixels]


def cut_stack(
    cube: Path,
    path: Path,
    places: Sequence[tuple[int, int]],
    *,
    shape_yx: tuple[int, int],
    fold: Sequence[int] | None = None,
    background: bool = False,
    void: bool = False,
    parcels: bool = True,
    split: bool = True,
    thin: bool = False,
    crs: Sequence[str] | None = None,
) -> Path:
    """Cut sites out of a labelled cube, with the fields that lie wholly in one, and their split.

    Each site has the dates on which one of its pixels is valid.

    Parameters
    ----------
    places
        Row and column of each site's first pixel in the cube.
    background
        Pixels in no field are of one more class, ``background``; else unlabelled.
    void
        The first row of each site is of an ignored class.
    thin
        Sites lose none, one or two of their dates, in turn.
    """
    season = open_season(cube)
    assert season.fields is not None
    assert season.legend is not None
    sites = [Window(*place, *shape_yx) for place in places]
    seen = [
        np.flatnonzero(season.valid[:, site.rows, site.cols].any(axis=(1, 2))) for site in sites
    ]
    if thin:
        seen = [dates[place % 3 :] for place, dates in enumerate(seen)]
    most = max(len(dates) for dates in seen)
    time = np.full((len(sites), most), np.datetime64("NaT"), dtype="datetime64[s]")
    bands = len(season.bands)
    values = np.full((len(sites), most, bands, *shape_yx), RUBBISH, dtype=np.int16)
    valid = np.zeros((len(sites), most, *shape_yx), dtype=bool)
    labels = np.full((len(sites), *shape_yx), UNLABELLED, dtype=np.uint8)
    numbers = np.zeros((len(sites), *shape_yx), dtype=np.int32)
    classes = len(season.legend)
    for place, (site, dates) in enumerate(zip(sites, seen, strict=True)):
        time[place, : len(dates)] = season.time[dates]
        values[place, : len(dates)] = season.reflectance[:, :, site.rows, site.cols][dates]
        valid[place, : len(dates)] = season.valid[:, site.rows, site.cols][dates]
        there = season.parcels[site.rows, site.cols]  # type: ignore[index]
        kept = np.isin(there, whole_fields(season, site))
        numbers[place] = np.where(kept, there, 0)
        known = season.labels[site.rows, site.cols]  # type: ignore[index]
        labels[place] = np.where(kept, known, classes if background else UNLABELLED)
    rows: list[dict[str, object]] = [{"value": entry.value} for entry in season.legend.classes]
    if background:
        rows.append({"value": "background"})
    if void:
        rows.append({"value": "void", "ignored": True})
        labels[:, 0] = len(rows) - 1
    made = create_stack(
        path, season.name,
        site_id=[f"s{place}" for place in range(len(sites))],
        crs=crs or [str(season.geobox.crs)] * len(sites),
        transform=np.array([tuple(crop_geobox(season.geobox, s).affine)[:6] for s in sites]),
        shape_yx=shape_yx, time=time, bands=season.bands,
        layout=StackLayout(chunk=16, sites=2),
        fold=None if fold is None else np.array(fold),
        legend=Legend.from_rows(rows, source="test"), with_parcels=parcels,
    )  # fmt: skip
    for shard in made.shards:
        part = slice(shard.start, shard.stop)
        write_sites(
            made, shard.start, reflectance=values[part], valid=valid[part], labels=labels[part],
            parcels=numbers[part],
        )  # fmt: skip
    finish_stack(path, season.name)
    if split:
        written = open_stack(path, mode="r+")
        write_stack_split(written, split_of(written, season))
    return path


def split_of(stack: Stack, season: Season) -> np.ndarray:
    """Return the split that the same fields have in the cube; what lies in no field has none."""
    assert stack.fields is not None
    assert season.fields is not None
    known = np.zeros(int(season.fields.number.max()) + 1, dtype=np.uint8)
    known[season.fields.number] = season.fields.split
    return known[stack.fields.number]
