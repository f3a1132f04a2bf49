from __future__ import annotations

import datetime

import numpy as np
import pytest
import rioxarray  # noqa: F401
import xarray as xr
from affine import Affine

from stcln_geo import open_cube, validate_cube, write_cube
from stcln_geo.cube.contract import FILL, days_since, season_name
from stcln_geo.cube.lock import cube_lock, lock_path
from stcln_geo.cube.store import (
    FieldTable,
    Layout,
    create_season,
    list_seasons,
    open_building,
    open_season,
    plan_layout,
    write_fields,
    write_shard,
)
from stcln_geo.data.reader import drop_empty_dates, read_block
from stcln_geo.errors import CubeError, InputError, MissingFileError, OutputError
from stcln_geo.grid import Window
from stcln_geo.legend import Legend

BELGIUM_BANDS = {
    "S2-L2A-B02": "blue",
    "S2-L2A-B03": "green",
    "S2-L2A-B04": "red",
    "S2-L2A-B05": "rededge1",
    "S2-L2A-B06": "rededge2",
    "S2-L2A-B07": "rededge3",
    "S2-L2A-B08": "nir",
    "S2-L2A-B11": "swir16",
    "S2-L2A-B12": "swir22",
}


def make_dataset(height=53, width=77, times=("2019-10-03", "2020-02-11", "2020-11-30")):
    generator = np.random.default_rng(5)
    time = np.array(times, dtype="datetime64[ns]")
    shape = (len(time), height, width)
    data = {
        name: (("time", "y", "x"), generator.uniform(-0.02, 0.6, shape).astype("float32"))
        for name in ("red", "nir", "blue")
    }
    dataset = xr.Dataset(
        data,
        coords={
            "time": time,
            "y": 5_000_000 - 10 * (np.arange(height) + 0.5),
            "x": 400_000 + 10 * (np.arange(width) + 0.5),
        },
    )
    dataset["red"][0, :5] = np.nan
    return dataset.rio.write_crs("EPSG:32631")


def test_seasons_hold_what_was_written(tmp_path):
    source = make_dataset()
    path = write_cube(source, tmp_path / "cube.zarr", layout=Layout(chunk=16, shard=32))
    assert list_seasons(path) == ["2019-09-01", "2020-09-01"]
    whole = open_cube(path)
    assert list(whole["band"].values) == ["blue", "red", "nir"]
    inside = whole.sel(y=source.y, x=source.x)
    for band in ("blue", "red", "nir"):
        expected = source[band].to_numpy()
        found = inside["reflectance"].sel(band=band).to_numpy()
        np.testing.assert_allclose(found, expected, atol=0.51e-4, equal_nan=True)
    np.testing.assert_array_equal(inside["valid"].values, np.isfinite(source["red"].values))
    # Beyond the dataset there is nothing, and it is not valid.
    assert int(whole["valid"].sum()) == int(np.isfinite(source["red"].values).sum())
    assert validate_cube(whole)[0] == []


def test_a_season_opens_with_plain_xarray_and_has_its_crs(tmp_path):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr")
    plain = xr.open_zarr(path / "2019-09-01")
    assert plain.rio.crs.to_epsg() == 32631
    assert plain.rio.resolution() == (10.0, -10.0)
    assert plain["reflectance"].dtype == "float64"
    assert "spatial_ref" in plain.coords
    assert plain["days"].values.tolist() == [32, 163]
    assert plain.attrs["proj:code"] == "EPSG:32631"
    raw = open_cube(path, "2019-09-01", mask_and_scale=False)
    assert raw["reflectance"].dtype == "int16"
    assert validate_cube(raw)[0] == []


@pytest.mark.parametrize("mask_and_scale", [True, False], ids=["decoded", "raw"])
@pytest.mark.parametrize("season", ["2019-09-01", None], ids=["one season", "all seasons"])
def test_a_part_of_an_opened_cube_can_be_written_anywhere(tmp_path, season, mask_and_scale):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr", layout=Layout(chunk=16, shard=32))
    legend = Legend.from_values(["wheat"])
    stored = open_season(path, "2019-09-01", mode="r+")
    labels = np.ones(stored.shape_yx, dtype=np.uint8)
    fields = FieldTable(
        number=np.array([1], dtype=np.int32),
        code=np.array([1], dtype=np.uint8),
        pixels=np.array([labels.size], dtype=np.int32),
        split=np.array([1], dtype=np.uint8),
    )
    write_fields(
        stored, labels=labels, parcels=labels.astype(np.int32), fields=fields, legend=legend
    )
    whole = open_cube(path, season, mask_and_scale=mask_and_scale)
    part = whole.isel(time=[0], y=slice(21, 60), x=slice(35, 90)).chunk(y=20, x=20)
    part.to_zarr(tmp_path / "three.zarr", consolidated=False)
    part.to_zarr(tmp_path / "two.zarr", zarr_format=2)
    part.to_netcdf(tmp_path / "part.nc")
    expected = open_cube(path, "2019-09-01")["reflectance"][:1, :, 21:60, 35:90].to_numpy()
    for copy in (
        xr.open_zarr(tmp_path / "three.zarr", consolidated=False),
        xr.open_zarr(tmp_path / "two.zarr"),
        xr.open_dataset(tmp_path / "part.nc", decode_coords="all"),
    ):
        with copy:
            np.testing.assert_allclose(copy["reflectance"].to_numpy(), expected, atol=1e-7)
            np.testing.assert_array_equal(copy["valid"], part["valid"])
            assert copy["time"].to_numpy() == part["time"].to_numpy()
            assert copy.rio.crs.to_epsg() == 32631
            # What says where the whole season lies would be wrong of the part.
            assert not [key for key in copy.attrs if key.startswith("spatial:")]


@pytest.mark.parametrize("later", ["longer", "without scl"])
def test_seasons_of_different_form_open_together(tmp_path, later):
    """Few dates get larger chunks than many, and not all seasons keep scene classes."""
    times = ("2019-10-03", "2020-02-11", "2020-11-30", "2020-12-05")
    source = make_dataset(times=times)
    source["scl"] = (("time", "y", "x"), np.full((4, 53, 77), 4, dtype=np.uint8))
    path = tmp_path / "cube.zarr"
    write_cube(source.isel(time=[0, 1]), path, layout=Layout(chunk=16, shard=32))
    if later == "longer":
        write_cube(source.isel(time=[2, 3]), path, layout=Layout(chunk=32, shard=64))
    else:
        write_cube(
            source.isel(time=[2, 3]).drop_vars("scl"), path, layout=Layout(chunk=16, shard=32)
        )
    for chunks in ("auto", None):
        whole = open_cube(path, mask_and_scale=False, chunks=chunks)
        assert validate_cube(whole)[0] == []
        assert ("coverage" in whole) == (later != "longer")
        assert ("scl" in whole) == (later == "longer")
        for name, dates in (("2019-09-01", slice(0, 2)), ("2020-09-01", slice(2, 4))):
            season = open_cube(path, name, mask_and_scale=False)
            for variable in ("reflectance", "valid", "overview", "days"):
                np.testing.assert_array_equal(
                    whole[variable].isel(time=dates).to_numpy(), season[variable].to_numpy()
                )


def test_coverage_and_overview_agree_with_the_pixels(tmp_path):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr", layout=Layout(chunk=32, shard=64))
    season = open_season(path, "2019-09-01")
    valid = season.valid[:]
    coverage = season.coverage[:]
    assert coverage.sum() == valid.sum()
    assert coverage[1, 1, 2] == valid[1, 32:64, 64:96].sum()
    overview = season.overview[:]
    measured = (season.reflectance[:] != FILL).any(axis=1)
    padded = np.zeros((len(season.time), overview.shape[2] * 16, overview.shape[3] * 16), bool)
    padded[:, : measured.shape[1], : measured.shape[2]] = measured
    blocks = padded.reshape(len(season.time), overview.shape[2], 16, overview.shape[3], 16)
    np.testing.assert_array_equal((overview > 0).any(axis=1), blocks.any(axis=(2, 4)))


def test_integers_above_the_range_are_clipped_and_never_valid(tmp_path):
    source = make_dataset(times=("2019-10-03",))
    numbers = np.full((1, 53, 77), 500, dtype="uint16")
    numbers[0, 10, 10], numbers[0, 20, 20], numbers[0, 30, 30] = 40000, 65535, 0
    for band in ("red", "nir", "blue"):
        source[band] = (("time", "y", "x"), numbers.copy())
    path = write_cube(source, tmp_path / "cube.zarr", offset=-0.1, nodata=0)
    inside = open_cube(path, mask_and_scale=False).sel(y=source.y, x=source.x)
    red, valid = inside["reflectance"].sel(band="red").values[0], inside["valid"].values[0]
    assert (red[10, 10], red[20, 20], red[30, 30], red[0, 0]) == (32767, 32767, FILL, -500)
    assert not valid[10, 10]
    assert not valid[20, 20]
    assert not valid[30, 30]
    assert valid.sum() == valid.size - 3


@pytest.mark.parametrize(
    ("declared", "given", "expected"),
    [
        ({}, {}, 0.3),
        # What rioxarray says of files that say nothing.
        ({"scale_factor": 1.0, "add_offset": 0.0}, {}, 0.3),
        ({"scale_factor": 1e-4, "add_offset": -0.1}, {}, 0.2),
        ({"add_offset": -1000}, {}, 0.2),
        ({"scale_factor": 2e-4, "add_offset": -0.1}, {"offset": 0.0}, 0.6),
        ({"scale_factor": 2e-4, "add_offset": -0.1}, {"scale": 1e-4}, 0.3),
    ],
    ids=["plain", "rioxarray", "declared", "offset alone", "offset given", "scale given"],
)
def test_integers_are_scaled_as_they_declare_or_as_is_given(tmp_path, declared, given, expected):
    source = make_dataset(times=("2019-10-03",))
    for band in ("red", "nir", "blue"):
        source[band] = (("time", "y", "x"), np.full((1, 53, 77), 3000, dtype="uint16"), declared)

    path = write_cube(source, tmp_path / "cube.zarr", **given)

    inside = open_cube(path).sel(y=source.y, x=source.x)
    np.testing.assert_allclose(inside["reflectance"], expected, atol=1e-6)
    assert inside["valid"].all()


@pytest.mark.parametrize("part", [slice(None), slice(7, 60)], ids=["whole", "part"])
@pytest.mark.parametrize("corners", [True, False], ids=["corners", "centres"])
def test_an_array_of_bands_does_as_a_dataset(tmp_path, corners, part):
    source = make_dataset()
    scl = np.random.default_rng(7).integers(0, 12, source["red"].shape)
    source["SCL"] = source["red"].dims, scl.astype("float64")
    # As stackstac gives it: attributes in place of a grid mapping, and corners unless asked.
    stacked = source.drop_vars("spatial_ref").to_dataarray("band").transpose("time", "band", ...)
    stacked.attrs = {
        "crs": "epsg:32631",
        "transform": Affine(10, 0, 400_000, 0, -10, 5_000_000),
        "resolution": 10,
    }
    if corners:
        stacked = stacked.assign_coords(x=stacked.x - 5, y=stacked.y + 5)
    expected = open_cube(write_cube(source.isel(x=part), tmp_path / "dataset.zarr"))
    found = open_cube(write_cube(stacked.isel(x=part), tmp_path / "array.zarr"))
    xr.testing.assert_equal(found, expected)
    assert int(found["valid"].sum()) > 0


def test_a_transform_of_other_pixels_moves_nothing(tmp_path):
    source = make_dataset()
    source.attrs["transform"] = Affine(5, 0, 400_000, 0, -5, 5_000_000)
    found = open_cube(write_cube(source, tmp_path / "cube.zarr"))
    expected = open_cube(write_cube(make_dataset(), tmp_path / "without.zarr"))
    xr.testing.assert_equal(found, expected)


def test_the_level_is_kept(tmp_path):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr", level="top-of-atmosphere")
    whole = open_cube(path)
    assert whole["reflectance"].attrs["standard_name"] == "toa_bidirectional_reflectance"
    assert open_season(path, "2019-09-01").attrs["level"] == "top-of-atmosphere"
    with pytest.raises(CubeError, match=r"level='L1C'.*surface, top-of-atmosphere"):
        write_cube(make_dataset(), tmp_path / "other.zarr", level="L1C")


@pytest.mark.parametrize("dtype", [bool, float, object])
def test_what_a_join_left_open_is_not_valid(tmp_path, dtype):
    source = make_dataset(times=("2019-10-03", "2019-10-05"))
    flags = (np.arange(77) % 3 > 0)[None, None].repeat(53, axis=1).repeat(2, axis=0)
    values = flags.astype(dtype)
    if dtype is not bool:
        values[1] = np.nan
    source["valid"] = (("time", "y", "x"), values)
    path = write_cube(source.fillna({"red": 0.1}), tmp_path / "cube.zarr")
    found = open_cube(path).sel(y=source.y, x=source.x)["valid"].values
    np.testing.assert_array_equal(found[0], flags[0])
    np.testing.assert_array_equal(found[1], flags[1] & (dtype is bool))


def test_each_band_has_its_own_scale_and_fill_value(tmp_path):
    source = make_dataset().fillna(0.1)
    expected = source[["blue", "red", "nir"]].to_array("band").transpose("time", "band", "y", "x")
    expected = expected.to_numpy().astype("float64")
    expected[1, 2, :, :20] = np.nan
    files = source.copy()
    for name, scale, added, fill in (
        ("blue", 1e-4, 0.0, -20000), ("red", 2e-4, -0.1, -1111), ("nir", 1e-4, 0.0, -9999),
    ):  # fmt: skip
        numbers = np.rint((source[name] - added) / scale)
        numbers = xr.where(np.isnan(expected[:, 2]) & (name == "nir"), fill, numbers)
        files[name] = numbers.astype("int16").assign_attrs(
            scale_factor=scale, add_offset=added, _FillValue=fill
        )
    path = write_cube(files, tmp_path / "cube.zarr", layout=Layout(chunk=16, shard=32))
    cube = open_cube(path).sel(y=source["y"], x=source["x"])
    np.testing.assert_allclose(cube["reflectance"].to_numpy(), expected, atol=1.1e-4)
    np.testing.assert_array_equal(cube["valid"].to_numpy(), ~np.isnan(expected).any(axis=1))


def test_floats_beyond_the_sampled_corner_are_not_taken_for_reflectance(tmp_path):
    """The corner that the scale is judged by may lie outside of the orbit."""
    source = make_dataset().fillna(0.1) * 1e4
    source = source.where(source["x"] > 400_000 + 10 * 64).rio.write_crs("EPSG:32631")
    with pytest.raises(CubeError, match=r"above 3\.2.*scale=0\.0001"):
        write_cube(source, tmp_path / "cube.zarr")
    assert list_seasons(tmp_path / "cube.zarr") == []
    path = write_cube(source, tmp_path / "cube.zarr", scale=1e-4)
    assert open_cube(path)["valid"].any()


def test_fill_values_and_unknown_scene_classes_are_not_valid(tmp_path):
    source = make_dataset().fillna(0.1)
    valid = np.ones((3, 53, 77), dtype=np.uint8)
    valid[0, :10], valid[1, 10:20] = 0, 255
    classes = np.full((3, 53, 77), 5, dtype=np.int16)
    classes[2, :9], classes[2, 20:30] = 9, 260  # 260 is 4, vegetation, in eight bits
    source["valid"] = (("time", "y", "x"), valid, {"_FillValue": 255})
    source["SCL"] = (("time", "y", "x"), classes)
    path = write_cube(source, tmp_path / "cube.zarr", layout=Layout(chunk=16, shard=32))
    cube = open_cube(path).sel(y=source["y"], x=source["x"])
    np.testing.assert_array_equal(cube["valid"], (valid == 1) & (classes == 5))
    np.testing.assert_array_equal(cube["scl"], np.where(classes == 260, 0, classes))


def test_seasons_of_a_cube_share_bands_and_grid(tmp_path):
    path = write_cube(make_dataset(times=("2019-10-03",)), tmp_path / "cube.zarr")
    later = make_dataset(times=("2020-10-03",))
    with pytest.raises(CubeError, match=r"the bands blue, red on .* has blue, red, nir on"):
        write_cube(later.drop_vars("nir"), path)
    for other in (later.isel(y=slice(31, None)), later.rio.write_crs("EPSG:32632")):
        with pytest.raises(CubeError, match=r"season 2019-09-01 has .*EPSG:32631 from x 399780"):
            write_cube(other, path, overwrite=True)
    assert list_seasons(path) == ["2019-09-01"]
    # Its only season may be replaced by another.
    write_cube(make_dataset(times=("2019-10-03",)).isel(y=slice(31, None)), path, overwrite=True)
    assert open_cube(path).sizes["y"] < 84


def test_a_monthly_netcdf_becomes_a_cube(shared, tmp_path):
    source = xr.open_dataset(shared / "data" / "belgium_2021_monthly_100x100.nc")
    path = write_cube(
        source, tmp_path / "b.zarr", bands=BELGIUM_BANDS, nodata=65535, season_start="11-01"
    )
    cube = open_cube(path)
    assert cube.rio.crs.to_epsg() == 32631
    inside = cube.sel(y=source.y, x=source.x)
    for name, band in BELGIUM_BANDS.items():
        raw = source[name].to_numpy().astype("float32")
        expected = np.where(raw == 65535, np.nan, raw * np.float32(1e-4))
        found = inside["reflectance"].sel(band=band).to_numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6, equal_nan=True)
    empty = ~cube["valid"].any(("y", "x")).values
    assert empty.sum() == 2
    errors, _ = validate_cube(cube)
    assert errors == []


def in_degrees(dataset):
    """Return a dataset as many catalogs give it: pixels of 0.0001 degrees."""
    x, y = 5 + 1e-4 * np.arange(dataset.x.size), 50 - 1e-4 * np.arange(dataset.y.size)
    return dataset.assign_coords(x=x + 5e-5, y=y - 5e-5).rio.write_crs("EPSG:4326")


def repeated_band(dataset):
    """Return a dataset with a band dimension in which one name stands twice."""
    stack = dataset[["red", "nir"]].to_array("band").isel(band=[0, 0, 1])
    return stack.to_dataset(name="reflectance").rio.write_crs("EPSG:32631")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda ds: ds.drop_vars("spatial_ref"), "without a CRS"),
        (lambda ds: in_degrees(ds), r"WGS 84: .* projected CRS in metres.*estimate_utm_crs"),
        (lambda ds: ds.rio.write_crs("EPSG:2272"), "ftUS.*projected CRS in metres"),
        (lambda ds: ds.rename(red="b04", nir="b08", blue="b02"), "Cannot name the bands"),
        (lambda ds: ds.isel(time=[1, 0, 2]), "increase strictly"),
        (lambda ds: ds * 10000, "Pass scale=0.0001"),
        (lambda ds: ds.assign_coords(x=ds.x + 3), "multiple of the 10 m pixel"),
        (lambda ds: ds.isel(x=[0, 1, 5, 6]), "square and regular"),
        (lambda ds: ds.assign_coords(time=[18000, 18100, 18200]), r"times.*int64.*decode_cf"),
        (lambda ds: ds.assign(valid=ds["red"][0] > 0), r"'valid'.*\('y', 'x'\).*Broadcast"),
        (lambda ds: repeated_band(ds), "red, red, nir.*each must occur once"),
        (lambda ds: repeated_band(ds)["reflectance"], "red, red, nir.*each must occur once"),
        (lambda ds: ds["red"], r"array.*\('time', 'y', 'x'\).*to_dataset"),
        (lambda ds: ds["red"].to_numpy(), "of a ndarray: an xarray.Dataset is needed"),
    ],
    ids=[
        "crs", "degrees", "feet", "bands", "time-order", "scale", "shifted", "irregular",
        "undecoded-times", "one-valid-for-all", "repeated-band",
        "repeated-in-array", "one-band", "numpy",
    ],
)  # fmt: skip
def test_bad_datasets_are_explained_and_leave_nothing(tmp_path, change, match):
    with pytest.raises(InputError, match=match):
        write_cube(change(make_dataset()), tmp_path / "cube.zarr")
    assert not (tmp_path / "cube.zarr").exists()


def test_a_path_from_home_is_not_taken_literally(tmp_path, monkeypatch):
    """As xarray and zarr take it; a folder named ~ would fill the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_cube(make_dataset(), "~/cube.zarr")
    assert list_seasons(tmp_path / "home" / "cube.zarr") == list_seasons("~/cube.zarr")
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(MissingFileError, match="~nobody-of-this-name"):
        open_cube("~nobody-of-this-name/cube.zarr")


def test_write_cube_does_not_overwrite_unasked(tmp_path):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr")
    with pytest.raises(CubeError, match="never overwrites unasked"):
        write_cube(make_dataset(), path)
    write_cube(make_dataset(), path, overwrite=True)
    assert list_seasons(path) == ["2019-09-01", "2020-09-01"]
    assert not list(path.glob("*.building")) + list(path.glob("*.replaced"))


def test_write_cube_waits_for_no_other_writer(tmp_path):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr")
    with cube_lock(path), pytest.raises(CubeError, match="one writer at a time"):
        write_cube(make_dataset(), path, overwrite=True)
    assert not list(path.glob("*.building"))
    write_cube(make_dataset(), path, overwrite=True)
    assert not lock_path(path).exists()


def test_choosing_seasons(tmp_path):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr")
    with pytest.raises(CubeError, match="Name one with --season"):
        open_season(path)
    with pytest.raises(CubeError, match=r"'2018-09-01' .* does not exist. The cube has: 2019"):
        open_season(path, "2018-09-01")
    with pytest.raises(MissingFileError, match="there is no Zarr v3 group"):
        open_season(tmp_path / "nothing.zarr")


def test_what_is_no_cube_is_told_apart(tmp_path):
    path = write_cube(make_dataset(), tmp_path / "cube.zarr")
    with pytest.raises(CubeError, match=r"is the season 2019-09-01 of one.*--season"):
        open_cube(path / "2019-09-01")
    plain = tmp_path / "plain.zarr"
    make_dataset().to_zarr(plain, zarr_format=3, consolidated=False)
    with pytest.raises(CubeError, match=r"did not write.*write_cube"):
        open_cube(plain)
    make_dataset().to_zarr(plain, group="2019-09-01", zarr_format=3, consolidated=False)
    with pytest.raises(CubeError, match=r"2019-09-01.*did not write.*write_cube"):
        open_cube(plain)


def test_an_unfinished_season_does_not_open(tmp_path):
    source = make_dataset()
    done = write_cube(source.isel(time=[0]), tmp_path / "done.zarr")
    model = open_season(done)
    create_season(
        tmp_path / "cube.zarr",
        "2019-09-01",
        geobox=model.geobox,
        time=model.time,
        bands=model.bands,
        aoi=model.aoi,
    )
    with pytest.raises(CubeError, match=r"2019-09-01\.building is unfinished"):
        open_season(tmp_path / "cube.zarr")
    building = open_building(tmp_path / "cube.zarr", "2019-09-01")
    assert building is not None
    with pytest.raises(InputError, match="Write one whole shard at a time"):
        write_shard(
            building,
            Window(16, 0, 10, 10),
            reflectance=np.zeros((1, 3, 10, 10), np.int16),
            valid=np.ones((1, 10, 10), bool),
        )


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(OutputError, match="Cannot write to"):
        write_cube(make_dataset(), tmp_path / "file" / "cube.zarr")


def test_validate_gathers_every_breach(tmp_path):
    cube = open_cube(write_cube(make_dataset(), tmp_path / "c.zarr"), "2019-09-01")
    broken = cube.assign(valid=cube["valid"].astype("int32")).drop_vars("spatial_ref")
    broken = broken.isel(time=[1, 0])
    errors, _ = validate_cube(broken)
    text = " ".join(errors)
    assert "'valid' has the dtype int32" in text
    assert "'spatial_ref'" in text
    assert "increase strictly" in text
    everywhere = cube.assign(valid=xr.ones_like(cube["valid"]))
    assert "NaN" in " ".join(validate_cube(everywhere)[0])


@pytest.mark.parametrize(
    ("time", "start", "expected"),
    [
        ("2019-08-31T23:59", "09-01", "2018-09-01"),
        ("2019-09-01", "09-01", "2019-09-01"),
        ("2020-02-29", "01-01", "2020-01-01"),
        ("2020-06-30", "07-01", "2019-07-01"),
    ],
)
def test_season_name(time, start, expected):
    assert season_name(np.datetime64(time), start) == expected


@pytest.mark.parametrize("start", ["01-01", "03-01", "09-01", "12-31"])
def test_seasons_partition_time_and_days_count_from_their_first(start):
    begin = datetime.date(1999, 1, 1)
    for step in range(2500):
        day = begin + datetime.timedelta(days=step)
        season = season_name(f"{day}T23:59:59", start)
        first = datetime.date.fromisoformat(season)
        assert season[5:] == start
        assert first <= day < first.replace(year=first.year + 1)
        times = np.array([f"{day}T00:00", f"{day}T23:59:59"], "datetime64[ns]")
        assert days_since(times, season).tolist() == [(day - first).days] * 2


def test_season_start_must_exist_every_year():
    with pytest.raises(InputError, match="MM-DD"):
        season_name("2019-01-01", "02-29")


@pytest.mark.parametrize("dates", [6, 36, 72, 140])
def test_layout_stays_within_its_bounds(dates):
    layout = plan_layout(dates, 10, (5000, 7000))
    assert dates * 10 * layout.shard**2 * 2 <= 400_000_000
    assert layout.shard % layout.chunk == 0
    assert plan_layout(dates, 10, (101, 90)).shard <= 128


class TestReader:
    @pytest.fixture
    def season(self, tmp_path):
        path = write_cube(make_dataset(), tmp_path / "c.zarr", layout=Layout(chunk=16, shard=32))
        return open_season(path, "2019-09-01")

    def test_beyond_the_season_nothing_is_valid(self, season):
        height, _ = season.shape_yx
        window = Window(height - 20, -13, 41, 60)
        block = read_block(season, window, bands=("nir", "red"))
        assert block.reflectance.shape == (2, 2, 41, 60)
        raw = season.reflectance[:, :, height - 20 :, :47]
        np.testing.assert_array_equal(block.reflectance[:, 0, :20, 13:], raw[:, 2])
        np.testing.assert_array_equal(block.reflectance[:, 1, :20, 13:], raw[:, 1])
        assert (block.reflectance[:, :, 20:] == FILL).all()
        assert not block.valid[:, 20:].any()
        assert not block.valid[:, :, :13].any()

    def test_dates_are_picked_and_empty_ones_dropped(self, season):
        block = read_block(season, Window(0, 0, 200, 200), dates=np.array([1]))
        assert block.days.tolist() == [163]
        top = np.flatnonzero(season.valid[1].any(axis=1))[0]
        cut = read_block(season, Window(int(top), 40, 3, 20))
        assert drop_empty_dates(cut).days.tolist() == [163]

    def test_a_missing_band_is_named(self, season):
        with pytest.raises(CubeError, match=r"lacks band 'green'.*The cube has: blue, red, nir"):
            read_block(season, Window(0, 0, 4, 4), bands=("green", "red"))
