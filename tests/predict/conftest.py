"""A small cube on a ragged grid and a small classifier with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon

from stcln_geo.cube.store import (
    Layout,
    Season,
    create_season,
    finish_season,
    open_season,
    shards_of,
    write_shard,
)
from stcln_geo.grid import Lattice, Window, snapped_geobox
from stcln_geo.legend import Legend
from stcln_geo.model.checkpoint import save_checkpoint
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.stcln import Stcln

CRS = "EPSG:32631"
BANDS = ("blue", "green", "red", "nir")
LATTICE = Lattice(window=16, halo=4)
SEASON = "2018-09-01"
EXTENT = Window(-560_033, 50_017, 101, 75)
"""Bounding box of the region (absolute pixels); meets no line of the lattice."""


def region_polygon() -> Polygon:
    """A polygon that fills most of EXTENT and touches all its sides."""
    top, left = -EXTENT.row * 10.0, EXTENT.col * 10.0
    bottom, right = top - EXTENT.height * 10.0, left + EXTENT.width * 10.0
    return Polygon(
        [(left, top), (right, top), (right, bottom + 203), (right - 177, bottom), (left, bottom)]
    )


def make_season(
    path: Path, aoi: Polygon, *, bands: tuple[str, ...] = BANDS, chunk: int = 32
) -> Season:
    """Write a cube whose pixels depend on their absolute place only."""
    geobox = snapped_geobox(aoi, crs=CRS, resolution=10, lattice=LATTICE)
    days = np.array([20, 55, 110, 140, 200, 232, 260, 301])
    building = create_season(
        path,
        SEASON,
        geobox=geobox,
        time=np.datetime64(SEASON, "s") + days * np.timedelta64(86400, "s"),
        bands=bands,
        layout=Layout(chunk=chunk, shard=2 * chunk),
        aoi=aoi,
        lattice=LATTICE,
    )
    for shard in shards_of(building):
        place = shard.shift(building.window.row, building.window.col)
        reflectance, valid = pixels_at(place, len(days), len(bands))
        write_shard(building, shard, reflectance=reflectance, valid=valid)
    finish_season(path, SEASON)
    return open_season(path)


def pixels_at(place: Window, dates: int, bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Return reflectance (T, C, H, W) int16 and valid (T, H, W) of absolute pixels."""
    row = np.arange(place.row, place.row + place.height)[:, None]
    col = np.arange(place.col, place.col + place.width)[None, :]
    field = (row // 13 * 31 + col // 11 * 17) % 7
    noise = (row * 7919 + col * 104_729) % 97
    planes = [
        [1500 + 400 * field + 30 * noise + 250 * band - 90 * date for band in range(bands)]
        for date in range(dates)
    ]
    reflectance = np.array(planes).astype(np.int16)
    # Orbits: one date covers the west only, another the east; clouds come in squares.
    valid = np.stack([(row // 9 * 5 + col // 8 * 3 + 11 * date) % 13 > 4 for date in range(dates)])
    valid[1] &= col < EXTENT.col + 30
    valid[2] &= col >= EXTENT.col + 40
    # A place that no date sees, and one that a single date sees.
    never = (row - EXTENT.row >= 40) & (row - EXTENT.row < 47) & (col - EXTENT.col < 9)
    valid &= ~never
    once = (row - EXTENT.row >= 70) & (row - EXTENT.row < 75) & (col - EXTENT.col >= 50)
    valid &= ~once
    valid[4] |= once
    reflectance[~np.broadcast_to(valid[:, None], reflectance.shape)] = -32768
    return reflectance, valid


def make_network(classes: int, *, seed: int = 3, mode: str = "geo") -> Stcln:
    """Return a tiny classifier whose random weights tell all classes apart."""
    torch.manual_seed(seed)
    config = StclnConfig(
        bands=("nir", "red", "green"),  # not the cube's order, and fewer
        classes=classes,
        widths=(4, 16),
        layers=1,
        heads=2,
        feedforward=16,
        mode=mode,
    )
    network = Stcln(config).eval()
    with torch.no_grad():
        network.encoder.set_normalisation([0.3] * 3, [0.15] * 3)
        network.attention.gate.fill_(0.7)
        network.classifier.weight.mul_(12.0)
        # Centre the logits, so that every class wins somewhere.
        numbers, valid = pixels_at(Window(EXTENT.row, EXTENT.col, 48, 48), 8, 3)
        images = torch.from_numpy(numbers.astype(np.float32) * 1e-4)[None]
        logits = network(images, torch.arange(8)[None] * 40, torch.from_numpy(valid)[None])
        network.classifier.bias.sub_(logits.mean((0, 2, 3)))
    return network


@dataclass(frozen=True, kw_only=True)
class World:
    """What predictions need, and the tools that made it."""

    season: Season
    checkpoint: Path
    legend: Legend
    lattice: Lattice = LATTICE
    extent: Window = EXTENT
    crs: str = CRS
    bands: tuple[str, ...] = BANDS

    @property
    def cube(self) -> Path:
        return self.season.cube

    make_season = staticmethod(make_season)
    make_network = staticmethod(make_network)
    pixels_at = staticmethod(pixels_at)
    region_polygon = staticmethod(region_polygon)

    def save(self, path: Path, module: torch.nn.Module, **changes: Any) -> Path:
        """Save a network as the world's checkpoint is saved, but for the changes."""
        options: dict[str, Any] = {
            "legend": self.legend.to_json(),
            "chip": LATTICE.window,
            "halo": LATTICE.halo,
            "trained_days": (10, 320),
            "season_start": "09-01",
        }
        return save_checkpoint(path, module, **{**options, **changes})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    legend = Legend.from_rows(
        [
            {"value": value, "name": value.title()}
            for value in ("wheat", "maïs", "beet & co", "oat")
        ],
        source="test",
    )
    path = folder / "network.safetensors"
    made = World(
        season=make_season(folder / "cube.zarr", region_polygon()), checkpoint=path, legend=legend
    )
    made.save(path, make_network(len(legend)))
    return made
