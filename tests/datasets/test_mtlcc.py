"""MTLCC comes in as it was written, from either form; damage is told before anything is written."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from stcln_geo.archive.members import add_members
from stcln_geo.archive.validate import validate_archive
from stcln_geo.cli.main import invoke
from stcln_geo.cube.season import list_seasons
from stcln_geo.cube.stack import Stack, open_stack
from stcln_geo.cube.stack_contract import stack_dataset, validate_stack
from stcln_geo.datasets.mtlcc import plan_mtlcc
from stcln_geo.datasets.run import import_dataset
from stcln_geo.datasets.tfrecord import parse_example, read_records
from stcln_geo.errors import InputError, MissingFileError, TaskError
from stcln_geo.execution import Execution
from stcln_geo.storage import list_files, location

from .make_mtlcc import (
    Tile,
    crc32c,
    example,
    frame,
    ints_feature,
    make_tile,
    masked,
    record_of,
    write_records,
    write_tifs,
)

NAMES = ["sugar beet", "summer oat", "meadow", "rape", "hop", "maize"]


def make_tiles(year: int = 2016, side: int = 24) -> list[Tile]:
    """Five tiles: padded, unsorted, with a repeated date, short."""
    rng = np.random.default_rng(year + side)
    tiles = [
        make_tile(number, year=year, dates=dates, side=side, rng=rng, padding=padding)
        for number, dates, padding in ((7, 6, 2), (12, 5, 0), (103, 7, 0), (5, 4, 1), (1000, 6, 0))
    ]
    order = rng.permutation(7)
    tiles[2].doy = tiles[2].doy[order]
    tiles[4].doy[3] = tiles[4].doy[2]
    return tiles


def frames_in_time(tile: Tile) -> list[int]:
    first: dict[str, int] = {}
    for number, date in enumerate(tile.dates):
        if date:
            first.setdefault(date, number)
    return [first[date] for date in sorted(first)]


def assert_as_written(stack: Stack, tiles: list[Tile]) -> None:
    by_id = {str(tile.id): tile for tile in tiles}
    assert stack.site_id == tuple(sorted(by_id, key=int))
    for site, name in enumerate(stack.site_id):
        tile = by_id[name]
        frames = frames_in_time(tile)
        count = len(frames)
        assert stack.dates[site] == count
        dates = [np.datetime64(tile.dates[number]) for number in frames]
        assert list(stack.time[site, :count].astype("datetime64[D]")) == dates
        assert list(stack.days[site, :count]) == [int(tile.doy[number]) - 1 for number in frames]
        # Row by row, column by column: the pixel of 20 m and 60 m that holds that of 10 m.
        rows = np.arange(tile.x10.shape[1])
        expected = np.concatenate(
            [
                values[frames][:, rows // factor][:, :, rows // factor]
                for values, factor in ((tile.x10, 1), (tile.x20, 2), (tile.x60, 6))
            ],
            axis=-1,
        )
        expected = np.moveaxis(expected, -1, 1)
        stored = stack.reflectance[site]
        np.testing.assert_array_equal(stored[:count], np.where(expected > 0, expected, -32768))
        assert (stored[count:] == -32768).all()
        np.testing.assert_array_equal(stack.valid[site, :count], (expected > 0).all(axis=1))
        assert not stack.valid[site, count:].any()
        assert stack.legend is not None
        back = np.array([*(int(entry.value) for entry in stack.legend.classes), *[0] * 250])
        np.testing.assert_array_equal(back[stack.labels[site]], tile.labels)
        assert stack.crs[site] == "EPSG:32632"
        assert list(stack.transform[site]) == [10, 0, tile.origin[0], 0, -10, tile.origin[1]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Tile]]]:
    tiles = {year: make_tiles(year) for year in (2016, 2017)}
    del tiles[2017][1]
    root = tmp_path_factory.mktemp("mtlcc") / "datasets" / "full" / "240"
    write_records(root, tiles[2016] + tiles[2017])
    return root, tiles


@pytest.fixture(scope="module")
def imported(records: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "mtlcc.zarr"
    import_dataset(plan_mtlcc(records[0]), out)
    return out


def test_records_are_as_they_were_written(
    imported: Path, records: tuple[Path, dict[int, list[Tile]]]
):
    assert list_seasons(location(imported)) == ["2016-01-01", "2017-01-01"]
    for year in (2016, 2017):
        stack = open_stack(imported, f"{year}-01-01")
        assert_as_written(stack, records[1][year])
        assert stack.bands[:5] == ("red", "green", "blue", "nir", "rededge1")
        assert stack.bands[-4:] == ("swir22", "coastal", "nir09", "cirrus")
        assert stack.legend is not None
        assert list(stack.legend.names) == NAMES
        assert stack.attrs["level"] == "top-of-atmosphere"
        dataset = stack_dataset(imported, f"{year}-01-01")
        assert validate_stack(dataset)[0] == []
        assert dataset["reflectance"].attrs["standard_name"] == "toa_bidirectional_reflectance"
        assert set(dataset["georeference"].to_numpy()) == {"geotransforms.csv"}


def test_splits_stand_beside_the_seasons(imported: Path):
    splits = json.loads((imported / "splits.json").read_text())
    assert splits["2016-01-01"] == {
        "eval": ["1000"], "test_fold0": ["103"], "train_fold0": ["5", "7", "12"],
    }  # fmt: skip
    assert splits["2017-01-01"]["train_fold0"] == ["5", "7"]


def test_splits_are_told_anew_where_all_pixels_are_there(tmp_path: Path):
    root = write_tifs(tmp_path / "p", [tile for tile in make_tiles() if tile.id in {12, 103}])
    import_dataset(plan_mtlcc(root), tmp_path / "o.zarr")
    (root / "tileids" / "train_fold1.tileids").write_text("12\n")
    report = import_dataset(plan_mtlcc(root), tmp_path / "o.zarr")
    assert report.written == 0
    splits = json.loads((tmp_path / "o.zarr" / "splits.json").read_text())
    assert splits["2016-01-01"]["train_fold1"] == ["12"]


def test_what_was_left_out_is_counted_by_season(imported: Path):
    seasons = json.loads((imported / "import.json").read_text())["seasons"]
    found = {one["kind"]: one["items"] for one in seasons["2016-01-01"]["left_out"]}
    assert found["padding"] == ["5 (1)", "7 (2)"] or found["padding"] == ["7 (2)", "5 (1)"]
    assert found["unsorted_dates"] == ["103"]
    assert len(found["repeated_date"]) == 1
    assert found["repeated_date"][0].startswith("1000 2016-")
    assert found["missing_tiles"] == ["train_fold0 (1 of 4)"]
    assert sorted(found["short_series"]) == ["1000", "103", "12", "5", "7"]
    other = {one["kind"]: one["items"] for one in seasons["2017-01-01"]["left_out"]}
    assert other["missing_tiles"] == ["train_fold0 (2 of 4)"]


@pytest.mark.parametrize("tree", ["published", "converter"])
@pytest.mark.parametrize(
    ("placed", "places", "rule"),
    [(True, False, "file"), (False, True, "geotransforms.csv"), (False, False, "none")],
)
def test_geotiffs_are_as_they_were_written(
    tmp_path: Path, tree: Any, placed: bool, places: bool, rule: str
):
    tiles = [tile for tile in make_tiles() if tile.id in {12, 103}]
    root = write_tifs(tmp_path / "data16", tiles, tree=tree, placed=placed, places=places)
    plan = plan_mtlcc(root)
    import_dataset(plan, tmp_path / "o.zarr")
    stack = open_stack(tmp_path / "o.zarr")
    assert {site.georeference for site in plan.seasons[0].sites} == {rule}
    kinds = {one.kind for one in plan.seasons[0].findings}
    assert ("no_place" in kinds) == (rule == "none")
    if rule == "none":
        for tile in tiles:
            tile.origin = (0, 0)
    assert_as_written(stack, tiles)


def test_both_forms_give_the_same_pixels(tmp_path: Path):
    tiles = [tile for tile in make_tiles(side=48) if tile.id in {12, 103}]
    first = plan_mtlcc(write_records(tmp_path / "r", tiles))
    second = plan_mtlcc(write_tifs(tmp_path / "t", tiles))
    import_dataset(first, tmp_path / "r.zarr")
    import_dataset(second, tmp_path / "t.zarr")
    one, two = open_stack(tmp_path / "r.zarr"), open_stack(tmp_path / "t.zarr")
    assert one.shape_yx == (48, 48)
    for name in ("reflectance", "valid", "labels", "coverage"):
        np.testing.assert_array_equal(getattr(one, name)[:], getattr(two, name)[:])
    assert one.attrs["statistics"] == two.attrs["statistics"]
    assert_as_written(two, tiles)


def test_years_of_geotiffs_have_splits_of_their_own(tmp_path: Path):
    for year in (2016, 2017):
        tiles = [tile for tile in make_tiles(year) if tile.id in {12, 103, 1000}]
        write_tifs(tmp_path / "p" / f"data{year - 2000}", tiles[:2] if year == 2017 else tiles)
    plan = plan_mtlcc(tmp_path / "p")
    first, second = plan.seasons
    assert first.splits == {"eval": ("1000",), "test_fold0": ("103",), "train_fold0": ("12",)}
    assert second.splits == {"eval": ("103",), "test_fold0": ("12",), "train_fold0": ()}


def test_years_are_chosen_and_join_one_stack(
    records: tuple[Path, dict[int, list[Tile]]], imported: Path, tmp_path: Path
):
    out = tmp_path / "o.zarr"
    import_dataset(plan_mtlcc(records[0], years=[2017]), out)
    assert list_seasons(location(out)) == ["2017-01-01"]
    import_dataset(plan_mtlcc(records[0], years=[2016]), out)
    assert_as_written(open_stack(out, "2016-01-01"), records[1][2016])
    for file in ("import.json", "splits.json"):
        assert json.loads((out / file).read_text()) == json.loads((imported / file).read_text())
    with pytest.raises(InputError, match=r"tile of 2018.*there: 2016, 2017"):
        plan_mtlcc(records[0], years=[2018, 2017])


def test_awkward_tiles_are_counted_and_never_fatal(tmp_path: Path):
    tiles = make_tiles()
    root = write_tifs(tmp_path / "p", [tiles[1], tiles[2]])
    write_tifs(root, [make_tile(9, year=2016, dates=3, side=48, rng=np.random.default_rng(1))])
    (root / "data" / "8888").mkdir()
    first = tiles[1].dates[0].replace("-", "")
    (root / "data" / "12" / f"{first}_20m.tif").unlink()
    (root / "data" / "12" / "20160231_10m.tif").write_bytes(b"")
    (root / "data" / "103" / "y.tif").unlink()
    (root / "classes.txt").write_text("0|unknown\n1|sugar beet\n")
    (root / "tileids" / "eval.tileids").unlink()
    plan = plan_mtlcc(root)
    found = {one.kind: one.items for one in plan.seasons[0].findings}
    assert set(found["bad_date"]) == {f"12 ({first})", "12 (20160231)"}
    assert found["no_dates"] == ("8888",)
    assert found["other_shape"] == ("9",)
    assert found["missing_labels"] == ("103",)
    assert found["unknown_class"] == ("12",)
    import_dataset(plan, tmp_path / "o.zarr")
    stack = open_stack(tmp_path / "o.zarr")
    assert stack.site_id == ("12", "103")
    assert stack.dates.tolist() == [4, 7]
    assert (stack.labels[1] == 255).all()
    np.testing.assert_array_equal(stack.labels[0] == 0, tiles[1].labels == 1)
    assert set(np.unique(stack.labels[0])) == {0, 255}


def test_true_length_of_a_tile(tmp_path: Path):
    tile = make_tile(1, year=2016, dates=31, side=48, rng=np.random.default_rng(1), padding=15)
    plan = plan_mtlcc(write_records(tmp_path / "r", [tile], labels_in_time=False))
    assert "short_series" not in {one.kind for one in plan.seasons[0].findings}
    import_dataset(plan, tmp_path / "o.zarr")
    assert_as_written(open_stack(tmp_path / "o.zarr"), [tile])


# --- the form of TFRecords ------------------------------------------------------------------------


def test_the_generator_checks_as_a_known_library_does():
    assert crc32c(b"123456789") == 0xE3069283
    content = np.random.default_rng(1).bytes(1000)
    assert crc32c(content) == google_crc32c.value(content)


def test_an_example_is_read_packed_or_not():
    numbers = (0, 1, 127, 128, 2**40, -1, -(2**63))
    for packed in (True, False):
        content = example({"a/é": ints_feature(numbers, packed=packed), "b": ints_feature((5,))})
        assert parse_example(content) == {"a/é": list(numbers), "b": [5]}
    with pytest.raises(ValueError, match="longer than its message"):
        parse_example(content[:-1])


def test_records_are_read_one_after_the_other(tmp_path: Path):
    contents = [b"", b"one", bytes(range(256)) * 9]
    (tmp_path / "a").write_bytes(b"".join(frame(content) for content in contents))
    assert list(read_records(tmp_path / "a")) == contents


def rewrite(harm: Any) -> Any:
    """Return a function that changes the unpacked bytes of a tile's file."""

    def change(file: Path) -> None:
        content = bytearray(gzip.decompress(file.read_bytes()))
        file.write_bytes(gzip.compress(bytes(harm(content)), 1))

    return change


def flip(position: int) -> Any:
    def harm(content: bytearray) -> bytearray:
        content[position] ^= 1
        return content

    return rewrite(harm)


def other_record(**changes: Any) -> Any:
    def change(file: Path) -> None:
        tile = make_tile(7, year=2016, dates=5, side=24, rng=np.random.default_rng(1))
        for name, value in changes.items():
            setattr(tile, name, value(getattr(tile, name)))
        file.write_bytes(gzip.compress(frame(record_of(tile))))

    return change


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-50]), "gzip stream is broken"),
        (
            lambda file: file.write_bytes(gzip.compress(b"no records at all")),
            "checksum of a length",
        ),
        (flip(0), "checksum of a length, at byte 0"),
        (flip(5000), "checksum of the record at byte 12"),
        (flip(-1), "checksum of the record"),
        (rewrite(lambda content: content[:-9]), "ends within a record"),
        (rewrite(lambda content: content + b"12345"), "ends within the head"),
        (rewrite(lambda content: content * 2), "2 records, where a tile is one"),
        (lambda file: file.write_bytes(gzip.compress(frame(b"\x0f\xff"))), "it holds"),
        (lambda file: file.write_bytes(gzip.compress(frame(b""))), "no feature x10/data"),
        (other_record(x20=lambda values: values[1:]), "different numbers of frames"),
        (other_record(x60=lambda values: values[..., :2]), "shape .* of the bands of 60m"),
    ],
)
def test_damaged_records_are_named_before_anything_is_written(
    tmp_path: Path, harm: Any, message: str
):
    tiles = [tile for tile in make_tiles() if tile.id in {7, 12}]
    root = write_records(tmp_path / "r", tiles)
    harm(root / "data16" / "7.tfrecord.gz")
    with pytest.raises(InputError, match=f"1 of 2 tiles are damaged.*7.tfrecord.gz: .*{message}"):
        plan_mtlcc(root)


def test_a_length_that_lies_is_not_believed(tmp_path: Path):
    head = struct.pack("<Q", 2**60)
    (tmp_path / "a").write_bytes(head + masked(head) + b"short")
    with pytest.raises(InputError, match="ends within a record of 1152921504606846976 bytes"):
        list(read_records(tmp_path / "a"))


def test_a_damaged_image_is_named_and_the_others_are_written(tmp_path: Path):
    tiles = [tile for tile in make_tiles() if tile.id in {12, 103}]
    root = write_tifs(tmp_path / "p", tiles)
    date = tiles[0].dates[2].replace("-", "")
    image = root / "data" / "12" / f"{date}_60m.tif"
    whole = image.read_bytes()
    image.write_bytes(b"no image")
    plan = plan_mtlcc(root)
    with pytest.raises(TaskError, match=f"{date}_60m.tif"):
        import_dataset(plan, tmp_path / "o.zarr")
    assert list_seasons(location(tmp_path / "o.zarr")) == []
    image.write_bytes(whole)
    import_dataset(plan_mtlcc(root), tmp_path / "o.zarr")
    assert_as_written(open_stack(tmp_path / "o.zarr"), tiles)


# --- stopped, and mistakes ------------------------------------------------------------------------


def test_a_stopped_import_goes_on_in_its_second_season(
    records: tuple[Path, Any], imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from stcln_geo.datasets import run

    plan = plan_mtlcc(records[0])
    read: list[str] = []

    def reader(site: Any, legend: Any) -> Any:
        read.append(site.path)
        if stops and len(read) == 7:
            raise KeyboardInterrupt
        return run.read_mtlcc_record(site, legend)

    monkeypatch.setattr(run, "_READERS", {"mtlcc-tfrecord": reader})
    stops = True
    out = tmp_path / "o.zarr"
    with pytest.raises(KeyboardInterrupt):
        import_dataset(plan, out)
    assert list_seasons(location(out)) == ["2016-01-01"]
    stops = False
    read.clear()
    import_dataset(plan, out)
    assert len(read) == 4
    for name in list_files(location(imported)):
        assert (out / name).read_bytes() == (imported / name).read_bytes(), name


def test_the_command(records: tuple[Path, Any], tmp_path: Path, capsys: Any):
    out = tmp_path / "o.zarr"
    command = ["import", "mtlcc", str(records[0]), str(out)]
    assert invoke([*command, "--dry-run", "--years", "2017"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Season 2017-01-01: 4 sites of 24 x 24 px, 13 bands" in told
    assert "2016" not in told
    assert not out.exists()
    assert invoke(command) == 0
    assert "9 sites, 9 written now" in capsys.readouterr().out
    assert invoke([*command, "--years", "last"]) == 2
    assert "--years 2016,2017" in " ".join(capsys.readouterr().err.split())
    above = str(records[0].parents[1])
    assert invoke(["import", "mtlcc", above, str(out)]) == 2
    assert f"here one of {records[0]}" in " ".join(capsys.readouterr().err.split())
    assert invoke(["import", "pastis", str(records[0]), str(out)]) == 2
    assert "the folder holds an import of mtlcc" in " ".join(capsys.readouterr().err.split())


def test_a_set_without_classes_or_another_folder_is_refused(tmp_path: Path):
    root = write_records(tmp_path / "r", make_tiles()[:1])
    (root / "classes.txt").write_text("1;beet\n")
    with pytest.raises(InputError, match=r"line 1 of classes.txt"):
        plan_mtlcc(root)
    (root / "classes.txt").unlink()
    with pytest.raises(MissingFileError, match=r"no classes.txt"):
        plan_mtlcc(root)
    with pytest.raises(MissingFileError, match="nothing at this path"):
        plan_mtlcc(tmp_path / "none")
    with pytest.raises(InputError, match="Unpack it"):
        plan_mtlcc(root / "geotransforms.csv")


@pytest.mark.slow
def test_archives_and_workers_take_it(records: tuple[Path, Any], imported: Path, tmp_path: Path):
    here = Execution(workers=2)
    import_dataset(plan_mtlcc(records[0], execution=here), tmp_path / "o.zarr", execution=here)
    for name in list_files(location(imported)):
        assert (tmp_path / "o.zarr" / name).read_bytes() == (imported / name).read_bytes(), name
    assert add_members(tmp_path / "a", [imported]).rows == 9
    assert validate_archive(tmp_path / "a")[0] == []
