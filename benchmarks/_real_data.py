"""Cubes and stacks of the real data beside the repository, for ``real_few_fields.py``.

Which fields and samples take part, and on which side of which split, is decided here, by rules
that look at numbers of pixels, dates and fields alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

BANDS = ("blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "swir16", "swir22")
"""What Flanders, Belgium and France all have."""
_CODES = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12")
_NODATA = 65535

SOURCES = {"flanders": "flanders_2019", "france": "france_2023_dekads.geoparquet"}
BELGIUM = "belgium_2021_monthly_100x100.nc"

FOLDS = 3
"""Parts of the Flanders fields; each is the test part once."""
MIN_PIXELS = 10
"""Smaller fields of Flanders are used neither to train nor to test."""
MIN_DATES = 6
"""Clear dekads below which a sample of France is left out."""
MIN_SAMPLES = 8
"""Samples that a class of France needs on either side."""
SIDES = {"north": ("831861fffffffff",), "south": ("831849fffffffff", "83184dfffffffff")}
"""The values of ``h3_l3_cell``: one cell in the north, two neighbours in the south."""
DIRECTIONS = (("north", "south"), ("south", "north"))


def missing_data(data: Path, study: str) -> list[str]:
    """Return what a study needs of the data and is absent."""
    return [name for name in (SOURCES[study], BELGIUM) if not (data / name).exists()]


def flanders_parts(folds: int = FOLDS) -> tuple[str, ...]:
    """Return the names of the cubes that hold one fold's fields as test fields."""
    return tuple(f"flanders-{fold}" for fold in range(folds))


def france_parts() -> tuple[str, ...]:
    """Return the names of the stacks, by where is trained and where is tested."""
    return tuple(f"france-{train}-to-{test}" for train, test in DIRECTIONS)


def prepare(data: Path, study: str, folder: Path) -> None:
    """Write the cubes and stacks of a study into a folder, which appears when it is whole."""
    made = folder.with_name(f"{folder.name}.building")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    make = {"flanders": make_flanders, "france": make_france}[study]
    make(data / SOURCES[study], made)
    make_belgium(data / BELGIUM, made / "belgium.zarr")
    made.rename(folder)


def make_flanders(source: Path, folder: Path) -> None:
    """Build the cube of one season, burn the parcels, and copy it once for each fold."""
    import rasterio

    from stcln_geo.catalog import load_catalog
    from stcln_geo.cube.build import build_cube
    from stcln_geo.cube.labels import burn_labels
    from stcln_geo.cube.plan import CubeSpec, plan_cube
    from stcln_geo.cube.search import search_items
    from stcln_geo.cube.store import open_season, write_split
    from stcln_geo.data.split import check_labelled
    from stcln_geo.grid import Window

    with rasterio.open(source / "labels.tif") as labels:
        size = labels.transform.a
        top, left = -labels.transform.f / size, labels.transform.c / size
        window = Window(round(top), round(left), labels.height, labels.width)
    items = search_items(load_catalog(source), time_range="2018-09-01/2019-08-31")
    first, *others = (folder / f"{name}.zarr" for name in flanders_parts())
    build_cube(plan_cube(items, spec=CubeSpec(bands=BANDS), window=window), first)
    burn_labels(first, source / "parcels.gpkg", column="crop_code")
    for other in others:
        shutil.copytree(first, other)
    for fold, cube in enumerate((first, *others)):
        season = open_season(cube, mode="r+")
        fields, _ = check_labelled(season)
        write_split(season, split_fold(deal_folds(fields.code, fields.pixels), fold))


def deal_folds(code: np.ndarray, pixels: np.ndarray, *, folds: int = FOLDS) -> np.ndarray:
    """Deal out the fields of each class one by one, in a random order that is always the same.

    Returns
    -------
    (F,) int64, the fold of each field; -1 of fields that are too small.
    """
    found = np.full(len(code), -1)
    for value in np.unique(code):
        members = np.flatnonzero((code == value) & (pixels >= MIN_PIXELS))
        order = np.random.default_rng([0, int(value)]).permutation(members)
        found[order] = np.arange(len(order)) % folds
    return found


def split_fold(fold_of: np.ndarray, fold: int) -> np.ndarray:
    """Return the split with one fold to test on: (F,) uint8 as in ``SPLITS``."""
    from stcln_geo.cube.contract import SPLITS

    split = np.where(fold_of == fold, SPLITS["test"], SPLITS["train"])
    return np.where(fold_of < 0, SPLITS["unused"], split).astype(np.uint8)


def make_belgium(source: Path, path: Path) -> None:
    """Write the months of one season that have a pixel as a cube; it has no labels."""
    import xarray as xr

    from stcln_geo import write_cube

    with xr.open_dataset(source) as opened:
        images = opened.rename({"t": "time"}).sel(time=slice(None, "2021-08-31")).load()
    images = images.rio.write_crs(images["crs"].attrs["crs_wkt"])
    bands = {f"S2-L2A-{code}": band for code, band in zip(_CODES, BANDS, strict=True)}
    seen = (images[next(iter(bands))] != _NODATA).any(("y", "x"))
    write_cube(images[list(bands)].isel(time=seen.to_numpy()), path, bands=bands, nodata=_NODATA)


def make_france(source: Path, folder: Path) -> None:
    """Write the pixel series as a stack of sites of one pixel, once for each direction."""
    from stcln_geo.data.split_labels import SplitSpec, split_labels

    first, second = (folder / f"{name}.zarr" for name in france_parts())
    _write_france(source, first)
    shutil.copytree(first, second)
    for path, (train, test) in zip((first, second), DIRECTIONS, strict=True):
        folds = {"train": _folds_of(train), "test": _folds_of(test)}
        split_labels(path, SplitSpec(by="fold", folds=folds))


def _folds_of(side: str) -> tuple[int, ...]:
    cells = sorted(cell for cells in SIDES.values() for cell in cells)
    return tuple(1 + cells.index(cell) for cell in SIDES[side])


def _write_france(source: Path, path: Path) -> None:
    """Write all samples with enough clear dekads; a fold is a cell.

    A sample lies in one pixel, and nothing is known of its neighbours: so it is a site of 1 x 1
    px, and what a chip shows beyond it is invalid. Samples of rare classes have no label.
    """
    import geopandas
    from pyproj import Transformer

    from stcln_geo.cube.stack_store import create_stack, finish_stack, write_sites
    from stcln_geo.legend import UNLABELLED, Legend

    columns = [f"S2-L2A-{code}" for code in _CODES]
    rows = geopandas.read_parquet(source)
    season = (rows["timestamp"] >= "2022-09-01") & (rows["timestamp"] < "2023-09-01")
    rows = rows[season & (rows[columns] != _NODATA).all(axis=1)]
    rows = rows.sort_values(["sample_id", "timestamp"])
    samples = [
        (str(name), part)
        for name, part in rows.groupby("sample_id", observed=True, sort=True)
        if len(part) >= MIN_DATES
    ]
    crop = np.array([str(part["ewoc_code"].iloc[0]) for _, part in samples])
    cell = np.array([str(part["h3_l3_cell"].iloc[0]) for _, part in samples])
    classes = common_classes(crop, [np.isin(cell, cells) for cells in SIDES.values()])

    count, most = len(samples), max(len(part) for _, part in samples)
    time = np.full((count, most), np.datetime64("NaT"), dtype="datetime64[s]")
    values = np.full((count, most, len(BANDS), 1, 1), -32768, dtype=np.int16)
    valid = np.zeros((count, most, 1, 1), dtype=bool)
    for site, (_, part) in enumerate(samples):
        time[site, : len(part)] = part["timestamp"].to_numpy()
        values[site, : len(part), :, 0, 0] = part[columns].to_numpy()
        valid[site, : len(part)] = True
    labels = np.array([classes.index(one) if one in classes else UNLABELLED for one in crop])
    number = np.where(labels == UNLABELLED, 0, np.arange(1, count + 1))

    # The pixel of 10 m that a sample's point lies in.
    crs = "EPSG:32630"
    point = [part[["lon", "lat"]].iloc[0].to_numpy() for _, part in samples]
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(*np.transpose(point))
    corner = zip(np.floor(x / 10) * 10, np.ceil(y / 10) * 10, strict=True)
    stack = create_stack(
        path, "2022-09-01",
        site_id=[name for name, _ in samples],
        crs=[crs] * count,
        transform=np.array([[10, 0, left, 0, -10, top] for left, top in corner]),
        shape_yx=(1, 1), time=time, bands=BANDS,
        fold=1 + np.unique(cell, return_inverse=True)[1],
        legend=Legend.from_values(classes), with_parcels=True,
        site_attrs={"h3_l3_cell": cell.astype(np.dtypes.StringDType())},
    )  # fmt: skip
    for shard in stack.shards:
        part = slice(shard.start, shard.stop)
        write_sites(
            stack, shard.start, reflectance=values[part], valid=valid[part],
            labels=labels[part, None, None].astype(np.uint8),
            parcels=number[part, None, None].astype(np.int32),
        )  # fmt: skip
    finish_stack(path, stack.name)


def common_classes(
    crop: np.ndarray, sides: Sequence[np.ndarray], *, least: int = MIN_SAMPLES
) -> list[str]:
    """Return the classes, sorted, that have enough samples on each of the sides, (N,) bool."""
    names = [str(name) for name in np.unique(crop)]
    return [
        name for name in names if all(int(((crop == name) & side).sum()) >= least for side in sides)
    ]
