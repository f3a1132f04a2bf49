"""Plans: grid, bands, dates, mosaics, blocks and costs, without reading a pixel."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from shapely import box

from stcln_geo.catalog import load_catalog
from stcln_geo.cube.cost import (
    WIDEST_BLOCK,
    TaskShare,
    count_reads,
    plan_blocks,
    shard_bytes,
    task_bytes,
    task_share,
    waiting_bytes,
)
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.plan import CubePlan, CubeSpec, crop_plan, plan_cube
from stcln_geo.cube.search import search_items
from stcln_geo.cube.stored import shard_fingerprint
from stcln_geo.errors import InputError, SearchError
from stcln_geo.grid import Lattice, Window, absolute_window
from stcln_geo.region import Region

FULL = np.full((102, 104), 1000, dtype="uint16")
CLEAR = np.full((51, 52), 4, dtype="uint8")


def plan_of(archive: Any, *, region: Region | None = None, **choices: Any) -> CubePlan:
    snapshot = search_items(load_catalog(archive.location), region=region)
    return plan_cube(snapshot, region, CubeSpec(**choices))


def add(archive: Any, name: str, time: str, **options: Any) -> None:
    archive.add(name, time, pixels={"red": FULL, "nir": FULL}, scl=CLEAR, **options)


def test_flanders_plan(flanders: Path, monkeypatch: pytest.MonkeyPatch):
    def no_reading(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan must not open a file")

    monkeypatch.setattr(rasterio, "open", no_reading)
    plan = plan_cube(search_items(load_catalog(flanders)))
    assert plan.crs == "EPSG:32631"
    assert plan.aoi.bounds == (574680.0, 5621800.0, 575320.0, 5622440.0)
    assert [season.name for season in plan.seasons] == ["2017-09-01", "2018-09-01", "2019-09-01"]
    assert [len(season.dates) for season in plan.seasons] == [4, 55, 13]
    assert plan.lacking == ()
    assert plan.window.contains(Lattice().cover(Window(-562244, 57468, 64, 64)))
    assert absolute_window(plan.geobox) == plan.window
    text = str(plan)
    for expected in ("EPSG:32631, 10 m, 108 x 84 px", "55 dates", "605 asset windows",
                     "80 items: has no asset", "+0 (declared): 72 scenes"):  # fmt: skip
        assert expected in text


def test_a_grid_of_too_many_pixels_is_refused(flanders: Path):
    found = search_items(load_catalog(flanders))
    with pytest.raises(InputError, match=r"[\d,]{9,} x [\d,]{9,} px of 0\.0005 m .*--resolution"):
        plan_cube(found, spec=CubeSpec(resolution=0.0005))


def test_plan_survives_the_disk(flanders: Path):
    plan = plan_cube(search_items(load_catalog(flanders)), spec=CubeSpec(bands=("nir", "red")))
    back = CubePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.fingerprint == plan.fingerprint
    other = plan_cube(search_items(load_catalog(flanders)), spec=CubeSpec(bands=("red", "nir")))
    assert other.fingerprint != plan.fingerprint


def test_without_ten_metre_bands(shared: Path):
    catalog = load_catalog(shared / "data" / "tanzania_2021")
    plan = plan_cube(search_items(catalog))
    assert plan.bands == ("rededge1", "rededge2", "rededge3", "nir08", "swir16", "swir22")
    assert plan.lacking == ("blue", "green", "red", "nir")
    assert "lacking: blue, green, red, nir" in str(plan)
    assert plan.crs == "EPSG:32737"
    assert sum(len(season.dates) for season in plan.seasons) == 134
    with pytest.raises(InputError, match="The items have: rededge1"):
        plan_cube(search_items(catalog), spec=CubeSpec(bands=("red", "swir16")))


def test_scenes_of_one_solar_day_are_one_date_in_the_order_of_preference(archive: Any):
    old = {"s2:processing_baseline": "02.14", "grid:code": "MGRS-31UFT"}
    add(archive, "b_old", "2019-03-01T10:50:00", properties=old)
    new = {"s2:processing_baseline": "05.00", "grid:code": "MGRS-31UGS"}
    add(archive, "c_new", "2019-03-01T10:50:20", properties=new)
    add(archive, "a_new", "2019-03-01T10:50:10", properties={"grid:code": "MGRS-31UGT"})
    other = {"s2:processing_baseline": "09.00", "grid:code": "MGRS-32ULB"}
    add(archive, "zone", "2019-03-01T10:49:50", crs="EPSG:32632", origin=(175000, 5606000),
        properties=other)  # fmt: skip
    unknown = {"s2:processing_baseline": None, "grid:code": "MGRS-31UFU"}
    add(archive, "a_unknown", "2019-03-01T10:50:30", properties=unknown)
    add(archive, "next", "2019-03-02T10:50:00")
    plan = plan_of(archive, region=Region.from_bbox((4.40, 50.5, 4.44, 50.55)), crs="EPSG:32631")
    dates = plan.seasons[0].dates
    assert [[scene.item for scene in date.scenes] for date in dates] == [
        ["a_new", "c_new", "b_old", "a_unknown", "zone"], ["next"],
    ]  # fmt: skip
    assert str(dates[0].time) == "2019-03-01T10:49:50"


def test_days_follow_the_sun_not_the_date_line(archive: Any):
    # 178 E: the morning pass is at about 22:30 UTC of the day before, on both sides of midnight.
    for name, time in (("a", "2019-03-01T23:59:50"), ("b", "2019-03-02T00:00:20")):
        tile = {"grid:code": f"MGRS-57M{name.upper()}A"}
        add(archive, name, time, crs="EPSG:32757", origin=(300000, 9000000), properties=tile)
    plan = plan_of(archive)
    assert [len(date.scenes) for date in plan.seasons[0].dates] == [2]


def test_a_pass_across_midnight_is_of_one_day_and_season_for_every_region(archive: Any):
    # Sydney, 151 E: the pass from 23:52 UTC on reaches the south of the state after midnight.
    tops = {"north": 6_300_000, "south": 6_290_000}
    for day, after in (("2020-08-31", "2020-09-01"), ("2021-02-27", "2021-02-28")):
        for name, time in (("north", f"{day}T23:59:50"), ("south", f"{after}T00:00:20")):
            take = {
                "s2:datatake_id": f"GS2A_{day.replace('-', '')}T235241_027129_N05.00",
                "grid:code": f"MGRS-56H{name[0].upper()}A",
            }
            add(archive, f"{name}_{day}", time, crs="EPSG:32756", origin=(300000, tops[name]),
                properties=take)  # fmt: skip
    catalog = load_catalog(archive.location)
    regions = {
        name: Region.from_projected(
            box(300000, top - 300, 300300, top), "EPSG:32756", source=name
        )
        for name, top in tops.items()
    }  # fmt: skip
    spec = CubeSpec(bands=("red", "nir"))
    found = {
        name: plan_cube(search_items(catalog, region=region), region, spec)
        for name, region in regions.items()
    }
    whole = plan_cube(search_items(catalog), spec=spec)
    parts = [crop_plan(whole, one.window, region="part") for one in found.values()]
    for plan in (*found.values(), whole, *parts):
        assert [season.name for season in plan.seasons] == ["2019-09-01", "2020-09-01"]
        days = [str(date.time)[:10] for season in plan.seasons for date in season.dates]
        assert days == ["2020-08-31", "2021-02-27"]
    # What counts is when the pass began, also at the ends of the range that is asked for.
    for name, region in regions.items():
        snapshot = search_items(catalog, region=region, time_range="2020-09-01/2021-02-27")
        assert [item["id"] for item in snapshot.items] == [f"{name}_2021-02-27"]


def test_scenes_of_two_zones_across_the_antimeridian_are_one_small_region(archive: Any):
    # 180 E, 17 S lies at 819 451 m in zone 60 and at 180 548 m in zone 1.
    for name, crs, left in (("a", "EPSG:32760", 819000), ("b", "EPSG:32701", 180000)):
        tile = {"grid:code": f"MGRS-60K{name.upper()}A"}
        add(archive, name, "2019-03-01T22:20:00", crs=crs, origin=(left, 8118600), properties=tile)
    plan = plan_of(archive)
    assert plan.crs in {"EPSG:32760", "EPSG:32701"}
    assert max(plan.window.shape_yx) < 250
    assert len(plan.scenes) == 2


def test_items_outside_the_grid_or_without_a_band_are_left_out_with_the_reason(archive: Any):
    add(archive, "good", "2019-03-01T10:50:00")
    add(archive, "other", "2019-03-05T10:50:00")
    add(archive, "no_nir", "2019-03-02T10:50:00", drop=("nir",))
    add(archive, "no_scl", "2019-03-03T10:50:00", drop=("scl",))
    add(archive, "beside", "2019-03-04T10:50:00", origin=(602000, 5600040),
        properties={"grid:code": "MGRS-31UFX"})  # fmt: skip
    region = Region.from_bbox((4.4122, 50.5436, 4.4139, 50.5447))
    plan = plan_of(archive, region=region)
    assert [scene.item for scene in plan.scenes] == ["good", "other"]
    reasons = {entry.item: entry.reason for entry in plan.dropped}
    assert reasons == {
        "no_nir": "lacks the asset of nir",
        "no_scl": "lacks the asset of scl",
        "beside": "its raster lies outside the grid",
    }
    assert {item["id"] for item in plan.items} == {"good", "other"}


def test_seasons_are_split_by_their_first_day(archive: Any):
    for day in ("2019-08-31", "2019-09-01", "2020-03-01"):
        add(archive, f"S_{day}", f"{day}T10:50:00")
    assert [s.name for s in plan_of(archive).seasons] == ["2018-09-01", "2019-09-01"]
    calendar = plan_of(archive, season_start="01-01")
    assert [s.name for s in calendar.seasons] == ["2019-01-01", "2020-01-01"]
    gaps = plan_of(archive).seasons[1].gaps
    assert gaps == [("2019-09-01", "2020-03-01", 182)]
    assert "no date for 182 days: 2019-09-01 to 2020-03-01" in str(plan_of(archive))


def test_no_scene_classes_is_said(archive: Any):
    archive.add("a", "2019-03-01T10:50:00", pixels={"red": FULL})
    plan = plan_of(archive)
    assert plan.bands == ("red",)
    assert "NOT masked" in str(plan)


def test_blocks_are_whole_shards_within_memory(planted: Any):
    plan = plan_of(planted, layout=Layout(chunk=16, shard=48))
    season = plan.seasons[0]
    whole = plan_blocks(plan, season)
    assert whole == [Window(0, 0, *plan.window.shape_yx)]
    one = task_bytes(plan, season, 48)
    blocks = plan_blocks(plan, season, memory=one)
    assert len(blocks) == 9
    assert {block.row % 48 for block in blocks} == {0}
    assert sum(block.area for block in blocks) == plan.window.area
    assert plan_blocks(plan, season, memory=2 * one, workers=2) == blocks
    assert count_reads(plan, season, whole) == 3 * 4
    with pytest.raises(InputError, match="2 workers: season 2018-09-01 needs"):
        plan_blocks(plan, season, memory=2 * one - 1, workers=2)


def test_waiting_pixels_are_those_of_the_scenes_in_each_block(planted: Any):
    plan = plan_of(planted, layout=Layout(chunk=64, shard=512), bands=("red", "swir16"))
    (season,) = plan.seasons
    scene = season.dates[0].scenes[0]
    rng = np.random.default_rng(3)
    places = [None, *((int(r), int(c), 301, 203) for r, c in rng.integers(-300, 900, (5, 2)))]
    scenes = tuple(
        dataclasses.replace(
            scene, item=f"{n}", place=places[n % 6], crs=plan.crs if n % 4 else "EPSG:32632"
        )
        for n in range(31)
    )
    dates = (dataclasses.replace(season.dates[0], scenes=scenes),)
    large = dataclasses.replace(plan, window=Window(-100, 50, 1100, 1300))
    large = dataclasses.replace(large, seasons=(dataclasses.replace(season, dates=dates),))
    blocks = [Window(0, 0, 512, 512), Window(512, 0, 588, 512), Window(0, 512, 1100, 788)]

    def waits(block: Window) -> float:
        area, total = block.shift(-100, 50), 0.0
        for one in scenes:
            place = Window(*one.place) if one.place is not None else large.window
            # 10 m and 20 m, as they were read; both at 10 m where they were warped.
            pixel = 2 + 2 / 4 if one.crs == plan.crs else 4
            total += place.intersection(area).area * pixel
        return total

    assert waiting_bytes(large, large.seasons[0], blocks) == round(max(map(waits, blocks)))
    assert waiting_bytes(large, large.seasons[0], blocks[:1]) == round(waits(blocks[0]))
    assert waiting_bytes(large, large.seasons[0], []) == 0

    # The scenes around a block decide its shards, and no others.
    for block in blocks:
        near = large.seasons[0].within(block.shift(-100, 50))
        assert len(near.dates) == 1
        assert len(near.dates[0].scenes) < len(scenes)
        for shard in (Window(block.row, block.col, 100, 90), block):
            alone = shard_fingerprint(large, near, shard)
            assert alone == shard_fingerprint(large, large.seasons[0], shard)


def test_blocks_are_even_and_leave_no_worker_idle(planted: Any):
    plan = plan_of(planted, layout=Layout(chunk=64, shard=512))

    def cut(height: int, width: int, **options: Any) -> list[Window]:
        large = dataclasses.replace(plan, window=Window(0, 0, height, width))
        return plan_blocks(large, large.seasons[0], **options)

    # A little more than 2048 px is no reason for a sliver.
    blocks = cut(4140, 2100)
    assert [block.shape_yx for block in blocks] == [(2048, 2100), (2092, 2100)]
    for height, width, workers in ((4140, 4140, 0), (4140, 4140, 5), (9000, 700, 3), (301, 203, 4)):
        blocks = cut(height, width, workers=workers)
        assert sum(block.area for block in blocks) == height * width
        assert functools.reduce(Window.union, blocks) == Window(0, 0, height, width)
        assert {(block.row % 512, block.col % 512) for block in blocks} == {(0, 0)}
        assert max(max(block.shape_yx) for block in blocks) <= WIDEST_BLOCK
        assert len(blocks) >= 2 * workers or max(max(b.shape_yx) for b in blocks) <= 1024


def test_little_memory_changes_where_pixels_wait_and_not_the_blocks(planted: Any):
    plan = plan_of(planted, layout=Layout(chunk=64, shard=512))
    large = dataclasses.replace(plan, window=Window(0, 0, 4140, 4140))
    season = large.seasons[0]
    blocks = plan_blocks(large, season)
    enough = task_bytes(large, season, 2092)
    assert plan_blocks(large, season, memory=2 * enough, workers=2) == blocks
    assert len(plan_blocks(large, season, memory=enough - 1)) > len(blocks)
    least = task_share(large, season, blocks, memory=enough, workers=1, threads=8)
    assert least == TaskShare(together=1, keep=0)
    previous = least
    for memory in (enough + 10**8, 2 * enough, 4 * enough):
        share = task_share(large, season, blocks, memory=memory, workers=1, threads=8)
        assert share.together >= previous.together
        taken = (share.together - 1) * shard_bytes(large, season) + share.keep
        assert 0 < taken <= memory - enough
        previous = share
    assert previous.together == 8
    single = task_share(large, season, blocks, memory=4 * enough, workers=1, threads=1)
    assert single.together == 1
    assert single.keep > previous.keep


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"crs": "EPSG:4326"}, "projected CRS in metres"),
        ({"crs": "EPSG:2229"}, "projected CRS in metres"),
        ({"crs": "nonsense"}, "not known"),
        ({"resolution": 0}, "above 0"),
        ({"season_start": "02-30"}, "month and day"),
        ({"resampling": "magic"}, "resampling='magic'"),
        ({"composite": "mean", "period": "P10D"}, "composite='mean'"),
        ({"composite": "median"}, "Give --period P5D, P10D, P16D or P1M"),
        ({"composite": "median", "period": "P7D"}, "must be P5D, P10D, P16D, P1M"),
        ({"period": "P10D"}, "Add --composite median"),
        ({"composite": "least-cloudy", "period": "P1M"}, "none of 1 items has the property"),
        ({"bands": ("red", "B08")}, "common STAC names"),
        ({"offset": -1000.0}, "reflectance"),
    ],
)
def test_bad_choices_are_named(archive: Any, choices: dict[str, Any], message: str):
    add(archive, "a", "2019-03-01T10:50:00")
    with pytest.raises(InputError, match=message):
        plan_of(archive, **choices)


def test_a_region_beside_all_scenes_is_named(planted: Any):
    snapshot = search_items(load_catalog(planted.location))
    with pytest.raises(SearchError, match="none of 3 items has pixels there"):
        plan_cube(snapshot, Region.from_bbox((5.0, 50.0, 5.01, 50.01)))
