"""Polygons of a map equal those of the whole raster at once, whatever the window."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from rasterio.features import shapes
from scipy import ndimage
from shapely.geometry import shape

from stcln_geo.errors import InputError
from stcln_geo.maps import polygons
from stcln_geo.maps.classmap import open_class_map
from stcln_geo.maps.polygons import iter_patches, write_polygons

from .conftest import LEGEND, TRANSFORM, patchy


def spiral() -> np.ndarray:
    """One patch that winds through all windows, and another between its arms."""
    codes = np.zeros((61, 47), dtype=np.uint8)
    for ring in range(0, 22, 2):
        codes[ring, ring : 47 - ring] = 1
        codes[ring : 61 - ring, 46 - ring] = 1
        codes[60 - ring, ring : 47 - ring] = 1
        codes[ring + 2 : 61 - ring, ring] = 1
        codes[ring + 2, ring : ring + 2] = 1
    return codes


MAPS = {
    "patchy": patchy,
    "noise": lambda: np.random.default_rng(4).integers(0, 3, (53, 61)).astype(np.uint8),
    "spiral": spiral,
    "one": lambda: np.zeros((37, 29), dtype=np.uint8),
}


def whole(codes: np.ndarray) -> list[tuple[int, shapely.Polygon]]:
    """The oracle: rasterio on the whole raster."""
    found = shapes(codes, mask=codes != 255, connectivity=4)
    return [(int(value), shape(geometry)) for geometry, value in found]


def key(code: int, polygon: shapely.Polygon) -> tuple[float, ...]:
    point = polygon.representative_point()
    return (code, *polygon.bounds, polygon.area, point.x, point.y)


@pytest.mark.parametrize("window", [7, 16, 31, 500])
@pytest.mark.parametrize("name", MAPS)
def test_equal_to_polygons_of_the_whole(new_map, name, window):
    codes = MAPS[name]()
    found = [
        (p.code, p.polygon) for p in iter_patches(open_class_map(new_map(codes)), window=window)
    ]
    expected = whole(codes)
    assert len(found) == len(expected)
    number = sum(ndimage.label(codes == code)[1] for code in range(4))
    assert len(found) == number
    for (code, polygon), (other, truth) in zip(
        sorted(found, key=lambda one: key(*one)),
        sorted(expected, key=lambda one: key(*one)),
        strict=True,
    ):
        assert code == other
        assert polygon.is_valid
        assert polygon.geom_type == "Polygon"
        assert polygon.symmetric_difference(truth).area == 0
        assert polygon.normalize().equals_exact(truth.normalize(), 0)


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_file(new_map, tmp_path, suffix, monkeypatch):
    """Outlines are made, and rows written, in batches of which the last is not full."""
    monkeypatch.setattr(polygons, "_BATCH", 7)
    codes = patchy()
    product, out = new_map(codes), tmp_path / f"polygons{suffix}"
    report = write_polygons(product, out, window=40, minimum_area=301)
    found = geopandas.read_parquet(out) if suffix == ".parquet" else geopandas.read_file(out)
    expected = [(code, polygon) for code, polygon in whole(codes) if polygon.area * 100 >= 301]
    assert len(found) == len(expected) == report.polygons
    assert report.dropped == len(whole(codes)) - len(expected)
    assert report.dropped > 10
    assert report.polygons > 10
    total = 100 * (codes != 255).sum()
    assert report.dropped_m2 == total - sum(100 * polygon.area for _, polygon in expected)
    assert found.crs.to_epsg() == 32631
    assert found["area_m2"].sum() == pytest.approx(100 * sum(p.area for _, p in expected))
    np.testing.assert_allclose(found.geometry.area, found["area_m2"])
    assert (found["pixels"] * 100 == found["area_m2"]).all()
    # Each polygon lies where the map has its class.
    inside = found.geometry.representative_point()
    cols = ((inside.x - TRANSFORM.c) / 10).astype(int)
    rows = ((TRANSFORM.f - inside.y) / 10).astype(int)
    assert (codes[rows, cols] == found["code"]).all()
    assert (np.array(LEGEND.names)[found["code"]] == found["class"]).all()
    assert not list(tmp_path.glob(".*"))


def test_areas_in_degrees_are_geodesic(new_map, tmp_path):
    from pyproj import Geod
    from rasterio.transform import Affine

    codes = patchy((40, 51))
    product = new_map(codes, crs="EPSG:4326", transform=Affine(0.001, 0, 4.0, 0, -0.001, 51.0))
    write_polygons(product, tmp_path / "p.parquet", window=13)
    found = geopandas.read_parquet(tmp_path / "p.parquet")
    geod = Geod(ellps="WGS84")
    exact = [abs(geod.geometry_area_perimeter(one)[0]) for one in found.geometry.segmentize(0.001)]
    np.testing.assert_allclose(found["area_m2"], exact, rtol=1e-6)


def test_a_map_without_labels_and_a_wrong_area(new_map, tmp_path):
    empty = new_map(np.full((11, 13), 255, dtype=np.uint8))
    assert write_polygons(empty, tmp_path / "p.gpkg").polygons == 0
    assert len(geopandas.read_file(tmp_path / "p.gpkg")) == 0
    with pytest.raises(InputError, match="0 or more"):
        write_polygons(empty, tmp_path / "p.gpkg", minimum_area=-1)
    with pytest.raises(InputError, match="below nan m2"):
        write_polygons(empty, tmp_path / "p.gpkg", minimum_area=float("nan"))


def test_memory_holds_only_what_the_sweep_has_not_passed(new_map):
    """After each row of windows only patches that reach the next row are held."""
    from stcln_geo.maps.polygons import _Sweep

    codes = patchy()
    class_map = open_class_map(new_map(codes))
    sweep = _Sweep(class_map.shape_yx)
    done = 0
    with class_map.reader() as reader:
        for square in class_map.windows(20):
            done += len(list(sweep.add(square, reader.read(square))))
            if square.col + square.width == codes.shape[1]:
                done += len(list(sweep.pass_row()))
                bottom = square.row + square.height
                runs = 1 + int((np.diff(codes[bottom - 1].astype(int)) != 0).sum())
                assert len(sweep.pieces) <= runs
    assert not sweep.pieces
    assert done == len(whole(codes))
