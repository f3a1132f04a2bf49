"""A small static catalog that tests fill with planted scenes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.transform import from_origin

BANDS = {"red": 10, "nir": 10, "swir16": 20}


class Archive:
    """Writes scenes as GeoTIFFs and their items as JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._write_catalog()

    @property
    def location(self) -> str:
        return str(self.folder)

    def add(
        self,
        name: str,
        time: str,
        *,
        pixels: Mapping[str, np.ndarray],
        scl: np.ndarray | None = None,
        origin: tuple[float, float] = (600000, 5600040),
        crs: str = "EPSG:32631",
        offset: float | None = 0.0,
        properties: Mapping[str, Any] | None = None,
        drop: tuple[str, ...] = (),
        bands: Mapping[str, int] = BANDS,
    ) -> dict[str, Any]:
        """Add a scene; `pixels` are by band at the band's own resolution."""
        layers = {band: np.asarray(array) for band, array in pixels.items()}
        some = next(iter(layers.values()))
        height = some.shape[0] * bands[next(iter(layers))]
        width = some.shape[1] * bands[next(iter(layers))]
        if scl is not None:
            layers["scl"] = np.asarray(scl, dtype="uint8")
        left, top = origin
        assets = {}
        for key, array in layers.items():
            size = height // array.shape[0]
            href = f"{name}_{key}.tif"
            with rasterio.open(
                self.folder / href, "w", driver="GTiff", dtype=array.dtype.name, count=1,
                height=array.shape[0], width=array.shape[1], crs=crs, nodata=0, tiled=True,
                blockxsize=64, blockysize=64, compress="deflate",
                transform=from_origin(left, top, size, size),
            ) as file:  # fmt: skip
                file.write(array, 1)
            entry: dict[str, Any] = {"nodata": 0, "scale": 1e-4}
            if offset is not None:
                entry["offset"] = offset
            assets[key] = {
                "href": f"./{href}",
                "gsd": size,
                "proj:shape": list(array.shape),
                "proj:transform": [size, 0, left, 0, -size, top],
                **({"raster:bands": [entry]} if key != "scl" else {}),
            }
        for key in drop:
            del assets[key]
        bounds = (left, top - height, left + width, top)
        west, south, east, north = Transformer.from_crs(
            crs, "EPSG:4326", always_xy=True
        ).transform_bounds(*bounds, densify_pts=21)
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        item = {
            "type": "Feature",
            "stac_version": "1.0.0",
            "id": name,
            "collection": "planted",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "bbox": [west, south, east, north],
            "properties": {
                "datetime": f"{time}Z",
                "platform": "sentinel-2a",
                "grid:code": "MGRS-31UFS",
                "s2:processing_baseline": "05.00",
                "proj:epsg": int(crs.split(":")[1]),
                **(properties or {}),
            },
            "assets": assets,
            "links": [],
        }
        self.items.append(item)
        (self.folder / f"{name}.json").write_text(json.dumps(item))
        self._write_catalog()
        return item

    def _write_catalog(self) -> None:
        links = [{"rel": "item", "href": f"./{item['id']}.json"} for item in self.items]
        collection = {
            "type": "Collection", "stac_version": "1.0.0", "id": "planted", "links": links,
            "description": "planted scenes", "license": "other", "extent": {},
        }  # fmt: skip
        catalog = {
            "type": "Catalog", "stac_version": "1.0.0", "id": "planted-catalog",
            "description": "planted scenes",
            "links": [{"rel": "child", "href": "./collection.json"}],
        }  # fmt: skip
        (self.folder / "collection.json").write_text(json.dumps(collection))
        (self.folder / "catalog.json").write_text(json.dumps(catalog))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "archive")


def _plant(archive: Archive) -> Archive:
    """Add three scenes of 102 x 104 pixels (10 m), with clouds, on three days of one season."""
    rng = np.random.default_rng(7)
    for index, day in enumerate(("2019-03-01", "2019-03-11", "2019-04-30")):
        scl = rng.choice([4, 5], size=(51, 52)).astype("uint8")
        scl[10 + index : 14 + index, 20:26] = 9
        scl[30, 5 + index] = 3
        archive.add(
            f"S2_{index}",
            f"{day}T10:50:0{index}",
            pixels={
                "red": rng.integers(1, 4000, (102, 104)).astype("uint16"),
                "nir": rng.integers(1, 9000, (102, 104)).astype("uint16"),
                "swir16": rng.integers(1, 6000, (51, 52)).astype("uint16"),
            },
            scl=scl,
        )
    return archive


@pytest.fixture
def planted(tmp_path: Path) -> Archive:
    """Planted scenes that a test may change."""
    return _plant(Archive(tmp_path / "archive"))


@pytest.fixture(scope="session")
def planted_once(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Planted scenes that no test changes."""
    return _plant(Archive(tmp_path_factory.mktemp("planted") / "archive"))
