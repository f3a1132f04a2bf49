"""Stacks are labelled, split and cut into chips as cubes are, site by site."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.stack import open_stack
from stcln_geo.cube.stack_contract import stack_dataset, validate_stack
from stcln_geo.cube.stack_fields import label_stack, write_stack_split
from stcln_geo.cube.stack_store import finish_stack, take_back_stack
from stcln_geo.cube.store import open_season
from stcln_geo.data import blocks
from stcln_geo.data.chips import ChipDataset, plan_labelled_chips, plan_windows
from stcln_geo.data.labelled import plan_training, repeat_units
from stcln_geo.data.site_split import (
    SiteLists,
    read_site_lists,
    split_by_fold,
    split_by_lists,
    split_by_site,
)
from stcln_geo.data.source import open_source
from stcln_geo.data.split import sites_apart
from stcln_geo.data.split_labels import SplitSpec, split_labels
from stcln_geo.data.targets import ChipChoice, Targets, fields_within
from stcln_geo.errors import InputError, LabelError, MissingFileError
from stcln_geo.grid import Lattice
from stcln_geo.legend import Legend

from ..labelled_stacks import cut_stack, whole_fields

CHIP = 16
PLACES = ((0, 0), (3, 47), (51, 0), (54, 58))
"""The sites do not overlap."""
SHAPE = (32, 41)
"""No multiple of a chip to the east, where the sites end in the middle of one."""
FOLDS = (1, 2, 3, 2)
TRAIN, VALIDATION, TEST = (SPLITS[name] for name in ("train", "validation", "test"))


@pytest.fixture(scope="module")
def stack(cube: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sites with background and void; not to be changed."""
    path = tmp_path_factory.mktemp("stack") / "sites.zarr"
    return cut_stack(cube, path, PLACES, shape_yx=SHAPE, fold=FOLDS, background=True, void=True)


@pytest.fixture
def own(cube: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a stack of one's own, to change."""
    return lambda **options: cut_stack(
        cube, tmp_path / "own.zarr", PLACES, shape_yx=SHAPE, **{"fold": FOLDS, **options}
    )


def test_every_pixel_with_a_class_belongs_to_one_row(stack: Path) -> None:
    opened = open_stack(stack)
    fields, labels, parcels = opened.fields, opened.labels[:], opened.parcels[:]
    assert fields is not None
    assert opened.legend is not None
    assert opened.legend.names == ("crop 0", "crop 1", "crop 2", "background")
    assert [entry.code for entry in opened.legend.ignored] == [4]

    told = set()
    for site in range(len(PLACES)):
        for number in np.unique(parcels[site]):
            here = (parcels[site] == number) & (labels[site] < 4)
            for code in np.unique(labels[site][here]):
                count = (here & (labels[site] == code)).sum()
                told.add((site, int(number), int(code), int(count)))
    columns = (fields.site, fields.number, fields.code, fields.pixels)
    assert set(zip(*(column.tolist() for column in columns), strict=True)) == told
    assert len(fields) == len(told)
    assert (np.bincount(fields.site[fields.number == 0]) == 1).all()
    assert fields.pixels.sum() == (labels < 4).sum()
    assert (labels[:, 0] == 4).all()
    assert validate_stack(stack_dataset(stack)) == ([], [])


def test_a_field_of_several_classes_is_of_that_of_most_pixels(own: Callable[..., Path]) -> None:
    path = own()
    opened = open_stack(path, mode="r+")
    assert opened.fields is not None
    number, code = int(opened.fields.number[0]), int(opened.fields.code[0])
    row, col = np.nonzero(opened.parcels[0] == number)
    other = (code + 1) % 3
    opened.labels[0, row[0], col[0]] = other

    fields = label_stack(opened)

    assert fields.code[0] == code
    assert fields.pixels.tolist() == opened.fields.pixels.tolist()
    wanted = fields.number == number
    source = open_source(path)
    assert Targets(source, wanted).read(source.window)[row[0], col[0]] == other


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda stack: stack.parcels.__setitem__((2, 5, 5), 1), "parcel 1 lies in the sites 's0'"),
        (lambda stack: stack.labels.__setitem__((1, 3, 3), 9), "site 's1' hold 9, .* 0 to 2"),
    ],
    ids=["parcel in two sites", "code unknown"],
)
def test_labels_that_break_the_contract_are_refused(
    own: Callable[..., Path], break_it: Callable[[Any], None], message: str
) -> None:
    opened = open_stack(own(), mode="r+")
    break_it(opened)
    opened.labels[2, 5, 5] = 0

    with pytest.raises(LabelError, match=message):
        label_stack(opened)


def test_a_stack_that_is_written_again_keeps_the_split_of_what_stayed(
    own: Callable[..., Path],
) -> None:
    path = own(split=False)
    opened = open_stack(path, mode="r+")
    assert opened.fields is not None
    split = (np.arange(len(opened.fields)) % 3 + 1).astype(np.uint8)
    write_stack_split(opened, split, np.array([1, 2, 1, 3]))
    gone = opened.fields.number[0]

    take_back_stack(path, opened.name)
    group: Any = zarr.open_group(path / f"{opened.name}.building", mode="r+")
    labels = group["labels"][:]
    labels[group["parcels"][:] == gone] = 255
    group["labels"][:] = labels
    finish_stack(path, opened.name)

    again = open_stack(path)
    assert again.fields is not None
    assert again.weight is not None
    assert again.fields.number.tolist() == opened.fields.number[1:].tolist()
    assert again.fields.split.tolist() == split[1:].tolist()
    assert again.weight.tolist() == [1, 2, 1, 3]


def test_targets_are_those_of_wanted_rows_and_never_of_ignored_classes(stack: Path) -> None:
    source = open_source(stack)
    assert source.fields is not None
    opened = open_stack(stack)
    labels, parcels = opened.labels[:], opened.parcels[:]
    wanted = np.random.default_rng(0).random(len(source.fields)) < 0.5
    wanted[source.fields.number == 0] = [True, False, True, True]
    rows = {
        (int(site), int(number)): bool(want)
        for site, number, want in zip(source.fields.site, source.fields.number, wanted, strict=True)
    }
    targets = Targets(source, wanted)

    for site in range(len(PLACES)):
        chosen = np.vectorize(lambda number, site=site: rows.get((site, int(number)), False))(
            parcels[site]
        )
        expected = np.where(chosen & (labels[site] < 4), labels[site], 255)
        np.testing.assert_array_equal(targets.read(source.window, site=site), expected)
        # Beyond the site there is nothing to learn.
        around = targets.read(source.window.expand(3), site=site)
        assert (around != 255).sum() == (expected != 255).sum()
        squares = targets.squares(side=7)[site]
        for row, col in np.ndindex(squares.shape):
            part = expected[7 * row : 7 * row + 7, 7 * col : 7 * col + 7]
            assert squares[row, col] == (part != 255).any()


def test_labels_without_parcels_follow_site_and_class(own: Callable[..., Path]) -> None:
    path = own(parcels=False, background=True)
    source = open_source(path)
    assert source.fields is not None
    assert not source.fields.number.any()

    split_labels(path, SplitSpec(by="fold", folds={"train": (1, 3), "test": (2,)}))

    source = open_source(path)
    assert source.fields is not None
    labels = open_stack(path).labels[:]
    judged = Targets(source, source.fields.split == TEST)
    for site, fold in enumerate(FOLDS):
        expected = labels[site] if fold == 2 else np.full(SHAPE, 255)
        np.testing.assert_array_equal(judged.read(source.window, site=site), expected)


def test_chips_of_a_stack_are_those_of_its_cube(cube: Path, tmp_path: Path) -> None:
    shape = (32, 48)
    places = ((0, 0), (16, 48), (48, 16))
    path = cut_stack(cube, tmp_path / "law.zarr", places, shape_yx=shape)
    season, source = open_season(cube), open_source(path)
    assert season.fields is not None
    assert source.fields is not None
    from stcln_geo.grid import Window

    mine = {}
    wanted = source.fields.split == TRAIN
    units = plan_labelled_chips(source, wanted, chip=CHIP)
    dataset = ChipDataset([source], units, bands=("nir", "red"), wanted=[wanted])
    for number, unit in enumerate(units):
        for window, chip in zip(unit.chips, dataset.read(number), strict=True):
            row, col = places[unit.site]
            mine[(window.row + row, window.col + col)] = chip

    kept = np.concatenate([whole_fields(season, Window(*place, *shape)) for place in places])
    wanted = (season.fields.split == TRAIN) & np.isin(season.fields.number, kept)
    assert np.isin(source.fields.number, kept).all()
    for column in ("code", "pixels", "split"):
        ours = getattr(source.fields, column)[np.argsort(source.fields.number)]
        theirs = getattr(season.fields, column)[np.isin(season.fields.number, kept)]
        assert ours.tolist() == theirs.tolist()
    units = plan_labelled_chips(season, wanted, chip=CHIP)
    dataset = ChipDataset([season], units, bands=("nir", "red"), wanted=[wanted])
    found = 0
    for number, unit in enumerate(units):
        for window, chip in zip(unit.chips, dataset.read(number), strict=True):
            found += 1
            own = mine[(window.row, window.col)]
            for name in ("reflectance", "valid", "days", "target"):
                np.testing.assert_array_equal(getattr(own, name), getattr(chip, name))
    assert found == len(mine) > 6


def test_windows_lie_in_each_sites_own_pixels(stack: Path) -> None:
    source = open_source(stack)
    assert source.fields is not None
    lattice = Lattice(window=20, halo=3)
    wanted = source.fields.code != 1

    units = plan_windows(source, wanted, lattice=lattice)
    dataset = ChipDataset([source], units, bands=source.bands, wanted=[wanted], halo=lattice.halo)

    judged = np.zeros((len(PLACES), *SHAPE), dtype=int)
    for number, unit in enumerate(units):
        assert (unit.window.row + 3) % 14 == 0
        assert (unit.window.col + 3) % 14 == 0
        (chip,) = dataset.read(number)
        assert chip.target is not None
        row, col = np.nonzero(chip.target != 255)
        judged[unit.site, row + unit.window.row, col + unit.window.col] += 1
        outside = unit.window.row + np.arange(20) < 0
        assert not chip.valid[:, outside].any()
    targets = Targets(source, wanted)
    for site in range(len(PLACES)):
        assert ((targets.read(source.window, site=site) != 255) == judged[site]).all()


def test_dates_that_a_site_lacks_are_never_read(own: Callable[..., Path]) -> None:
    path = own(background=True, thin=True)
    opened = open_stack(path, mode="r+")
    assert len(set(opened.dates.tolist())) > 1
    valid = opened.valid[:]
    valid[np.isnat(opened.time)] = True
    opened.valid[:] = valid
    source = open_source(path)
    assert source.fields is not None
    wanted = source.fields.split >= 0

    units = plan_labelled_chips(source, wanted, chip=CHIP)
    dataset = ChipDataset([source], units, bands=source.bands, wanted=[wanted])

    for number, unit in enumerate(units):
        for chip in dataset.read(number):
            assert set(chip.days.tolist()) <= set(source.days[unit.site].tolist())
            assert chip.days.min() >= 0
    assert source.day_range == (int(source.days[source.days >= 0].min()), int(source.days.max()))


def test_folds_put_exactly_their_sites(own: Callable[..., Path]) -> None:
    path = own(background=True, split=False)
    spec = SplitSpec(by="fold", folds={"train": (1,), "validation": (3,), "test": (2,)})

    assert split_labels(path, spec, dry_run=True).sites is not None
    assert not open_stack(path).fields.split.any()  # type: ignore[union-attr]
    report = split_labels(path, spec)

    fields = open_stack(path).fields
    assert fields is not None
    wanted = np.array([TRAIN, TEST, VALIDATION, TEST])
    assert fields.split.tolist() == wanted[fields.site].tolist()
    assert report.sites is not None
    assert report.sites.tolist() == [0, 1, 1, 2]
    assert sites_apart(fields, fields.split == TEST)
    assert not sites_apart(fields, fields.split == TRAIN)
    assert not sites_apart(fields, fields.split == 9)
    with pytest.raises(LabelError, match=r"no site is in fold 7.*folds 1, 2, 3"):
        split_by_fold(np.array(FOLDS), {"train": (1, 7)})
    with pytest.raises(InputError, match="fold 2 in two splits"):
        split_by_fold(np.array(FOLDS), {"train": (1, 2), "test": (2,)})
    with pytest.raises(InputError, match="no fold named"):
        split_by_fold(np.array(FOLDS), {})
    with pytest.raises(LabelError, match="its sites have none"):
        split_by_fold(None, {"train": (1,)})


@pytest.mark.parametrize("seed", range(3))
def test_sites_are_dealt_out_whole_and_class_by_class(seed: int) -> None:
    from stcln_geo.cube.season import FieldTable

    generator = np.random.default_rng(seed)
    # Each of 60 sites has fields of three of eight classes; one class lies in site 7 alone.
    site = np.repeat(np.arange(60), 3)
    code = np.concatenate([generator.permutation(8)[:3] for _ in range(60)])
    site, code = np.append(site, 7), np.append(code, 8)
    count = len(site)
    fields = FieldTable(
        number=np.arange(1, count + 1), code=code.astype(np.uint8), pixels=np.ones(count, np.int32),
        split=np.zeros(count, np.uint8), site=site,
    )  # fmt: skip

    split = split_by_site(fields, sites=62, test=0.3, validation=0.2, seed=seed)

    assert split.tolist() == split_by_site(fields, sites=62, seed=seed).tolist()
    assert split.tolist() != split_by_site(fields, sites=62, seed=seed + 50).tolist()
    assert split[60:].tolist() == [0, 0]
    assert (split[:60] > 0).all()
    for value in range(8):
        mine = split[site[code == value]]
        shares = np.bincount(mine, minlength=4)[1:] / len(mine)
        np.testing.assert_allclose(shares, [0.5, 0.2, 0.3], atol=0.1)


def test_lists_name_sites_and_how_often(own: Callable[..., Path], tmp_path: Path) -> None:
    path = own(background=True)
    listed = {"train": ["s2", "s0", "s2", "s9"], "test": ["s3", "gone"], "about": {"paper": 1}}
    (tmp_path / "l.json").write_text(json.dumps(listed))
    (tmp_path / "l.toml").write_text('train = ["s2", "s0", "s2", "s9"]\ntest = ["s3", "gone"]\n')
    (tmp_path / "l.csv").write_text(
        "site_id, split\ns2,train\ns0,train\ns2,train\ns9,train\ns3,test\ngone,test\n",
        encoding="utf-8-sig",  # as Excel writes them
    )
    json_lists, toml_lists, csv_lists = (
        read_site_lists(tmp_path / f"l.{kind}") for kind in ("json", "toml", "csv")
    )
    assert json_lists.train == toml_lists.train == csv_lists.train == ("s2", "s0", "s2", "s9")
    assert json_lists.test == toml_lists.test == csv_lists.test

    with pytest.raises(LabelError, match="2 of 5 listed sites are not in it: s9, gone"):
        split_labels(path, SplitSpec(lists=json_lists))
    report = split_labels(path, SplitSpec(lists=json_lists, missing="skip"))

    assert report.missing == ("s9", "gone")
    assert any("2 of 5 listed sites are not in the stack: s9, gone" in s for s in report.lines())
    source = open_source(path)
    assert source.fields is not None
    assert source.fields.split.tolist() == np.array([1, 0, 1, 3])[source.fields.site].tolist()
    assert source.weight is not None
    assert source.weight.tolist() == [1, 1, 2, 1]
    units = plan_labelled_chips(source, source.fields.split == TRAIN, chip=CHIP)
    shown = repeat_units(units, source)
    for unit in units:
        assert shown.count(unit) == (2 if unit.site == 2 else 1)

    # Folds put the sites that no list names.
    spec = SplitSpec(
        by="fold", folds={"validation": (2,)}, lists=SiteLists(train=("s0",), test=("s3",))
    )
    split_labels(path, spec)
    fields = open_stack(path).fields
    assert fields is not None
    assert fields.split.tolist() == np.array([1, 2, 0, 3])[fields.site].tolist()


def test_lists_that_cannot_be_used_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 sites stand under both train and test \(a, b\)"):
        SiteLists(train=("a", "b", "c"), test=("b", "a"))
    with pytest.raises(LabelError, match=r"none of its 1 sites is in the stack \(z; .*s0, s1"):
        split_by_lists(("s0", "s1"), SiteLists(train=("z",)))
    with pytest.raises(MissingFileError, match="there is no such file"):
        read_site_lists(tmp_path / "none.json")
    for name, text, said in (
        ("a.json", "{}", "names no site"),
        ("b.json", '{"train": "s1"}', "'train' is no list of ids"),
        ("c.toml", "train = [", "site lists"),
        ("d.csv", "site_id,split\ns1,exam\n", "line 2 has the site_id 's1' and the split 'exam'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=said):
            read_site_lists(tmp_path / name)


def test_some_chips_of_a_site(stack: Path) -> None:
    source = open_source(stack)
    assert source.fields is not None
    within = ChipChoice(CHIP, ((0, 0), (1, 2)))
    wanted = source.fields.split >= 0

    units = plan_labelled_chips(source, wanted, chip=CHIP, within=within)
    dataset = ChipDataset([source], units, bands=source.bands, wanted=[wanted], within=within)

    assert {(part.row // CHIP, part.col // CHIP) for unit in units for part in unit.chips} == {
        (0, 0),
        (1, 2),
    }
    whole, part = Targets(source, wanted), Targets(source, wanted, within=within)
    counts = np.zeros(4, dtype=int)
    for site in range(len(PLACES)):
        target, all_of_it = (one.read(source.window, site=site) for one in (part, whole))
        inside = np.zeros(SHAPE, dtype=bool)
        inside[:16, :16] = inside[16:, 32:] = True
        np.testing.assert_array_equal(target, np.where(inside, all_of_it, 255))
        counts += np.bincount(target[target != 255], minlength=4)
    read = [chip.target for number in range(len(units)) for chip in dataset.read(number)]
    assert sum((target != 255).sum() for target in read) == counts.sum()
    seen = fields_within(source, within)
    tested = source.fields.split == TEST
    assert (seen.pixels[tested] == source.fields.pixels[tested]).all()
    for code in range(4):
        mine = (seen.code == code) & ~tested
        own_test = Targets(source, tested, within=within)
        left = sum(
            (own_test.read(source.window, site=site) == code).sum() for site in range(len(PLACES))
        )
        assert seen.pixels[mine].sum() == counts[code] - left
    assert not seen.split[(seen.pixels == 0) & ~tested].any()
    with pytest.raises(InputError, match=r"\[\[2, 0\]\].*2 rows and 3 columns"):
        plan_labelled_chips(source, wanted, chip=CHIP, within=ChipChoice(CHIP, ((2, 0),)))


def test_what_does_not_fit_is_refused(
    stack: Path, cube: Path, own: Callable[..., Path], tmp_path: Path
) -> None:
    for spec, said in (
        ({"by": "site"}, "it is a cube, which has one site"),
        ({"by": "fold"}, "it is a cube"),
        ({"lists": SiteLists(train=("a",))}, "by lists of sites: it is a cube"),
    ):
        with pytest.raises(InputError, match=said):
            split_labels(cube, SplitSpec(**spec))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="never by pixel"):
        SplitSpec(by="pixel")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--seed -1: it must be 0 or more"):
        SplitSpec(seed=-1)
    with pytest.raises(InputError, match="by lists of sites and by site at once"):
        SplitSpec(by="site", lists=SiteLists(train=("a",)))
    with pytest.raises(InputError, match="Use --by site"):
        split_labels(stack, SplitSpec(by="block"))
    path = own()
    group: Any = zarr.open_group(path / open_stack(path).name, mode="r+", use_consolidated=False)
    del group.attrs["fields"]
    source = open_source(path)
    with pytest.raises(LabelError, match="fields were not counted yet"):
        Targets(source, np.ones(3, dtype=bool))
    # Splitting counts them.
    assert len(split_labels(path, SplitSpec()).fields) > 5
    assert Legend.from_json(json.dumps([{"value": 1}])).ignored == ()


def test_the_example_of_the_manual_writes_a_stack_that_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "labelled-stacks.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    monkeypatch.chdir(tmp_path)

    exec(code, {})

    assert validate_stack(stack_dataset(tmp_path / "sites.zarr"))[0] == []
    folds = {"train": (1,), "validation": (2,), "test": (3,)}
    report = split_labels(tmp_path / "sites.zarr", SplitSpec(by="fold", folds=folds))
    for code, name in enumerate(("background", "wheat", "maize")):
        assert report.legend.names[code] == name
        for split in (TRAIN, VALIDATION, TEST):
            assert ((report.fields.code == code) & (report.fields.split == split)).sum() == 2


@pytest.mark.parametrize("kind", ["cube", "stack"])
def test_planning_reads_labels_past_zarr_and_as_they_are_now(
    kind: str, cube: Path, own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cube if kind == "cube" else own(background=True)
    source = open_source(path)
    whole = {name: np.asarray(getattr(source, name)[:]) for name in ("labels", "parcels")}

    def swept() -> dict[str, np.ndarray]:
        found = {name: np.zeros_like(values) for name, values in whole.items()}
        for tile in source.label_tiles():
            place = (tile.sites, tile.window.rows, tile.window.cols)[kind == "cube" :]
            for name, values in found.items():
                read = getattr(tile, name)
                values[place] = read[0] if kind == "cube" else read
        return found

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__getitem__", lambda *_: pytest.fail("read through Zarr"))
        first = swept()
    for name, values in whole.items():
        np.testing.assert_array_equal(first[name], values)
    if kind == "stack":
        turned = np.where(whole["labels"] == 0, 1, whole["labels"])
        assert (turned != whole["labels"]).any()
        zarr.open_array(f"{source.folder}/labels", mode="r+")[:] = turned
        np.testing.assert_array_equal(swept()["labels"], turned)


@pytest.mark.parametrize("kind", ["cube", "stack"])
def test_targets_of_chips_are_read_past_zarr(
    kind: str, cube: Path, own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(cube if kind == "cube" else own(background=True))
    labels = np.asarray(source.labels[:]).reshape(source.sites, *source.shape_yx)
    chosen = np.ones(len(source.fields), dtype=bool)
    units = plan_labelled_chips(source, chosen, chip=16)
    dataset = ChipDataset([source], units, bands=source.bands, wanted=[chosen])

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__getitem__", lambda *_: pytest.fail("read through Zarr"))
        chips = [chip for unit in range(len(units)) for chip in dataset.read(unit)]

    padded = np.pad(labels, ((0, 0), (0, 16), (0, 16)), constant_values=255)
    assert len(chips) > 3
    for chip in chips:
        part = chip.source.window
        expected = padded[source.site_of(chip.source), part.rows, part.cols]
        np.testing.assert_array_equal(chip.target, expected)


@pytest.mark.parametrize("kind", ["cube", "stack"])
def test_a_run_is_planned_with_one_sweep_over_the_labels(
    kind: str, cube: Path, own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(cube if kind == "cube" else own(background=True))
    trained = np.arange(len(source.fields)) % 3 > 0
    lattice = Lattice(window=16, halo=3)
    chips = plan_labelled_chips(source, trained, chip=16)
    windows = plan_windows(source, ~trained, lattice=lattice)
    assert chips
    assert windows
    reads: list[Path] = []
    read = blocks._read_range

    def counted(file: Path, offset: int, length: int) -> bytes:
        reads.append(file)
        return read(file, offset, length)

    monkeypatch.setattr(blocks, "_read_range", counted)
    list(source.label_tiles())
    sweep = sorted(reads)
    assert {file.relative_to(source.folder).parts[0] for file in sweep} == {"labels", "parcels"}
    reads.clear()

    found = plan_training(
        source, trained=trained, judged=~trained, chip=16, lattice=lattice
    )  # fmt: skip

    assert found == (chips, windows)
    assert sorted(reads) == sweep
