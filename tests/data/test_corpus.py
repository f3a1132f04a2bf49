"""Cubes, stacks and archives of different dates, bands, seasons and CRS are one set of chips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stcln_geo.archive.members import add_members
from stcln_geo.cube.store import open_season
from stcln_geo.data.blocks import ShardReader
from stcln_geo.data.chips import ChipDataset
from stcln_geo.data.corpus import open_sources, plan_corpus
from stcln_geo.data.plan import plan_source, unit_side
from stcln_geo.data.sampling import SampleOrder
from stcln_geo.data.source import Source, source_of
from stcln_geo.data.weights import weigh_units
from stcln_geo.errors import CubeError, InputError
from stcln_geo.storage import list_files, location, write_file

STACK_BANDS = ("red", "blue", "nir", "green")
SITES, DATES, SIDE = 7, 9, 50
SEASON = "2021-03-01"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven sites of 50 x 50 px in two zones, with 3 to 9 dates; not to be changed."""
    return make_stack(tmp_path_factory.mktemp("stack") / "sites.zarr")


def make_stack(path: Path, *, season: str = SEASON, seed: int = 5) -> Path:
    from stcln_geo.cube.stack import StackLayout
    from stcln_geo.cube.stack_store import create_stack, finish_stack, write_sites

    generator = np.random.default_rng(seed)
    time = np.full((SITES, DATES), np.datetime64("NaT"), dtype="datetime64[s]")
    for site in range(SITES):
        count = 3 + site if site < SITES - 1 else DATES
        days = np.sort(generator.choice(300, count, replace=False))
        time[site, :count] = np.datetime64(season) + days
    made = create_stack(
        path, season,
        site_id=[f"s{site}" for site in range(SITES)],
        crs=["EPSG:32631" if site % 2 else "EPSG:32720" for site in range(SITES)],
        transform=np.array([[10, 0, 5e5 + 1e4 * site, 0, -10, 8e6] for site in range(SITES)]),
        shape_yx=(SIDE, SIDE), time=time, bands=STACK_BANDS,
        layout=StackLayout(chunk=32, sites=3),
    )  # fmt: skip
    for shard in made.shards:
        count = len(shard)
        shape = (count, DATES, len(STACK_BANDS), SIDE, SIDE)
        reflectance = generator.integers(-100, 9000, shape).astype(np.int16)
        valid = (~np.isnat(time[shard.start : shard.stop]))[:, :, None, None] & (
            generator.random((count, DATES, SIDE, SIDE)) > 0.2
        )
        if 2 in shard:
            valid[2 - shard.start, :, :32, :32] = False
        write_sites(made, shard.start, reflectance=reflectance, valid=valid)
    finish_stack(path, season)
    return path


def test_chips_of_a_stack_are_its_pixels(stack: Path) -> None:
    import xarray as xr

    source = open_sources([stack])[0]
    plan = plan_source(source, chip=16).plan
    dataset = ChipDataset([source], plan, bands=("nir", "red"))

    told = xr.open_zarr(stack / SEASON, mask_and_scale=False, consolidated=False)
    pixels = told.reflectance.sel(band=["nir", "red"]).values
    valid = told.valid.values
    seen = np.zeros((SITES, 64, 64), dtype=int)
    for number, unit in enumerate(plan):
        for window, chip in zip(unit.chips, dataset.read(number), strict=True):
            seen[unit.site, window.rows, window.cols] += 1
            kept = np.isin(source.days[unit.site], chip.days)
            rows, cols = window.rows, window.cols
            assert chip.days.min() >= 0
            expected = valid[unit.site, :, rows, cols]
            height, width = expected.shape[1:]
            assert (kept == expected.any(axis=(1, 2))).all()
            assert np.array_equal(chip.valid[:, :height, :width], expected[kept])
            assert not chip.valid[:, height:].any()
            assert not chip.valid[:, :, width:].any()
            assert np.array_equal(
                chip.reflectance[:, :, :height, :width], pixels[unit.site, :, :, rows, cols][kept]
            )
            assert chip.source is not None
            assert f"site s{unit.site}" in str(chip.source)
            assert len(chip.days) <= unit.dates
    assert (seen[:, :32, :32].sum(axis=(1, 2)) == np.where(np.arange(SITES) == 2, 0, 1024)).all()
    assert (seen[:, 32:] == 1).all()


def test_sources_are_found_in_cubes_stacks_and_archives_each_once(
    cube: Path, stack: Path, new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    other = new_cube("other", season="2020-09-01", bands=("nir", "red", "green"), dates=4)
    archive = tmp_path / "archive"
    add_members(archive, [stack, other])

    sources = open_sources([archive, cube, stack])

    assert [(source.path.name, source.season, source.kind) for source in sources] == [
        ("sites.zarr", "2021-03-01", "stack"),
        ("other.zarr", "2020-09-01", "cube"),
        ("field.zarr", "2018-09-01", "cube"),
    ]
    assert [source.season for source in open_sources([archive], season="2020-09-01")] == [
        "2020-09-01"
    ]
    with pytest.raises(CubeError, match=r"no member has it.*2020-09-01, 2021-03-01"):
        open_sources([archive], season="1999-01-01")

    corpus = plan_corpus(sources, chip=16, memory=10**9)
    assert corpus.bands == ("red", "nir", "green")
    assert any("Left out, as not all sources have them: blue, swir16" in n for n in corpus.notes)
    assert any("Seasons begin on 03-01, 09-01" in note for note in corpus.notes)
    dataset = ChipDataset(sources, corpus.plan, bands=corpus.bands)
    assert dataset.chips == len(corpus.plan.row)
    assert {unit.season for unit in corpus.plan} == {0, 1, 2}
    assert {chip.reflectance.shape[1:] for chip in dataset.read(0)} == {(3, 16, 16)}
    with pytest.raises(CubeError, match=r"lacks band 'blue' required by pre-training"):
        plan_corpus(sources, chip=16, memory=10**9, bands=("blue", "red"))


def test_sources_without_a_common_band_are_an_error(
    cube: Path, new_cube: Callable[..., Path]
) -> None:
    other = new_cube("other", bands=("swir22", "blue"))

    with pytest.raises(CubeError, match=r"without a common band.*green, red, nir, swir16; .*blue"):
        plan_corpus(open_sources([cube, other]), chip=16, memory=10**9)


def test_chips_are_left_out_by_the_clear_dates_of_their_chunk(stack: Path) -> None:
    source = open_sources([stack])[0]
    coverage = np.asarray(source.coverage[:])
    side = np.array([32, 18])
    often = coverage.sum(axis=1) / (side[:, None] * side[None])

    for least in (0.0, 3.0, 5.0):
        part = plan_source(source, chip=32, min_clear=least)
        wanted = (often > 0) & (often >= least)
        assert part.chips == wanted.sum()
        assert part.empty == 1
        assert part.cloudy == (often > 0).sum() - wanted.sum()
    with pytest.raises(InputError, match="have fewer than 99 clear dates"):
        plan_corpus([source], chip=32, memory=10**9, min_clear=99)


def test_empty_dates_are_counted(cube: Path) -> None:
    season = open_season(cube)
    corpus = plan_corpus([source_of(season)], chip=32, memory=10**9)
    dataset = ChipDataset([season], corpus.plan, bands=season.bands)

    shown = sum(len(chip.days) for unit in range(len(dataset.units)) for chip in dataset.read(unit))

    # One date of the cube is cloudy all over.
    assert corpus.dates == 8 * 12
    assert corpus.empty_dates == corpus.dates - shown
    assert corpus.empty_dates >= 12


@pytest.mark.parametrize(
    ("chip", "chunk", "most_pixels", "expected"),
    [
        (32, 64, 10**9, (64, 1.0)),
        (32, 32, 10**9, (32, 1.0)),
        (64, 32, 10**9, (64, 1.0)),
        (48, 64, 10**9, (192, 1.0)),
        (32, 1024, 10**9, (1024, 1.0)),
        (32, 64, 0, (32, 4.0)),
        (32, 1024, 128 * 128, (128, 64.0)),
    ],
)
def test_units_are_as_small_as_they_can_be_with_each_chunk_decoded_once(
    chip: int, chunk: int, most_pixels: int, expected: tuple[int, float]
) -> None:
    assert unit_side((6144, 6144), chip=chip, chunk=chunk, most_pixels=most_pixels) == expected


def test_a_layout_that_is_decoded_too_often_is_refused(new_cube: Callable[..., Path]) -> None:
    wide = open_sources([new_cube("wide", chunk=128, shape_yx=(256, 128))])

    with pytest.raises(InputError, match=r"decoded 16 times an epoch.*cube rechunk.*--allow-ampl"):
        plan_corpus(wide, chip=32, memory=1_000_000)

    corpus = plan_corpus(wide, chip=32, memory=1_000_000, most_amplification=None)
    assert len(corpus.plan.row) == 32
    assert len(plan_corpus(wide, chip=32, memory=10**9).plan) == 2


def test_weights_multiply_by_cube_year_and_region(cube: Path, stack: Path, tmp_path: Path) -> None:
    sources = open_sources([cube, stack])
    plan = plan_corpus(sources, chip=16, memory=10**9).plan
    of_stack = plan.season == 1
    south = of_stack & (plan.site % 2 == 0)

    weights = weigh_units(
        plan, sources, cubes={"field*": 2.0, "sites": 3.0}, years={"2021": 0.5},
        regions={"-180,-90,180,40": 4.0},
    )  # fmt: skip

    assert weights is not None
    assert set(weights[~of_stack]) == {8.0 if south_of_40(sources) else 2.0}
    assert set(weights[of_stack & ~south]) == {1.5}
    assert set(weights[south]) == {6.0}
    assert weigh_units(plan, sources) is None
    even = weigh_units(plan, sources, balance="sources")
    assert even is not None
    shown = np.bincount(plan.season, weights=even * plan.chips_per_unit)
    assert shown[0] == pytest.approx(shown[1])
    assert shown.sum() == pytest.approx(len(plan.row))

    with pytest.raises(InputError, match=r"cubes 'alps'.*There is: field.zarr, sites.zarr"):
        weigh_units(plan, sources, cubes={"alps": 1.0})
    with pytest.raises(InputError, match=r"'2021' = -1"):
        weigh_units(plan, sources, years={"2021": -1})
    with pytest.raises(InputError, match="There is:"):
        weigh_units(plan, sources, regions={"100,0,101,1": 1})
    with pytest.raises(InputError, match=r"all of .* units get 0"):
        weigh_units(plan, sources, years={"20": 0})


def south_of_40(sources: tuple) -> bool:
    return sources[0].transform[0, 5] < 4_400_000


def test_fingerprints_tell_sources_apart(stack: Path, tmp_path: Path) -> None:
    again = open_sources([make_stack(tmp_path / "again.zarr")])[0]
    other = open_sources([make_stack(tmp_path / "other.zarr", seed=6)])[0]

    assert again.fingerprint == open_sources([stack])[0].fingerprint
    assert other.fingerprint != again.fingerprint


def upload(folder: Path, target: str) -> None:
    for name in list_files(folder):
        write_file(location(target) / name, (folder / name).read_bytes())


def test_chips_of_a_bucket_are_those_of_disk(
    stack: Path, new_cube: Callable[..., Path], s3: str
) -> None:
    own = new_cube("own")
    upload(own, f"{s3}/own.zarr")
    upload(stack, f"{s3}/sites.zarr")
    add_members(f"{s3}/archive", [f"{s3}/own.zarr", f"{s3}/sites.zarr"])

    here = open_sources([own, stack])
    there = open_sources([f"{s3}/archive"])

    assert [source.fingerprint for source in there] == [source.fingerprint for source in here]
    plan = plan_corpus(there, chip=16, memory=10**9).plan
    bands = ("nir", "red")
    local, remote = (ChipDataset(sources, plan, bands=bands) for sources in (here, there))
    for source in remote.sources:
        assert isinstance(source.reflectance, ShardReader)
    for unit in range(len(plan)):
        for ours, theirs in zip(local.read(unit), remote.read(unit), strict=True):
            assert np.array_equal(ours.reflectance, theirs.reflectance)
            assert np.array_equal(ours.valid, theirs.valid)
            assert np.array_equal(ours.days, theirs.days)


def test_an_archive_of_many_sites_plans_without_opening_them(tmp_path: Path) -> None:
    """20 000 sites: the pixels do not exist, the plan comes from the counts."""
    import time

    source = many_sites(20_000)
    begun = time.process_time()
    part = plan_source(source, chip=32, min_clear=3)

    assert part.chips + part.empty + part.cloudy == 20_000 * 16
    assert len(part.plan) == int(part.chips / 4)
    assert time.process_time() - begun < 5
    weights = weigh_units(part.plan, [source], regions={"-180,-90,180,0": 2.0})
    assert weights is not None
    order = SampleOrder(
        part.plan.chips_per_unit, np.full(len(part.plan), 10**6), memory=10**9, seed=0,
        rank=3, world_size=8, weights=weights,
    )  # fmt: skip
    assert next(order.samples(123_456)).epoch >= 1
    assert time.process_time() - begun < 10


def many_sites(sites: int) -> Source:
    generator = np.random.default_rng(0)
    clear = generator.random((sites, 1, 1, 1)) < 0.9
    coverage = (generator.integers(500, 4096, (sites, 12, 2, 2)) * clear).astype(np.uint16)

    class Unread:
        def read(self, selection: tuple[slice, ...]) -> np.ndarray:
            raise AssertionError("planning reads no pixel")

    return Source(
        path=Path("many.zarr"), season=SEASON, kind="stack", bands=STACK_BANDS,
        shape_yx=(128, 128), chunk=64, days=np.tile(np.arange(12, dtype=np.int32), (sites, 1)),
        dates=np.full(sites, 12), site_id=tuple(f"s{site}" for site in range(sites)),
        crs=tuple("EPSG:32631" if site % 2 else "EPSG:32731" for site in range(sites)),
        transform=np.tile([10.0, 0, 5e5, 0, -10, 5e6], (sites, 1)),
        reflectance=Unread(), valid=Unread(), coverage=coverage,
    )  # fmt: skip
