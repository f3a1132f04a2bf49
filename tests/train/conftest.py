"""A small cube whose classes differ in the time of their green peak, with clouds and fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from stcln_geo.data.chips import ChipDataset

BANDS = ("green", "red", "nir", "swir16")
ORIGIN = (-123457, 51234)
"""Absolute row and column of the first pixel: no multiple of any window."""


def make_cube(
    path: Path,
    *,
    shape_yx: tuple[int, int] = (86, 101),
    dates: int = 8,
    classes: int = 3,
    field: int = 11,
    seed: int = 0,
    season: str = "2018-09-01",
    bands: tuple[str, ...] = BANDS,
    chunk: int = 32,
    split: bool = True,
    bare: bool = False,
    origin: tuple[int, int] = ORIGIN,
    level: str = "surface",
    crs: str = "EPSG:32631",
) -> Path:
    """Write a cube of square fields, two pixels apart, one class each; ``bare`` is never green."""
    from shapely.geometry import box

    from stcln_geo.cube.store import (
        FieldTable,
        Layout,
        create_season,
        finish_season,
        open_season,
        shards_of,
        write_fields,
        write_shard,
    )
    from stcln_geo.data.split import split_fields
    from stcln_geo.grid import Lattice, Window, geobox_from_window
    from stcln_geo.legend import Legend

    generator = np.random.default_rng(seed)
    height, width = shape_yx
    geobox = geobox_from_window(Window(*origin, *shape_yx), crs=crs, resolution=10)
    time = np.datetime64(season) + np.sort(generator.choice(300, dates, replace=False))

    step = field + 2
    parcels = np.zeros(shape_yx, dtype=np.int32)
    codes = []
    for row in range(0, height - field + 1, step):
        for col in range(0, width - field + 1, step):
            codes.append(len(codes) % classes)
            parcels[row : row + field, col : col + field] = len(codes)
    code = np.array(codes, dtype=np.uint8)
    labels = np.concatenate([[255], code]).astype(np.uint8)[parcels]

    days = (time - np.datetime64(season)).astype(int)
    peaks = 60 + 180 * np.arange(classes) / max(classes - 1, 1)
    green = 0.2 + 0.6 * np.exp(-(((days[:, None] - peaks) / 60) ** 2))
    green = np.concatenate([green, np.full((dates, 1), 0.45)], axis=1)
    ndvi = green[:, np.where(labels == 255, classes, labels)] * (0.2 if bare else 1.0)
    red = 0.12 * (1 - ndvi) + 0.02
    planes = {"red": red, "nir": red * (1 + ndvi) / (1 - ndvi), "green": 0.08 + 0 * ndvi}
    planes["swir16"] = 0.3 - 0.2 * ndvi
    values = np.stack([planes.get(band, planes["swir16"]) for band in bands], axis=1)
    values = values + generator.normal(0, 0.01, values.shape)
    reflectance = np.clip(np.round(values / 1e-4), -2000, 20000).astype(np.int16)

    valid = generator.random((dates, -(-height // 8), -(-width // 8))) > 0.25
    valid = valid.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    valid[dates // 2] = False
    reflectance[~valid.repeat(len(bands), 0).reshape(dates, len(bands), height, width)] = 9000

    bounds = geobox.boundingbox
    opened = create_season(
        path, season, geobox=geobox, time=time, bands=bands, aoi=box(*bounds.bbox),
        layout=Layout(chunk=chunk, shard=2 * chunk), lattice=Lattice(), attrs={"level": level},
    )  # fmt: skip
    for window in shards_of(opened):
        write_shard(
            opened,
            window,
            reflectance=reflectance[:, :, window.rows, window.cols],
            valid=valid[:, window.rows, window.cols],
        )
    finish_season(path, season)
    opened = open_season(path, season, mode="r+")
    pixels = np.bincount(parcels.reshape(-1))[1:].astype(np.int32)
    number = np.arange(1, len(code) + 1, dtype=np.int32)
    table = FieldTable(number=number, code=code, pixels=pixels, split=np.zeros_like(code))
    if split:
        table = FieldTable(number=number, code=code, pixels=pixels, split=split_fields(table))
    legend = Legend.from_values([f"crop {value}" for value in range(classes)])
    write_fields(opened, labels=labels, parcels=parcels, fields=table, legend=legend)
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Same sums in the same order on every machine; no threads that wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled and split cube of 86 x 101 px; not to be changed."""
    return make_cube(tmp_path_factory.mktemp("cube") / "field.zarr")


@pytest.fixture(scope="session")
def small_cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled and split cube of 59 x 66 px with 20 fields; not to be changed."""
    return make_cube(tmp_path_factory.mktemp("cube") / "small.zarr", shape_yx=(59, 66), dates=6)


@pytest.fixture(scope="session")
def dataset(small_cube: Path) -> ChipDataset:
    """All chips of ``small_cube``, with the targets of all its fields."""
    from stcln_geo.cube.store import open_season
    from stcln_geo.data.chips import ChipDataset, plan_chips

    season = open_season(small_cube)
    assert season.fields is not None
    return ChipDataset(
        [season], plan_chips(season, chip=16), bands=season.bands,
        wanted=[season.fields.split >= 0],
    )  # fmt: skip


@pytest.fixture
def new_cube(tmp_path: Path) -> Callable[..., Path]:
    """Make a cube of one's own, as small as ``small_cube`` unless told otherwise, to change."""

    def make(name: str = "own", **options: object) -> Path:
        sizes = {"shape_yx": (59, 66), "dates": 6}
        return make_cube(tmp_path / f"{name}.zarr", **{**sizes, **options})

    return make
