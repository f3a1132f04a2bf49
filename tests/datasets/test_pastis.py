"""PASTIS comes in as it was written: values, dates, classes, parcels, folds, places."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from stcln_geo.archive.index import open_archive
from stcln_geo.archive.members import add_members
from stcln_geo.archive.validate import validate_archive
from stcln_geo.cli.main import invoke
from stcln_geo.cube.stack import Stack, open_stack
from stcln_geo.cube.stack_contract import stack_dataset, validate_stack
from stcln_geo.datasets.pastis import plan_pastis
from stcln_geo.datasets.run import import_dataset
from stcln_geo.errors import CubeError, InputError, MissingFileError, OutputError
from stcln_geo.storage import list_files, location

from .make_pastis import Square, add_radar, awkward_squares, make_square, write_pastis

SIDE = 24
LEFT_OUT = 30_007


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Square]]:
    """Seven squares, of which one has more dates than frames."""
    squares = awkward_squares(SIDE)
    for square in squares:
        if square.id == LEFT_OUT:
            square.dates.append(20191101)
    root = write_pastis(tmp_path_factory.mktemp("pastis"), squares)
    return root, {square.id: square for square in squares}


@pytest.fixture(scope="module")
def imported(source: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "pastis.zarr"
    import_dataset(plan_pastis(source[0]), out)
    return out


def frames_in_time(square: Square) -> list[int]:
    """Frames of a square as they should stand: by date, the first of each, none impossible."""
    first: dict[int, int] = {}
    for frame, date in enumerate(square.dates):
        if date != 20190231:
            first.setdefault(date, frame)
    return [first[date] for date in sorted(first)]


def assert_as_written(stack: Stack, squares: dict[int, Square]) -> None:
    assert stack.site_id == tuple(str(key) for key in sorted(squares) if key != LEFT_OUT)
    numbers: set[int] = set()
    for site, name in enumerate(stack.site_id):
        square = squares[int(name)]
        frames = frames_in_time(square)
        count = len(frames)
        assert stack.dates[site] == count
        expected = [pandas.Timestamp(str(square.dates[frame])) for frame in frames]
        assert list(stack.time[site, :count]) == [stamp.to_datetime64() for stamp in expected]
        assert list(stack.days[site, :count]) == [
            (stamp - pandas.Timestamp("2018-09-01")).days for stamp in expected
        ]
        written = square.series[frames]
        measured = written != -10_000
        stored = stack.reflectance[site]
        np.testing.assert_array_equal(stored[:count][measured], written[measured])
        assert (stored[:count][~measured] == -32768).all()
        assert (stored[count:] == -32768).all()
        np.testing.assert_array_equal(stack.valid[site, :count], measured.all(axis=1))
        assert not stack.valid[site, count:].any()
        classes = square.target[0].astype(int)
        np.testing.assert_array_equal(stack.labels[site], np.where(classes == 19, 255, classes))
        parcels = stack.parcels[site]
        np.testing.assert_array_equal(parcels > 0, square.parcels > 0)
        pairs = set(zip(parcels.ravel().tolist(), square.parcels.ravel().tolist(), strict=True))
        assert len(pairs) == len(np.unique(square.parcels)) == len(np.unique(parcels))
        mine = set(np.unique(parcels[parcels > 0]).tolist())
        assert not mine & numbers, "no two sites share a parcel"
        numbers |= mine
        assert stack.fold is not None
        assert stack.fold[site] == square.fold
        assert stack.crs[site] == square.crs
        np.testing.assert_allclose(
            stack.transform[site], [10, 0, square.origin[0], 0, -10, square.origin[1]]
        )
    assert numbers == set(range(1, len(numbers) + 1))


def test_all_is_as_it_was_written(imported: Path, source: tuple[Path, dict[int, Square]]):
    stack = open_stack(imported)
    assert stack.name == "2018-09-01"
    assert_as_written(stack, source[1])
    assert stack.legend is not None
    assert len(stack.legend) == 19
    assert stack.legend.names[0] == "Background"
    assert stack.legend.colormap()[18] == (23, 190, 207, 255)
    assert stack.attrs["clouds_masked"] is False
    assert stack.attrs["void"] == {"source": 19, "stored": 255}


def test_the_stack_keeps_the_contract_and_tells_how_sites_were_placed(imported: Path):
    dataset = stack_dataset(imported)
    assert validate_stack(dataset) == ([], [])
    rules = dict(
        zip(dataset["site_id"].to_numpy(), dataset["georeference"].to_numpy(), strict=True)
    )
    assert rules["10005"] == "lambert93"
    assert rules["10000"] == rules["40003"] == "utm"
    assert float(dataset["offset_m"].max()) < 1
    assert set(dataset["tile"].to_numpy()) == {"T30UXV", "T31TFJ", "T31TFM", "T32ULU"}


def test_parcels_lead_back_to_the_register(imported: Path, source: tuple[Path, dict[int, Square]]):
    table = pandas.read_parquet(imported / "parcels.parquet")
    stack = open_stack(imported)
    site = stack.site_id.index("20001")
    mine = table[table["site_id"] == "20001"].set_index("number")["source_id"]
    numbers = stack.parcels[site]
    back = np.zeros(numbers.shape, dtype=int)
    back[numbers > 0] = mine.loc[numbers[numbers > 0]].to_numpy()
    np.testing.assert_array_equal(back, source[1][20_001].parcels)


def test_statistics_are_those_of_numpy(imported: Path, source: tuple[Path, dict[int, Square]]):
    stack = open_stack(imported)
    told = stack.attrs["statistics"]
    values, usable = stack.reflectance[:].astype("float64") * 1e-4, stack.valid[:]
    picked = np.moveaxis(values, 2, 0)[:, usable]
    assert told["all"]["pixels"] == usable.sum()
    np.testing.assert_allclose(told["all"]["mean"], picked.mean(axis=1), rtol=1e-9)
    np.testing.assert_allclose(told["all"]["std"], picked.std(axis=1), rtol=1e-9)
    assert stack.fold is not None
    ours = np.moveaxis(values[stack.fold == 1], 2, 0)[:, usable[stack.fold == 1]]
    np.testing.assert_allclose(told["folds"]["1"]["mean"], ours.mean(axis=1), rtol=1e-9)
    norm = json.loads((source[0] / "NORM_S2_patch.json").read_text())
    assert stack.attrs["published_normalisation"] == norm
    counts = np.bincount(stack.labels[:].ravel(), minlength=256)[:19]
    assert stack.attrs["label_pixels"] == counts.tolist()


def test_what_was_left_out_is_counted(imported: Path):
    told = json.loads((imported / "import.json").read_text())["seasons"]["2018-09-01"]
    found = {one["kind"]: one["items"] for one in told["left_out"]}
    assert found == {
        "unsorted_dates": ["20001"],
        "repeated_date": [found["repeated_date"][0]],
        "bad_date": ["20006 frame 3 (20190231)"],
        "dates_disagree": ["30007"],
    }
    assert found["repeated_date"][0].startswith("30002 ")
    assert told["sites"] == 6


def test_dates_as_text_and_degrees_give_the_same(
    source: tuple[Path, dict[int, Square]], tmp_path: Path
):
    from pyproj import Transformer

    squares = [square for square in awkward_squares(SIDE) if square.tile == "t32ulu"]
    plain = plan_pastis(write_pastis(tmp_path / "a", squares)).seasons[0].sites
    degrees = Transformer.from_crs("EPSG:2154", "OGC:CRS84", always_xy=True).transform
    for square in squares:
        square.ring = [degrees(x, y) for x, y in square.ring]
    other = plan_pastis(write_pastis(tmp_path / "b", squares, dates_as="text")).seasons[0].sites
    for one, two in zip(plain, other, strict=True):
        assert (one.time, one.frames, one.crs) == (two.time, two.frames, two.crs)
        assert one.transform == two.transform


def test_missing_parts_are_counted_and_never_fatal(tmp_path: Path):
    squares = awkward_squares(SIDE)
    root = write_pastis(tmp_path / "p", squares)
    (root / "DATA_S2" / "S2_10000.npy").unlink()
    (root / "ANNOTATIONS" / "TARGET_10005.npy").unlink()
    (root / "ANNOTATIONS" / "ParcelIDs_40003.npy").unlink()
    (root / "NORM_S2_patch.json").unlink()
    np.save(root / "DATA_S2" / "S2_20006.npy", np.zeros((39, 10, 8, 8), "int16"))
    strange = squares[3].target.copy()
    strange[0, 5, 5] = 77
    np.save(root / "ANNOTATIONS" / "TARGET_30002.npy", strange)
    content = json.loads((root / "metadata.geojson").read_text())
    content["features"].append(content["features"][0])
    content["features"][6]["geometry"] = None
    (root / "metadata.geojson").write_text(json.dumps(content))
    plan = plan_pastis(root)
    found = {one.kind: one.items for one in plan.seasons[0].findings}
    assert found["missing_series"] == ("10000",)
    assert found["other_shape"] == ("20006",)
    assert found["missing_target"] == ("10005",)
    assert found["missing_parcels"] == ("40003",)
    assert found["unknown_class"] == ("30002",)
    assert found["no_footprint"] == ("30007",)
    assert found["repeated_id"] == ("40003",)
    assert found["missing_statistics"] == ("NORM_S2_patch.json",)
    import_dataset(plan, tmp_path / "o.zarr")
    stack = open_stack(tmp_path / "o.zarr")
    assert stack.site_id == ("10005", "20001", "30002", "40003")
    assert (stack.labels[0] == 255).all()
    assert stack.labels[2, 5, 5] == 255
    assert not stack.parcels[3].any()
    assert stack.attrs["published_normalisation"] is None


def test_a_footprint_that_is_no_square_is_told(tmp_path: Path):
    square = make_square(
        1, fold=1, tile="t31tfj", dates=38, side=SIDE, rng=np.random.default_rng(1)
    )
    # Its bounds in Lambert-93, drawn out by 100 m: neither rule for squares can hold.
    (west, north), (east, south) = square.ring[0], square.ring[2]
    square.ring = [(west, north), (east + 100, north), (east + 100, south), (west, south),
                   (west, north)]  # fmt: skip
    plan = plan_pastis(write_pastis(tmp_path, [square]))
    site = plan.seasons[0].sites[0]
    assert site.georeference == "utm-centre"
    assert site.crs == "EPSG:32631"
    assert 40 < site.offset_m < 75
    assert abs(site.transform[2] - (square.origin[0] + 50)) <= 6
    assert {one.kind for one in plan.seasons[0].findings} == {"uncertain_place"}


def test_wide_numbers_are_clipped_and_never_wrap(tmp_path: Path):
    square = make_square(
        1, fold=1, tile="t31tfj", dates=38, side=SIDE, rng=np.random.default_rng(1)
    )
    square.series = square.series.astype("float32")
    square.series[1, 2, 3, 4] = 40_000
    square.series[1, 2, 3, 5] = np.nan
    square.series[1, 2, 3, 6] = -9_999
    import_dataset(plan_pastis(write_pastis(tmp_path / "p", [square])), tmp_path / "o.zarr")
    stack = open_stack(tmp_path / "o.zarr")
    assert stack.reflectance[0, 1, 2, 3, 4:7].tolist() == [32767, -32768, -9_999]
    assert stack.valid[0, 1, 3, 4:7].tolist() == [False, False, True]


def test_true_size_of_a_square(tmp_path: Path):
    square = make_square(
        10_000, fold=1, tile="t30uxv", dates=38, side=128, rng=np.random.default_rng(1)
    )
    import_dataset(plan_pastis(write_pastis(tmp_path / "p", [square])), tmp_path / "o.zarr")
    stack = open_stack(tmp_path / "o.zarr")
    assert stack.shape_yx == (128, 128)
    assert stack.radar is None
    assert_as_written(stack, {square.id: square})


def test_frames_from_before_the_first_day_are_left_out(tmp_path: Path):
    square = make_square(
        10_000, fold=1, tile="t30uxv", dates=38, side=8, rng=np.random.default_rng(1)
    )
    square.dates[:2] = [20180831, 20180901]
    plan = plan_pastis(write_pastis(tmp_path / "p", [square]))
    assert plan.seasons[0].sites[0].time[0] == "2018-09-01"
    assert plan.seasons[0].sites[0].frames == tuple(range(1, 38))
    assert plan.seasons[0].findings[0].items == ("10000 2018-08-31",)


# --- Sentinel-1 of PASTIS-R -------------------------------------------------------------------


@pytest.fixture(scope="module")
def radar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Square]]:
    """A set with both directions, one, an unsorted and a broken series; and its import."""
    rng = np.random.default_rng(3)
    squares = {
        str(number): make_square(number, fold=1, tile="t31tfj", dates=38, side=16, rng=rng)
        for number in (20_001, 20_002, 20_003, 20_004)
    }
    add_radar(squares["20001"], "S1A", 7, rng)
    add_radar(squares["20001"], "S1D", 9, rng)
    for name in ("S1A", "S1D"):
        squares["20001"].radar[name][0][-1] = 20191115  # morning and evening of one day
    add_radar(squares["20002"], "S1D", 5, rng)
    order = rng.permutation(5)
    dates, series = squares["20002"].radar["S1D"]
    squares["20002"].radar["S1D"] = ([dates[place] for place in order], series)
    add_radar(squares["20004"], "S1A", 3, rng)
    squares["20004"].radar["S1A"][0].append(20191111)
    root = write_pastis(tmp_path_factory.mktemp("r"), list(squares.values()), dates_as="text")
    out = tmp_path_factory.mktemp("ro") / "o.zarr"
    import_dataset(plan_pastis(root), out)
    return root, out, squares


def test_radar_is_as_it_was_written(radar: tuple[Path, Path, dict[str, Square]]):
    stack = open_stack(radar[1])
    assert stack.radar is not None
    assert stack.radar.pols == ("vv", "vh")
    assert stack.radar.backscatter.shape == (4, 16, 2, 16, 16)
    assert stack.radar.backscatter.dtype == np.float32
    for site, name in enumerate(stack.site_id):
        expected = []
        for direction, orbit in (("S1A", "ascending"), ("S1D", "descending")):
            dates, series = radar[2][name].radar.get(direction, ([], []))
            if len(dates) == len(series):
                expected += [
                    (pandas.Timestamp(str(date)), orbit, frame[:2].astype("float32"))
                    for date, frame in zip(dates, series, strict=True)
                ]
        expected.sort(key=lambda image: (image[0], image[1]))
        count = len(expected)
        times = stack.radar.time[site]
        assert list(times[:count]) == [date.to_datetime64() for date, _, _ in expected]
        assert np.isnat(times[count:]).all()
        assert stack.radar.orbit[site].tolist() == [
            *(orbit for _, orbit, _ in expected), *[""] * (16 - count)
        ]  # fmt: skip
        first = pandas.Timestamp("2018-09-01")
        assert stack.radar.days[site].tolist() == [
            *((date - first).days for date, _, _ in expected), *[-1] * (16 - count)
        ]  # fmt: skip
        stored = stack.radar.backscatter[site]
        for place, (_, _, values) in enumerate(expected):
            np.testing.assert_array_equal(stored[place], values)
        assert np.isnan(stored[count:]).all()
    assert_as_written(stack, {int(name): square for name, square in radar[2].items()})
    norm = stack.attrs["published_normalisation_s1"]
    assert norm["descending"]["Fold_1"]["mean"] == [-10.9, -17.3, 6.4]


def test_radar_keeps_the_contract_and_breaches_are_told(radar: tuple[Path, Path, Any]):
    dataset = stack_dataset(radar[1]).load()
    assert validate_stack(dataset) == ([], [])
    assert dataset["backscatter"].dims == ("site", "time_s1", "pol", "y", "x")
    assert "time_s1" in dataset.coords
    for change, message in (
        (lambda ds: ds.drop_vars("orbit_s1"), "lacks the coordinates orbit_s1"),
        (lambda ds: ds.assign(backscatter=ds["backscatter"].astype("float64")), "float32"),
        (
            lambda ds: ds.assign_coords(time_s1=(ds["time_s1"].dims, ds["time_s1"].data[:, ::-1])),
            "'time_s1' must",
        ),
        (lambda ds: ds.assign_coords(days_s1=ds["days_s1"] + 1), "'days_s1' must be -1"),
        (
            lambda ds: ds.assign_coords(orbit_s1=(ds["orbit_s1"].dims, np.full((4, 16), "up"))),
            "'orbit_s1' must be ascending or descending",
        ),
    ):
        errors, _ = validate_stack(change(dataset))
        assert any(message in text for text in errors), (message, errors)


def test_radar_that_was_left_out_is_counted(radar: tuple[Path, Path, Any], tmp_path: Path):
    told = json.loads((radar[1] / "import.json").read_text())["seasons"]["2018-09-01"]
    found = {one["kind"]: one["items"] for one in told["left_out"]}
    assert found == {
        "unsorted_dates": ["20002 S1D"], "radar_dates_disagree": ["20004 S1A"],
    }  # fmt: skip
    root = tmp_path / "p"
    shutil.copytree(radar[0], root)
    (root / "DATA_S1D" / "S1D_20002.npy").unlink()
    np.save(root / "DATA_S1A" / "S1A_20001.npy", np.zeros((7, 3, 8, 8), "float16"))
    found = {one.kind: list(one.items) for one in plan_pastis(root).seasons[0].findings}
    assert found["missing_radar"] == ["20002 S1D"]
    assert found["radar_shape"] == ["20001 S1A"]
    file = root / "DATA_S1D" / "S1D_20001.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"damaged \(DATA_S1D/S1D_20001.npy"):
        plan_pastis(root)


# --- stopped, and run again -------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stcln_geo.cube.stack._SHARD_BYTES", 1_500_000)


def content_of(path: Path) -> dict[str, bytes]:
    return {
        name: (path / name).read_bytes()
        for name in list_files(location(path))
        if not name.endswith("import.json")
    }


@pytest.mark.usefixtures("small_shards")
def test_a_stopped_import_goes_on_and_gives_the_same(
    source: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_pastis(source[0])
    whole = tmp_path / "whole.zarr"
    import_dataset(plan, whole)
    assert len(open_stack(whole).shards) == 3
    read: list[str] = []

    def stop_at(name: str | None) -> None:
        from stcln_geo.datasets import run
        from stcln_geo.datasets.pastis import read_pastis_site

        def reader(site: Any, legend: Any) -> Any:
            if site.id == name:
                raise KeyboardInterrupt
            read.append(site.id)
            return read_pastis_site(site, legend)

        monkeypatch.setattr(run, "_READERS", {"pastis": reader})

    out = tmp_path / "o.zarr"
    stop_at("20006")
    with pytest.raises(KeyboardInterrupt):
        import_dataset(plan, out)
    with pytest.raises(CubeError, match=r"no complete season|unfinished"):
        open_stack(out)
    assert len(read) == 3
    read.clear()
    stop_at(None)
    report = import_dataset(plan_pastis(source[0]), out)
    assert read == ["20001", "20006", "30002", "40003"], "the finished shard is not read again"
    assert report.written == 4
    assert content_of(out) == content_of(whole)
    assert not (tmp_path / "o.zarr.lock").exists()
    again = import_dataset(plan, out)
    assert again.written == 0
    assert "nothing to do" in str(again)


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_workers_write_the_same(source: tuple[Path, Any], tmp_path: Path):
    from stcln_geo.execution import Execution

    plan = plan_pastis(source[0])
    import_dataset(plan, tmp_path / "a.zarr")
    import_dataset(
        plan_pastis(source[0], execution=Execution(workers=2)), tmp_path / "b.zarr",
        execution=Execution(workers=2),
    )  # fmt: skip
    assert content_of(tmp_path / "a.zarr") == content_of(tmp_path / "b.zarr")


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_a_bucket_gets_the_same(source: tuple[Path, Any], tmp_path: Path, s3: str):
    plan = plan_pastis(source[0])
    import_dataset(plan, tmp_path / "o.zarr")
    there = location(f"{s3}/o.zarr")
    import_dataset(plan, there)
    assert import_dataset(plan, there).written == 0
    assert list_files(there) == list_files(location(tmp_path / "o.zarr"))
    for name, content in content_of(tmp_path / "o.zarr").items():
        assert (there / name).read_bytes() == content, name
    assert_as_written(open_stack(there), source[1])


@pytest.mark.slow
def test_a_killed_command_goes_on_and_gives_the_same(source: tuple[Path, Any], tmp_path: Path):
    whole, out = tmp_path / "whole.zarr", tmp_path / "o.zarr"
    script = (
        "import sys, time\n"
        "from stcln_geo.cube import stack\n"
        "from stcln_geo.datasets import run as imports\n"
        "from stcln_geo.cli.main import run\n"
        "original = imports.write_sites\n"
        "def slow(*args, **options):\n"
        "    original(*args, **options); time.sleep(0.3)\n"
        "imports.write_sites = slow\n"
        "stack._SHARD_BYTES = 1\nrun(['import', 'pastis', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", script, str(source[0])]
    assert subprocess.run([*command, str(whole)], check=False).returncode == 0
    manifests = out / "manifests" / "2018-09-01"
    for wanted in (1, 3):
        process = subprocess.Popen([*command, str(out)])
        while len(list(manifests.glob("*.json"))) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was killed before it had ended"
    kept = {file.name: file.stat().st_mtime_ns for file in manifests.glob("*.json")}
    assert 3 <= len(kept) < 6
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"6 sites, {6 - len(kept)} written now" in done.stdout
    for name, changed in kept.items():
        assert (manifests / name).stat().st_mtime_ns == changed
    assert content_of(out) == content_of(whole)
    assert not (tmp_path / "o.zarr.lock").exists()


def test_changed_files_are_refused_and_replaced_on_demand(tmp_path: Path):
    squares = awkward_squares(SIDE)[:2]
    root = write_pastis(tmp_path / "p", squares)
    out = tmp_path / "o.zarr"
    import_dataset(plan_pastis(root), out)
    squares[0].series[:] += 1
    write_pastis(root, squares)
    with pytest.raises(CubeError, match="--overwrite"):
        import_dataset(plan_pastis(root), out)
    import_dataset(plan_pastis(root), out, overwrite=True)
    position = open_stack(out).site_id.index(str(squares[0].id))
    assert open_stack(out).reflectance[position, 1, 0, 0, 0] == squares[0].series[1, 0, 0, 0]


# --- mistakes -----------------------------------------------------------------------------------


def break_metadata(root: Path) -> None:
    (root / "metadata.geojson").write_text('{"type": "FeatureCollection", "feat')


def cut_series(root: Path) -> None:
    file = root / "DATA_S2" / "S2_10000.npy"
    file.write_bytes(file.read_bytes()[:-100])


def empty_target(root: Path) -> None:
    (root / "ANNOTATIONS" / "TARGET_10000.npy").write_bytes(b"")


def pickle_series(root: Path) -> None:
    np.save(root / "DATA_S2" / "S2_10000.npy", np.array([{"a": 1}], dtype=object))


def lose_series(root: Path) -> None:
    for file in (root / "DATA_S2").glob("*.npy"):
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda root: (root / "metadata.geojson").unlink(), MissingFileError, "no metadata"),
        (break_metadata, InputError, "metadata.geojson is damaged"),
        (cut_series, InputError, r"1 files are damaged \(DATA_S2/S2_10000.npy"),
        (empty_target, InputError, r"ANNOTATIONS/TARGET_10000.npy"),
        (pickle_series, InputError, r"DATA_S2/S2_10000.npy"),
        (lose_series, InputError, "none of the 2 squares"),
        (lambda root: (root / "NORM_S2_patch.json").write_text("[]"), InputError, "NORM_S2_patch"),
    ],
)
def test_damaged_sets_are_refused_before_anything_is_written(
    tmp_path: Path, harm: Any, error: type[Exception], message: str
):
    root = write_pastis(tmp_path / "p", awkward_squares(8)[:2])
    harm(root)
    with pytest.raises(error, match=message):
        plan_pastis(root)


def test_the_folder_above_is_recognised(tmp_path: Path):
    write_pastis(tmp_path / "x" / "PASTIS", awkward_squares(8)[:1])
    with pytest.raises(MissingFileError, match=r"Did you mean .*x/PASTIS\?"):
        plan_pastis(tmp_path / "x")
    (tmp_path / "PASTIS.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="Unzip it"):
        plan_pastis(tmp_path / "PASTIS.zip")


def test_other_folders_are_left_alone(source: tuple[Path, Any], tmp_path: Path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="other files"):
        import_dataset(plan_pastis(source[0]), tmp_path / "o")
    with pytest.raises(OutputError, match="is a file"):
        import_dataset(plan_pastis(source[0]), tmp_path / "o" / "mine.txt")


def test_the_command(source: tuple[Path, Any], tmp_path: Path, capsys: Any):
    out = tmp_path / "o.zarr"
    command = ["import", "pastis", str(source[0]), str(out)]
    assert invoke([*command, "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "6 sites of 24 x 24 px, 10 bands, 38 to 61 dates each" in told
    assert "Dry run: nothing was written." in told
    assert not out.exists()
    assert invoke(command) == 0
    shown = capsys.readouterr()
    assert "6 sites, 6 written now" in shown.out
    assert "left out, since it is unknown which date a frame has: 1 (30007)" in " ".join(
        shown.err.split()
    )
    assert "no cloud mask" in shown.out
    assert invoke(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert invoke(["import", "pastis", "nowhere", str(source[0])]) == 2
    assert "holds other files" in " ".join(capsys.readouterr().err.split())
    assert invoke(["import", "pastis", str(tmp_path / "none"), str(out)]) == 2
    assert "nothing at this path" in " ".join(capsys.readouterr().err.split())
    assert invoke(["import", "pastis", str(source[0])]) == 2
    assert invoke([*command, "--workers", "2", "--scheduler", "tcp://x"]) == 2


# --- what the rest of the house makes of it -----------------------------------------------------


def test_an_archive_takes_it(imported: Path, tmp_path: Path, capsys: Any):
    report = add_members(tmp_path / "a", [imported])
    assert report.rows == 6
    assert validate_archive(tmp_path / "a") == ([], [])
    index = open_archive(tmp_path / "a").index.set_index("id")
    assert index.loc["20001", "dates"] == 61
    # Places of the tiles, roughly: Normandy lies west of the Alps.
    centres = index.geometry.representative_point()
    assert -3 < centres.loc["10000"].x < 1.5
    assert 6 < centres.loc["40003"].x < 7
    assert invoke(["archive", "info", str(tmp_path / "a")]) == 0
    assert "2018-09-01" in capsys.readouterr().out


@pytest.mark.slow
def test_pretraining_takes_it(imported: Path, tmp_path: Path):
    run = tmp_path / "run"
    options = {
        "steps": 2, "batch_size": 4, "model.preset": "tiny", "model.widths": "[8, 16]",
        "model.layers": 1, "model.heads": 2, "data.chip": 16, "validation.every": 2,
        "masking.gate": "false",  # random pixels are never green
    }  # fmt: skip
    flat = [text for key, value in options.items() for text in ("--set", f"{key}={value}")]
    assert invoke(["pretrain", str(imported), "--out", str(run), *flat]) == 0
    told = json.loads((run / "run.json").read_text())
    assert told["data"]["sites"] == 6
