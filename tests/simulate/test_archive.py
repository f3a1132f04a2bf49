"""The written archive: valid COGs, a readable static catalog, parcels like the pixels."""

from __future__ import annotations

import json
import os
import pathlib

import geopandas
import numpy as np
import pystac
import pytest
import rasterio
import shapely
from pyproj import Transformer
from rasterio.features import rasterize
from rio_cogeo.cogeo import cog_validate

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube.lock import cube_lock
from stcln_geo.cube.plan import plan_cube
from stcln_geo.cube.search import search_items
from stcln_geo.errors import OutputError
from stcln_geo.execution import Execution
from stcln_geo.grid import Window
from stcln_geo.region import Region
from stcln_geo.simulate import (
    CROPS,
    SimulationSpec,
    make_landscape,
    plan_archive,
    render_scene,
    simulate_archive,
)
from stcln_geo.simulate.stac import ASSETS, mgrs_square

SPEC = SimulationSpec(width=101, height=67, dates=7, seed=6)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return simulate_archive(tmp_path_factory.mktemp("archive"), SPEC)


def _items(archive):
    return list(pystac.Catalog.from_file(str(archive.catalog)).get_items(recursive=True))


def test_catalog_reads_and_links_to_every_file(archive):
    items = _items(archive)
    assert [item.id for item in items] == list(archive.items)
    assert len(items) == SPEC.dates
    collection = pystac.Catalog.from_file(str(archive.catalog)).get_child(archive.collection)
    assert collection.id == "simulated-sentinel-2-l2a"
    for item, acquisition in zip(items, SPEC.acquisitions, strict=True):
        assert set(item.assets) == set(ASSETS)
        assert item.datetime == acquisition.when
        assert item.properties["grid:code"] == "MGRS-31UES"
        raw = json.loads(pathlib.Path(item.self_href).read_text())
        assert raw["properties"]["proj:epsg"] == 32631
        assert item.properties["sat:relative_orbit"] == acquisition.orbit
        for asset in item.assets.values():
            assert os.path.exists(asset.get_absolute_href())


def test_files_are_strictly_valid_cogs_of_the_declared_form(archive):
    for item in _items(archive):
        for key, asset in item.assets.items():
            path = asset.get_absolute_href()
            valid, errors, warnings = cog_validate(path, strict=True, quiet=True)
            assert valid, (path, errors, warnings)
            with rasterio.open(path) as file:
                band = asset.extra_fields["raster:bands"][0]
                assert file.crs.to_epsg() == SPEC.epsg
                assert list(file.shape) == asset.extra_fields["proj:shape"]
                assert list(file.transform)[:6] == asset.extra_fields["proj:transform"]
                assert (file.dtypes[0], file.nodata) == (band["data_type"], 0)
                assert file.res == (asset.extra_fields["gsd"],) * 2
                assert file.shape == ((67, 101) if file.res[0] == 10 else (34, 51)), key


def test_pixels_are_those_of_the_rendered_scene(archive):
    window = Window(SPEC.window.row, SPEC.window.col, 68, 102)
    for item, acquisition in zip(_items(archive), SPEC.acquisitions, strict=True):
        scene = render_scene(SPEC, acquisition, window)
        for key in ASSETS:
            expected = scene.scl if key == "scl" else scene.bands[key]
            with rasterio.open(item.assets[key].get_absolute_href()) as file:
                stored = file.read(1)
            np.testing.assert_array_equal(stored, expected[: stored.shape[0], : stored.shape[1]])


def test_footprint_and_nodata_agree(archive):
    orbits = set()
    for item in _items(archive):
        partial = item.properties["sat:relative_orbit"] == 8
        orbits.add(partial)
        with rasterio.open(item.assets["red"].get_absolute_href()) as file:
            seen = file.read(1) > 0
            whole = file.shape[0] * file.shape[1] * 100
        shape = geopandas.GeoSeries([shapely.geometry.shape(item.geometry)], crs=4326)
        share = float(shape.to_crs(SPEC.epsg).area.iloc[0]) / whole
        assert seen.mean() == pytest.approx(share, abs=0.01)
        assert bool(seen.all()) is not partial
        np.testing.assert_allclose(item.bbox, shapely.geometry.shape(item.geometry).bounds)
    assert orbits == {True, False}


def test_later_baseline_adds_1000_and_declares_it(tmp_path):
    # Without clouds the darkest pixels of blue show what was added.
    spec = SimulationSpec(width=64, height=48, dates=8, seed=6, cloud_fraction=0.0)
    offsets = set()
    for item in _items(simulate_archive(tmp_path, spec)):
        late = item.properties["s2:processing_baseline"] == "05.10"
        assert item.properties["earthsearch:boa_offset_applied"] is False
        assert late == (item.datetime >= spec.acquisitions[0].when.replace(2022, 1, 25, 0, 0))
        band = item.assets["blue"].extra_fields["raster:bands"][0]
        assert (band["scale"], band["offset"]) == (1e-4, -0.1 if late else 0)
        assert "offset" not in item.assets["scl"].extra_fields["raster:bands"][0]
        offsets.add(band["offset"])
        with rasterio.open(item.assets["blue"].get_absolute_href()) as file:
            numbers = file.read(1)
        reflectance = numbers[numbers > 0] * band["scale"] + band["offset"]
        assert -0.01 < np.percentile(reflectance, 1) < 0.09
    assert offsets == {0, -0.1}


def test_parcels_agree_with_the_drawn_crops(archive):
    parcels = geopandas.read_file(archive.parcels)
    assert list(parcels.columns) == ["field_id", "crop_code", "crop_name", "geometry"]
    assert parcels.crs.to_epsg() == SPEC.epsg
    assert parcels.field_id.is_unique
    codes = [crop.code for crop in CROPS]
    with rasterio.open(_items(archive)[0].assets["red"].get_absolute_href()) as file:
        burnt = rasterize(
            zip(parcels.geometry, [codes.index(code) for code in parcels.crop_code], strict=True),
            out_shape=file.shape,
            transform=file.transform,
            fill=255,
            dtype="uint8",
        )
    window = Window(SPEC.window.row, SPEC.window.col, 67, 101)
    drawn = make_landscape(SPEC, window).crops(0)
    assert (burnt < 255).mean() > 0.4
    np.testing.assert_array_equal(burnt, drawn)


def test_parcels_do_not_overlap_and_lie_in_the_region(archive):
    parcels = geopandas.read_file(archive.parcels)
    west, south, east, north = SPEC.bounds
    assert shapely.box(west, south, east, north).buffer(0.01).covers(parcels.union_all())
    assert parcels.union_all().area == pytest.approx(parcels.area.sum(), rel=1e-9)


def test_region_covers_the_archive_and_no_more(archive):
    region = geopandas.read_file(archive.region).to_crs(SPEC.epsg)
    np.testing.assert_allclose(region.total_bounds, SPEC.bounds, atol=2)
    west, south, east, north = SPEC.bounds
    assert shapely.box(west, south, east, north).covers(region.geometry.iloc[0])


def test_legend_names_every_code_of_the_parcels(archive):
    lines = archive.legend.read_text().splitlines()
    assert lines[0] == "value,name,color"
    values = {line.split(",")[0] for line in lines[1:]}
    assert set(geopandas.read_file(archive.parcels).crop_code) <= values
    assert len(values) == len(CROPS)


def test_running_again_keeps_files_and_restores_a_lost_one(tmp_path):
    spec = SimulationSpec(width=40, height=33, dates=3, seed=1)
    archive = simulate_archive(tmp_path, spec)
    paths = sorted(tmp_path.glob("S2*/*.tif"))
    content = {path: path.read_bytes() for path in paths}
    paths[4].unlink()
    left = paths[4].with_name(f".{paths[4].name}.raw")
    left.write_bytes(b"left by a killed run")
    stamps = {path: path.stat().st_mtime_ns for path in paths if path.exists()}

    told = []
    again = simulate_archive(tmp_path, spec, progress=lambda *values: told.append(values))
    assert again == archive
    assert {path: path.read_bytes() for path in paths} == content
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert told[-1][:2] == (3, 3)
    assert not left.exists()
    assert not [path for path in tmp_path.rglob(".*")]
    with pytest.raises(OutputError, match=r"seed 1 \(now 2\)"):
        simulate_archive(tmp_path, SimulationSpec(width=40, height=33, dates=3, seed=2))


@pytest.mark.parametrize("name", ["parcels.gpkg", "legend.csv", "region.geojson", "catalog.json"])
def test_files_of_others_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(OutputError, match=rf"holds other files.*\({name}\).*another folder"):
        simulate_archive(tmp_path, SPEC)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"precious"]


def test_one_process_writes_an_archive_at_a_time(tmp_path):
    with cube_lock(tmp_path / "a"), pytest.raises(OutputError, match=r"has been writing it since"):
        simulate_archive(tmp_path / "a", SPEC)
    simulate_archive(tmp_path / "a", SPEC)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "simulation.json").write_text("")
    with pytest.raises(OutputError, match=r"recipe simulation\.json cannot be read"):
        simulate_archive(tmp_path, SPEC)


def test_workers_write_the_same_files(tmp_path):
    spec = SimulationSpec(width=50, height=37, dates=2, seed=3)
    one = simulate_archive(tmp_path / "one", spec)
    two = simulate_archive(tmp_path / "two", spec, execution=Execution(workers=2))
    for path in sorted(one.folder.rglob("*.tif")) + sorted(one.folder.rglob("*.json")):
        assert path.read_bytes() == (two.folder / path.relative_to(one.folder)).read_bytes()


def test_more_than_one_block_has_no_seam(tmp_path):
    spec = SimulationSpec(width=523, height=35, dates=2, seed=8)
    archive = simulate_archive(tmp_path, spec)
    window = Window(spec.window.row, spec.window.col, 36, 524)
    for item, acquisition in zip(_items(archive), spec.acquisitions, strict=True):
        scene = render_scene(spec, acquisition, window)
        for key in ("green", "swir16"):
            path = item.assets[key].get_absolute_href()
            assert cog_validate(path, strict=True, quiet=True)[0]
            with rasterio.open(path) as file:
                stored = file.read(1)
            cut = scene.bands[key][: stored.shape[0], : stored.shape[1]]
            np.testing.assert_array_equal(stored, cut)


def test_second_season_has_crop_columns_of_its_own(tmp_path):
    spec = SimulationSpec(width=60, height=45, dates=2, seasons=2, seed=1)
    archive = simulate_archive(tmp_path, spec)
    parcels = geopandas.read_file(archive.parcels)
    assert (parcels.crop_code == parcels.crop_code_2021).all()
    assert (parcels.crop_code != parcels.crop_code_2022).any()
    assert len(_items(archive)) == 4
    assert archive.time_range == "2021-09-01/2023-08-31"


def test_plan_counts_what_is_written(archive):
    plan = plan_archive(archive.folder, SPEC)
    paths = list(archive.folder.glob("S2*/*.tif"))
    assert plan.existing == plan.files == len(paths) == 7 * 11
    raw = 0
    for path in paths:
        with rasterio.open(path) as file:
            raw += file.width * file.height * np.dtype(file.dtypes[0]).itemsize
    assert plan.raw_bytes == raw
    on_disk = sum(path.stat().st_size for path in paths)
    assert 0.6 < plan.packed_bytes / on_disk < 1.5


@pytest.mark.parametrize(
    ("crs", "x", "y", "square"),
    [
        ("EPSG:32631", 573_000, 5_625_000, "31UES"),
        ("EPSG:32632", 600_000, 5_300_040, "32TPT"),
        ("EPSG:32737", 260_880, 9_649_980, "37MBS"),
    ],
    ids=["flanders", "bavaria", "tanzania"],
)
def test_grid_squares(crs, x, y, square):
    spec = SimulationSpec(crs=crs, origin_x=x, origin_y=y, width=101, height=67)
    assert mgrs_square(spec) == square


def test_an_archive_across_the_antimeridian_is_split_there_and_becomes_one_cube(tmp_path):
    spec = SimulationSpec(width=150, height=67, dates=2, crs="EPSG:32760", origin_x=818_700,
                          origin_y=8_118_600, cloud_fraction=0.0)  # fmt: skip
    archive = simulate_archive(tmp_path / "fiji", spec)
    region = Region.from_file(archive.region)
    around = Transformer.from_crs(spec.crs, 4326, always_xy=True).transform_bounds(*spec.bounds)
    assert region.bbox == pytest.approx(around, abs=2e-5)
    assert region.bbox[0] > 179 > -179 > region.bbox[2]
    for item in _items(archive):
        assert item.geometry["type"] == "MultiPolygon"
        assert item.bbox[2] < -179 < 179 < item.bbox[0]
        # On either side, and on both, all scenes are found.
        for bbox in ("179.995,-17,179.998,-16.996", "179.995,-17,-179.995,-16.996"):
            found = search_items(load_catalog(archive.catalog), region=Region.from_bbox(bbox))
            assert item.id in [one["id"] for one in found.items]
    plan = plan_cube(search_items(load_catalog(archive.catalog), region=region), region)
    assert plan.crs == "EPSG:32760"
    assert plan.window.width < spec.width + 2 * 32


def test_command_line(tmp_path, capsys):
    out = tmp_path / "made"
    arguments = ["simulate", str(out), "--size", "41x33", "--dates", "2", "--seed", "5"]
    assert invoke([*arguments, "--dry-run"]) == 0
    assert "22 COGs, 0 of them written" in capsys.readouterr().out
    assert not out.exists()
    assert invoke([*arguments, "--crs", "EPSG:32756"]) == 0
    told = "2021-03-01/2022-02-28, with --season-start 03-01"
    assert told in " ".join(capsys.readouterr().out.split())
    dates = [name.split("_")[2] for name in os.listdir(out) if name.startswith("S2")]
    assert all("20210301" <= date <= "20220228" for date in dates)
    assert len(json.loads((out / "collection.json").read_text())["links"]) == 4
    assert invoke(["simulate", str(out), "--size", "big"]) == 2
    assert "--size 'big'" in capsys.readouterr().err
