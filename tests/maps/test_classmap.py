"""A map is read by windows, and what is kept of it does not grow with it."""

from __future__ import annotations

import pytest
from rasterio._env import get_gdal_config

from stcln_geo.maps import classmap
from stcln_geo.maps.classmap import open_class_map

from .conftest import patchy

FORMS = {"tiles": {"tiled": True, "blockxsize": 16, "blockysize": 16}, "rows": {"blockysize": 3}}


@pytest.mark.parametrize("form", FORMS)
def test_gdal_keeps_a_row_of_windows_however_large_the_map(
    new_map, form: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(classmap, "_CACHE_BYTES", 100_000)
    before = get_gdal_config("GDAL_CACHEMAX")
    kept = set()
    for height in (101, 407):
        opened = open_class_map(new_map(patchy((height, 143)), name=f"{height}", **FORMS[form]))
        with opened.reader():
            kept.add(get_gdal_config("GDAL_CACHEMAX"))
        assert get_gdal_config("GDAL_CACHEMAX") == before
    # The blocks of rows lie under all windows of a row, of classes and confidence.
    whole_row = 2 * classmap.WINDOW * 143
    assert len(kept) == 1
    assert (whole_row <= kept.pop() < 1.1 * whole_row) if form == "rows" else kept == {100_000}
