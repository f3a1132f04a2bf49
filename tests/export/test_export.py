"""An export holds the cube's numbers, for rasterio, GDAL and STAC, and survives being killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from rio_cogeo.cogeo import cog_validate
from shapely.geometry import box

from stcln_geo import export_cube
from stcln_geo.cli.main import invoke
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.lock import cube_lock
from stcln_geo.cube.store import (
    FieldTable,
    Season,
    create_season,
    finish_season,
    open_season,
    shards_of,
    write_fields,
    write_shard,
    write_split,
)
from stcln_geo.export import files as files_module
from stcln_geo.export import plan_export
from stcln_geo.grid import Window, geobox_from_window
from stcln_geo.legend import Legend

BANDS = ("red", "rededge1", "nir")
TIMES = ("2018-09-03T10:50:21", "2018-09-08T10:49:00", "2019-02-11T10:50:21", "2019-07-01T11:00:00")
SHAPE = (101, 203)
ITEMS = ("A1 A2", "B", "C", "D")


def make_cube(
    path: Path,
    *,
    times: Sequence[str] = TIMES,
    items: Sequence[str] = ITEMS,
    level: str = "surface",
) -> Path:
    """A cube of random numbers with its extremes; no chunk or shard fits the grid."""
    geobox = geobox_from_window(Window(-563000, 57000, *SHAPE), crs="EPSG:32631", resolution=10)
    rng = np.random.default_rng(11)
    season = create_season(
        path, "2018-09-01", geobox=geobox, time=np.array(times, "datetime64[s]"), bands=BANDS,
        aoi=box(*geobox.boundingbox.bbox), layout=Layout(chunk=32, shard=96), with_scl=True,
        attrs={"level": level},
        date_attrs={"platform": ["sentinel-2a"] * len(times), "item_ids": list(items)},
    )  # fmt: skip
    for shard in shards_of(season):
        shape = (len(times), *shard.shape_yx)
        values = rng.integers(-32768, 32768, (shape[0], 3, *shape[1:])).astype("int16")
        valid = (rng.random(shape) < 0.7) & (values != -32768).all(axis=1)
        scl = rng.integers(0, 12, shape).astype("uint8")
        write_shard(season, shard, reflectance=values, valid=valid, scl=scl)
    finish_season(path, "2018-09-01")
    labels = np.full(SHAPE, 255, dtype=np.uint8)
    labels[10:40, 20:70], labels[60:90, 100:180] = 0, 1
    parcels = np.zeros(SHAPE, dtype=np.int32)
    parcels[10:40, 20:70], parcels[60:90, 100:180] = 1, 2
    table = FieldTable(
        number=np.array([1, 2], dtype="int32"), code=np.array([0, 1], dtype="uint8"),
        pixels=np.array([1500, 2400], dtype="int32"), split=np.zeros(2, dtype="uint8"),
    )  # fmt: skip
    write_fields(
        open_season(path, mode="r+"), labels=labels, parcels=parcels, fields=table,
        legend=Legend.from_values(["wheat", "maize"]),
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cube(tmp_path_factory.mktemp("export") / "own.zarr")


@pytest.fixture(scope="module")
def season(cube: Path) -> Season:
    return open_season(cube)


@pytest.fixture(scope="module")
def folder(cube: Path) -> Path:
    """All dates and all kinds."""
    out = cube.parent / "out"
    export_cube(cube, out, what=("reflectance", "valid", "scl", "labels"))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_rasterio_reads_the_stored_numbers(folder: Path, season: Season):
    stored = season.reflectance[:]
    for index, time in enumerate(TIMES):
        with rasterio.open(folder / f"{time[:10]}_reflectance.tif") as source:
            np.testing.assert_array_equal(source.read(), stored[index])
            assert source.transform == season.geobox.affine
            assert source.crs.to_epsg() == 32631
            assert source.descriptions == BANDS
            assert source.nodata == -32768
            assert source.scales == (1e-4,) * 3
            assert source.offsets == (0.0,) * 3
            tags = source.tags()
            assert tags["TIFFTAG_DATETIME"] == time.replace("-", ":").replace("T", " ")
            assert tags["ACQUISITION_TIME"] == f"{time}Z"
            assert tags["STCLN_GEO_ITEM_IDS"] == ITEMS[index]
            measured = source.read(masked=True)
            np.testing.assert_array_equal(measured.mask, stored[index] == -32768)


@pytest.mark.parametrize("what", ["valid", "scl"])
def test_masks_and_classes_are_those_stored(folder: Path, season: Season, what: str):
    stored = getattr(season, what)[:]
    for index, time in enumerate(TIMES):
        with rasterio.open(folder / f"{time[:10]}_{what}.tif") as source:
            assert source.dtypes == ("uint8",)
            np.testing.assert_array_equal(source.read(1), stored[index])


def test_labels_have_names_and_colours(folder: Path, season: Season):
    path = folder / "labels_2018-09-01.tif"
    with rasterio.open(path) as source:
        np.testing.assert_array_equal(source.read(1), season.labels[:])
        assert source.nodata == 255
        assert source.colormap(1)[1][:3] == season.legend.colormap()[1][:3]
    assert "wheat" in path.with_name(f"{path.name}.aux.xml").read_text()
    assert invoke(["cog", "validate", str(path)]) == 0


def test_all_files_are_strictly_cogs(folder: Path):
    files = sorted(folder.glob("*.tif"))
    assert len(files) == 13
    for path in files:
        assert cog_validate(str(path), strict=True, quiet=True) == (True, [], [])


def test_large_images_have_overviews_of_measured_pixels(tmp_path: Path):
    """The mean of a square with no data in it is the mean of the rest."""
    shape = (620, 590)
    geobox = geobox_from_window(Window(0, 0, *shape), crs="EPSG:32631", resolution=10)
    path = tmp_path / "large.zarr"
    season = create_season(
        path, "2018-09-01", geobox=geobox, time=np.array(TIMES[:1], "datetime64[s]"),
        bands=("red",), aoi=box(*geobox.boundingbox.bbox), layout=Layout(chunk=32, shard=256),
    )  # fmt: skip
    values = np.full((1, 1, *shape), 1000, dtype=np.int16)
    values[..., ::2, ::2] = -32768
    for shard in shards_of(season):
        part = values[..., shard.rows, shard.cols]
        write_shard(season, shard, reflectance=part, valid=part[:, 0] != -32768)
    finish_season(path, "2018-09-01")
    export_cube(path, tmp_path / "out")
    tif = tmp_path / "out" / "2018-09-03_reflectance.tif"
    with rasterio.open(tif) as source:
        np.testing.assert_array_equal(source.read(), values[0])
        assert source.overviews(1) == [2]
    with rasterio.open(tif, overview_level=0) as source:
        assert (source.read() == 1000).all()
    assert cog_validate(str(tif), strict=True, quiet=True) == (True, [], [])


def test_bands_dates_and_clear_pixels(cube: Path, season: Season, tmp_path: Path):
    report = export_cube(
        cube, tmp_path / "o", bands=("nir", "red"), dates="2018-09-05/2019-02-11", clear_only=True
    )
    assert report.written == ("2018-09-08_reflectance.tif", "2019-02-11_reflectance.tif")
    valid = season.valid[:]
    for index, name in zip((1, 2), report.written, strict=True):
        with rasterio.open(tmp_path / "o" / name) as source:
            assert source.descriptions == ("nir", "red")
            expected = np.where(valid[index], season.reflectance[:][index][[2, 0]], -32768)
            np.testing.assert_array_equal(source.read(), expected)


def test_small_reads_and_groups_do_not_show(
    cube: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(files_module, "_READ_BYTES", 1)
    monkeypatch.setattr(files_module, "_DATES_AT_A_TIME", 3)
    seen: list[tuple[int, int]] = []
    export_cube(cube, tmp_path / "o", progress=lambda done, total, _: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)
    for path in (tmp_path / "o").glob("*.tif"):
        with rasterio.open(path) as one, rasterio.open(folder / path.name) as other:
            np.testing.assert_array_equal(one.read(), other.read())


@pytest.mark.parametrize(
    ("level", "title"),
    [("surface", "Surface reflectance"), ("top-of-atmosphere", "Top-of-atmosphere reflectance")],
)
def test_level_1c_is_not_called_surface_reflectance(tmp_path: Path, level: str, title: str):
    cube = make_cube(tmp_path / "c.zarr", times=TIMES[:1], items=ITEMS[:1], level=level)
    export_cube(cube, tmp_path / "out")
    item = json.loads((tmp_path / "out" / "2018-09-03.json").read_text())
    assert item["assets"]["reflectance"]["title"] == title


def test_the_folder_is_a_stac_collection(folder: Path, season: Season):
    import pystac

    collection = pystac.Collection.from_file(str(folder / "collection.json"))
    items = {item.id: item for item in collection.get_items()}
    assert set(items) == {*(time[:10] for time in TIMES), "labels_2018-09-01"}
    item = items["2018-09-08"]
    assert item.datetime.isoformat() == "2018-09-08T10:49:00+00:00"
    assert set(item.assets) == {"reflectance", "valid", "scl"}
    asset = item.assets["reflectance"]
    assert (
        Path(asset.get_absolute_href()).resolve()
        == (folder / "2018-09-08_reflectance.tif").resolve()
    )
    assert [band["name"] for band in asset.extra_fields["bands"]] == list(BANDS)
    assert asset.extra_fields["bands"][1]["eo:common_name"] == "rededge071"
    with rasterio.open(asset.get_absolute_href()) as source:
        assert item.properties["proj:transform"] == list(source.transform)[:6]
        assert item.properties["proj:shape"] == list(source.shape)
        assert asset.extra_fields["nodata"] == source.nodata
        assert asset.extra_fields["raster:scale"] == source.scales[0]
        lonlat = rasterio.warp.transform_bounds(source.crs, "EPSG:4326", *source.bounds)
    np.testing.assert_allclose(item.bbox, lonlat, atol=1e-5)
    clear = season.valid[:][1].mean()
    assert item.properties["stcln_geo:clear_percent"] == pytest.approx(100 * clear, abs=0.006)
    for text in (path.read_text() for path in folder.glob("*.json")):
        assert str(folder) not in text


def test_stac_says_what_codes_mean(folder: Path):
    import pystac
    from pystac.extensions.classification import ClassificationExtension

    def classes(item: str, key: str) -> list[tuple[Any, ...]]:
        asset = pystac.Item.from_file(str(folder / f"{item}.json")).assets[key]
        found = ClassificationExtension.ext(asset).classes
        return [(one.value, one.name, one.color_hint, bool(one.nodata)) for one in found]

    assert classes("labels_2018-09-01", "labels") == [
        (0, "wheat", "E3B505", False), (1, "maize", "2F7D4F", False),
        (255, "unlabelled", None, True),
    ]  # fmt: skip
    scenes = classes("2018-09-08", "scl")
    assert [value for value, *_ in scenes] == list(range(12))
    assert scenes[0] == (0, "no-data", "000000", True)
    assert scenes[8] == (8, "cloud-medium-probability", "C0C0C0", False)
    with rasterio.open(folder / "2018-09-08_scl.tif") as source:
        palette = {code: bytes(c[:3]).hex().upper() for code, c in source.colormap(1).items()}
    assert all(palette[value] == color for value, _, color, _ in scenes)
    assert [name for _, name, *_ in classes("2018-09-08", "valid")] == ["not-usable", "usable"]


def test_xarray_finds_in_the_cube_what_codes_mean(cube: Path):
    stored = xr.open_zarr(cube / "2018-09-01")
    meanings = {
        name: dict(
            zip(array.attrs["flag_values"], array.attrs["flag_meanings"].split(), strict=True)
        )
        for name, array in stored[["labels", "scl"]].items()
    }
    assert meanings["labels"] == {0: "wheat", 1: "maize", 255: "unlabelled"}
    assert set(np.unique(stored["scl"])) <= set(meanings["scl"])
    assert (meanings["scl"][3], meanings["scl"][11]) == ("cloud_shadow", "snow_or_ice")


def test_a_second_run_writes_nothing_and_a_changed_date_only_itself(cube: Path, tmp_path: Path):
    import zarr

    mine = make_cube(tmp_path / "own.zarr")
    out = tmp_path / "o"
    export_cube(mine, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    again = export_cube(mine, out)
    assert again.written == ()
    assert "nothing to do" in str(again)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tif")} == before

    # As after an append that found a scene processed anew.
    group: Any = zarr.open_group(mine / "2018-09-01", mode="r+", use_consolidated=False)
    group["item_ids"][1] = "B_reprocessed"
    assert export_cube(mine, out).written == ("2018-09-08_reflectance.tif",)
    # A file that was removed comes back, and another kind joins the items.
    (out / "2018-09-03_reflectance.tif").unlink()
    report = export_cube(mine, out, what=("reflectance", "valid"), dates="2018-09-01/2018-09-30")
    assert report.written == (
        "2018-09-03_reflectance.tif", "2018-09-03_valid.tif", "2018-09-08_valid.tif",
    )  # fmt: skip
    assert set(json.loads((out / "2018-09-08.json").read_text())["assets"]) == {
        "reflectance", "valid",
    }  # fmt: skip


def test_labels_that_are_burnt_again_are_written_again(tmp_path: Path):
    mine, out = make_cube(tmp_path / "own.zarr"), tmp_path / "o"
    export_cube(mine, out, what=("labels",))
    season = open_season(mine, mode="r+")
    assert season.fields is not None
    assert season.legend is not None
    write_split(season, np.ones(2, dtype=np.uint8))
    assert export_cube(mine, out, what=("labels",)).written == ()

    # The same fields, each a pixel further down: as many pixels as before.
    labels, parcels = (np.roll(array[:], 1, axis=0) for array in (season.labels, season.parcels))
    write_fields(season, labels=labels, parcels=parcels, fields=season.fields, legend=season.legend)
    assert export_cube(mine, out, what=("labels",)).written == ("labels_2018-09-01.tif",)
    with rasterio.open(out / "labels_2018-09-01.tif") as source:
        np.testing.assert_array_equal(source.read(1), labels)


@pytest.mark.parametrize(
    ("dates", "written"),
    [((0, 1, 2, 3), ("2018-09-08_reflectance.tif",)), ((0, 3), ())],
    ids=["a date between others", "dates that are gone"],
)
def test_items_keep_their_files_when_dates_move(
    tmp_path: Path, dates: tuple[int, ...], written: tuple[str, ...]
):
    out = tmp_path / "o"
    places = [0, 2, 3]
    for path, kept in ((tmp_path / "1" / "own.zarr", places), (tmp_path / "2" / "own.zarr", dates)):
        path.parent.mkdir()
        times, items = ([values[place] for place in kept] for values in (TIMES, ITEMS))
        report = export_cube(make_cube(path, times=times, items=items), out)

    assert report.written == written
    content = json.loads((out / "collection.json").read_text())
    items = [link["href"] for link in content["links"] if link["rel"] == "item"]
    assert items == [f"./{TIMES[place][:10]}.json" for place in dates]
    for place in dates:
        day = TIMES[place][:10]
        item = json.loads((out / f"{day}.json").read_text())
        assert item["properties"]["datetime"] == f"{TIMES[place]}Z"
        (asset,) = item["assets"].values()
        assert asset["href"] == f"./{day}_reflectance.tif"
        with rasterio.open(out / asset["href"]) as source:
            assert source.tags()["ACQUISITION_TIME"] == f"{TIMES[place]}Z"


def test_a_killed_export_goes_on(cube: Path, folder: Path, tmp_path: Path):
    out = tmp_path / "o"
    script = (
        "import os, signal, sys\n"
        "from stcln_geo.export import export_cube, files\n"
        "files._DATES_AT_A_TIME = 2\n"
        "def kill(done, total, what):\n"
        "    if what.startswith('2018-09-08'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_cube(sys.argv[1], sys.argv[2], progress=kill)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", script, str(cube), str(out)], env=environment)
    assert done.returncode == -9
    assert {path.name for path in out.glob("*.tif")} == {
        "2018-09-03_reflectance.tif", "2018-09-08_reflectance.tif",
    }  # fmt: skip
    assert list(out.glob(".export-*"))
    first = (out / "2018-09-03_reflectance.tif").stat().st_mtime_ns
    report = export_cube(cube, out)
    assert "2018-09-03_reflectance.tif" in report.kept
    assert (out / "2018-09-03_reflectance.tif").stat().st_mtime_ns == first
    assert not list(out.glob(".*"))
    for name in ("2018-09-03", "2018-09-08", "2019-02-11", "2019-07-01"):
        name += "_reflectance.tif"
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_composites_carry_their_period(tmp_path: Path):
    geobox = geobox_from_window(Window(0, 0, 40, 50), crs="EPSG:32631", resolution=10)
    season = create_season(
        tmp_path / "c.zarr", "2018-09-01", geobox=geobox, bands=("red",),
        time=np.array(["2018-09-06"], "datetime64[s]"), aoi=box(*geobox.boundingbox.bbox),
        with_observations=True,
        date_attrs={"item_ids": ["A"], "period_start": ["2018-09-01"],
                    "period_end": ["2018-09-10"]},
    )  # fmt: skip
    assert season.scl is None
    finish_season(tmp_path / "c.zarr", "2018-09-01")
    export_cube(tmp_path / "c.zarr", tmp_path / "o")
    properties = json.loads((tmp_path / "o" / "2018-09-06.json").read_text())["properties"]
    assert properties["start_datetime"] == "2018-09-01T00:00:00Z"
    assert properties["end_datetime"] == "2018-09-10T23:59:59Z"


def test_the_command_and_its_refusals(cube: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "o"

    def run(*options: str) -> tuple[int, str]:
        code = invoke(["cube", "export", str(cube), str(out), *options])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    code, text = run("--dry-run", "--what", "reflectance,labels")
    assert code == 0
    assert "4 files reflectance of red, rededge1, nir: 0.123 MB each" in text
    assert "5 to write" in text
    assert not out.exists()
    assert run("--dates", "2018-09-01/2018-09-05", "--bands", "red")[0] == 0
    for options, words in (
        (["--bands", "blue"], "It has: red, rededge1, nir"),
        (["--bands", "red,red"], "once"),
        (["--what", "sky"], "reflectance, valid, scl, labels"),
        (["--dates", "2012-01-01/2012-02-01"], "has none of them"),
        (["--season", "2001-09-01"], "does not exist"),
        ([], "Choose another folder, or replace them with --overwrite"),
        (["--clear-only", "--bands", "red"], "of clear pixels only"),
    ):
        code, text = run(*options)
        assert (code, "Traceback" in text) == (2, False)
        assert words in text
    with cube_lock(out):
        assert run("--bands", "red")[0] == 2
    assert run("--overwrite")[0] == 0
    other = make_cube(tmp_path / "other.zarr")
    assert invoke(["cube", "export", str(other), str(out)]) == 2
    assert "holds season 2018-09-01 of own.zarr" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "2018-09-03_reflectance.tif").write_text("mine")
    assert invoke(["cube", "export", str(cube), str(tmp_path / "foreign")]) == 2
    assert "may be yours" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "collection.json").write_text("mine")
    assert invoke(["cube", "export", str(cube), str(tmp_path / "catalog")]) == 2
    assert "collection.json is there" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "catalog" / "collection.json").read_text() == "mine"
    assert invoke(["cube", "export", str(tmp_path / "none.zarr"), str(out)]) == 2
    (tmp_path / "file").write_text("")
    assert invoke(["cube", "export", str(cube), str(tmp_path / "file")]) == 2


def test_dates_that_share_a_day_have_names_of_their_own(tmp_path: Path):
    geobox = geobox_from_window(Window(0, 0, 40, 50), crs="EPSG:32601", resolution=10)
    create_season(
        tmp_path / "c.zarr", "2018-09-01", geobox=geobox, bands=("red",),
        time=np.array(["2018-10-01T00:10:00", "2018-10-01T23:50:00"], "datetime64[s]"),
        aoi=box(*geobox.boundingbox.bbox),
    )  # fmt: skip
    finish_season(tmp_path / "c.zarr", "2018-09-01")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = plan_export(tmp_path / "c.zarr", tmp_path / "o")
    assert [file.name for file in plan.files] == [
        "2018-10-01T001000_reflectance.tif", "2018-10-01T235000_reflectance.tif",
    ]  # fmt: skip
