"""The simulated land and sky: blocks agree, seeds repeat, crops follow their calendar."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from stcln_geo.errors import InputError
from stcln_geo.grid import Window
from stcln_geo.simulate import CROPS, SimulationSpec, make_landscape, make_sky, render_scene
from stcln_geo.simulate.noise import hash_grid, make_noise, to_normal, to_uniform
from stcln_geo.simulate.phenology import BANDS, Variation, make_state
from stcln_geo.simulate.sky import is_cloudy, make_covered

SPEC = SimulationSpec(width=151, height=101, dates=12, seed=4)
AREA = Window(SPEC.window.row, SPEC.window.col, 102, 152)
# Ragged parts whose union is the area: even, as bands of 20 m ask for.
PARTS = [
    Window(AREA.row + row, AREA.col + col, height, width)
    for row, height in ((0, 38), (38, 64))
    for col, width in ((0, 90), (90, 62))
]


def _partial_pass(spec):
    return next(item for item in spec.acquisitions if item.partial)


def _cloudy_pass(spec):
    return min(spec.acquisitions, key=lambda item: abs(item.cloud_amount - 0.5))


def test_noise_is_the_same_in_every_window_and_standard_normal_at_large():
    whole = make_noise(Window(-900, 70, 400, 500), cells=(16, 5), weights=(1.0, 0.5), key=9)
    part = make_noise(Window(-813, 101, 57, 203), cells=(16, 5), weights=(1.0, 0.5), key=9)
    np.testing.assert_array_equal(part, whole[87:144, 31:234])
    assert abs(whole.mean()) < 0.1
    assert whole.std() == pytest.approx(1, abs=0.1)


def test_hashes_are_uniform_normal_and_uncorrelated():
    words = hash_grid(np.arange(-300, 300), np.arange(50, 650), 3)
    uniform, normal = to_uniform(words), to_normal(words)
    assert np.histogram(uniform, bins=10, range=(0, 1))[0] == pytest.approx(36_000, rel=0.03)
    assert normal.mean() == pytest.approx(0, abs=0.01)
    assert normal.std() == pytest.approx(1, abs=0.01)
    for shifted in (uniform[1:], uniform[:, 1:]):
        other = uniform[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(shifted.ravel(), other.ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("choose", [_partial_pass, _cloudy_pass], ids=["partial", "cloudy"])
def test_whole_equals_parts(choose):
    acquisition = choose(SPEC)
    whole = render_scene(SPEC, acquisition, AREA)
    for part in PARTS:
        scene = render_scene(SPEC, acquisition, part)
        where = part.relative_to(AREA)
        half = slice(where.row // 2, (where.row + part.height) // 2)
        half_cols = slice(where.col // 2, (where.col + part.width) // 2)
        np.testing.assert_array_equal(scene.scl, whole.scl[half, half_cols])
        for name in BANDS:
            cut = (
                (half, half_cols)
                if scene.bands[name].shape != part.shape_yx
                else (
                    where.rows,
                    where.cols,
                )
            )
            np.testing.assert_array_equal(scene.bands[name], whole.bands[name][cut], err_msg=name)


def test_overlapping_regions_of_one_seed_see_the_same_land():
    other = SimulationSpec(
        width=120, height=90, dates=12, seed=4, origin_x=SPEC.origin_x + 300, origin_y=SPEC.origin_y
    )
    window = Window(AREA.row, AREA.col + 30, 60, 60)
    np.testing.assert_array_equal(
        make_landscape(SPEC, window).crops(0), make_landscape(other, window).crops(0)
    )


def test_seed_decides_everything():
    acquisition = SPEC.acquisitions[3]
    window = Window(AREA.row, AREA.col, 40, 40)
    once = render_scene(SPEC, acquisition, window).bands["red"]
    make_landscape.cache_clear()
    np.testing.assert_array_equal(once, render_scene(SPEC, acquisition, window).bands["red"])
    changed = SimulationSpec(width=151, height=101, dates=12, seed=5)
    other = render_scene(changed, changed.acquisitions[3], window).bands["red"]
    assert (once != other).mean() > 0.5


def test_fields_are_of_the_size_asked_for_and_every_crop_grows():
    for seed in range(3):
        spec = SimulationSpec(seed=seed)
        land = make_landscape(spec, Window(spec.window.row, spec.window.col, 204, 302))
        crops = land.crops(0)
        pixels = np.bincount(land.ids.ravel(), minlength=len(land.surfaces.keys))
        fields = land.surfaces.declared & (pixels > 0)
        assert fields.sum() > 100
        assert 0.7 < pixels[fields].mean() / spec.field_pixels < 1.3
        assert 0.4 < (crops < 255).mean() < 0.9
        grown = np.bincount(land.surfaces.covers[fields, 1], minlength=len(CROPS))
        assert (grown >= 8).all(), grown


def test_grassland_stays_and_other_crops_rotate():
    spec = SimulationSpec(seasons=2, seed=1)
    land = make_landscape(spec, Window(spec.window.row, spec.window.col, 204, 302))
    first, second = (land.surfaces.covers[land.surfaces.declared, season] for season in (1, 2))
    grass = next(index for index, crop in enumerate(CROPS) if crop.permanent)
    np.testing.assert_array_equal(first == grass, second == grass)
    assert (first[first != grass] != second[first != grass]).mean() > 0.6


def test_crops_follow_their_calendar():
    spec = SimulationSpec(seed=2)
    surfaces = make_landscape(spec, Window(spec.window.row, spec.window.col, 204, 302)).surfaces
    fields = surfaces.declared

    def leaf_area(day):
        area = make_state(surfaces, season=0, day=day, year=2021, wetness=0.3).leaf_area
        names = np.array([crop.name for crop in CROPS])[surfaces.covers[fields, 1]]
        return {crop.name: float(np.median(area[fields][names == crop.name])) for crop in CROPS}

    may, late_july = leaf_area(250), leaf_area(325)
    for winter_crop in ("Winter wheat", "Winter barley", "Winter rapeseed"):
        assert may[winter_crop] > 2
        assert late_july[winter_crop] < 1
    for summer_crop in ("Maize", "Sugar beet", "Potatoes"):
        assert may[summer_crop] < 1
        assert late_july[summer_crop] > 2
    # Barley ripens before wheat, and potatoes before beet.
    assert leaf_area(290)["Winter barley"] < leaf_area(290)["Winter wheat"] - 1
    assert leaf_area(360)["Potatoes"] < leaf_area(360)["Sugar beet"] - 1


def test_fields_stray_and_regions_are_late_as_asked_for():
    spec = SimulationSpec(seed=2)
    surfaces = make_landscape(spec, Window(spec.window.row, spec.window.col, 204, 302)).surfaces
    crop = next(index for index, crop in enumerate(CROPS) if crop.name == "Maize")
    maize = surfaces.declared & (surfaces.covers[:, 1] == crop)

    def leaf_area(day, **options):
        variation = Variation(**options)
        state = make_state(surfaces, season=0, day=day, year=2021, wetness=0.3, variation=variation)
        return state.leaf_area[maize]

    usual, none = leaf_area(290), leaf_area(290, fields=0.0)
    np.testing.assert_array_equal(usual, leaf_area(290, fields=1.0, year_days=4.0, late_days=0.0))
    # Weeds after the crop before are not of the curve, and go on straying.
    assert none.std() < 0.6 * usual.std()
    assert leaf_area(290, fields=2.0).std() > 1.5 * usual.std()
    # A late region is an earlier day of one on time; a year's shift is at most as asked for.
    np.testing.assert_allclose(
        leaf_area(300, fields=0.0, late_days=12.0), leaf_area(288, fields=0.0), rtol=1e-2
    )
    shifted = leaf_area(290, fields=0.0, year_days=10.0)
    early, late = (
        leaf_area(290, fields=0.0, year_days=0.0, late_days=days) for days in (-10.0, 10.0)
    )
    assert late.mean() <= shifted.mean() <= early.mean()


def test_classification_follows_the_clouds_with_some_errors():
    spec = SimulationSpec(seed=3, dates=20)
    window = Window(spec.window.row, spec.window.col, 204, 302)
    missed = false = thick_cells = clear_cells = shaded_found = shaded = 0
    passed = thin_cells = 0
    for acquisition in spec.acquisitions:
        sky = make_sky(acquisition, window)
        scl = render_scene(spec, acquisition, window, bands=()).scl
        opacity, veil, shade = (
            layer.reshape(102, 2, 151, 2).mean(axis=(1, 3))
            for layer in (sky.cloud, sky.cirrus, sky.shadow)
        )
        seen = scl > 0
        thick = (opacity > 0.6) & seen
        clear = (opacity < 0.02) & (veil < 0.02) & seen
        missed += int((thick & ~is_cloudy(scl)).sum())
        false += int((clear & is_cloudy(scl)).sum())
        thick_cells, clear_cells = thick_cells + int(thick.sum()), clear_cells + int(clear.sum())
        thin = (opacity > 0.08) & (opacity < 0.25) & (veil < 0.02) & seen
        thin_cells += int(thin.sum())
        passed += int((thin & ~is_cloudy(scl)).sum())
        deep = (shade > 0.7) & (opacity < 0.1) & (veil < 0.02) & seen
        shaded, shaded_found = shaded + int(deep.sum()), shaded_found + int((scl[deep] == 3).sum())
    assert min(thick_cells, clear_cells, shaded) > 1000
    assert missed / thick_cells < 0.01
    assert shaded_found / shaded > 0.95
    assert 0 < false / clear_cells < 0.02
    # Thin edges of cloud pass as ground: the classification is not the truth.
    assert passed / thin_cells > 0.3


def test_clouds_brighten_shadows_darken_and_both_are_patches():
    acquisition = _cloudy_pass(SPEC)
    sky = make_sky(acquisition, AREA)
    nir = render_scene(SPEC, acquisition, AREA).bands["nir"].astype(float) - acquisition.offset
    clear = (sky.cloud < 0.02) & (sky.shadow < 0.02) & (sky.cirrus < 0.02)
    assert nir[sky.cloud > 0.9].mean() > 1.5 * nir[clear].mean()
    deep = (sky.shadow > 0.9) & (sky.cloud < 0.02)
    assert nir[deep].mean() < 0.6 * nir[clear].mean()
    patches, count = ndimage.label(sky.cloud > 0.5)
    assert np.bincount(patches.ravel())[1:].max() > 500
    assert count < 40


def test_mean_cloud_follows_the_spec():
    for fraction in (0.0, 0.2, 0.5):
        spec = SimulationSpec(cloud_fraction=fraction, dates=140, seasons=5)
        amounts = [item.cloud_amount for item in spec.acquisitions]
        assert np.mean(amounts) == pytest.approx(fraction, abs=0.05)


def test_partial_orbit_covers_the_west_only():
    covered = make_covered(SPEC, _partial_pass(SPEC), AREA)
    assert 0.4 < covered.mean() < 0.8
    assert covered[:, 0].all()
    assert not covered[:, -1].any()
    assert (np.diff(covered.astype(int), axis=1) <= 0).all()
    full = next(item for item in SPEC.acquisitions if not item.partial)
    assert make_covered(SPEC, full, AREA).all()


@pytest.mark.parametrize("dates", [2, 24, 73, 100, 146])
def test_passes_are_distinct_and_stay_in_their_season(dates):
    spec = SimulationSpec(dates=dates, seasons=2)
    times = [item.when for item in spec.acquisitions]
    assert len(times) == 2 * dates
    assert all(before < after for before, after in pairwise(times))
    for item in spec.acquisitions:
        start = spec.season_start(item.season)
        assert item.when.date() == start.date().fromordinal(start.toordinal() + item.day)
        assert start <= item.when < spec.season_start(item.season + 1)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"width": 3}, "width=3 must be from 16"),
        ({"dates": 200}, "dates=200 must be from 2 to 146"),
        ({"cloud_fraction": 2.0}, "cloud_fraction=2.0"),
        ({"crs": "EPSG:3035"}, "UTM zone"),
        ({"origin_x": 573_010}, "multiple of 60"),
    ],
    ids=["width", "dates", "clouds", "crs", "origin"],
)
def test_impossible_recipes_are_refused(values, told):
    with pytest.raises(InputError, match=told):
        SimulationSpec(**values)


def test_odd_windows_are_refused():
    with pytest.raises(InputError, match="must be even"):
        render_scene(SPEC, SPEC.acquisitions[0], Window(0, 0, 3, 4))


def _cloud_of_the_shadows(acquisition, window):
    """Where the cloud stands that casts a shadow, from the picture: rows south, columns east."""
    wide = make_sky(acquisition, window.expand(700))
    rows, cols = np.nonzero(wide.cloud[500:-500, 500:-500] < 0.5)
    some = np.random.default_rng(1).choice(len(rows), 60, replace=False)
    rows, cols = rows[some] + 500, cols[some] + 500
    cast = wide.shadow[rows, cols] / (1 - wide.cloud[rows, cols])
    down, right = (np.arange(-480, 481, 2)[:, None, None], np.arange(-240, 241, 2)[None, :, None])
    miss = np.abs(wide.cloud[rows + down, cols + right] - cast).mean(axis=2)
    place = np.unravel_index(miss.argmin(), miss.shape)
    assert miss[place] < 1e-3
    return int(down[place[0], 0, 0]), int(right[0, place[1], 0])


def test_the_south_has_the_calendar_and_the_sun_of_the_other_half_of_the_year():
    common = {"width": 101, "height": 67, "dates": 30, "seed": 4, "seasons": 2}
    north, south = SimulationSpec(**common), SimulationSpec(**common, crs="EPSG:32756")
    assert (north.time_range, south.time_range) == (
        "2021-09-01/2023-08-31", "2021-03-01/2023-02-28",
    )  # fmt: skip
    passes = list(zip(north.acquisitions, south.acquisitions, strict=True))
    assert all((one.day, one.orbit) == (other.day, other.orbit) for one, other in passes)
    for spec in (north, south):
        assert all(spec.season_start(one.season) <= one.when for one in spec.acquisitions)
    # The weather of a day of the season is the same, but for a few days of the sun's year.
    for one, other in passes:
        assert one.cloud_amount == pytest.approx(other.cloud_amount, abs=0.06)

    broken = [pair for pair in passes if 0.3 < pair[0].cloud_amount < 0.7]
    days = [broken[0], min(broken, key=lambda pair: abs(pair[0].day - 115))]
    for one, other in days:
        rows, cols = _cloud_of_the_shadows(one, north.window)
        far, east = _cloud_of_the_shadows(other, south.window)
        # In the morning the sun is in the east, and on the equator's side.
        assert rows > 0 > far
        assert min(cols, east) > 0
        # In the south the sun stands as high half a year later.
        assert abs(far) == pytest.approx(rows, rel=0.06)
