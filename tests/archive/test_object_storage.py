"""Archives in object storage, on a real server on loopback: as local ones, and as hard to break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo import storage
from stcln_geo.archive.create import create_archive
from stcln_geo.archive.index import open_archive
from stcln_geo.archive.members import add_members
from stcln_geo.archive.plan import ArchivePlan, plan_archive
from stcln_geo.archive.sites import Site
from stcln_geo.archive.summary import describe_archive
from stcln_geo.archive.validate import validate_archive
from stcln_geo.cli.main import invoke
from stcln_geo.cube import publish, stack_store
from stcln_geo.cube.lock import cube_lock
from stcln_geo.cube.plan import CubeSpec
from stcln_geo.cube.stack import open_stack
from stcln_geo.cube.store import list_seasons, open_season
from stcln_geo.errors import CubeError
from stcln_geo.storage import Location, list_files, location, write_file

from .conftest import PLACES, SEASONS, SIZE, WEST, make_sites, make_spec, plant
from .test_create import assert_equal

pytestmark = pytest.mark.usefixtures("two_per_shard")

WEST_SITES = ("w1", "w2", "w3")


def west_plan(catalog: str, path: str | Location, **choices: Any) -> ArchivePlan:
    """One stack of two shards."""
    spec = make_spec(catalog, years=(2018,), **choices)
    return plan_archive(make_sites(names=WEST_SITES), spec, path)


def rows_of(path: str | Location) -> list[dict[str, Any]]:
    """Return the index of the western sites in the first season as plain values."""
    table = open_archive(path).index
    chosen = table[(table["crs"] == WEST) & (table["season"] == SEASONS[0])]
    return [
        {
            key: value.wkt if key == "geometry" else np.asarray(value).tolist()
            for key, value in row.items()
        }
        for row in chosen.to_dict("records")
    ]


def upload(folder: Path, target: str) -> None:
    for name in list_files(folder):
        write_file(location(target) / name, (folder / name).read_bytes())


@pytest.mark.slow
def test_an_archive_in_a_bucket_is_the_same(
    whole_plan: ArchivePlan, planted: Any, s3: str, capsys: Any
):
    where = f"{s3}/deep/archive"
    plan = west_plan(planted.location, where)
    assert create_archive(plan).windows_read == plan.windows > 0
    ours = open_stack(f"{where}/{plan.stacks[0].folder}")
    theirs = open_stack(whole_plan.path / plan.stacks[0].folder, SEASONS[0])
    assert ours.site_id == theirs.site_id
    for name in ("reflectance", "valid", "coverage", "scl"):
        np.testing.assert_array_equal(getattr(ours, name)[:], getattr(theirs, name)[:])
    # Of the same bytes too: the SHA-256 of metadata and manifests is the same.
    assert rows_of(where) == rows_of(whole_plan.path)
    assert len(rows_of(where)) == 3
    assert not [name for name in list_files(location(where)) if "building" in name]
    assert not location(f"{where}.lock").is_file()

    again = create_archive(west_plan(planted.location, where))
    assert (again.windows_read, again.written, again.site_seasons) == (0, 0, 3)
    assert invoke(["archive", "validate", where]) == 0
    assert f"{where} is whole" in capsys.readouterr().out
    assert invoke(["archive", "info", where]) == 0
    text = capsys.readouterr().out
    assert f"{where}: 3 site-seasons of 3 sites in 1 stacks" in text
    size = storage.tree_bytes(location(where) / plan.stacks[0].folder / SEASONS[0])
    assert size == sum(
        len((location(where) / plan.stacks[0].folder / SEASONS[0] / name).read_bytes())
        for name in list_files(location(where) / plan.stacks[0].folder / SEASONS[0])
    )


@pytest.mark.slow
def test_members_are_named_by_path_inside_and_by_address_outside(
    whole_plan: ArchivePlan, s3: str, tmp_path: Path
):
    stack = Path(whole_plan.path) / whole_plan.stacks[0].folder
    outside, inside = f"{s3}/others/west.zarr", f"{s3}/archive/mine/west.zarr"
    upload(stack, outside)
    first = add_members(f"{s3}/archive", [outside])
    assert (first.added, first.notes) == ((outside,), ())
    upload(stack, inside)
    report = add_members(f"{s3}/archive", [inside, outside, stack])
    assert report.added == ("mine/west.zarr", stack.as_posix())
    assert report.known == (outside,)
    assert ["on this machine alone" in note for note in report.notes] == [True]
    # The same seasons three times: what is read of each is the same.
    table = open_archive(f"{s3}/archive").index
    assert table.groupby("path").size().to_dict() == dict.fromkeys((outside, *report.added), 6)
    assert table.groupby("path")["manifest_sha"].agg(lambda values: tuple(values)).nunique() == 1
    assert validate_archive(f"{s3}/archive") == ([], [])

    # An archive on disk may name members in a bucket.
    assert add_members(tmp_path / "local", [outside]).rows == 6
    archive = open_archive(tmp_path / "local")
    assert archive.member(outside) == location(outside)
    assert validate_archive(tmp_path / "local") == ([], [])
    assert "on disk" in describe_archive(tmp_path / "local")
    storage.remove_tree(location(outside))
    assert "is not there any more" in validate_archive(tmp_path / "local")[0][0]


def test_a_mistaken_address_is_named(s3: str, planted: Any, tmp_path: Path, capsys: Any):
    points = tmp_path / "p.csv"
    points.write_text("id,lon,lat\nw1,{},{}\n".format(*PLACES["w1"]))
    asked = ["archive", "create", "--sites", str(points), "--size", str(SIZE), "--seasons", "2018",
             "--catalog", planted.location]  # fmt: skip
    assert invoke([*asked, "gs://bucket/archive"]) == 2
    assert "Cannot use the location" in " ".join(capsys.readouterr().err.split())
    assert invoke([*asked, "s3://no-such-bucket-at-all/archive"]) == 2
    assert "there is no bucket" in " ".join(capsys.readouterr().err.split())
    assert invoke(["archive", "info", f"{s3}/nothing"]) == 2
    assert "Cannot open the archive s3://" in " ".join(capsys.readouterr().err.split())
    with cube_lock(f"{s3}/busy"), pytest.raises(CubeError, match="has been writing"):
        create_archive(west_plan(planted.location, f"{s3}/busy"))


class Stop(BaseException):
    """A process that ends here and now."""


def stop(*_: Any, **__: Any) -> None:
    raise Stop


@pytest.mark.slow
def test_a_run_stopped_while_a_stack_gets_its_name_goes_on(
    whole_plan: ArchivePlan, planted: Any, s3: str, monkeypatch: pytest.MonkeyPatch
):
    plan = west_plan(planted.location, f"{s3}/archive")
    with monkeypatch.context() as patched:
        patched.setattr(publish, "copy_file", stop)
        with pytest.raises(Stop):
            create_archive(plan)
    stack = location(f"{s3}/archive") / plan.stacks[0].folder
    assert list_seasons(stack) == []
    assert (stack / f"{SEASONS[0]}{publish.JOURNAL}").is_file()
    report = create_archive(west_plan(planted.location, f"{s3}/archive"))
    assert (report.windows_read, report.site_seasons) == (0, 3)
    assert rows_of(f"{s3}/archive") == rows_of(whole_plan.path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["copied", "marked", "removed"])
def test_scenes_left_out_are_read_again(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """A whole stack is taken back to work, and may be stopped while it is."""
    catalog = plant(tmp_path / "catalog")
    lost = catalog.folder / "S31_2019-03-02_red.tif"
    content = lost.read_bytes()
    lost.unlink()
    where = f"{s3}/archive"
    skipping = west_plan(catalog.location, where, cube=CubeSpec(on_error="skip"))
    assert create_archive(skipping).failures == 1
    assert len(list_files(location(f"{where}/ledger.jsonl"))) == 1
    lost.write_bytes(content)
    plan = west_plan(catalog.location, where)
    name = {"copied": "copy_tree", "marked": "copy_file", "removed": "remove_tree"}[moment]
    original = getattr(storage, name)

    def interrupted(*args: Any) -> None:
        if name == "remove_tree" and not str(args[0]).endswith(SEASONS[0]):
            original(*args)
            return
        if name == "remove_tree":
            (args[0] / "zarr.json").unlink()
        else:
            original(*args)
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(stack_store, name, interrupted)
        with pytest.raises(Stop):
            create_archive(plan)
    report = create_archive(west_plan(catalog.location, where))
    # Only the shard of w1 and w2 is read again.
    costs = {name: cost for group in plan.groups for name, cost in group.sites.items()}
    assert report.windows_read == costs["w1"].windows + costs["w2"].windows
    undisturbed = west_plan(catalog.location, tmp_path / "archive")
    create_archive(undisturbed)
    assert_equal(plan, undisturbed)
    assert validate_archive(where) == ([], [])


@pytest.mark.slow
def test_large_sites_are_cubes_in_a_bucket(
    planted: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stcln_geo.archive.spec.STACK_PIXELS", 32)
    sites: list[Site] = make_sites(48, ("w2", "e2"))
    spec = make_spec(planted.location, size=48, years=(2018,))
    for where in (f"{s3}/archive", tmp_path / "archive"):
        assert create_archive(plan_archive(sites, spec, where)).site_seasons == 2
        assert create_archive(plan_archive(sites, spec, where)).windows_read == 0
        assert validate_archive(where)[0] == []
    for site in sites:
        ours, theirs = (
            open_season(location(where) / "cubes" / f"{site.id}.zarr")
            for where in (f"{s3}/archive", tmp_path / "archive")
        )
        for name in ("reflectance", "valid", "scl", "coverage"):
            np.testing.assert_array_equal(getattr(ours, name)[:], getattr(theirs, name)[:])
