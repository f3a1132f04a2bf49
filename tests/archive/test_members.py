"""Cubes and stacks that exist enter the index; what is broken is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import zarr
from shapely.geometry import box

from stcln_geo.archive.index import IndexRows, list_members, open_archive
from stcln_geo.archive.members import add_members
from stcln_geo.archive.plan import ArchivePlan
from stcln_geo.archive.summary import describe_archive
from stcln_geo.archive.validate import validate_archive
from stcln_geo.catalog import load_catalog
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.labels import burn_labels
from stcln_geo.cube.plan import CubeSpec, plan_cube
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import open_season
from stcln_geo.errors import CubeError, InputError, MissingFileError
from stcln_geo.grid import Window

from .conftest import SEASONS, WEST


def cube_of(catalog: str, path: Path, **choices: Any) -> Path:
    """A cube of 40 x 30 px of the western scene."""
    snapshot = search_items(load_catalog(catalog), time_range="2018-09-01/2019-08-31")
    spec = CubeSpec(**{"crs": WEST, **choices})
    pixel = 10 / spec.resolution
    window = Window(round(-559860 * pixel), round(71196 * pixel), 40, 30)
    build_cube(plan_cube(snapshot, None, spec, window=window), path)
    return path


@pytest.fixture
def copied(whole_plan: ArchivePlan, tmp_path: Path) -> Path:
    """The undisturbed archive, for changes."""
    shutil.copytree(whole_plan.path, tmp_path / "archive")
    return tmp_path / "archive"


def test_members_are_added_once_and_by_reference(copied: Path, planted: Any, tmp_path: Path):
    outside = cube_of(planted.location, tmp_path / "region.zarr")
    inside = cube_of(planted.location, copied / "mine" / "inner.zarr", bands=("red",))
    report = add_members(copied, [outside, inside])
    assert report.added == (outside.as_posix(), "mine/inner.zarr")
    assert len(report.notes) == 1
    assert "lacks swir16: all members now share only red" in report.notes[0]
    assert report.rows == 14
    again = add_members(copied, [outside, inside])
    assert (again.added, len(again.known), again.rows) == ((), 2, 14)

    archive = open_archive(copied)
    assert archive.bands == ("red",)
    row = archive.index[archive.index["path"] == outside.as_posix()].iloc[0]
    season = open_season(outside)
    assert (row["kind"], row["site"], row["id"]) == ("cube", -1, "region")
    assert (row["season"], row["dates"]) == (SEASONS[0], len(season.time))
    assert row["clear_fraction"] == pytest.approx(season.valid[:].mean(), abs=1e-12)
    assert archive.member(row["path"]) == outside
    assert validate_archive(copied)[0] == []
    text = describe_archive(copied)
    assert "14 site-seasons of 8 sites in 2 cubes, 2 stacks" in text


def test_new_members_are_opened_once_and_known_ones_not(
    copied: Path, planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    new = [
        cube_of(planted.location, tmp_path / f"{name}.zarr", bands=("red",)) for name in ("a", "b")
    ]
    before = geopandas.read_parquet(copied / "index.parquet")
    opened: list[str] = []
    open_group = zarr.open_group

    def counted(store: Any, **options: Any) -> Any:
        opened.append(str(store))
        return open_group(store, **options)

    monkeypatch.setattr(zarr, "open_group", counted)

    report = add_members(copied, new)

    assert report.rows == len(before) + 2
    assert sorted(opened) == [str(path / SEASONS[0]) for path in new]
    after = geopandas.read_parquet(copied / "index.parquet")
    assert after[: len(before)].equals(before)
    opened.clear()
    assert add_members(copied, new[:1]).known == (new[0].as_posix(),)
    assert opened == []
    # Without a member all are looked at.
    add_members(copied, [])
    assert len(opened) == len(before.groupby(["path", "season"])) + 2
    assert geopandas.read_parquet(copied / "index.parquet").equals(after)


def test_an_archive_of_a_stack_alone(whole_plan: ArchivePlan, tmp_path: Path):
    stack = whole_plan.path / whole_plan.stacks[0].folder
    report = add_members(tmp_path / "new", [stack])
    assert report.rows == 6
    assert set(open_archive(tmp_path / "new").index["crs"]) == {WEST}


def test_what_does_not_fit_is_refused(copied: Path, planted: Any, tmp_path: Path):
    with pytest.raises(MissingFileError, match="no Zarr v3 group"):
        add_members(copied, [tmp_path / "none.zarr"])
    only = cube_of(planted.location, tmp_path / "red.zarr", bands=("red",))
    other = cube_of(planted.location, tmp_path / "swir.zarr", bands=("swir16",), resolution=20.0)
    new = tmp_path / "new"
    add_members(new, [only])
    with pytest.raises(CubeError, match=r"bands swir16, and none.*\(red\)"):
        add_members(new, [other])
    assert len(open_archive(new)) == 1
    coarse = cube_of(planted.location, tmp_path / "coarse.zarr", resolution=20.0)
    assert any("pixels of 20 m; the others have 10 m" in note for note in add_members(
        new, [coarse]).notes)  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is no archive"):
        add_members(tmp_path / "full", [only])
    with pytest.raises(MissingFileError, match="there is none"):
        add_members(tmp_path / "nothing", [])


def test_the_index_is_made_anew_from_the_members(copied: Path):
    before = geopandas.read_parquet(copied / "index.parquet")
    (copied / "index.parquet").unlink()
    assert IndexRows(copied).write() == len(before)
    assert geopandas.read_parquet(copied / "index.parquet").equals(before)


def test_a_member_that_is_away_is_named(copied: Path, planted: Any, tmp_path: Path):
    """A disk that is not mounted would shrink what is trained on, without a word."""
    outside = cube_of(planted.location, tmp_path / "region.zarr")
    assert add_members(copied, [outside]).rows == 13
    outside.rename(tmp_path / "moved.zarr")
    report = add_members(copied, [])
    assert report.rows == 12
    assert [note.partition(":")[0] for note in report.notes] == [f"{outside} is not there"]
    (tmp_path / "moved.zarr").rename(outside)
    report = add_members(copied, [])
    assert (report.rows, report.notes) == (13, ())


@pytest.mark.parametrize("damage", ["pixels", "row", "member", "unknown row"])
def test_damage_is_told(copied: Path, damage: str):
    member = list_members(copied)[0]
    if damage == "pixels":
        group: Any = zarr.open_group(copied / member / SEASONS[0], mode="r+")
        group["valid"][0] = ~group["valid"][0]
        expected = "'coverage' of site"
    elif damage == "row":
        table = geopandas.read_parquet(copied / "index.parquet")
        table.loc[0, "clear_fraction"] += 0.25
        table.to_parquet(copied / "index.parquet")
        expected = "out of date (clear_fraction)"
    elif damage == "member":
        shutil.rmtree(copied / member / SEASONS[0])
        expected = "which no member has"
    else:
        table = geopandas.read_parquet(copied / "index.parquet")
        table[table["path"] != member].to_parquet(copied / "index.parquet")
        expected = "is not in the index"
    errors, _ = validate_archive(copied)
    assert any(expected in text for text in errors), errors
    if damage in {"row", "unknown row", "member"}:
        add_members(copied, [])
        assert validate_archive(copied)[0] == []


def test_fields_are_counted_by_season(copied: Path, planted: Any, tmp_path: Path):
    region = cube_of(planted.location, tmp_path / "region.zarr")
    left, bottom, right, top = open_season(region).geobox.boundingbox.bbox
    width, height = (right - left) / 4, (top - bottom) / 4
    frame = geopandas.GeoDataFrame(
        {"crop": ["wheat", "maize", "wheat"]},
        geometry=[
            box(left + n * width, bottom, left + (n + 0.8) * width, bottom + height)
            for n in range(3)
        ],
        crs=WEST,
    )
    frame.to_file(tmp_path / "fields.gpkg")
    burn_labels(region, tmp_path / "fields.gpkg", column="crop", min_fields=1)
    add_members(copied, [region])

    lines = [line.split() for line in describe_archive(copied).splitlines()]
    place = next(words for words in lines if words[0] == "season").index("fields")
    counts = {words[0]: words[place] for words in lines if words[0] in SEASONS}
    assert counts == {SEASONS[0]: "3", **dict.fromkeys(SEASONS[1:], "-")}


def test_what_is_unfinished_is_said(copied: Path):
    member = list_members(copied)[0]
    (copied / member / SEASONS[1]).rename(copied / member / f"{SEASONS[1]}.building")
    IndexRows(copied).write()
    errors, warnings = validate_archive(copied)
    assert errors == []
    assert any("unfinished" in text for text in warnings)
    assert "unfinished" in describe_archive(copied)
    assert np.isin(open_archive(copied).index["season"], SEASONS).all()
