"""Small class maps on ragged grids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine
from scipy import ndimage

from stcln_geo.cog.names import LEGEND_TAG
from stcln_geo.legend import Legend

LEGEND = Legend.from_rows(
    [
        {"value": "110", "name": "Winter wheat"},
        {"value": "120", "name": "Maize"},
        {"value": "130", "name": "Maïs & soy"},
        {"value": "140", "name": "Grass"},
    ],
    source="the tests",
)
SHAPE = (101, 143)
TRANSFORM = Affine(10, 0, 500_170, 0, -10, 5_600_330)


def patchy(shape_yx: tuple[int, int] = SHAPE, *, seed: int = 5, classes: int = 4) -> np.ndarray:
    """Codes in patches of all sizes, with speckle and nodata."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(classes, *shape_yx)), (0, 4, 4))
    codes = smooth.argmax(axis=0).astype(np.uint8)
    speckle = rng.random(shape_yx) < 0.05
    codes[speckle] = rng.integers(0, classes, int(speckle.sum()))
    codes[ndimage.gaussian_filter(rng.normal(size=shape_yx), 5) > 0.07] = 255
    return codes


@pytest.fixture
def new_map(tmp_path: Path) -> Callable[..., Path]:
    """Write a product's folder with classes and confidence, or a plain GeoTIFF."""

    def write(codes: np.ndarray, name: str = "map", **options: Any) -> Path:
        plain, legend = options.pop("plain", False), options.pop("legend", LEGEND)
        profile = {
            "driver": "GTiff", "height": codes.shape[0], "width": codes.shape[1], "count": 1,
            "dtype": codes.dtype, "nodata": 255, "crs": "EPSG:32631", "transform": TRANSFORM,
            **options,
        }  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        path = folder / ("plain.tif" if plain else "classes.tif")
        with rasterio.open(path, "w", **profile) as target:
            target.write(codes, 1)
            if legend is not None and not plain:
                target.update_tags(**{LEGEND_TAG: legend.to_json()})
        if plain:
            return path
        percent = np.random.default_rng(1).integers(20, 101, codes.shape).astype(np.uint8)
        with rasterio.open(folder / "confidence.tif", "w", **profile) as target:
            target.write(np.where(codes == 255, 255, percent).astype(np.uint8), 1)
        return folder

    return write
