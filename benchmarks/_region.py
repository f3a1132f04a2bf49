"""Regions to map: cubes tiled with one simulated block, and networks with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BANDS = ("blue", "green", "red", "nir")
CLASSES = 8
CHUNK = 64
SHARD = 512
"""Side of a storage shard, and of the block that is tiled (pixels)."""
CORNER = (-562_500, 57_300)
"""Row and column of a cube's first pixel (absolute pixels)."""
CRS = "EPSG:32631"


@dataclass(frozen=True)
class Block:
    """A simulated square of a season, as the cube builder wrote it."""

    season: str
    time: np.ndarray
    """(T,) datetime64."""
    reflectance: np.ndarray
    """(T, C, SHARD, SHARD) int16."""
    valid: np.ndarray
    """(T, SHARD, SHARD) bool."""


def simulate_block(folder: Path, *, dates: int) -> Block:
    """Simulate an archive of one block and build its cube."""
    from stcln_geo.catalog import load_catalog
    from stcln_geo.cube.build import build_cube
    from stcln_geo.cube.plan import CubeSpec, plan_cube
    from stcln_geo.cube.search import search_items
    from stcln_geo.cube.store import open_season
    from stcln_geo.grid import Window
    from stcln_geo.simulate import SimulationSpec, simulate_archive

    spec = SimulationSpec(width=SHARD, height=SHARD, dates=dates, cloud_fraction=0.2)
    made = simulate_archive(folder / "archive", spec)
    plan = plan_cube(
        search_items(load_catalog(str(made.catalog))),
        spec=CubeSpec(bands=BANDS),
        window=Window(spec.window.row, spec.window.col, SHARD, SHARD),
    )
    season = open_season(build_cube(plan, folder / "block.zarr").path)
    return Block(
        season=season.name,
        time=season.time,
        reflectance=season.reflectance[:],
        valid=season.valid[:],
    )


def tile_cube(
    path: Path, block: Block, *, side: int, filled: Sequence[tuple[int, int]] | None = None
) -> Path:
    """Write a square cube that repeats a block.

    Parameters
    ----------
    side
        Of the cube (pixels).
    filled
        Row and column of the storage shards that hold the block; the others have no chunk at
        all. None fills all.
    """
    from shapely.geometry import box

    from stcln_geo.cube.store import Layout, create_season, finish_season, shards_of, write_shard
    from stcln_geo.grid import Window, geobox_from_window

    geobox = geobox_from_window(Window(*CORNER, side, side), crs=CRS, resolution=10)
    building = create_season(
        path, block.season, geobox=geobox, time=block.time, bands=BANDS,
        layout=Layout(chunk=CHUNK, shard=SHARD), aoi=box(*geobox.boundingbox.bbox),
    )  # fmt: skip
    wanted = None if filled is None else set(filled)
    for shard in shards_of(building):
        if wanted is None or (shard.row // SHARD, shard.col // SHARD) in wanted:
            write_shard(
                building,
                shard,
                reflectance=block.reflectance[..., : shard.height, : shard.width],
                valid=block.valid[:, : shard.height, : shard.width],
            )
    finish_season(path, block.season)
    return path


def save_network(path: Path, block: Block, *, preset: str, window: int, halo: int) -> Path:
    """Write a checkpoint with random weights, whose classes all occur on the block."""
    import torch

    from stcln_geo.cube.contract import days_since
    from stcln_geo.legend import Legend
    from stcln_geo.model.checkpoint import save_checkpoint
    from stcln_geo.model.config import StclnConfig
    from stcln_geo.model.stcln import Stcln

    torch.manual_seed(0)
    network = Stcln(StclnConfig.preset(preset, bands=BANDS, classes=CLASSES)).eval()
    days = days_since(block.time, block.season)
    part = np.s_[..., :window, :window]
    with torch.inference_mode():
        network.encoder.set_normalisation([0.15] * len(BANDS), [0.1] * len(BANDS))
        network.attention.gate.fill_(0.5)
        logits = network(
            torch.from_numpy(block.reflectance[part].astype(np.float32) * 1e-4)[None],
            torch.from_numpy(days)[None],
            torch.from_numpy(block.valid[part])[None],
        )
        # Equal on average, and apart enough for one to win.
        network.classifier.weight.mul_(2.0 / logits.std())
        network.classifier.bias.copy_(network.classifier.bias - logits.mean((0, 2, 3)))
    legend = Legend.from_values([f"class {code}" for code in range(CLASSES)])
    return save_checkpoint(
        path, network, legend=legend.to_json(), chip=window, halo=halo,
        trained_days=(int(days[0]), int(days[-1])), season_start=block.season[5:],
    )  # fmt: skip
