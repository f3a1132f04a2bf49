"""Sites of stacks are chosen by fold, id or published list, and are then all that is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stcln_geo.cube.stack_store import create_stack, finish_stack, write_sites
from stcln_geo.data.corpus import open_sources, plan_corpus
from stcln_geo.data.site_choice import SiteChoice, choose_sites, read_site_ids
from stcln_geo.errors import CubeError, InputError, LabelError, MissingFileError

SEASON = "2018-09-01"
FOLDS = (1, 2, 1, 5, 2)


def make_stack(path: Path, prefix: str, *, fold: tuple[int, ...] | None = FOLDS) -> Path:
    """Write five sites of 20 x 27 px with one to five dates; the second is never clear."""
    dates = np.full((5, 5), "NaT", dtype="datetime64[s]")
    for site in range(5):
        dates[site, : site + 1] = np.datetime64("2018-10-01") + 10 * np.arange(site + 1)
    stack = create_stack(
        path, SEASON, site_id=[f"{prefix}{site}" for site in range(5)], crs=["EPSG:32631"] * 5,
        transform=np.tile([10, 0, 5e5, 0, -10, 5e6], (5, 1)), shape_yx=(20, 27), time=dates,
        bands=("red", "nir"), fold=None if fold is None else np.array(fold),
    )  # fmt: skip
    for shard in stack.shards:
        sites = np.arange(shard.start, shard.stop)
        valid = np.broadcast_to(
            ~np.isnat(dates[sites, :, None, None]), (len(sites), 5, 20, 27)
        ).copy()
        valid[sites == 1] = False
        write_sites(
            stack, shard.start, valid=valid,
            reflectance=np.full((len(sites), 5, 2, 20, 27), 900, dtype=np.int16),
        )  # fmt: skip
    finish_stack(path, SEASON)
    return path


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stacks, the first with published lists; not to be changed."""
    folder = tmp_path_factory.mktemp("choice")
    one, other = make_stack(folder / "a.zarr", "a"), make_stack(folder / "b.zarr", "b")
    (one / "splits.json").write_text(json.dumps({SEASON: {"train_fold0": ["a3", "a4", "zz"]}}))
    return one, other


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (SiteChoice(folds=(1, 5)), [[0, 2, 3], [0, 2, 3]]),
        (SiteChoice(sites=("b4", "a0")), [[0], [4]]),
        (SiteChoice(folds=(2,), sites=("a0", "b4", "b1")), [[], [1, 4]]),
    ],
    ids=["fold", "id", "both"],
)
def test_what_is_named_must_all_hold(
    stacks: tuple[Path, Path], choice: SiteChoice, expected: list[list[int]]
) -> None:
    sources = open_sources(stacks)
    found = choose_sites(sources, choice)
    assert [np.flatnonzero(used).tolist() for used in found.used] == expected

    corpus = plan_corpus(sources, chip=8, memory=10**9, choice=choice)
    units = set(zip(corpus.plan.season.tolist(), corpus.plan.site.tolist(), strict=True))
    clear = {(part, site) for part, sites in enumerate(expected) for site in sites if site != 1}
    assert units == clear
    # As if there were no other sites, in every count.
    assert corpus.sites == corpus.summary()["sites"] == sum(map(len, expected))
    assert corpus.most_dates == max(site + 1 for sites in expected for site in sites)
    last = max(site for sites in expected for site in sites)
    assert corpus.day_range == (30, 30 + 10 * last)
    assert corpus.empty == 12 * sum(1 in sites for sites in expected)


def test_a_published_list_is_found_beside_the_season(stacks: tuple[Path, Path]) -> None:
    choice = SiteChoice(lists=("train_fold0",))
    found = choose_sites(open_sources(stacks[:1]), choice)
    assert np.flatnonzero(found.used[0]).tolist() == [3, 4]
    assert found.notes == ("Sites: 2 of 5, by list train_fold0.",)
    with pytest.raises(CubeError, match=r"'eval' .* it has train_fold0"):
        choose_sites(open_sources(stacks[:1]), SiteChoice(lists=("eval",)))
    with pytest.raises(CubeError, match=r"it has no splits\.json"):
        choose_sites(open_sources(stacks[1:]), choice)


def test_ids_that_are_nowhere_are_counted(stacks: tuple[Path, Path]) -> None:
    found = choose_sites(open_sources(stacks), SiteChoice(sites=("a0", "x", "b1", "y", "x")))
    assert found.notes == (
        "Sites: 2 of 10, by 4 ids.",
        "2 of 4 named sites are not in the data: x, y",
    )
    with pytest.raises(InputError, match="Cannot use fold 9: none of 10 sites is left"):
        choose_sites(open_sources(stacks), SiteChoice(folds=(9,)))


def test_sites_without_folds_and_cubes_are_refused(tmp_path: Path, cube: Path) -> None:
    for choice in (SiteChoice(folds=(5,)), SiteChoice(sites=("a0",))):
        with pytest.raises(InputError, match="it is a cube, which has one site"):
            choose_sites(open_sources([cube]), choice)
    bare = open_sources([make_stack(tmp_path / "c.zarr", "c", fold=None)])
    with pytest.raises(LabelError, match=r"Cannot choose the folds 5 of .*c\.zarr"):
        choose_sites(bare, SiteChoice(folds=(5,)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tileids", "7\n12\n\n7\n"),
        ("a.csv", "other,site_id\n1,7\n2,12\n"),
        ("a.json", "[7, 12]"),
        ("a.toml", 'sites = [7, "12"]'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"], ids=["plain", "byte order mark"])
def test_ids_are_read_from_files_of_many_kinds(
    tmp_path: Path, name: str, text: str, encoding: str
) -> None:
    (tmp_path / name).write_text(text, encoding=encoding)
    assert read_site_ids(tmp_path / name) == ("7", "12")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.txt", "\n", "it holds no id"),
        ("a.csv", "site\n7\n", "'site_id'"),
        ("a.json", '{"sites": "7"}', "it holds no list of ids"),
        ("a.json", "[7, [12]]", "it holds no list of ids"),
        ("a.json", "[", "Expecting value"),
    ],
)
def test_a_file_without_ids_is_refused(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="Cannot read the site ids") as caught:
        read_site_ids(tmp_path / name)
    assert told in str(caught.value)
    with pytest.raises(MissingFileError, match="there is no such file"):
        read_site_ids(tmp_path / "none")
