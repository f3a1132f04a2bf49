"""Sample design: sizes, allocation, equal chances, and figures that hold for the map."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import geopandas
import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from stcln_geo import evaluate_map
from stcln_geo.cog.names import LEGEND_TAG
from stcln_geo.errors import InputError, MissingFileError, OutputError
from stcln_geo.legend import Legend
from stcln_geo.maps.classmap import open_class_map
from stcln_geo.report.accuracy import AccuracySpec
from stcln_geo.report.design import (
    SampleSpec,
    _draw,
    _find,
    design_path,
    plan_sample,
    read_design,
    write_sample,
)
from stcln_geo.report.sizing import allocate

NAMES = ["Wheat", "Maize", "Grass"]
TRANSFORM = Affine(10, 0, 500_000, 0, -10, 5_600_000)


def write_map(path, codes, **options):
    profile = {
        "driver": "GTiff", "height": codes.shape[0], "width": codes.shape[1], "count": 1,
        "dtype": "uint8", "nodata": 255, "crs": "EPSG:32631", "transform": TRANSFORM, **options,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(codes, 1)
        target.update_tags(**{LEGEND_TAG: Legend.from_values(NAMES).to_json()})
    return path


@pytest.fixture
def codes():
    """A map of 67 x 83 pixels, some of a rare class, some without a label."""
    rng = np.random.default_rng(3)
    codes = rng.choice([0, 1, 2, 255], p=[0.62, 0.3, 0.03, 0.05], size=(67, 83))
    return codes.astype(np.uint8)


def test_size_of_the_published_example(tmp_path):
    """Olofsson et al. 2014, section 5.1.1: 641 units for a standard error of 0.01."""
    shares = {0: 0.020, 1: 0.015, 2: 0.320, 3: 0.645}
    codes = np.repeat(list(shares), [round(share * 4_000_000) for share in shares.values()])
    path = tmp_path / "map.tif"
    write_map(path, codes.reshape(2000, 2000).astype(np.uint8))
    with rasterio.open(path, "r+") as target:
        names = ["Deforestation", "Gain", "Forest", "Other"]
        target.update_tags(**{LEGEND_TAG: Legend.from_values(names).to_json()})
    expected = {"Deforestation": 0.7, "Gain": 0.6, "Forest": 0.9, "": 0.95}
    spec = SampleSpec(target_error=0.01, expected=expected)
    plan = plan_sample(path, spec)
    assert plan.points.sum() == 641
    assert plan.points[:2].tolist() == [50, 50]
    assert plan.points[3] / plan.points[2] == pytest.approx(0.645 / 0.320, abs=0.02)
    best = plan_sample(
        path, SampleSpec(count=641, expected=expected, allocation="neyman", minimum=0)
    )
    # Neyman's allocation has the least error; the target assumes no more than that.
    assert best.expected_error <= min(plan.expected_error, 0.01 + 1e-9)
    weights = np.array(list(shares.values())) * np.sqrt([0.21, 0.24, 0.09, 0.0475])
    np.testing.assert_allclose(best.points, 641 * weights / weights.sum(), atol=1)


def test_a_target_that_is_easily_met_still_takes_two_points_for_each_class(codes, tmp_path):
    path = write_map(tmp_path / "map.tif", codes)
    assert plan_sample(path, SampleSpec(target_error=0.3)).points.sum() == 6
    two = write_map(tmp_path / "two.tif", np.where(codes == 2, 255, codes).astype(np.uint8))
    assert plan_sample(two, SampleSpec(target_error=0.3)).points.sum() == 4


@pytest.mark.parametrize("allocation", ["proportional", "equal", "neyman"])
def test_a_target_that_an_allocation_misses_is_told_with_the_count_it_takes(tmp_path, allocation):
    """The oracle writes out equation 5 of Olofsson et al.; the size assumes Neyman's rule."""
    path, target = tmp_path / "map.tif", 0.02
    pixels = np.array([90_000, 6_000, 4_000])
    write_map(path, np.repeat(np.arange(3), pixels).reshape(250, 400).astype(np.uint8))
    expected = {NAMES[0]: 0.95, NAMES[1]: 0.6, NAMES[2]: 0.7}
    wished = {"allocation": allocation, "minimum": 0, "expected": expected}

    def error(count):
        points = plan_sample(path, SampleSpec(count=count, **wished)).points
        right = np.array(list(expected.values()))
        variance = (pixels / pixels.sum()) ** 2 * right * (1 - right) / points
        return math.sqrt((variance * (1 - points / pixels)).sum())

    plan = plan_sample(path, SampleSpec(target_error=target, **wished))
    assert plan.expected_error == pytest.approx(error(int(plan.points.sum())))
    told = re.findall(r"misses the target error of 0.02.* --count (\d+)", "\n".join(plan.lines()))
    if allocation == "neyman":
        assert plan.expected_error == pytest.approx(target, rel=0.01)
        assert not told
        return
    assert plan.expected_error > 1.02 * target
    needed = int(told[0])
    assert error(needed) <= target < error(needed - 3)


@pytest.mark.parametrize(
    ("weights", "count", "minimum", "available", "expected"),
    [
        ([0.7, 0.2, 0.1], 100, 0, [10**6] * 3, [70, 20, 10]),
        ([0.97, 0.02, 0.01], 200, 50, [10**6] * 3, [100, 50, 50]),
        ([1, 1, 1], 10, 0, [10**6] * 3, [4, 3, 3]),
        ([0.5, 0.5], 60, 20, [7, 10**6], [7, 53]),
        ([0.0, 1.0], 5, 0, [9, 9], [0, 5]),
        ([0.0, 0.0], 5, 0, [9, 9], [3, 2]),
        ([0.9, 0.1], 6, 3, [9, 9], [3, 3]),
        ([0.9, 0.1], 11, 3, [9, 2], [9, 2]),
    ],
    ids=[
        "proportional",
        "rare",
        "rest",
        "few pixels",
        "no weight",
        "no weights",
        "the least",
        "every pixel",
    ],
)
def test_allocation(weights, count, minimum, available, expected):
    points = allocate(np.array(weights), count, minimum=minimum, available=np.array(available))
    assert points.tolist() == expected


def test_allocation_that_cannot_be(codes, tmp_path):
    with pytest.raises(InputError, match="at least 50 points"):
        allocate(np.ones(3), 100, minimum=50, available=np.array([100] * 3))
    path = write_map(tmp_path / "m.tif", codes)
    with pytest.raises(InputError, match="one a pixel"):
        plan_sample(path, SampleSpec(count=codes.size + 1))


def test_points_lie_in_their_stratum_and_carry_their_weights(codes, tmp_path):
    path = write_map(tmp_path / "m.tif", codes)
    plan = plan_sample(path, SampleSpec(count=90, seed=4))
    out = write_sample(plan, tmp_path / "points.gpkg")
    points = geopandas.read_file(out)
    cols = ((points.geometry.x - TRANSFORM.c) / 10).to_numpy()
    rows = ((TRANSFORM.f - points.geometry.y) / 10).to_numpy()
    np.testing.assert_allclose(cols % 1, 0.5)
    assert (codes[rows.astype(int), cols.astype(int)] == points["stratum"]).all()
    assert len(points.geometry.drop_duplicates()) == 90
    assert points["reference"].isna().all()
    assert points["stratum_name"].tolist() == [NAMES[code] for code in points["stratum"]]
    assert (np.diff(points["stratum"]) != 0).sum() > 20, "the order tells nothing"
    sums = points.groupby("stratum")["weight"].sum()
    for code in range(3):
        assert sums[code] == pytest.approx((codes == code).sum())
    np.testing.assert_allclose(points["weight"] * points["inclusion_probability"], 1)
    lonlat = points.to_crs("EPSG:4326").geometry
    np.testing.assert_allclose(points[["lon", "lat"]], np.column_stack([lonlat.x, lonlat.y]))
    told = json.loads(design_path(out).read_text())
    assert [row["pixels"] for row in told["strata"]] == [
        int((codes == code).sum()) for code in range(3)
    ]
    assert read_design(design_path(out)).areas.tolist() == [
        100.0 * row["pixels"] for row in told["strata"]
    ]

    again = write_sample(plan_sample(path, plan.spec), tmp_path / "again.gpkg")
    assert geopandas.read_file(again).geometry.equals(points.geometry)
    other = write_sample(plan_sample(path, SampleSpec(count=90, seed=5)), tmp_path / "other.gpkg")
    assert not geopandas.read_file(other).geometry.equals(points.geometry)
    with pytest.raises(OutputError, match="filled in"):
        write_sample(plan, out)


def test_a_class_that_does_not_occur_has_no_points_and_is_no_stratum(codes, tmp_path):
    path = write_map(tmp_path / "m.tif", np.where(codes == 1, 255, codes).astype(np.uint8))
    out = write_sample(plan_sample(path, SampleSpec(count=40)), tmp_path / "points.parquet")
    points = geopandas.read_parquet(out)
    assert len(points) == 40
    assert set(points["stratum"]) == {0, 2}
    design = read_design(design_path(out))
    assert (design.strata, design.names) == (("0", "2"), ("Wheat", "Grass"))
    points["reference"] = points["stratum_name"]
    points.to_parquet(out)
    found = evaluate_map(path, out)
    assert found.estimates.covered == pytest.approx(1)
    assert [one.value for one in found.areas] == pytest.approx(
        [100.0 * (codes == 0).sum(), 0, 100.0 * (codes == 2).sum()]
    )


def test_points_do_not_depend_on_the_strips(codes, tmp_path, monkeypatch):
    path = write_map(tmp_path / "m.tif", codes)
    plan = plan_sample(path, SampleSpec(count=200))
    whole = _draw(plan)
    monkeypatch.setattr("stcln_geo.maps.classmap._STRIP_PIXELS", codes.shape[1] * 5)
    assert len(plan.class_map.strips()) == 14
    assert _draw(plan).geometry.equals(whole.geometry)


def test_every_pixel_of_a_stratum_has_the_same_chance(tmp_path):
    """Draw 250 samples of a small map: how often each pixel comes fits a uniform choice."""
    from scipy.stats import chi2

    codes = np.random.default_rng(1).choice([0, 1, 255], p=[0.5, 0.3, 0.2], size=(11, 13))
    path = write_map(tmp_path / "m.tif", codes.astype(np.uint8))
    plan = plan_sample(path, SampleSpec(count=20, allocation="equal"))
    hits = np.zeros(codes.shape)
    runs = 250
    for seed in range(runs):
        for rows, cols in _find(replace(plan, spec=replace(plan.spec, seed=seed))):
            hits[rows, cols] += 1
    assert hits[codes == 255].sum() == 0
    for code in range(2):
        mine = hits[codes == code]
        share = 10 / len(mine)
        # Without replacement the statistic has len - 1 degrees of freedom after this scaling.
        statistic = ((mine - runs * share) ** 2).sum() / (runs * share * (1 - share))
        statistic *= (len(mine) - 1) / len(mine)
        assert chi2.cdf(statistic, len(mine) - 1) < 0.999
        assert chi2.cdf(statistic, len(mine) - 1) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("crs", ["EPSG:32631", "EPSG:4326"], ids=["metres", "degrees"])
def test_filled_in_points_give_intervals_that_cover_the_truth(codes, tmp_path, crs):
    """The whole path, 150 times: design, fill in the truth, evaluate."""
    transform = TRANSFORM if crs != "EPSG:4326" else Affine(0.1, 0, 4.0, 0, -0.5, 68.0)
    rng = np.random.default_rng(6)
    path = write_map(tmp_path / "m.tif", codes, crs=crs, transform=transform)
    wrong = rng.random(codes.shape) < np.array([0.1, 0.25, 0.2] + [0] * 253)[codes]
    truth = np.where(wrong, (codes + rng.integers(1, 3, codes.shape)) % 3, codes)
    class_map = open_class_map(path)
    sizes = np.broadcast_to(class_map.row_areas()[:, None], codes.shape)
    labelled = codes != 255
    areas = [sizes[labelled & (truth == code)].sum() for code in range(3)]
    overall = sizes[labelled & (truth == codes)].sum() / sizes[labelled].sum()

    hits = np.zeros(4)
    runs = 150
    for seed in range(runs):
        out = tmp_path / f"points{seed}.parquet"
        plan = plan_sample(class_map, SampleSpec(count=300, seed=seed))
        write_sample(plan, out)
        points = geopandas.read_parquet(out)
        cols = np.floor((points.geometry.x - transform.c) / transform.a).astype(int)
        rows = np.floor((points.geometry.y - transform.f) / transform.e).astype(int)
        points["reference"] = [NAMES[code] for code in truth[rows, cols]]
        points.to_parquet(out)
        found = evaluate_map(class_map, out)
        assert found.used == 300
        hits[0] += (
            found.estimates.overall_accuracy.lower
            <= overall
            <= found.estimates.overall_accuracy.upper
        )
        hits[1:] += [
            one.lower <= area <= one.upper for one, area in zip(found.areas, areas, strict=True)
        ]
    # 95 % of 150, with a standard error of 1.8 %.
    assert (hits / runs > 0.89).all(), hits / runs
    assert hits.mean() / runs < 0.995


def test_a_map_made_later_is_scored_with_the_strata_of_the_first(codes, tmp_path):
    """Points designed on one map estimate another without bias; its own classes would not do."""
    truth = codes.copy()
    first = write_map(tmp_path / "first.tif", codes)
    second_codes = np.where(codes == 255, 255, (codes + (np.arange(83) > 40)) % 3).astype(np.uint8)
    second = write_map(tmp_path / "second.tif", second_codes)
    out = tmp_path / "points.parquet"
    write_sample(plan_sample(first, SampleSpec(count=400)), out)
    points = geopandas.read_parquet(out)
    rows = np.floor((TRANSFORM.f - points.geometry.y) / 10).astype(int)
    cols = np.floor((points.geometry.x - TRANSFORM.c) / 10).astype(int)
    points["reference"] = [NAMES[code] for code in truth[rows, cols]]
    points.to_parquet(out)
    found = evaluate_map(second, out)
    assert "first.tif" in found.strata
    labelled = codes != 255
    overall = found.estimates.overall_accuracy
    exact = (second_codes == truth)[labelled].mean()
    assert overall.lower <= exact <= overall.upper
    # The strata are the truth itself: its areas are known exactly.
    for code in range(3):
        assert found.areas[code].value == pytest.approx(100.0 * (truth == code).sum())
        assert found.areas[code].standard_error == pytest.approx(0, abs=1e-6)
    # Passing the strata over is told where it makes a difference, and only there.
    for scored, strata, warned in (
        (second, "auto", False), (second, "map", True), (second, "none", True),
        (first, "map", False), (first, "none", True),
    ):  # fmt: skip
        notes = evaluate_map(scored, out, spec=AccuracySpec(strata=strata)).notes
        assert any("unequal chances" in note for note in notes) == warned, (scored, strata)
    # Passed over, they have no say: by hand, from what the second map holds at the points.
    mapped, right = second_codes[rows, cols], (second_codes == truth)[rows, cols]
    shares = [(second_codes == code).sum() / labelled.sum() for code in range(3)]
    by_map = sum(share * right[mapped == code].mean() for code, share in enumerate(shares))
    assert len({round(float(one), 5) for one in (overall.value, by_map, right.mean())}) == 3
    for strata, expected in (("map", by_map), ("none", right.mean())):
        passed = evaluate_map(second, out, spec=AccuracySpec(strata=strata))
        assert passed.estimates.overall_accuracy.value == pytest.approx(expected)
        with pytest.raises(InputError, match=r"Leave one of them out"):
            evaluate_map(second, out, spec=AccuracySpec(strata=strata, design=design_path(out)))
    points.drop(columns="stratum").to_parquet(tmp_path / "bare.parquet")
    shutil.copy(design_path(out), design_path(tmp_path / "bare.parquet"))
    bare = evaluate_map(second, tmp_path / "bare.parquet", spec=AccuracySpec(strata="map"))
    assert bare.estimates.overall_accuracy.value == pytest.approx(by_map)
    renamed = points.rename(columns={"stratum": "drawn from"})
    renamed.to_parquet(tmp_path / "renamed.parquet")
    named = AccuracySpec(design=design_path(out), strata_column="drawn from")
    same = evaluate_map(open_class_map(second), tmp_path / "renamed.parquet", spec=named)
    assert same.estimates.overall_accuracy == overall
    points.assign(stratum="Barley").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"holds the strata Barley, and the design has .*0"):
        evaluate_map(second, tmp_path / "other.parquet", spec=AccuracySpec(design=design_path(out)))
    with pytest.raises(InputError, match="--strata-column"):
        evaluate_map(second, tmp_path / "bare.parquet", spec=AccuracySpec(design=design_path(out)))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SampleSpec(), "exactly one"),
        (SampleSpec(count=10, target_error=0.1), "exactly one"),
        (SampleSpec(count=0), "at least 1"),
        (SampleSpec(target_error=0.7), "between 0 and 0.5"),
        (SampleSpec(count=30, allocation="random"), "neyman"),  # type: ignore[arg-type]
        (SampleSpec(count=30, expected={"Barley": 0.8}), "Wheat, Maize"),
        (SampleSpec(count=30, expected={"Maize": 80}), "between 0 and 1"),
        (SampleSpec(count=30, expected={"": 1.5}), "between 0 and 1"),
        (SampleSpec(count=30, seed=-1), "0 or more"),
    ],
    ids=["none", "both", "zero", "error", "allocation", "class", "percent", "others", "seed"],
)
def test_recipes_that_contradict_themselves(codes, tmp_path, spec, said):
    with pytest.raises(InputError, match=said):
        plan_sample(write_map(tmp_path / "m.tif", codes), spec)


def test_a_design_made_by_hand_needs_no_more_than_its_strata(tmp_path):
    path = tmp_path / "hand.json"
    path.write_text('{"strata": [{"stratum": "A", "pixels": 7, "area_m2": 700.5}]}')
    design = read_design(path)
    assert (design.column, design.strata, design.names) == ("stratum", ("A",), ("A",))
    assert (design.pixels.tolist(), design.areas.tolist()) == ([7], [700.5])


def test_design_files(tmp_path):
    with pytest.raises(MissingFileError, match="evaluate design"):
        read_design(tmp_path / "no.json")
    for text in ("{", "{}", '{"strata": [{"stratum": 1}]}', '{"strata": []}'):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(InputError, match="design"):
            read_design(tmp_path / "d.json")
