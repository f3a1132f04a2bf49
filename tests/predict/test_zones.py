"""Maps of several UTM zones: they partition the region, and the mosaic shows them as they are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from pyproj import Transformer
from pystac.validation import validate_dict

from stcln_geo.cli.main import invoke
from stcln_geo.cog import validate_cog
from stcln_geo.cube.store import (
    Layout,
    Season,
    create_season,
    finish_season,
    open_season,
    shards_of,
    write_shard,
)
from stcln_geo.errors import InputError, OutputError, TaskError
from stcln_geo.grid import snapped_geobox
from stcln_geo.maps import open_class_map
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.predict import PredictSpec, predict_region
from stcln_geo.predict import run as run_module
from stcln_geo.predict.qa import QA_LEGEND
from stcln_geo.predict.zones import find_zone_cubes, plan_zone_maps, run_zone_maps
from stcln_geo.region import Region
from stcln_geo.report.beside import ACCURACY_FILES

from ..gdal_python import gdal_names

REGION = Region.from_bbox((5.9903, 50.4949, 6.0062, 50.5031))
"""About 1.1 x 0.9 km, two thirds of it west of the line at 6 E."""

CODES = ("32631", "32632")
NAME = "map #1 of 50%"
SPEC = PredictSpec(device="cpu", precision="float32", min_clear=1, seam_audit=0)
LAYERS = ("classes", "confidence", "qa", "observations")


def build(world: Any, path: Path, crs: str, part: Region, *, name: str = "2018-09-01") -> Season:
    """Write a cube of a zone, whose pixels depend on their place in it."""
    aoi = part.to_crs(crs)
    days = np.array([20, 110, 140, 260])
    building = create_season(
        path, name, aoi=aoi, lattice=world.lattice, bands=world.bands,
        geobox=snapped_geobox(aoi, crs=crs, resolution=10, lattice=world.lattice),
        time=np.datetime64(name, "s") + days * np.timedelta64(86400, "s"),
        layout=Layout(chunk=32, shard=64),
    )  # fmt: skip
    for shard in shards_of(building):
        place = shard.shift(building.window.row, building.window.col)
        numbers, valid = world.pixels_at(place, 8, len(world.bands))
        write_shard(building, shard, reflectance=numbers[::2], valid=valid[::2])
    finish_season(path, name)
    return open_season(path)


@pytest.fixture(scope="module")
def cubes(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Season]:
    folder = tmp_path_factory.mktemp("zones")
    return {
        zone[-5:]: build(world, folder / f"region-{zone[-5:]}.zarr", zone, part)
        for zone, part in REGION.by_utm_zone(margin=320.0).items()
    }


@pytest.fixture(scope="module")
def product(world: Any, cubes: dict[str, Season], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The map, as the command makes it from the name that the cubes were built under."""
    out = tmp_path_factory.mktemp("product") / NAME
    name = cubes["32631"].cube.parent / "region.zarr"
    arguments = ["predict", str(name), "--checkpoint", str(world.checkpoint), "--out", str(out),
                 "--device", "cpu", "--min-clear", "1", "--seam-audit", "0"]  # fmt: skip
    assert invoke(arguments) == 0
    return out


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as source:
        return source.read(1)


def places(path: Path, right: float = 0.5, down: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Return longitude and latitude of a place in each of a raster's pixels, (H, W) each."""
    with rasterio.open(path) as source:
        rows, cols = np.indices(source.shape)
        affine, crs = source.transform, source.crs
    x, y = affine.c + affine.a * (cols + right), affine.f + affine.e * (rows + down)
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)


def touches_its_zone(path: Path) -> np.ndarray:
    """Return which pixels of a zone's map have a corner in the zone, (H, W) bool."""
    west_zone = path.parent.name == "32631"
    corners = [places(path, right, down)[0] for right in (0, 1) for down in (0, 1)]
    return np.any([(lon < 6.0) if west_zone else (lon >= 6.0) for lon in corners], axis=0)


def at(path: Path, lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the value of a map's pixel at each place, -1 beyond it, and how near its edge it is.

    The second is the distance to the nearest side of the pixel, in pixels.
    """
    with rasterio.open(path) as source:
        values, affine, crs = source.read(1), source.transform, source.crs
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    cols, rows = (x - affine.c) / affine.a, (y - affine.f) / affine.e
    row, col = np.floor(rows).astype(int), np.floor(cols).astype(int)
    inside = (row >= 0) & (row < values.shape[0]) & (col >= 0) & (col < values.shape[1])
    found = np.full(lon.shape, -1)
    found[inside] = values[row[inside], col[inside]]
    return found, np.minimum(np.abs(cols - np.rint(cols)), np.abs(rows - np.rint(rows)))


def test_a_zone_maps_the_pixels_that_touch_it(product: Path) -> None:
    west, south, east, north = REGION.geometry.bounds
    for code in CODES:
        path = product / code / "qa.tif"
        lon, lat = places(path)
        owned = touches_its_zone(path)
        owned &= (lon > west) & (lon < east) & (lat > south) & (lat < north)
        assert np.array_equal(read(path) != 1, owned)
        assert 3000 < owned.sum() < owned.size


def test_the_maps_share_the_region_out(product: Path) -> None:
    """Every place is mapped by its zone; by the other only in a pixel that the line cuts."""
    generator = np.random.default_rng(4)
    west, south, east, north = REGION.geometry.bounds
    lon, lat = generator.uniform(west, east, 60_000), generator.uniform(south, north, 60_000)
    lon[:20_000] = generator.uniform(5.9997, 6.0003, 20_000)
    # The rim of the region goes by centres: half the diagonal of a pixel of 10 m.
    rim = np.minimum(lon - west, east - lon) < 0.000101
    rim |= np.minimum(lat - south, north - lat) < 0.000065
    for code, own in zip(CODES, (lon < 6.0, lon >= 6.0), strict=True):
        path = product / code / "qa.tif"
        mapped = np.isin(at(path, lon, lat)[0], (0, 2, 3))
        assert mapped[own & ~rim].all()
        with rasterio.open(path) as source:
            crs, affine = source.crs, source.transform
        x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
        col, row = np.floor((x - affine.c) / 10), np.floor((affine.f - y) / 10)
        back = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
        corners = [
            back.transform(affine.c + 10 * (col + right), affine.f - 10 * (row + down))[0]
            for right in (0, 1) for down in (0, 1)
        ]  # fmt: skip
        cut = (np.min(corners, axis=0) < 6.0) & (np.max(corners, axis=0) >= 6.0)
        assert np.array_equal(mapped[~own & ~rim], cut[~own & ~rim])
        assert (mapped & ~own).any()


def test_each_map_is_that_of_its_cube(
    world: Any, cubes: dict[str, Season], product: Path, tmp_path: Path
) -> None:
    """Also at the line, where the cube reaches beyond: windows are whole in both zones."""
    for code in CODES:
        whole = predict_region(cubes[code].cube, world.checkpoint, tmp_path / code, spec=SPEC)
        with (
            rasterio.open(whole.classes) as ours,
            rasterio.open(product / code / "classes.tif") as part,
        ):
            row = round((ours.transform.f - part.transform.f) / 10)
            col = round((part.transform.c - ours.transform.c) / 10)
            expected = ours.read(1)[row : row + part.height, col : col + part.width]
            found = part.read(1)
        mapped = read(product / code / "qa.tif") == 0
        assert np.array_equal(found[mapped], expected[mapped])
        assert len(np.unique(found[mapped])) > 1
        for layer in LAYERS:
            assert validate_cog(product / code / f"{layer}.tif") == ([], [])


@pytest.mark.parametrize("layer", LAYERS)
def test_the_mosaic_shows_the_zones_pixels(product: Path, layer: str) -> None:
    path = product / f"{layer}.vrt"
    nothing = 1 if layer == "qa" else 255
    with rasterio.open(path) as mosaic:
        assert mosaic.crs.to_epsg() == 32631, "it holds most of the region"
        assert mosaic.nodata == nothing
        assert mosaic.res == (10, 10)
        found = mosaic.read(1)
    lon, lat = places(path)
    own, _ = at(product / "32631" / f"{layer}.tif", lon, lat)
    other, edge = at(product / "32632" / f"{layer}.tif", lon, lat)
    own, other = (np.where(one < 0, nothing, one) for one in (own, other))
    expected = np.where(own != nothing, own, other)
    sure = (own != nothing) | (edge > 0.02)
    assert np.array_equal(found[sure], expected[sure])
    assert sure.mean() > 0.9
    assert (found[(own == nothing) & sure] != nothing).sum() > 2000, "the other zone is shown"
    if layer == "qa":
        west, south, east, north = REGION.geometry.bounds
        inner = (lon > west + 2e-4) & (lon < east - 2e-4) & (lat > south + 1e-4)
        inner &= lat < north - 1e-4
        assert (found[inner] != nothing).all(), "no gap along the line"


def test_names_colours_and_legend_come_through(world: Any, product: Path) -> None:
    opened = open_class_map(product)
    assert opened.legend == world.legend
    assert opened.confidence == product / "confidence.vrt"
    assert opened.name == product.name
    with rasterio.open(product / "classes.vrt") as mosaic:
        palette = mosaic.colormap(1)
        assert all(palette[code] == color for code, color in world.legend.colormap().items())
        assert mosaic.colorinterp[0].name == "palette"
        assert mosaic.tags()["STCLN_GEO_KIND"] == "classes"
    told = gdal_names(product / "classes.vrt")
    assert told["categories"] == list(world.legend.names)
    assert told["table"] == [[entry.code, entry.name] for entry in world.legend.classes]
    assert told["colors"] == [list(palette[code]) for code in range(256)]
    assert gdal_names(product / "qa.vrt")["categories"] == list(QA_LEGEND.names)


def test_the_folder_can_be_moved(product: Path, tmp_path: Path) -> None:
    expected = read(product / "classes.vrt")
    shutil.copytree(product, tmp_path / "elsewhere")
    assert str(product.parent) not in (tmp_path / "elsewhere" / "classes.vrt").read_text()
    for path in (tmp_path / "elsewhere" / "32632").glob("*.tif"):
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as source:
            source.write(np.zeros(source.shape, np.uint8), 1)
    moved = read(tmp_path / "elsewhere" / "classes.vrt")
    changed = moved != expected
    assert changed.any()
    assert (moved[changed] == 0).all(), "it shows the files beside it, not those it was made of"


def test_a_coarse_view_is_made_of_classes(product: Path) -> None:
    with rasterio.open(product / "classes.vrt") as mosaic:
        small = mosaic.read(1, out_shape=(mosaic.height // 7, mosaic.width // 7))
        assert set(np.unique(small)) <= {*np.unique(mosaic.read(1)).tolist(), 255}


def test_the_collection_leads_to_the_items_and_back(product: Path, tmp_path: Path) -> None:
    # pystac takes what follows a "#" for a part of an address.
    product = shutil.copytree(product, tmp_path / "map")
    collection = pystac.Collection.from_file(str(product / "collection.json"))
    items = list(collection.get_items())
    assert [item.id for item in items] == [f"{NAME}-{code}-2018-09-01" for code in CODES]
    for code, item in zip(CODES, items, strict=True):
        assert item.properties["proj:code"] == f"EPSG:{code}"
        assert item.collection_id == collection.id
        for asset in item.assets.values():
            assert asset.href.startswith("./")
            assert (product / code / asset.href).is_file()
        assert item.get_collection().id == collection.id
        # The schemas of the extensions are on the web; those that pystac brings know the core.
        assert validate_dict({**item.to_dict(), "stac_extensions": []})
    for asset in collection.assets.values():
        assert (product / asset.href).is_file()
    text = (product / "collection.json").read_text()
    assert str(product) not in text
    assert [link["href"] for link in json.loads(text)["links"] if link["rel"] == "item"] == [
        "./32631/item.json", "./32632/item.json",
    ]  # fmt: skip
    west, south, east, north = collection.extent.spatial.bboxes[0]
    assert np.allclose([west, south, east, north], REGION.geometry.bounds, atol=2e-4)
    assert validate_dict(json.loads(text))


def test_parcels_and_polygons_take_the_whole(product: Path, tmp_path: Path) -> None:
    import geopandas

    parcels = geopandas.GeoDataFrame(
        {"name": ["west", "across", "east"]},
        geometry=[
            shapely.box(5.992, 50.497, 5.994, 50.499),
            shapely.box(5.999, 50.497, 6.001, 50.499),
            shapely.box(6.003, 50.497, 6.005, 50.499),
        ],
        crs="EPSG:4326",
    )
    parcels.to_file(tmp_path / "parcels.gpkg")
    out = str(tmp_path / "result.gpkg")
    assert invoke(["parcels", str(product), str(tmp_path / "parcels.gpkg"), out]) == 0
    table = geopandas.read_file(out)
    assert (table["map_outside"] < 0.001).all()
    assert (table["map_pixels"] > 100).all()
    polygons = str(tmp_path / "polygons.gpkg")
    assert invoke(["polygons", str(product), polygons]) == 0
    patches = geopandas.read_file(polygons)
    assert patches["pixels"].sum() == (read(product / "classes.vrt") != 255).sum()


def test_a_second_run_keeps_all_and_an_interrupted_one_continues(
    world: Any, cubes: dict[str, Season], product: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spec = PredictSpec(device="cpu", precision="float32", min_clear=1, seam_audit=0, shard_size=64)
    plan = plan_zone_maps(list(cubes.values()), read_metadata(world.checkpoint), spec)
    predict_shard = run_module.predict_shard
    left = len(plan.plans["32631"].shards) + 2

    def stop(task: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return predict_shard(task)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "predict_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            run_zone_maps(plan, tmp_path / "map")
    assert not (tmp_path / "map" / "classes.vrt").exists()
    made = run_zone_maps(plan, tmp_path / "map")
    assert made.zones["32631"].resumed_shards == len(plan.plans["32631"].shards)
    assert made.zones["32632"].resumed_shards == 1
    for layer in LAYERS:
        assert np.array_equal(
            read(tmp_path / "map" / f"{layer}.vrt"), read(product / f"{layer}.vrt")
        )
    collection = made.collection.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "predict_shard", None)
        run_zone_maps(plan, tmp_path / "map")
    assert made.collection.read_bytes() == collection
    names = {path.name for path in (tmp_path / "map").iterdir()}
    assert names == {
        *CODES, "warped", "classes.vrt", "confidence.vrt", "qa.vrt", "observations.vrt",
        "collection.json", "classes.qml", "qa.qml", "legend.json", "legend.csv",
    }  # fmt: skip
    assert len(list((tmp_path / "map" / "warped").iterdir())) == 4


def test_a_zone_whose_shards_fail_does_not_stop_the_others(
    world: Any, cubes: dict[str, Season], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, shard_size=64)
    plan = plan_zone_maps(list(cubes.values()), read_metadata(world.checkpoint), spec)
    predict_shard = run_module.predict_shard
    shards = [one.shards for one in plan.plans.values()]
    first = shards[0][0]

    def fail_in_the_west(task: Any) -> Any:
        if task.out.endswith("32631") and task.shard[:2] == (first.row, first.col):
            raise RuntimeError("a broken chunk")
        return predict_shard(task)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "predict_shard", fail_in_the_west)
        with pytest.raises(TaskError, match=r"EPSG:32631: 1 of \d+ shards failed.*a broken chunk"):
            run_zone_maps(plan, tmp_path)
    shown = read(tmp_path / "qa.vrt")
    assert (shown == 5).sum() > 1000, "the failed shard"
    assert (shown == 0).sum() > 1000, "the others"
    made = run_zone_maps(plan, tmp_path)
    assert made.zones["32631"].resumed_shards == len(shards[0]) - 1
    assert made.zones["32632"].resumed_shards == len(shards[1])
    assert not (read(tmp_path / "qa.vrt") == 5).any()


def test_the_plan_is_printed_and_nothing_written(
    world: Any, cubes: dict[str, Season], tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    paths = [str(season.cube) for season in cubes.values()]
    common = ["--checkpoint", str(world.checkpoint), "--out", str(tmp_path / "map"), "--dry-run"]
    assert invoke(["predict", *paths, *common]) == 0
    text = capsys.readouterr().out
    # A scheduler's workers run one window at a time, however many cores this machine has.
    monkeypatch.setattr("stcln_geo.predict.planning.available_cores", lambda: 64)
    assert invoke(["predict", *paths, *common, "--scheduler", "tcp://nowhere:8786"]) == 0
    remote = capsys.readouterr().out
    info = read_metadata(world.checkpoint)
    for_one = plan_zone_maps(list(cubes.values()), info, PredictSpec(), threads=1)
    assert str(for_one) in remote
    assert "Prediction of 2 UTM zones (32631, 32632)" in text
    assert "mosaic in EPSG:32631" in text
    assert text.count("Prediction of season 2018-09-01") == 2
    assert not (tmp_path / "map").exists()
    # A region in one zone needs one map; the other cube is left out, and that is said.
    west = tmp_path / "west.geojson"
    west.write_text(shapely.to_geojson(shapely.box(5.991, 50.496, 5.997, 50.5)))
    assert invoke(["predict", *paths, *common, "--region", str(west)]) == 0
    text = capsys.readouterr().out
    assert "Prediction of 1 UTM zone (32631)" in text
    assert "region-32632.zarr holds nothing of the region in its zone and is left out" in text


def test_what_does_not_fit_together_is_refused(
    world: Any, cubes: dict[str, Season], tmp_path: Path
) -> None:
    info = read_metadata(world.checkpoint)
    west, east = cubes.values()
    with pytest.raises(InputError, match=r"are both in EPSG:32631.*one for each UTM zone"):
        plan_zone_maps([west, world.season, east], info, SPEC)
    with pytest.raises(InputError, match=r"none of the cubes in EPSG:32631, EPSG:32632 holds"):
        plan_zone_maps([west, east], info, SPEC, region=Region.from_bbox((7.0, 50, 7.1, 50.1)))
    wide = Region.from_bbox((5.99, 50.49, 12.01, 50.5))
    plan = plan_zone_maps([east, west], info, SPEC, region=wide)
    assert any("reaches into EPSG:32633, of which no cube" in text for text in plan.warnings)
    assert list(plan.plans) == list(CODES), "the western first"
    part = REGION.by_utm_zone(margin=320.0)["EPSG:32632"]
    later = build(world, tmp_path / "later.zarr", "EPSG:32632", part, name="2019-09-01")
    with pytest.raises(InputError, match=r"seasons 2018-09-01, 2019-09-01 into one map.*--season"):
        plan_zone_maps([west, later], info, SPEC)
    laea = build(world, tmp_path / "laea.zarr", "EPSG:3035", part)
    with pytest.raises(InputError, match=r"laea\.zarr is in EPSG:3035.*one per UTM zone"):
        plan_zone_maps([west, laea], info, SPEC)
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "classes.tif").write_bytes(b"of one cube")
    with pytest.raises(OutputError, match=r"holds the map of one cube.*another --out"):
        run_zone_maps(plan, tmp_path / "map")


def test_the_accuracy_of_a_mosaic_does_not_outlive_it(
    world: Any, cubes: dict[str, Season], tmp_path: Path
) -> None:
    out = tmp_path / "map"
    part = Region.from_bbox((5.998, 50.498, 6.002, 50.5))
    other = world.save(tmp_path / "other.safetensors", world.make_network(4, seed=5))

    def predict(checkpoint: Path, **options: Any) -> None:
        plan = plan_zone_maps(list(cubes.values()), read_metadata(checkpoint), SPEC, region=part)
        run_zone_maps(plan, out, **options)

    predict(world.checkpoint)
    (out / "accuracy").mkdir()
    for name in ACCURACY_FILES:
        (out / "accuracy" / name).write_text("of this map")
    predict(world.checkpoint)
    assert (out / "accuracy" / "accuracy.json").is_file(), "the map is the same"
    predict(other, overwrite=True)
    assert not (out / "accuracy").exists()


def test_what_takes_one_map_says_so(world: Any, cubes: dict[str, Season], product: Path) -> None:
    with pytest.raises(InputError, match=r"a VRT holds no pixels.*folders of the zones"):
        validate_cog(product / "classes.vrt")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"the map of several zones.*another --out"):
            predict_region(
                cubes["32631"].cube, world.checkpoint, product, spec=SPEC, overwrite=overwrite
            )


def test_cubes_are_found_by_the_name_they_were_built_under(tmp_path: Path) -> None:
    for name in ("a-32631.zarr", "a-32732.zarr", "a-b.zarr", "b.zarr", "b-32631.zarr"):
        (tmp_path / name).mkdir()
    found = find_zone_cubes([tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "c.zarr"])
    assert [path.name for path in found] == ["a-32631.zarr", "a-32732.zarr", "b.zarr", "c.zarr"]
