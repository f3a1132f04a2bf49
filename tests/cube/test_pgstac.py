"""A real STAC API (stac-fastapi-pgstac) gives the cube of the same archive on disk.

The database and the API come from `tests/stac_server.py`. Where this machine lacks them the tests
are skipped, unless STCLN_GEO_REQUIRE_STAC_SERVER is set, as it is in `.ci/run`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import yaml
from shapely.geometry import box, shape

from stcln_geo.catalog import Catalog, load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube.search import search_items
from stcln_geo.cube.selection import Selection
from stcln_geo.cube.snapshot import ItemSnapshot, read_items, read_queries
from stcln_geo.cube.store import list_seasons, open_season
from stcln_geo.region import Region
from stcln_geo.simulate import SimulationSpec, simulate_archive
from stcln_geo.simulate.stac import COLLECTION

from ..stac_server import StacServer, missing, read_archive

pytestmark = pytest.mark.slow

SIZE = {"width": 73, "height": 61, "dates": 9, "seasons": 2}
ORIGINS = {"31UES": 599_340, "31UFS": 600_060}
"""Two tiles whose rasters lie side by side."""
SEASONS = ("2021-09-01", "2022-08-31", "2023-08-31")


@dataclass(frozen=True, kw_only=True)
class Site:
    """The archive as an API and as a folder."""

    api: str
    described: Path
    """YAML of the API, with the filter language and small pages."""
    folder: Path
    items: list[dict[str, Any]]
    late: str
    """A day with a scene within its last second."""

    @property
    def catalog(self) -> Catalog:
        return load_catalog(self.described)

    def find(self, region: Region | None = None, time: str | None = None, **chosen: Any) -> Any:
        """Search the API; by default everywhere."""
        area = region or everywhere(self.items)
        return search_items(
            self.catalog, COLLECTION, area, time, selection=Selection(**chosen), margin=0
        )


def everywhere(items: list[dict[str, Any]]) -> Region:
    boxes = np.array([item["bbox"] for item in items])
    west, south, east, north = (*boxes[:, :2].min(0), *boxes[:, 2:].max(0))
    return Region.from_bbox((west, south, east, north))


def ids(found: ItemSnapshot) -> list[str]:
    return sorted(item["id"] for item in found.items)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    lacking = missing()
    if lacking is not None and os.environ.get("STCLN_GEO_REQUIRE_STAC_SERVER"):
        pytest.fail(lacking)
    if lacking is not None:
        pytest.skip(lacking)
    folder = tmp_path_factory.mktemp("pgstac")
    links = []
    for number, (tile, origin) in enumerate(ORIGINS.items()):
        simulate_archive(folder / tile, SimulationSpec(seed=number, origin_x=origin, **SIZE))
        links.append({"rel": "child", "href": f"./{tile}/collection.json"})
    late = _move_one_item(folder)
    root = {"type": "Catalog", "stac_version": "1.0.0", "id": "both", "description": "both tiles"}
    (folder / "catalog.json").write_text(json.dumps({**root, "links": links}))

    with StacServer(folder) as server:
        items = []
        for tile in ORIGINS:
            collection, some = read_archive(folder / tile, f"{server.files}/{tile}")
            server.load(collection, some)
            items += some
        described = folder / "api.yaml"
        described.write_text(yaml.safe_dump(_description(server.api)))
        yield Site(api=server.api, described=described, folder=folder, items=items, late=late)


def _move_one_item(folder: Path) -> str:
    """Let one scene be of the last second of its day, and return that day.

    By the sun it is of the next day then; one that has no other scene is chosen.
    """
    days = {file.stem.split("_")[2]: file for file in sorted(folder.glob("*/S2?_*/*.json"))}
    for day, file in days.items():
        date = np.datetime64(f"{day[:4]}-{day[4:6]}-{day[6:]}")
        if str(date + 1).replace("-", "") not in days:
            item = json.loads(file.read_text())
            item["properties"]["datetime"] = f"{date}T23:59:59.700Z"
            file.write_text(json.dumps(item))
            return str(date)
    raise AssertionError("there is a scene on every day")


def _description(api: str) -> dict[str, Any]:
    fine = ("blue", "green", "red", "nir")
    coarse = ("rededge1", "rededge2", "rededge3", "nir08", "swir16", "swir22")
    assets = {name: {"asset": name, "resolution": 10} for name in fine}
    assets |= {name: {"asset": name, "resolution": 20} for name in coarse}
    return {
        "name": "pgstac", "kind": "api", "endpoint": api, "page_limit": 4, "filters": "cql2-json",
        "collections": {
            COLLECTION: {
                "bands": assets,
                "scl": {"asset": "scl", "resolution": 20},
                "offset": {"declared": True},
                "properties": {
                    "baseline": ["s2:processing_baseline"], "tile": ["grid:code"],
                    "orbit": ["sat:relative_orbit"],
                },
            }
        },
    }  # fmt: skip


def test_every_item_comes_once_over_many_pages(site: Site):
    found = site.find()
    assert ids(found) == sorted(item["id"] for item in site.items)
    assert found.seen == len(site.items) == 36
    assert found.dropped == ()
    # The server did give pages of four, as the snapshot says that it was asked to.
    sent = dict(found.query)
    page = requests.post(sent["url"], json=sent["body"], timeout=30).json()
    assert len(page["features"]) == sent["body"]["limit"] == 4
    assert any(link["rel"] == "next" for link in page["links"])


def test_the_server_selects_as_the_client_does(site: Site):
    covers = sorted(item["properties"]["eo:cloud_cover"] for item in site.items)
    orbits = sorted({item["properties"]["sat:relative_orbit"] for item in site.items})
    assert len(orbits) > 1
    limit = covers[len(covers) // 2]
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"tiles": ("31UFS",)}, lambda told: told["grid:code"] == "MGRS-31UFS"),
        ({"tiles": ("T31UES", "31UFS")}, lambda told: True),
        ({"orbits": (orbits[0],)}, lambda told: told["sat:relative_orbit"] == orbits[0]),
        ({"max_cloud": limit}, lambda told: told["eo:cloud_cover"] <= limit),
        (
            {"tiles": ("31UES",), "orbits": (orbits[1],), "max_cloud": 60},
            lambda told: (
                told["grid:code"] == "MGRS-31UES"
                and told["sat:relative_orbit"] == orbits[1]
                and told["eo:cloud_cover"] <= 60
            ),
        ),
    ]
    for chosen, holds in cases:
        expected = sorted(item["id"] for item in site.items if holds(item["properties"]))
        found = site.find(**chosen)
        assert ids(found) == expected, chosen
        # What the server answered with is what counts: a filter that is not sent, or not honoured,
        # would be made up for by the check here.
        assert found.seen == len(expected) > 0, chosen
        assert "filter" in found.query["body"]
    assert site.find(max_cloud=limit).seen < len(site.items)


def test_an_api_that_is_not_described_is_asked_for_what_is_known(site: Site):
    bare = load_catalog(site.api)
    assert (bare.kind, bare.filters) == ("api", "cql2-json")
    chosen = Selection(tiles=("31UFS",), max_cloud=50)
    found = search_items(bare, COLLECTION, everywhere(site.items), selection=chosen, margin=0)
    assert ids(found) == ids(site.find(tiles=("31UFS",), max_cloud=50))
    clear = [one for one in site.items if one["properties"]["eo:cloud_cover"] <= 50]
    assert found.seen == len(clear) > len(found)


def test_places_agree_with_shapely(site: Site, tmp_path: Path):
    west, east = (shape(site.items[0]["geometry"]), shape(site.items[-1]["geometry"]))
    left, low, right, high = west.union(east).bounds
    middle = (left + right) / 2
    corner = [[left, low], [left, high], [left + (right - left) / 5, high], [left, low]]
    polygon = {"type": "Polygon", "coordinates": [corner]}
    file = tmp_path / "corner.geojson"
    file.write_text(json.dumps({"type": "Feature", "geometry": polygon, "properties": {}}))
    strip = (left, low, left + (middle - left) / 3, high)
    for region, area in (
        (Region.from_file(file), shape(polygon)),
        (Region.from_bbox(strip), box(*strip)),
    ):
        expected = sorted(
            one["id"] for one in site.items if shape(one["geometry"]).intersects(area)
        )
        found = site.find(region)
        assert ids(found) == expected
        assert found.seen == len(expected)
        assert 0 < len(expected) < len(site.items)


def test_both_ends_of_a_time_range_are_included(site: Site):
    seconds = {item["id"]: item["properties"]["datetime"][:19] for item in site.items}
    times = sorted(seconds.values())
    last = f"{site.late}T23:59:59"
    assert last in times
    for asked, first, end in (
        (f"{times[0][:10]}/{times[5][:10]}", times[0], f"{times[5][:10]}T24"),
        (f"{times[0]}Z/{times[5]}Z", times[0], times[5]),
        (f"2021-09-01/{site.late}", "2021-09-01", last),
        (site.late, site.late, last),
        (f"{last}Z/{last}Z", last, last),
        ("2022-09-01/..", "2022-09-01", "9"),
    ):
        inside = sorted(name for name, second in seconds.items() if first <= second <= end)
        found = site.find(time=asked)
        assert ids(found) == inside, asked
        assert found.seen == len(inside) > 0, asked
        static = search_items(load_catalog(site.folder), COLLECTION, None, asked)
        assert [one["id"] for one in static.items] == [one["id"] for one in found.items]


def arguments(site: Site, catalog: Path | str) -> list[str]:
    bbox = ",".join(f"{edge:.6f}" for edge in everywhere(site.items).geometry.bounds)
    return ["--catalog", str(catalog), "--collection", COLLECTION, f"--bbox={bbox}",
            "--bands", "red,nir,swir16"]  # fmt: skip


def assert_cubes_equal(first: Path, second: Path) -> None:
    assert list_seasons(first) == list_seasons(second)
    for name in list_seasons(first):
        ours, theirs = open_season(first, name), open_season(second, name)
        np.testing.assert_array_equal(ours.time, theirs.time)
        for array in ("reflectance", "valid", "scl", "coverage", "overview"):
            np.testing.assert_array_equal(
                getattr(ours, array)[:], getattr(theirs, array)[:], err_msg=f"{name} {array}"
            )


def test_plan_build_and_append_equal_those_from_the_folder(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start, middle, end = SEASONS
    plans = {}
    cubes = {}
    for kind, catalog in (("api", site.described), ("folder", site.folder)):
        options = arguments(site, catalog)
        capsys.readouterr()
        assert invoke(["cube", "plan", *options, "--time", f"{start}/{end}"]) == 0
        plans[kind] = capsys.readouterr().out.splitlines()[1:]
        cubes[kind] = tmp_path / f"{kind}.zarr"
        build = ["cube", "build", *options, "--time", f"{start}/{middle}", str(cubes[kind])]
        assert invoke(build) == 0
    assert plans["api"] == plans["folder"]
    assert_cubes_equal(cubes["api"], cubes["folder"])
    assert list_seasons(cubes["api"]) == ["2021-09-01"]
    assert read_queries(cubes["api"] / "items.parquet")[0]["body"]["limit"] == 4

    for cube in cubes.values():
        assert invoke(["cube", "append", str(cube), "--until", end]) == 0
    assert_cubes_equal(cubes["api"], cubes["folder"])
    assert list_seasons(cubes["api"]) == ["2021-09-01", "2022-09-01"]
    whole = tmp_path / "whole.zarr"
    build = ["cube", "build", *arguments(site, site.described), "--time", f"{start}/{end}"]
    assert invoke([*build, str(whole)]) == 0
    assert_cubes_equal(cubes["api"], whole)
    assert any(open_season(whole, "2021-09-01").valid[:].ravel())

    # Both searches are kept, as they were sent: sent again, they find the items of the cube.
    kept = cubes["api"] / "items.parquet"
    again: set[str] = set()
    for query in read_queries(kept):
        body = {**query["body"], "limit": 100}
        answer = requests.post(query["url"], json=body, timeout=30).json()
        again |= {item["id"] for item in answer["features"]}
    assert len(read_queries(kept)) == 2
    assert again == {item["id"] for item in read_items(kept)} == {one["id"] for one in site.items}

    capsys.readouterr()
    assert invoke(["cube", "append", str(cubes["api"]), "--until", end]) == 0
    assert "no pixel read" in capsys.readouterr().out


def test_probe_agrees_with_the_description(site: Site, capsys: pytest.CaptureFixture[str]):
    assert invoke(["catalogs", "probe", str(site.described)]) == 0
    assert "findings agree" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="ends with its parent on Linux only")
def test_nothing_outlives_a_killed_run(site: Site):
    command = [sys.executable, str(Path(__file__).parents[1] / "stac_server.py")]
    run = subprocess.Popen([*command, str(site.folder / "31UES")], stdout=subprocess.PIPE)
    try:
        assert run.stdout is not None
        told = json.loads(run.stdout.readline())
        assert requests.get(told["api"], timeout=10).ok
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in told["processes"]):
        assert time.monotonic() < until, "the database or the API goes on"
        time.sleep(0.1)
    shutil.rmtree(told["folder"])
