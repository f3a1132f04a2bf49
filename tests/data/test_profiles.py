"""Profiles are the NDVI of fields as numpy counts it from the whole cube."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import rasterio.features
import shapely

from stcln_geo.cli.main import invoke
from stcln_geo.cube.stack import open_stack
from stcln_geo.cube.store import open_season
from stcln_geo.data import profiles
from stcln_geo.data.profiles import FieldProfiles, field_profiles, parcel_profiles
from stcln_geo.data.source import open_source
from stcln_geo.errors import CubeError
from stcln_geo.legend import Legend

from ..labelled_stacks import cut_stack


def test_profiles_equal_the_means_over_the_whole_cube(cube: Path) -> None:
    season = open_season(cube)
    assert season.fields is not None
    red, nir = (season.reflectance[:, season.bands.index(band)] * 1e-4 for band in ("red", "nir"))
    ndvi = np.clip((nir - red) / (nir + red), -1, 1)
    valid = season.valid[:] & (nir + red > 0)
    period = (season.days - season.days.min()) // 10

    found = field_profiles(open_source(cube), most=10_000)

    assert found.ndvi.shape == (len(season.fields), period.max() + 1)
    np.testing.assert_array_equal(found.code, season.fields.code)
    assert str(found.first[0]) == str(season.time[0])[:10]
    for row, number in enumerate(season.fields.number):
        inside = season.parcels[:] == number
        for column in range(found.ndvi.shape[1]):
            seen = valid[period == column] & inside
            expected = ndvi[period == column][seen].mean() if seen.any() else np.nan
            assert found.ndvi[row, column] == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_profiles_of_a_stack_are_site_by_site_and_its_background_is_a_field_of_each(
    cube: Path, tmp_path: Path
) -> None:
    path = cut_stack(
        cube, tmp_path / "sites.zarr", ((0, 0), (3, 47), (51, 0)), shape_yx=(32, 41),
        background=True, void=True, thin=True,
    )  # fmt: skip
    stack = open_stack(path)
    assert stack.fields is not None
    red, nir = (
        stack.reflectance[:][:, :, stack.bands.index(band)] * 1e-4 for band in ("red", "nir")
    )
    valid = stack.valid[:] & (nir + red > 0)
    ndvi = np.clip((nir - red) / np.where(valid, nir + red, 1), -1, 1)
    days = (stack.time.astype("datetime64[D]") - np.datetime64(stack.name)).astype(int)
    period = (days - days[~np.isnat(stack.time)].min()) // 10

    done: list[tuple[object, ...]] = []
    found = field_profiles(open_source(path), most=10_000, progress=lambda *told: done.append(told))

    np.testing.assert_array_equal(found.code, stack.fields.code)
    background = stack.fields.number == 0
    assert background.sum() == 3
    assert len(background) > 6
    for row, (site, number, code) in enumerate(
        zip(stack.fields.site, stack.fields.number, stack.fields.code, strict=True)
    ):
        inside = (stack.parcels[:][site] == number) & (stack.labels[:][site] == code)
        for column in range(found.ndvi.shape[1]):
            seen = valid[site] & inside & (period[site] == column)[:, None, None]
            expected = ndvi[site][seen].mean() if seen.any() else np.nan
            assert found.ndvi[row, column] == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert done == [(place + 1, len(done), "reads") for place in range(len(done))]


def test_quartiles_are_over_fields(cube: Path) -> None:
    found = field_profiles(open_source(cube), most=10_000)
    own = found.of_class(1)
    values = found.ndvi[found.code == 1]
    column = int(np.isfinite(values).sum(axis=0).argmax())
    lower, median, upper = np.nanquantile(values[:, column], (0.25, 0.5, 0.75))
    assert (own.lower[column], own.upper[column]) == pytest.approx((lower, upper))
    assert own.median[column] == pytest.approx(median)
    assert own.peak == np.nanargmax(own.median)
    # The greenest time of the classes goes from early to late, as the cube was made.
    peaks = [found.of_class(code).peak or 0 for code in range(len(found.legend))]
    assert peaks == sorted(peaks)


def test_quartiles_need_three_fields_and_a_median_one() -> None:
    rng = np.random.default_rng(5)
    ndvi = rng.random((23, 9)).astype(np.float32)
    ndvi[rng.random(ndvi.shape) < 0.7] = np.nan
    code = (np.arange(23) % 4).astype(np.uint8)
    ndvi[code == 2, 1:] = np.nan
    ndvi[code == 3] = np.nan
    first = np.datetime64("2018-09-01") + 10 * np.arange(9)
    legend = Legend.from_values(list("abcd"))
    found = FieldProfiles(season="2018-09-01", legend=legend, first=first, code=code, ndvi=ndvi)

    for each in range(4):
        own, table = found.of_class(each), pandas.DataFrame(ndvi[code == each])
        seen = table.count()
        assert own.fields == (table.count(axis=1) > 0).sum()
        np.testing.assert_allclose(own.median, table.median(), rtol=1e-6)
        for ours, share in ((own.lower, 0.25), (own.upper, 0.75)):
            np.testing.assert_allclose(ours, table.quantile(share).where(seen > 2), rtol=1e-6)
        assert own.peak == (table.median().idxmax() if seen.any() else None)


def test_dark_pixels_and_a_season_that_is_seen_late_count_as_they_should(
    new_cube: Callable[..., Path],
) -> None:
    """NDVI is cut at -1 and 1 where a band is below zero, and is none where both add up to that."""
    path = new_cube(dates=4, seed=0)
    season = open_season(path, mode="r+")
    assert season.fields is not None
    rng = np.random.default_rng(1)
    numbers = season.reflectance[:]
    dark = rng.random(numbers[:, :1].shape) < 0.2
    season.reflectance[:] = np.where(dark, rng.integers(-300, 900, numbers.shape), numbers)
    season = open_season(path)
    red, nir = (season.reflectance[:, season.bands.index(band)] * 1e-4 for band in ("red", "nir"))
    valid = season.valid[:] & (nir + red > 1e-9)
    ndvi = np.clip((nir - red) / np.where(valid, nir + red, 1), -1, 1)
    assert {-1, 1} < set(ndvi[valid])
    late = season.days - season.days.min()
    assert season.days.min() > 60

    fields = field_profiles(open_source(path), most=10_000)
    parcels = parcel_profiles(season, np.array([season.aoi]))

    for found, step, where in (
        (fields, 10, [season.parcels[:] == number for number in season.fields.number]),
        (parcels, 30, [np.ones(season.shape_yx, dtype=bool)]),
    ):
        assert str(found.first[0]) == str(season.time[0])[:10]
        assert found.ndvi.shape == (len(where), late.max() // step + 1)
        for row, inside in enumerate(where):
            for column in range(found.ndvi.shape[1]):
                at = late // step == column
                seen = valid[at] & inside
                expected = ndvi[at][seen].mean() if seen.any() else np.nan
                assert found.ndvi[row, column] == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_fewer_fields_are_a_choice_of_each_class(cube: Path) -> None:
    whole, few = (field_profiles(open_source(cube), most=most) for most in (10_000, 4))
    assert np.bincount(few.code).tolist() == [4] * len(few.legend)
    for row in few.ndvi:
        assert any(np.array_equal(row, other, equal_nan=True) for other in whole.ndvi)


def test_the_command_draws_and_says_when_each_class_is_greenest(
    cube: Path, new_cube: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, table = tmp_path / "p.png", tmp_path / "p.csv"
    assert invoke(["labels", "profile", str(cube), str(picture), "--table", str(table)]) == 0
    said = capsys.readouterr().out
    assert "crop 0:" in said
    assert "greenest from 201" in said
    assert picture.stat().st_size > 5000
    rows = list(csv.DictReader(table.open()))
    assert {row["class"] for row in rows} == set(open_season(cube).legend.names)  # type: ignore[union-attr]

    assert invoke(["labels", "profile", str(cube), str(picture), "--fields-per-class", "0"]) == 2
    capsys.readouterr()
    bare = new_cube(bands=("green", "swir16"))
    with pytest.raises(CubeError, match="lacks red and nir"):
        profiles.field_profiles(open_source(bare))


@pytest.mark.parametrize("read_bytes", [1, 10**9])
def test_profiles_of_parcels_equal_the_means_over_the_whole_cube(
    cube: Path, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "_READ_BYTES", read_bytes)
    season = open_season(cube)
    left, bottom, right, top = season.geobox.boundingbox.bbox
    rng = np.random.default_rng(6)
    polygons = shapely.buffer(
        shapely.points(rng.uniform(left - 40, right + 40, 19), rng.uniform(bottom, top, 19)),
        rng.uniform(3, 120, 19),
    )
    # One that holds no pixel, one beyond the cube, one over all; of those that overlap the last.
    polygons[3] = shapely.box(left + 6, top - 8, left + 8, top - 6)
    polygons[4] = shapely.box(right + 100, top - 90, right + 300, top)
    polygons[0] = shapely.box(left, bottom, right, top)
    numbers = rasterio.features.rasterize(
        zip(polygons, range(1, 20), strict=True), out_shape=season.shape_yx,
        transform=season.geobox.affine, dtype="int32",
    )  # fmt: skip
    red, nir = (season.reflectance[:, season.bands.index(band)] * 1e-4 for band in ("red", "nir"))
    ndvi = np.clip((nir - red) / (nir + red), -1, 1)
    valid = season.valid[:] & (nir + red > 0)
    period = (season.days - season.days.min()) // 30

    told: list[tuple[object, ...]] = []
    found = parcel_profiles(season, polygons, progress=lambda *one: told.append(one))

    assert told == [(row + 1, 3, "rows of chunks") for row in range(3)]
    assert found.ndvi.shape == (19, period.max() + 1) == (19, len(found.first))
    assert found.pixels.tolist() == np.bincount(numbers.reshape(-1), minlength=20)[1:].tolist()
    assert found.pixels[3] == found.pixels[4] == 0
    for row in range(19):
        inside = numbers == row + 1
        for column in range(found.ndvi.shape[1]):
            seen = valid[period == column] & inside
            expected = ndvi[period == column][seen].mean() if seen.any() else np.nan
            assert found.ndvi[row, column] == pytest.approx(expected, abs=1e-5, nan_ok=True)
