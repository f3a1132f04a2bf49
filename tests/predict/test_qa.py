"""Which pixels have a class, why others have none, and what masks leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rioxarray  # noqa: F401 -- registers the accessor
import shapely
import xarray
from affine import Affine
from rasterio.warp import transform as transform_points

from stcln_geo.cli.main import invoke
from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.grid import Window
from stcln_geo.predict import Prediction, PredictSpec, predict_region
from stcln_geo.predict.mask import open_mask
from stcln_geo.predict.qa import QA_LEGEND, Quality, quality_of, reasons

CPU = {"device": "cpu", "precision": "float32", "seam_audit": 0}


def read(product: Prediction, name: str) -> np.ndarray:
    with rasterio.open(product.out / f"{name}.tif") as source:
        return source.read(1)


def clear_dates(world: Any, extent: Window) -> np.ndarray:
    """Count the valid dates of each pixel, straight from the cube's array."""
    at = extent.relative_to(world.season.window)
    return world.season.valid[:][:, at.rows, at.cols].sum(0)


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raster of cropland in degrees, coarser than the cube, covering a part of it."""
    path = tmp_path_factory.mktemp("mask") / "crop.tif"
    values = (np.indices((30, 37)).sum(0) // 5 % 3).astype(np.uint8)
    values[:6, :9] = 200
    with rasterio.open(
        path, "w", driver="GTiff", height=30, width=37, count=1, dtype="uint8", crs="EPSG:4326",
        transform=Affine(0.0002, 0, 3.0035, 0, -0.0002, 50.5520), nodata=200,
    ) as target:  # fmt: skip
        target.write(values, 1)
    return path


def mapped_by_hand(path: Path, extent: Window, values: tuple[int, ...] | None) -> np.ndarray:
    """Look up the mask at each pixel's centre."""
    cols, rows = np.meshgrid(np.arange(extent.width), np.arange(extent.height))
    x = (extent.col + cols + 0.5) * 10
    y = -(extent.row + rows + 0.5) * 10
    lon, lat = transform_points("EPSG:32631", "EPSG:4326", x.ravel(), y.ravel())
    with rasterio.open(path) as source:
        band = source.read(1)
        found = np.zeros(x.size, dtype=bool)
        for index, (east, north) in enumerate(zip(lon, lat, strict=True)):
            col, row = ~source.transform * (east, north)
            if 0 <= row < source.height and 0 <= col < source.width:
                value = band[int(row), int(col)]
                wanted = value != 0 if values is None else value in values
                found[index] = value != 200 and wanted
    return found.reshape(extent.shape_yx)


def test_codes_are_fixed() -> None:
    assert {entry.name: int(entry.value) for entry in QA_LEGEND.classes} == {
        "mapped": 0, "outside the region": 1, "no clear date": 2, "too few clear dates": 3,
        "skipped by the mask": 4, "failed shard": 5, "merged into its surroundings": 6,
    }  # fmt: skip
    assert len(QA_LEGEND) == len(Quality)


def test_the_first_reason_that_holds_is_given() -> None:
    counts = np.array([[0, 1, 2, 3, 4]])
    inside = np.array([[True, True, True, True, False]])
    kept = np.array([[True, True, True, False, False]])
    found = quality_of(inside, kept, counts, min_clear=2)
    assert found.tolist() == [[2, 3, 0, 4, 1]]
    assert quality_of(inside, None, counts, min_clear=2).tolist() == [[2, 3, 0, 0, 1]]
    assert found.dtype == np.uint8


def test_reasons_are_those_that_occur() -> None:
    assert reasons({0: 5, 1: 0, 3: 2}) == {"mapped": 5, "too few clear dates": 2}


def test_more_clear_dates_than_a_byte_holds_are_not_taken_for_none(
    world: Any, tmp_path: Path
) -> None:
    dates = np.array([[0, 1, 253, 254, 255, 256, 300]])  # of 300
    clear = np.arange(300)[:, None, None] < np.broadcast_to(dates, (6, 7))
    numbers = np.where(clear, 1500 + np.arange(300, dtype=np.int16)[:, None, None], -32768)
    dataset = xarray.Dataset(
        {
            band: (("time", "y", "x"), numbers.astype(np.int16), {"_FillValue": -32768})
            for band in world.bands
        },
        coords={
            "time": np.datetime64("2018-09-01", "ns") + np.arange(300) * np.timedelta64(1, "D"),
            "y": 5_600_300 - 10 * (np.arange(6) + 0.5),
            "x": 500_200 + 10 * (np.arange(7) + 0.5),
        },
    ).rio.write_crs(world.crs)
    region = shapely.box(500_200, 5_600_240, 500_270, 5_600_300)

    product = predict_region(
        dataset, world.checkpoint, tmp_path, region=region, spec=PredictSpec(**CPU)
    )

    seen = read(product, "observations")
    expected = np.broadcast_to(np.minimum(dates, 254), (6, 7))
    assert np.array_equal(seen, expected), "255 says that a pixel was not looked at"
    with rasterio.open(product.out / "observations.tif") as source:
        assert source.nodata == 255
    assert np.array_equal(read(product, "qa") == Quality.NO_DATA, expected == 0)


@pytest.mark.parametrize("shard_size", [40, 256])
def test_every_pixel_has_a_class_or_a_reason(world: Any, tmp_path: Path, shard_size: int) -> None:
    part = shapely.Polygon([(500_200, 5_600_300), (500_900, 5_600_200), (500_300, 5_599_400)])
    spec = PredictSpec(**CPU, min_clear=4, shard_size=shard_size)
    product = predict_region(world.cube, world.checkpoint, tmp_path, region=part, spec=spec)
    classes, quality = read(product, "classes"), read(product, "qa")
    counts, seen = clear_dates(world, _extent(product)), read(product, "observations")
    assert np.array_equal(classes == 255, quality != 0)
    assert np.array_equal(seen == 255, quality == Quality.OUTSIDE)
    inside = seen != 255
    assert np.array_equal(seen[inside], counts[inside])
    expected = np.select([counts == 0, counts < 4], [2, 3], 0)
    assert np.array_equal(quality[inside], expected[inside])
    assert {0, 1, 2, 3} == set(np.unique(quality).tolist())
    assert product.quality["too few clear dates"] == (quality == 3).sum()
    assert sum(product.quality.values()) == quality.size


def _extent(product: Prediction) -> Window:
    with rasterio.open(product.classes) as source:
        at = source.transform
        return Window(round(-at.f / 10), round(at.c / 10), *source.shape)


@pytest.mark.parametrize("values", [None, (2,)], ids=["any", "2"])
def test_a_mask_takes_the_value_at_each_centre_in_any_shard(
    world: Any, mask_file: Path, values: tuple[int, ...] | None
) -> None:
    extent = world.extent
    by_hand = mapped_by_hand(mask_file, extent, values)
    assert 0.1 < by_hand.mean() < 0.9
    mask = open_mask(mask_file, values)
    assert np.array_equal(mask.read(extent, crs=world.crs, resolution=10), by_hand)
    part = Window(extent.row + 13, extent.col + 7, 29, 41)
    at = part.relative_to(extent)
    found = mask.read(part, crs=world.crs, resolution=10)
    assert np.array_equal(found, by_hand[at.rows, at.cols])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32"])
def test_beyond_a_mask_without_nodata_nothing_is_mapped(tmp_path: Path, dtype: str) -> None:
    values = (np.indices((21, 33)).sum(0) // 5 % 3).astype(dtype)
    path = tmp_path / "mask.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=21, width=33, count=1, dtype=dtype, crs="EPSG:32631",
        transform=Affine(10, 0, 500_000, 0, -10, 5_600_000),
    ) as target:  # fmt: skip
        target.write(values, 1)
    found = open_mask(path, (0,)).read(
        Window(-560_007, 49_987, 40, 60), crs="EPSG:32631", resolution=10
    )
    expected = np.zeros((40, 60), dtype=bool)
    expected[7:28, 13:46] = values == 0
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("blend", [False, True])
def test_a_mask_leaves_the_other_pixels_as_they_are(
    world: Any, mask_file: Path, tmp_path: Path, blend: bool
) -> None:
    spec = {**CPU, "blend": blend, "shard_size": 64}
    whole = predict_region(world.cube, world.checkpoint, tmp_path / "all", spec=PredictSpec(**spec))
    masked = predict_region(
        world.cube, world.checkpoint, tmp_path / "some",
        spec=PredictSpec(**spec, mask=mask_file, mask_values=(2,)),
    )  # fmt: skip
    kept = mapped_by_hand(mask_file, world.extent, (2,))
    for name in ("classes", "confidence"):
        assert np.array_equal(read(masked, name)[kept], read(whole, name)[kept])
        assert (read(masked, name)[~kept] == 255).all()
    inside = read(whole, "qa") != Quality.OUTSIDE
    assert (read(masked, "qa")[inside & ~kept] == Quality.SKIPPED).all()
    assert np.array_equal(read(masked, "qa")[kept], read(whole, "qa")[kept])
    assert masked.windows < whole.windows, "windows wholly skipped do not run"


def test_masks_that_cannot_be_used(
    world: Any, mask_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        open_mask(tmp_path / "no.tif")
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(InputError, match="no raster"):
        open_mask(tmp_path / "text.tif")
    arguments = [
        "predict", str(world.cube), "--checkpoint", str(world.checkpoint),
        "--out", str(tmp_path / "map"), "--mask", str(mask_file), "--mask-values",
    ]  # fmt: skip
    assert invoke([*arguments, "maize"]) == 2
    assert "whole numbers" in capsys.readouterr().err
    assert invoke([*arguments, "1,200"]) == 2
    assert "holds 200: that is its nodata" in capsys.readouterr().err.replace("\n", " ")
    assert invoke([*arguments, "1,2", "--dry-run"]) == 0
    assert "mapped where it holds 1, 2" in capsys.readouterr().out.replace("\n", " ")


def test_another_mask_is_another_run(world: Any, mask_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "crop.tif"
    copy.write_bytes(mask_file.read_bytes())
    before = open_mask(copy).fingerprint
    assert before == open_mask(mask_file).fingerprint
    mosaic = tmp_path / "crop.vrt"
    rasterio.shutil.copy(copy, mosaic, driver="VRT")
    of_mosaic = open_mask(mosaic).fingerprint
    (tmp_path / "crop.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")  # as a GIS leaves it
    assert (open_mask(copy).fingerprint, open_mask(mosaic).fingerprint) == (before, of_mosaic)
    with rasterio.open(copy, "r+") as source:
        source.write(1 - source.read(1) % 2, 1)
    assert open_mask(copy).fingerprint != before
    assert open_mask(mosaic).fingerprint != of_mosaic
