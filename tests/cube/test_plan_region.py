"""A plan of 100 km x 100 km over three years says what independent counting finds."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from pyproj import Transformer
from shapely import box

from stcln_geo.catalog import Catalog, shipped_catalogs
from stcln_geo.cli.main import invoke

CRS = "EPSG:32632"
SIDE = 109_800
"""Of a tile's raster (metres)."""
TILES = {
    "32UMU": (399_960, 5_400_000), "32UNU": (499_980, 5_400_000),
    "32TMT": (399_960, 5_300_040), "32TNT": (499_980, 5_300_040),
}  # fmt: skip
ORBITS = {65: 0, 108: 3}
"""Relative orbit, and the day of its first pass."""
YEARS = ("2018-09-01", "2021-08-31")
SILENT = ("2020-02-01", "2020-03-15")
"""No scene from the first to the second, both included."""
AREA = (450_000, 5_250_000, 550_000, 5_350_000)
"""Left, bottom, right, top of the region (metres)."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A scene as it was made up."""

    tile: str
    orbit: int
    day: np.datetime64
    again: int
    """0, or 1 for its later processing."""

    @property
    def season(self) -> str:
        year = int(str(self.day)[:4]) - (str(self.day)[5:] < "09-01")
        return f"{year}-09-01"

    @property
    def name(self) -> str:
        return f"S2A_{self.tile}_{str(self.day).replace('-', '')}_{self.again}_L2A"


def make_scenes() -> list[Made]:
    """Both orbits see every tile each fifth day; every seventh scene was processed twice."""
    start, end = (np.datetime64(day) for day in YEARS)
    made = []
    for orbit, first in ORBITS.items():
        for number, day in enumerate(np.arange(start + first, end + 1, 5)):
            if np.datetime64(SILENT[0]) <= day <= np.datetime64(SILENT[1]):
                continue
            for tile in TILES:
                made.append(Made(tile=tile, orbit=orbit, day=day, again=0))
                if (number + len(made)) % 7 == 0:
                    made.append(Made(tile=tile, orbit=orbit, day=day, again=1))
    return made


def make_item(scene: Made, template: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded item, as if it were of that scene."""
    item = copy.deepcopy(dict(template))
    date = str(scene.day).replace("-", "")
    left, top = TILES[scene.tile]
    baseline = "05.00" if scene.again else "02.14"
    take = f"{date}T102021"
    made = f"2023060{1 + scene.again}T000000" if scene.again else f"{date}T130000"
    number = baseline.replace(".", "")
    item["id"] = scene.name
    item["properties"] |= {
        "datetime": f"{scene.day}T10:28:{10 + list(TILES).index(scene.tile)}.000Z",
        "platform": "sentinel-2a",
        "grid:code": f"MGRS-{scene.tile}",
        "proj:epsg": 32632,
        "earthsearch:boa_offset_applied": False,
        "s2:sequence": str(scene.again),
        "s2:processing_baseline": baseline,
        "s2:generation_time": f"{made[:4]}-{made[4:6]}-{made[6:8]}T{made[9:11]}:00:00.000000Z",
        "s2:product_uri": f"S2A_MSIL2A_{take}_N{number}_R{scene.orbit:03d}_T{scene.tile}_{made}",
        "s2:datatake_id": f"GS2A_{take}_024567_N{baseline}",
        "s2:datastrip_id": f"S2A_OPER_MSI_L2A_DS_SGS__{made}_S{take}_N{baseline}",
    }
    bounds = (left, top - SIDE, left + SIDE, top)
    west, south, east, north = Transformer.from_crs(
        CRS, "EPSG:4326", always_xy=True
    ).transform_bounds(*bounds, densify_pts=21)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item["geometry"] = {"type": "Polygon", "coordinates": [ring]}
    item["bbox"] = [west, south, east, north]
    for asset in item["assets"].values():
        asset["href"] = re.sub(r"/[^/]+/([^/]+)$", rf"/{scene.name}/\1", asset["href"])
        for band in asset.get("raster:bands", []):
            if "offset" in band:
                band["offset"] = -0.1 if scene.again else 0
        if "proj:transform" in asset:
            asset["proj:transform"][2], asset["proj:transform"][5] = left, top
    return item


@pytest.fixture(scope="module")
def scenes() -> list[Made]:
    return make_scenes()


@pytest.fixture(scope="module")
def catalog(scenes: list[Made], shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The items as a static catalog on disk, described as Earth Search is."""
    recorded = shared / "data" / "stac_items" / "earth-search-v1" / "sentinel-2-l2a"
    template = json.loads((recorded / "S2A_32UMU_20200305_0_L2A.json").read_text())
    folder = tmp_path_factory.mktemp("region")
    links = []
    for scene in scenes:
        file = folder / f"{scene.name}.json"
        file.write_text(json.dumps(make_item(scene, template)))
        links.append({"rel": "item", "href": f"./{file.name}"})
    root = {"type": "Collection", "stac_version": "1.0.0", "id": "sentinel-2-l2a"}
    (folder / "collection.json").write_text(json.dumps({**root, "links": links}))
    return shipped_catalogs()["earth-search"].model_copy(
        update={"kind": "static", "endpoint": str(folder / "collection.json")}
    )


@pytest.fixture
def told(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> tuple[str, dict[str, str]]:
    """What `cube plan` prints: the head, and each season's lines."""

    def no_reading(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan must not open a file")

    monkeypatch.setattr(rasterio, "open", no_reading)
    file = tmp_path / "region.yaml"
    file.write_text(yaml.safe_dump(catalog.model_dump(mode="json", exclude_defaults=True)))
    corners = Transformer.from_crs(CRS, "EPSG:4326", always_xy=True).transform_bounds(*AREA)
    bbox = ",".join(f"{edge:.4f}" for edge in corners)
    options = ["--catalog", str(file), "--collection", "sentinel-2-l2a", f"--bbox={bbox}"]
    assert invoke(["cube", "plan", *options, "--time", "/".join(YEARS)]) == 0
    head, *seasons = capsys.readouterr().out.split("Season      ")
    return head, {text[:10]: text for text in seasons}


@pytest.mark.slow
def test_the_plan_of_a_region_agrees_with_counting(
    told: tuple[str, dict[str, str]], scenes: list[Made]
):
    head, seasons = told
    grid = re.search(r"(\d+) x (\d+) px, x (\d+) to (\d+), y (\d+) to (\d+)", head)
    assert grid is not None
    width, height, left, right, bottom, top = (int(part) for part in grid.groups())
    assert (right - left, top - bottom) == (10 * width, 10 * height)
    assert left <= AREA[0] < AREA[2] <= right
    assert bottom <= AREA[1] < AREA[3] <= top
    assert 1e10 < (right - left) * (top - bottom) < 1.2e10

    kept = {(one.tile, one.orbit, one.day): one for one in scenes}  # the later processing wins
    twice = len(scenes) - len(kept)
    assert len(scenes) > 1900
    assert twice > 200
    assert f"{twice} items: are older processings" in seasons["2020-09-01"]
    raw = sum(one.again for one in kept.values())
    assert f"-1000 (declared): {raw} scenes; +0 (declared): {len(kept) - raw} scenes" in head

    assert list(seasons) == ["2018-09-01", "2019-09-01", "2020-09-01"]
    for name, text in seasons.items():
        mine = [one for one in kept.values() if one.season == name]
        days = sorted({one.day for one in mine})
        line = f"{name}: {len(days)} dates, {days[0]} to {days[-1]}, from {len(mine)} scenes"
        assert text.startswith(line)
        side = int(_number(r"blocks of at most (\d+) px", text))
        shard = int(_number(r"shards of (\d+) px", text))
        assert side % shard == 0
        blocks = math.ceil(height / side) * math.ceil(width / side)
        shards = math.ceil(height / shard) * math.ceil(width / shard)
        assert f"{blocks} blocks of at most {side} px, {shards} shards of {shard} px" in text

        reads = pixels = 0
        for tile, corner in TILES.items():
            count = sum(one.tile == tile for one in mine)
            raster = box(corner[0], corner[1] - SIDE, corner[0] + SIDE, corner[1])
            reads += 11 * count * _met(raster, (left, top, width, height), side)
            area = raster.intersection(box(left, bottom, right, top)).area
            pixels += count * area * (4 * 2 / 100 + 6 * 2 / 400 + 1 / 400)
        assert f"{reads} asset windows to read" in text
        assert _bytes(r"about (\S+ \wB) of pixels", text) == pytest.approx(pixels, rel=0.006)
        size = width * height * len(days) * (2 * 10 + 1 + 1)
        assert _bytes(r"(\S+ \wB) before compression", text) == pytest.approx(size, rel=0.006)

        pauses = [
            f"no date for {(after - before).astype(int)} days: {before} to {after}"
            for before, after in itertools.pairwise(days)
            if after - before > np.timedelta64(30, "D")
        ]
        assert len(pauses) == (name == "2019-09-01")
        assert re.findall(r"no date for .*", text) == pauses


def _met(raster: Any, grid: tuple[int, int, int, int], side: int) -> int:
    """Return how many blocks of a grid a raster shares pixels with."""
    left, top, width, height = grid
    return sum(
        raster.intersection(
            box(
                left + 10 * col,
                top - 10 * min(row + side, height),
                left + 10 * min(col + side, width),
                top - 10 * row,
            )
        ).area
        > 0
        for row in range(0, height, side)
        for col in range(0, width, side)
    )


def _number(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


def _bytes(pattern: str, text: str) -> float:
    number, unit = _number(pattern, text).split()
    return float(number) * {"MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
