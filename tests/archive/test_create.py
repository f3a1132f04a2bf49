"""An archive's sites are what a cube has there, however it was assembled."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
from pyproj import Transformer
from shapely.geometry import Polygon, box

from stcln_geo.archive import index
from stcln_geo.archive.create import create_archive
from stcln_geo.archive.index import open_archive
from stcln_geo.archive.plan import ArchivePlan, plan_archive
from stcln_geo.archive.sites import place_site
from stcln_geo.archive.validate import validate_archive
from stcln_geo.catalog import load_catalog
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.contract import FILL
from stcln_geo.cube.plan import CubeSpec, crop_plan, plan_cube
from stcln_geo.cube.search import search_items
from stcln_geo.cube.stack import Stack, open_stack
from stcln_geo.cube.store import Season, open_season
from stcln_geo.errors import (
    CatalogError,
    CubeError,
    InputError,
    OutputError,
    SearchError,
    TaskError,
)
from stcln_geo.grid import Window
from stcln_geo.region import Region

from .conftest import EAST, SEASONS, SIZE, WEST, make_sites, make_spec, plant

pytestmark = pytest.mark.usefixtures("two_per_shard")

ARRAYS = ("reflectance", "valid", "coverage", "scl")


def stacks_of(plan: ArchivePlan) -> dict[tuple[str, str], Stack]:
    return {
        (stack.crs, stack.season): open_stack(plan.path / stack.folder, stack.season)
        for stack in plan.stacks
    }


def assert_equal(first: ArchivePlan, second: ArchivePlan) -> None:
    ours, theirs = stacks_of(first), stacks_of(second)
    assert set(ours) == set(theirs)
    for key, stack in ours.items():
        other = theirs[key]
        assert stack.site_id == other.site_id
        np.testing.assert_array_equal(stack.time, other.time)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(stack, name)[:], getattr(other, name)[:])


@pytest.fixture(scope="module")
def zone_cubes(
    planted: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Season]:
    """A cube over each zone's three sites, built the usual way."""
    folder, found = tmp_path_factory.mktemp("cubes"), {}
    for zone, letter in ((WEST, "w"), (EAST, "e")):
        sites = [site for site in make_sites() if site.id.startswith(letter)]
        area = functools.reduce(Window.union, [site.window for site in sites])
        bounds = (10 * area.col, -10 * (area.row + area.height),
                  10 * (area.col + area.width), -10 * area.row)  # fmt: skip
        region = Region.from_projected(box(*bounds), zone, source="the sites")
        snapshot = search_items(load_catalog(planted.location), region=region)
        build_cube(plan_cube(snapshot, region, CubeSpec(crs=zone)), folder / f"{zone[-5:]}.zarr")
        for season in SEASONS:
            found[(zone, season)] = open_season(folder / f"{zone[-5:]}.zarr", season)
    return found


@pytest.mark.parametrize("season", SEASONS)
@pytest.mark.parametrize("zone", [WEST, EAST])
def test_a_site_is_the_same_window_of_a_cube(
    whole_plan: ArchivePlan, zone_cubes: dict[tuple[str, str], Season], zone: str, season: str
):
    stack, cube = stacks_of(whole_plan)[(zone, season)], zone_cubes[(zone, season)]
    by_id = {site.id: site for site in make_sites()}
    assert {name[0] for name in stack.site_id} == {"w" if zone == WEST else "e"}
    assert stack.bands == cube.bands
    for position, name in enumerate(stack.site_id):
        here = by_id[name].window.relative_to(cube.window)
        assert Window(0, 0, *cube.shape_yx).contains(here)
        inside = (..., here.rows, here.cols)
        time = stack.time[position][~np.isnat(stack.time[position])]
        dates = np.searchsorted(cube.time, time)
        np.testing.assert_array_equal(cube.time[dates], time)
        np.testing.assert_array_equal(stack.days[position, : len(time)], cube.days[dates])
        for key in ("reflectance", "valid", "scl"):
            ours = getattr(stack, key)[position]
            theirs = getattr(cube, key)[:][inside]
            np.testing.assert_array_equal(ours[: len(time)], theirs[dates])
            # What the site has no date for, the cube did not see there; nor is there more.
            unseen = np.setdiff1d(np.arange(len(cube.time)), dates)
            empty = FILL if key == "reflectance" else 0
            assert (theirs[unseen] == empty).all()
            assert (ours[len(time) :] == empty).all()
        valid = stack.valid[position]
        np.testing.assert_array_equal(stack.coverage[position][:, 0, 0], valid.sum(axis=(1, 2)))
        assert valid.any()


def test_sites_of_one_stack_have_dates_of_their_own(whole_plan: ArchivePlan):
    stack = stacks_of(whole_plan)[(WEST, SEASONS[0])]
    dates = dict(zip(stack.site_id, stack.dates, strict=True))
    # The scene of 2019-03-02 lies south of w1 and w3.
    assert dates["w2"] == dates["w1"] + 1
    assert np.isnat(stack.time).any()
    # Scenes of the other zone count too where they reach: w3 lies at the line.
    assert dates["w3"] >= 3


def test_a_cropped_plan_is_the_plan_of_the_part(planted: Any):
    snapshot = search_items(load_catalog(planted.location))
    for site in make_sites():
        spec, region = CubeSpec(crs=site.crs), Region(geometry=site.footprint, source="s")
        alone = plan_cube(snapshot, region, spec, window=site.window)
        whole = plan_cube(snapshot, region, spec, window=site.window.expand(60))
        assert crop_plan(whole, site.window, region="s").seasons == alone.seasons
        assert len(whole.scenes) > len(alone.scenes) or site.id not in {"w1"}


def test_one_search_per_tile_and_season_and_none_again(
    server: Any, whole_plan: ArchivePlan, tmp_path: Path
):
    spec = make_spec(server.url, allow_hosts=("127.0.0.1",))
    plan = plan_archive(make_sites(), spec, tmp_path / "a")
    tiles = {(site.crs, site.cell) for site in make_sites()}
    assert len(tiles) == 2
    assert plan.searched == len(server.searches) == len(tiles) * len(SEASONS)
    assert not [path for path in server.requests if path.endswith(".tif")]
    # Planning once more, and building, search nothing.
    again = plan_archive(make_sites(), spec, tmp_path / "a")
    report = create_archive(again)
    assert again.fingerprint == plan.fingerprint
    assert len(server.searches) == 4
    assert report.windows_read == plan.windows > 0
    assert_equal(plan, whole_plan)
    # A finished archive asks for nothing at all, and reads nothing.
    asked = sum(server.requests.values())
    second = create_archive(plan_archive(make_sites(), spec, tmp_path / "a"))
    assert (second.windows_read, second.written) == (0, 0)
    assert "nothing to do" in str(second)
    assert (len(server.searches), sum(server.requests.values())) == (4, asked)


class Killed(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(
    "after", [pytest.param(1, marks=pytest.mark.slow), 3], ids=["first-stack", "second-stack"]
)
def test_an_interrupted_run_goes_on_and_gives_the_same(
    whole_plan: ArchivePlan, planted: Any, tmp_path: Path, after: int
):
    def interrupt(done: int, _: int, what: str) -> None:
        if what == "shard" and done == after:
            raise Killed

    plan = plan_archive(make_sites(), make_spec(planted.location), tmp_path / "a")
    with pytest.raises(Killed):
        create_archive(plan, progress=interrupt)
    finished = sum(1 for stack in plan.stacks if (plan.path / stack.folder / stack.season).exists())
    assert finished == after // 2
    indexed = len(open_archive(plan.path)) if finished else 0
    assert indexed == 3 * finished
    report = create_archive(plan_archive(make_sites(), plan.spec, plan.path))
    # Two shards per stack; the first of the first stack had two sites.
    assert report.written == 12 - {1: 2, 3: 5}[after]
    assert 0 < report.windows_read < plan.windows
    assert_equal(plan, whole_plan)
    assert validate_archive(plan.path)[0] == []


def test_a_stack_enters_the_index_without_a_look_at_the_others(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looks: Counter[tuple[str, str, str]] = Counter()
    lengths: list[int] = []

    def spy(name: str) -> None:
        function = getattr(index, name)

        def counted(place: Any, *rest: Any) -> Any:
            season = rest[0] if name == "member_sha" else rest[1]
            looks[name, place.name, season] += 1
            return function(place, *rest)

        monkeypatch.setattr(index, name, counted)

    def told(path: Path, content: bytes) -> None:
        write_file(path, content)
        lengths.append(len(geopandas.read_parquet(path)))

    write_file = index.write_file
    monkeypatch.setattr(index, "write_file", told)
    spy("member_sha")
    spy("season_rows")
    plan = plan_archive(make_sites(names=("w1", "w2", "e1")), make_spec(planted.location),
                        tmp_path / "a")  # fmt: skip
    stacks = {(Path(stack.folder).name, stack.season) for stack in plan.stacks}
    assert len(stacks) == 4

    create_archive(plan)

    # There when it is whole, and once more at the end.
    assert lengths == [2, 3, 5, 6, 6]
    assert looks == {
        (name, *stack): times
        for name, times in (("member_sha", 2), ("season_rows", 1))
        for stack in stacks
    }


@pytest.mark.slow
def test_workers_give_the_same(whole_plan: ArchivePlan, planted: Any, tmp_path: Path):
    from stcln_geo.execution import Execution

    names = ("w1", "w2", "w3")
    spec = make_spec(planted.location, years=(2018,))
    plan = plan_archive(make_sites(names=names), spec, tmp_path / "a")
    create_archive(plan, execution=Execution(workers=2))
    key = (WEST, SEASONS[0])
    for name in ARRAYS:
        ours, theirs = stacks_of(plan)[key], stacks_of(whole_plan)[key]
        np.testing.assert_array_equal(getattr(ours, name)[:], getattr(theirs, name)[:])


def test_an_asset_that_is_lost_stops_or_is_left_out(tmp_path: Path):
    catalog = plant(tmp_path / "catalog")
    lost = catalog.folder / "S31_2019-03-02_red.tif"
    content = lost.read_bytes()
    lost.unlink()
    spec = make_spec(catalog.location, years=(2018,))
    sites = [*make_sites(names=("w1", "w2", "w3")), place_site("e4", 6.0125, 50.497, size=SIZE)]
    plan = plan_archive(sites, spec, tmp_path / "a")
    with pytest.raises(TaskError, match=r"S31_2019-03-02.*ledger.jsonl.*--on-error skip"):
        create_archive(plan)
    entry = json.loads((tmp_path / "a" / "ledger.jsonl").read_text().splitlines()[0])
    assert (entry["item"], entry["asset"], entry["kind"]) == ("S31_2019-03-02", "red", "gone")
    # The other zone is done: the lost scene does not reach there.
    assert set(open_archive(tmp_path / "a").index["id"]) == {"e4"}

    skipping = make_spec(catalog.location, years=(2018,), cube=CubeSpec(on_error="skip"))
    plan = plan_archive(sites, skipping, tmp_path / "a")
    report = create_archive(plan)
    assert report.failures == 1
    stack = stacks_of(plan)[(WEST, SEASONS[0])]
    position = stack.site_id.index("w2")
    date = [str(day)[:10] for day in stack.time[position]].index("2019-03-02")
    assert not stack.valid[position, date].any()

    strict = CubeSpec(on_error="skip", max_failed_fraction=0.0)
    other = tmp_path / "b"
    other.mkdir()
    plan = plan_archive(
        sites, make_spec(catalog.location, years=(2018,), cube=strict), tmp_path / "b"
    )
    with pytest.raises(TaskError, match="share of --max-failed-fraction is 0"):
        create_archive(plan)

    # The file is back: what was left out is read when failures count again.
    lost.write_bytes(content)
    plan = plan_archive(sites, spec, tmp_path / "a")
    again = create_archive(plan)
    assert again.failures == 0
    # Only the shard of w1 and w2 is read again.
    costs = {name: cost for group in plan.groups for name, cost in group.sites.items()}
    assert again.windows_read == costs["w1"].windows + costs["w2"].windows
    assert stacks_of(plan)[(WEST, SEASONS[0])].valid[position, date].any()


def test_large_sites_are_cubes(planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stcln_geo.archive.spec.STACK_PIXELS", 32)
    sites = make_sites(48, ("w2", "e2"))
    spec = make_spec(planted.location, size=48, years=(2018,))
    plan = plan_archive(sites, spec, tmp_path / "a")
    assert "2 cubes, one per site" in str(plan)
    report = create_archive(plan)
    assert report.site_seasons == 2
    for site in sites:
        season = open_season(tmp_path / "a" / "cubes" / f"{site.id}.zarr", SEASONS[0])
        assert season.window == site.window
        region = Region(geometry=site.footprint, source="s")
        snapshot = search_items(load_catalog(planted.location), region=region)
        alone = plan_cube(snapshot, region, CubeSpec(crs=site.crs), window=site.window)
        build_cube(alone, tmp_path / f"{site.id}.zarr")
        direct = open_season(tmp_path / f"{site.id}.zarr", SEASONS[0])
        np.testing.assert_array_equal(direct.time, season.time)
        for name in ("reflectance", "valid", "scl"):
            np.testing.assert_array_equal(getattr(direct, name)[:], getattr(season, name)[:])
    assert set(open_archive(tmp_path / "a").index["kind"]) == {"cube"}
    assert create_archive(plan_archive(sites, spec, tmp_path / "a")).windows_read == 0
    assert validate_archive(tmp_path / "a")[0] == []


@pytest.mark.slow
def test_composites_have_the_same_dates_everywhere(planted: Any, tmp_path: Path):
    cube = CubeSpec(composite="median", period="P1M")
    spec = make_spec(planted.location, years=(2018,), cube=cube)
    plan = plan_archive(make_sites(names=("w1", "w2")), spec, tmp_path / "a")
    create_archive(plan)
    stack = stacks_of(plan)[(WEST, SEASONS[0])]
    assert stack.time.shape == (2, 12)
    assert not np.isnat(stack.time).any()
    np.testing.assert_array_equal(stack.valid[:], stack.observations[:] > 0)
    assert validate_archive(tmp_path / "a")[0] == []


def test_the_index_says_where_when_and_how_clear(whole_plan: ArchivePlan):
    table = geopandas.read_parquet(whole_plan.path / "index.parquet")
    assert table.crs.to_string() == "OGC:CRS84"
    assert len(table) == 12
    by_id = {site.id: site for site in make_sites()}
    for row in table.to_dict("records"):
        site = by_id[row["id"]]
        stack = open_stack(whole_plan.path / row["path"], row["season"])
        assert stack.site_id[row["site"]] == row["id"]
        window, change = site.window, Transformer.from_crs(site.crs, "EPSG:4326", always_xy=True)
        left, top, side = 10 * window.col, -10 * window.row, 10 * SIZE
        ring = [(left, top), (left + side, top), (left + side, top - side), (left, top - side)]
        expected = Polygon([change.transform(*corner) for corner in ring])
        assert row["geometry"].symmetric_difference(expected).area < 1e-4 * expected.area
        dates = int((~np.isnat(stack.time[row["site"]])).sum())
        valid = stack.valid[row["site"]][:dates]
        assert row["clear_fraction"] == pytest.approx(valid.mean(), abs=1e-12)
        assert (row["dates"], row["crs"], row["kind"]) == (dates, site.crs, "stack")
        assert list(row["bands"]) == ["red", "swir16"]
        assert list(row["shape"]) == [SIZE, SIZE]
        assert row["resolution"] == 10.0
        assert str(row["time_start"].date()) == str(stack.time[row["site"], 0])[:10]
        assert row["time_end"].tz is not None


def test_the_plan_tells_size_and_cost(whole_plan: ArchivePlan):
    text = str(whole_plan)
    for part in ("4 stacks", "6 of 32 x 32 px", "EPSG:32631 (3)", "4 (2 MGRS tiles x 2 seasons)",
                 "asset windows", "to transfer", "before compression", "Time"):  # fmt: skip
        assert part in text
    stacks = stacks_of(whole_plan).values()
    assert whole_plan.raw_bytes == sum(s.dates.sum() for s in stacks) * SIZE**2 * (2 * 2 + 2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [({"size": 64}, "site 'w1'.*archive's sites are 64 px"), ({"years": ()}, "at least one year"),
     ({"cube": CubeSpec(crs=WEST)}, "own UTM zone")],
)  # fmt: skip
def test_recipes_that_do_not_fit_are_named(
    planted: Any, tmp_path: Path, choices: Any, message: str
):
    with pytest.raises(InputError, match=message):
        plan_archive(make_sites(), make_spec(planted.location, **choices), tmp_path / "a")


def test_an_unknown_catalog_and_empty_searches_are_named(planted: Any, tmp_path: Path):
    with pytest.raises(CatalogError, match="no-such-catalog"):
        plan_archive(make_sites(), make_spec("no-such-catalog"), tmp_path / "a")
    with pytest.raises(SearchError, match="none of 2 searches found a usable scene"):
        plan_archive(make_sites(), make_spec(planted.location, years=(2030,)), tmp_path / "b")


def test_another_archive_is_not_written_over(whole_plan: ArchivePlan, planted: Any, tmp_path: Path):
    with pytest.raises(CubeError, match=r"its years is \[2018, 2019\], not \[2018\]"):
        plan_archive(make_sites(), make_spec(planted.location, years=(2018,)), whole_plan.path)
    with pytest.raises(CubeError, match="begun with 6 other sites"):
        plan_archive(make_sites(names=("w1",)), whole_plan.spec, whole_plan.path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        plan_archive(make_sites(), whole_plan.spec, tmp_path)
    with pytest.raises(InputError, match=r"needs .* each. Give more --memory"):
        create_archive(whole_plan, memory=10_000_000)


def test_sites_without_a_scene_are_left_out_and_counted(planted: Any, tmp_path: Path):
    sites = [*make_sites(names=("w1",)), place_site("far", 5.9, 50.45, size=SIZE)]
    plan = plan_archive(sites, make_spec(planted.location), tmp_path / "a")
    assert "1 sites have no scene" in str(plan)
    create_archive(plan)
    assert set(open_archive(tmp_path / "a").index["id"]) == {"w1"}
