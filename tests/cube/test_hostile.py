"""A hostile server and a perfect one give the same cube, or the ledger says what is missing."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from rasterio.transform import from_origin

from stcln_geo.cli.main import invoke
from stcln_geo.cube.build import BuildReport, build_cube
from stcln_geo.cube.clouds import CloudSpec
from stcln_geo.cube.contract import FILL
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.read import AssetReader, read_ledger
from stcln_geo.cube.search import search_items
from stcln_geo.cube.selection import Selection
from stcln_geo.cube.store import Season, open_season
from stcln_geo.errors import TaskError, UnsafeAddressError
from stcln_geo.grid import Window
from stcln_geo.region import Region

from .hostile import BANDS, FAULTS, PROVIDERS, SIDE, HostileStac, Planted, Provider

Start = Callable[..., HostileStac]

SCENES = [
    Planted(day="2020-03-01", seed=1, baseline="02.14"),
    # One scene in three processings: only the newest counts.
    Planted(day="2020-03-11", seed=2, baseline="02.14", generation="20200311T130000"),
    Planted(day="2020-03-11", seed=3, baseline="05.00", generation="20230601T130000"),
    Planted(day="2020-03-11", seed=4, baseline="05.00", generation="20230602T130000"),
    # Two tiles of one day, processed with and without an offset.
    Planted(day="2020-03-21", seed=5, baseline="02.14", tile="31UFT"),
    Planted(day="2020-03-21", seed=6, baseline="05.11", sensing="T104510"),
]
KEPT = {"2020-03-01": SCENES[0], "2020-03-11": SCENES[3], "2020-03-21": SCENES[5]}
REGION = Region.from_bbox((4.4125, 50.5335, 4.4285, 50.5435))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as running:

        def serve(
            provider: Provider, scenes: list[Planted] = SCENES, **options: Any
        ) -> HostileStac:
            folder = tmp_path / f"archive{time.monotonic_ns()}"
            server = HostileStac(folder, provider, scenes, **options)
            running.callback(server.close)
            return server

        yield serve


def plan_of(server: HostileStac, *, access: Any = None, **choices: Any) -> CubePlan:
    catalog = server.catalog(**(access or {}))
    snapshot = search_items(catalog, "sentinel-2-l2a", REGION, "2020-01-01/2020-12-31")
    clouds = CloudSpec(cloud_margin=0, shadow_margin=0)
    spec = CubeSpec(bands=tuple(BANDS), clouds=clouds, layout=Layout(chunk=16, shard=64), **choices)
    return plan_cube(snapshot, REGION, spec)


def build(server: HostileStac, path: Path, **choices: Any) -> tuple[Season, BuildReport]:
    report = build_cube(plan_of(server, **choices), path)
    return open_season(path), report


def assert_equal(first: Season, second: Season) -> None:
    np.testing.assert_array_equal(first.time, second.time)
    for name in ("reflectance", "valid", "scl", "coverage", "overview"):
        np.testing.assert_array_equal(
            getattr(first, name)[:], getattr(second, name)[:], err_msg=name
        )


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stcln_geo.cube.read._PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("stcln_geo.cube.stac_api._BACKOFF_SECONDS", 0.01)


providers = pytest.mark.parametrize(
    "provider",
    [PROVIDERS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PROVIDERS[1:])],
)


@providers
def test_a_hostile_server_gives_the_cube_of_a_perfect_one(
    provider: Provider, start: Start, tmp_path: Path
):
    perfect, quiet = build(start(provider), tmp_path / "perfect.zarr")
    bad = start(provider, seed=374, token_seconds=2)
    hostile, report = build(bad, tmp_path / "hostile.zarr")
    assert_equal(perfect, hostile)
    assert report.failures == () == quiet.failures
    assert report.windows_read == quiet.windows_read
    assert read_ledger(tmp_path / "hostile.zarr" / "ledger.jsonl") == []
    # It was hostile: every kind of fault, refused searches, and a page given twice.
    assert set(bad.asked.faults) == set(FAULTS) - (set() if bad.signed else {"expired"})
    assert len(bad.asked.searches) == 3 + 1 + 3
    assert bad.asked.pauses_broken == 0

    # And both are the planted numbers, whatever offset each processing carries.
    assert [str(day)[:10] for day in perfect.time] == list(KEPT)
    place = Window(-560004, 60000, 2 * SIDE, 2 * SIDE)
    shared = place.intersection(perfect.window)
    assert shared.area > 10_000
    here, there = shared.relative_to(perfect.window), shared.relative_to(place)
    for index, scene in enumerate(KEPT.values()):
        for band in ("blue", "red", "nir"):
            expected = scene.pixels(band)
            if scene.raw_offset == 0:
                expected = expected.clip(1)
            expected[-3:] = FILL
            got = perfect.reflectance[index, perfect.bands.index(band)]
            np.testing.assert_array_equal(
                got[here.rows, here.cols], expected[there.rows, there.cols], err_msg=scene.day
            )


@pytest.mark.slow
@providers
def test_what_stays_lost_is_named_precisely(provider: Provider, start: Start, tmp_path: Path):
    server = start(provider, seed=5)
    lost = f"{server.item_id(SCENES[3])}/B04_10m.tif"
    server.lost = lost
    with pytest.raises(TaskError, match="gone after"):
        build(server, tmp_path / "l.zarr")
    entries = read_ledger(tmp_path / "l.zarr" / "ledger.jsonl")
    assert {(entry.item, entry.asset, entry.kind) for entry in entries} == {
        (server.item_id(SCENES[3]), server.key("red"), "gone")
    }
    assert all(entry.href == f"{server.url}/box/{lost}" for entry in entries)
    server.lost = None
    season, _ = build(server, tmp_path / "l.zarr")
    assert_equal(season, build(start(provider), tmp_path / "p.zarr")[0])


def test_short_lived_signatures_are_renewed_and_kept_secret(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    server = start("planetary-computer", token_seconds=0.4)
    server.slow_seconds = 0.05
    build(server, tmp_path / "c.zarr")
    assert server.asked.tokens > 1
    written = b"".join(path.read_bytes() for path in (tmp_path / "c.zarr").rglob("*.*"))
    assert b"SECRET" not in written
    assert "SECRET" not in caplog.text
    lasting = start("planetary-computer")
    build(lasting, tmp_path / "d.zarr")
    assert lasting.asked.tokens == 1


@pytest.mark.parametrize("limit", [1, 2])
def test_a_host_gets_no_more_connections_than_it_allows(limit: int, start: Start, tmp_path: Path):
    server = start("cdse", SCENES[:1])
    server.slow_seconds = 0.02
    plan = plan_of(server, access={"max_connections": limit})
    (href,) = {asset.href for asset in plan.scenes[0].bands if asset.key == "B04_10m"}
    # Several readers of one process share the host's places.
    readers = [AssetReader(plan.access) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda reader: reader.read(href, plan.geobox), readers))
    assert server.asked.most_at_once == limit


@pytest.mark.parametrize(
    ("provider", "language"),
    [("earth-search", "query"), ("planetary-computer", "filter"), ("cdse", "filter")],
)
def test_selection_is_asked_of_the_server_and_checked_here(
    provider: Provider, language: str, start: Start
):
    scenes = [
        Planted(day="2020-03-01", seed=1, cloud=80),
        Planted(day="2020-03-02", seed=2, orbit=94),
        Planted(day="2020-03-03", seed=3, tile="31UFT"),
        Planted(day="2020-03-04", seed=4),
    ]
    server = start(provider, scenes)  # which ignores every filter
    selection = Selection(tiles=("T31UFS",), orbits=(51,), max_cloud=60)
    found = search_items(server.catalog(), "sentinel-2-l2a", REGION, selection=selection)
    assert [item["id"] for item in found.items] == [server.item_id(scenes[3])]
    assert {entry.reason for entry in found.dropped} == {
        "has more than 60 % cloud", "is of an orbit that is not selected",
        "is of a tile that is not selected",
    }  # fmt: skip
    asked = json.dumps(server.asked.searches[0][language])
    assert "eo:cloud_cover" in asked
    assert "31UFS" in asked
    assert ("sat:relative_orbit" in asked) == (provider != "earth-search")


def test_a_next_page_on_a_private_host_is_not_asked(start: Start, monkeypatch: pytest.MonkeyPatch):
    server = start("cdse")
    answer = server.answer

    def elsewhere(query: dict[str, Any]) -> dict[str, Any]:
        page = answer(query)
        page["links"][0]["href"] = "http://169.254.169.254/search"
        return page

    monkeypatch.setattr(server, "answer", elsewhere)
    with pytest.raises(UnsafeAddressError, match="the link to the next page"):
        search_items(server.catalog(), "sentinel-2-l2a", REGION)


@pytest.mark.parametrize("number", [1, 2])
def test_a_page_that_redirects_to_a_private_host_is_not_followed(
    number: int, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server = start("cdse")
    # This machine under another name, so that the request could be seen if it came.
    server.redirect_page = number, f"http://localhost:{server.port}/elsewhere"
    box = ",".join(map(str, REGION.geometry.bounds))
    plan = ["cube", "plan", "--catalog", yaml_of(server, tmp_path / "c.yaml"), f"--bbox={box}",
            "--bands", ",".join(BANDS)]  # fmt: skip
    assert invoke(plan) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "it redirects to the private host 'localhost'" in told
    assert "--allow-host localhost" in told
    assert "Traceback" not in told
    assert len(server.asked.searches) == number
    # Where it is allowed, it is followed.
    server.asked.searches.clear()
    assert invoke([*plan, "--allow-host", "localhost"]) == 0
    assert len(server.asked.searches) == 1 + len(server.items) // server.page


def test_a_landing_page_cannot_send_the_search_to_a_private_host(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    server = start("cdse")
    landing = server.landing()
    landing["links"][2]["href"] = f"http://localhost:{server.port}/search"
    monkeypatch.setattr(server, "landing", lambda: landing)
    with pytest.raises(UnsafeAddressError, match="Cannot use the search of catalog 'cdse'"):
        search_items(server.catalog(), "sentinel-2-l2a", REGION)
    assert server.asked.searches == []


def test_a_cube_of_top_of_atmosphere_reflectance_says_what_it_is(start: Start, tmp_path: Path):
    server = start("earth-search", SCENES[:1])
    (item,) = server.items
    item["collection"] = "sentinel-2-l1c"
    del item["assets"]["scl"]
    # Some of the provider's items name the wrong bucket.
    item["assets"]["cirrus"] = {"href": "s3://sentinel-s2-l2a/tiles/1/B10.jp2"}
    snapshot = search_items(server.catalog(), "sentinel-2-l1c", REGION)
    assert snapshot.items[0]["assets"]["cirrus"]["href"] == "s3://sentinel-s2-l1c/tiles/1/B10.jp2"
    plan = plan_cube(snapshot, REGION, CubeSpec(bands=tuple(BANDS)))
    assert "top of atmosphere" in str(plan)
    assert "clouds are NOT masked, valid says only that there is data" in str(plan)
    assert plan.access.gdal["AWS_REQUEST_PAYER"] == "requester"
    assert CubePlan.from_json(json.loads(json.dumps(plan.to_json()))).level == plan.level
    build_cube(plan, tmp_path / "l1c.zarr")
    season = open_season(tmp_path / "l1c.zarr")
    assert season.attrs["level"] == "top-of-atmosphere"
    assert not season.attrs["clouds_masked"]
    array = season.reflectance
    assert array.attrs["standard_name"] == "toa_bidirectional_reflectance"
    np.testing.assert_array_equal(season.valid[:], (array[:] != FILL).all(axis=1))
    assert 0 < season.valid[:].mean() < 1


@pytest.fixture
def radar(start: Start, tmp_path: Path, shared: Path) -> str:
    """A recorded Sentinel-1 item over planted pixels, at a server; its description as a file."""
    server = start("planetary-computer", [])
    folder = shared / "data" / "stac_items" / "planetary-computer" / "sentinel-1-rtc"
    item = json.loads(min(folder.glob("*.json")).read_text())
    left, top = item["properties"]["proj:transform"][2], item["properties"]["proj:transform"][5]
    height, width = item["properties"]["proj:shape"]
    for key in ("vv", "vh"):
        file = server.folder / "box" / f"{key}.tif"
        file.parent.mkdir(parents=True, exist_ok=True)
        # As large as the recorded one, and as empty on disk as a sparse file is.
        with rasterio.open(
            file, "w", driver="GTiff", dtype="float32", count=1, height=height, width=width,
            crs="EPSG:32633", nodata=-32768, tiled=True, sparse_ok=True, compress="deflate",
            transform=from_origin(left, top, 10, 10),
        ):  # fmt: skip
            pass
        item["assets"][key]["href"] = f"{server.url}/box/{key}.tif"
    server.items.append(item)
    content = server.catalog().model_dump(mode="json", exclude_defaults=True)
    file = tmp_path / "radar.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def test_radar_scenes_are_described_and_probed_but_make_no_cube(
    radar: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert invoke(["catalogs", "show", "planetary-computer"]) == 0
    assert "measures: backscatter" in capsys.readouterr().out
    assert invoke(["catalogs", "probe", radar, "--collection", "sentinel-1-rtc"]) == 0
    assert "64 x 64 px, float32" in capsys.readouterr().out
    out = tmp_path / "s1.zarr"
    build = ["cube", "build", "--catalog", radar, "--collection", "sentinel-1-rtc",
             "--bbox=14.5,33.6,14.6,33.7", str(out)]  # fmt: skip
    assert invoke(build) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "Cannot make a cube of the collection 'sentinel-1-rtc'" in told
    assert "Choose an optical collection with --collection" in told
    assert not out.exists()


def yaml_of(server: HostileStac, path: Path, **changes: Any) -> str:
    """The provider's description as a file, with only the planted bands."""
    content = server.catalog().model_dump(mode="json", exclude_defaults=True)
    profile = content["collections"]["sentinel-2-l2a"]
    profile["bands"] = {band: profile["bands"][band] for band in BANDS}
    content["collections"] = {"sentinel-2-l2a": {**profile, **changes}}
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_probe_agrees_with_a_provider_that_is_as_described(
    provider: Provider, start: Start, tmp_path: Path, capsys: Any
):
    server = start(provider)
    assert invoke(["catalogs", "probe", yaml_of(server, tmp_path / "c.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "findings agree" in shown
    assert "64 x 64 px, uint16" in shown
    assert "SECRET" not in shown
    assert server.asked.searches[0]["limit"] == 1
    assert len(server.asked.assets) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scale": 0.001}, "scale 0.001"),
        ({"nodata": 7}, "nodata 7"),
        ({"bands": {"red": {"asset": "nored", "resolution": 10}}}, "missing (has red)"),
        ({"bands": {"red": {"asset": "red", "resolution": 20}}}, "m 20"),
        ({"offset": {"declared": False}}, "offset 0 (none)"),
        ({"offset": {"applied_property": "no:flag", "declared": True}}, "no:flag"),
        ({"properties": {"baseline": ["no:baseline"]}}, "no:baseline"),
    ],
)
def test_probe_names_what_contradicts(
    changes: dict[str, Any], told: str, start: Start, tmp_path: Path, capsys: Any
):
    # The scene searched first declares an offset.
    server = start("earth-search", SCENES[2:3])
    assert invoke(["catalogs", "probe", yaml_of(server, tmp_path / "c.yaml", **changes)]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NO")]
    assert any(told in line for line in wrong)


def test_probe_tells_of_a_read_that_fails_and_of_an_empty_search(
    start: Start, tmp_path: Path, capsys: Any
):
    server = start("earth-search", SCENES[:1], lost="B04_10m.tif")
    assert invoke(["catalogs", "probe", yaml_of(server, tmp_path / "c.yaml")]) == 1
    (wrong,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NO")]
    assert "gone after 1 attempts" in wrong
    server.items.clear()
    assert invoke(["catalogs", "probe", str(tmp_path / "c.yaml")]) == 1
    assert "an item" in capsys.readouterr().out
