"""The parts of an experiment: intervals, tables, readings, designs, and dates left out."""

from __future__ import annotations

import csv
import datetime
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stcln_geo.cli.main import invoke
from stcln_geo.cube.season import choose_season
from stcln_geo.data.chips import ChipDataset, plan_windows
from stcln_geo.data.dates import DateChoice
from stcln_geo.data.source import open_source
from stcln_geo.errors import InputError, LabelError
from stcln_geo.experiments import EXPERIMENTS, Choices, Settings, plan_experiment
from stcln_geo.experiments.catalogue import STRATEGIES, make_design
from stcln_geo.experiments.design import Arm, Design, Pair, View, cutoff
from stcln_geo.experiments.paper import paper_lines, read_paper
from stcln_geo.experiments.scores import (
    PUBLISHED,
    STRICT,
    Score,
    place_by_names,
    published_rule,
    read_published,
)
from stcln_geo.experiments.statistics import estimate, estimate_difference
from stcln_geo.experiments.table import ALL_DATA, make_table, scores_csv, table_csv, table_markdown
from stcln_geo.experiments.write import say_intervals
from stcln_geo.grid import Lattice
from stcln_geo.report.published import published_metrics
from stcln_geo.train.protocol import load_protocol

SEASON = "2018-09-01"


# Intervals.


def test_an_interval_is_students():
    values = [0.41, 0.44, 0.39, 0.52, 0.47]
    found = estimate(values)
    low, high = stats.t.interval(
        0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
    )
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    # By hand: t(0.975, 4) = 2.776445.
    half = 2.776445 * np.std(values, ddof=1) / np.sqrt(5)
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)


def test_a_difference_is_paired_by_seed():
    first = {0: 0.50, 1: 0.61, 2: 0.48, 7: 0.9, 3: None}
    second = {2: 0.45, 1: 0.55, 0: 0.46, 8: 0.1, 3: 0.4}
    found = estimate_difference(first, second)
    test = stats.ttest_rel([0.50, 0.61, 0.48], [0.46, 0.55, 0.45])
    ends = test.confidence_interval(0.95)
    assert found.count == 3, "seeds that one lacks, or that have no figure, are left out"
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=1e-12)


def test_runs_that_share_a_pretraining_are_not_passed_off_as_independent():
    """Five values of two clusters: Student's interval of the five holds the mean too seldom."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(2000):
        of_pretraining = rng.normal(0, 1, 2)
        found = estimate([of_pretraining[seed % 2] + rng.normal(0, 0.3) for seed in range(5)])
        held += found.low <= 0 <= found.high
    assert held / 2000 < 0.85
    assert "2 pre-trainings, so that they are not independent" in say_intervals(range(5), 2)
    assert "of these data and of this pre-training" in say_intervals(range(5), 1)
    for independent in (5, None):
        assert "independent" not in say_intervals(range(5), independent)


@pytest.mark.parametrize("values", [[], [None, float("nan")], [0.3]], ids=["none", "nan", "one"])
def test_there_is_no_interval_of_fewer_than_two(values):
    found = estimate(values)
    assert found.low is None
    assert found.high is None
    assert found.mean == (0.3 if values == [0.3] else None)


# Dates left out.


@given(
    days=st.lists(st.integers(0, 400), unique=True, max_size=40).map(sorted),
    until=st.none() | st.integers(1, 420),
    most=st.none() | st.integers(1, 20),
)
def test_dates_are_those_before_a_day_spread_evenly(days, until, most):
    kept = DateChoice(until=until, most=most).positions(np.array(days, dtype=np.int32))
    allowed = [place for place, day in enumerate(days) if until is None or day < until]
    assert set(kept) <= set(allowed)
    assert len(kept) == min(len(allowed), most or len(allowed))
    assert (np.diff(kept) > 0).all()
    if len(kept) > 1:
        assert (kept[0], kept[-1]) == (allowed[0], allowed[-1])
        if len(kept) < len(allowed):
            gaps = np.diff([allowed.index(one) for one in kept])
            assert gaps.max() - gaps.min() <= 1
    elif len(kept) == 1:
        # As many before it as after it, or one more after it.
        place = allowed.index(kept[0])
        assert 0 <= len(allowed) - 1 - 2 * place <= 1


def test_a_chip_loses_its_late_dates_and_nothing_else(cube):
    source = open_source(cube)
    wanted = np.ones(len(source.fields), dtype=bool)
    units = plan_windows(source, wanted, lattice=Lattice(window=32, halo=4))
    options = {"bands": ("nir", "red"), "wanted": [wanted]}
    until = int(np.median(source.days))
    whole = ChipDataset([source], units, **options)
    cut = ChipDataset([source], units, **options, dates=DateChoice(until=until))
    none = ChipDataset([source], units, **options, dates=DateChoice(until=1))
    shortened = 0
    for unit in range(len(units)):
        for before, after, empty in zip(
            whole.read(unit), cut.read(unit), none.read(unit), strict=True
        ):
            early = before.days < until
            shortened += int((~early).sum())
            np.testing.assert_array_equal(after.days, before.days[early])
            np.testing.assert_array_equal(after.reflectance, before.reflectance[early])
            np.testing.assert_array_equal(after.valid, before.valid[early])
            np.testing.assert_array_equal(after.target, before.target)
            assert empty.reflectance.shape[0] == 0
    assert shortened > 0


@pytest.mark.parametrize(
    ("season", "months", "expected"),
    [
        ("2018-09-01", 7, "2019-04-01"),
        ("2018-09-01", 12, "2019-09-01"),
        ("2019-10-31", 4, "2020-02-29"),
        ("2018-12-15", 1, "2019-01-15"),
    ],
)
def test_cut_offs_are_whole_months_after_the_first_day(season, months, expected):
    assert cutoff(season, months) == datetime.date.fromisoformat(expected)
    choice = View(name="v", title="v", months=months).choice(season)
    assert choice.suffix(season) == f"-until-{expected}"


# Designs.


def test_every_experiment_compares_arms_that_differ_in_one_thing():
    choices = Choices(season=SEASON, fields=(3,))
    own = {
        "protocol": replace(choices, protocol=load_protocol("pastis-official"), pretraining=True),
        "cross-year": replace(choices, test_season="2019-09-01"),
    }
    for name in EXPERIMENTS:
        design = make_design(name, own.get(name, choices))
        assert design.name == name
        for pair in design.pairs:
            first, second = design.arm(pair.first[0]), design.arm(pair.second[0])
            same_view = pair.first[1] == pair.second[1]
            differ = sum(
                (first.pretrain != second.pretrain, first.finetune != second.finetune,
                 not same_view)
            )  # fmt: skip
            assert differ == 1, pair
        chosen = {arm.finetune.get("labels.fields_per_class") for arm in design.arms}
        assert chosen == {3}


def test_one_network_serves_all_cut_offs():
    design = make_design("early-season", Choices(season=SEASON, months=(3, 6, 9)))
    assert all(arm.finetune["data.prefix"] > 0 for arm in design.arms)
    assert [view.choice(SEASON).until for view in design.views] == [91, 181, 273]
    assert {arm.name for arm in design.arms} == {"pretrained", "scratch"}


def test_masks_are_those_that_are_named():
    design = make_design("mask-strategy", Choices())
    assert [arm.name for arm in design.arms] == [*STRATEGIES, "scratch"]
    space = design.arm("space").pretrain
    assert (space["masking.strategy"], space["masking.block"]) == ("tube", 1)


@pytest.mark.parametrize(
    ("name", "choices", "said"),
    [
        ("few", Choices(), "there are few-labels"),
        ("few-labels", Choices(fields=(0,)), "--fields 0"),
        ("few-labels", Choices(fields=(3, 3)), "named twice: pretrained-3"),
        ("mask-ratio", Choices(ratios=(0.2, 1.0)), "between 0 and 1"),
        ("mask-ratio", Choices(fields=(1, 3)), "only few-labels"),
        ("few-labels", Choices(ratios=(0.2,)), "--ratios in the experiment few-labels"),
        ("sta", Choices(strategies=("time",)), "only mask-strategy compares"),
        ("few-labels", Choices(season=SEASON, months=(3,)), "only early-season"),
        ("sta", Choices(season=SEASON, test_season="2019-09-01"), "only cross-year"),
        ("mask-ratio", Choices(short_dates=6), "--dates in the experiment mask-ratio"),
        ("mask-strategy", Choices(strategies=("time", "colour")), "colour"),
        ("early-season", Choices(season=SEASON, months=(6, 3)), "must increase"),
        ("short-series", Choices(long_dates=12, short_dates=12), "fewer"),
        ("cross-year", Choices(season=SEASON), "--test-season"),
        ("cross-year", Choices(season=SEASON, test_season=SEASON), "different"),
    ],
)
def test_choices_that_compare_nothing_are_refused(name, choices, said):
    with pytest.raises(InputError, match=said):
        make_design(name, choices)


def test_what_the_arms_differ_in_is_not_set_for_all(small_cube, tmp_path):
    for text in ("finetune.labels.fields_per_class=2", "labels.fields_per_class=2", "seed=3",
                 "finetune.init=other"):  # fmt: skip
        settings = Settings(data=(small_cube,), out=tmp_path, assignments=(text,))
        with pytest.raises(InputError, match="sets it itself"):
            plan_experiment("few-labels", settings)
    settings = Settings(
        data=(small_cube,), out=tmp_path, assignments=("pretrain.masking.mask_ratio=0.3",)
    )
    assert plan_experiment("few-labels", settings)
    with pytest.raises(InputError, match="sets it itself"):
        plan_experiment("mask-ratio", settings)


def test_equal_pretrainings_are_made_once(small_cube, tmp_path):
    settings = Settings(data=(small_cube,), out=tmp_path / "out", seeds=3, pretrain_seeds=2)
    steps = plan_experiment("few-labels", settings, Choices(fields=(1, 2))).steps
    assert len(steps.finetune) == 4 * 3
    assert [step.config.seed for step in steps.pretrain] == [0, 1]
    inits = {(step.arm, step.seed): step.config.init for step in steps.finetune if step.config.init}
    assert len(inits) == 2 * 3
    for (_, seed), init in inits.items():
        assert Path(init) == steps.pretrain[seed % 2].out
    masks = plan_experiment("mask-ratio", settings, Choices(ratios=(0.2, 0.4))).steps
    assert {step.config.masking.mask_ratio for step in masks.pretrain} == {0.2, 0.4}
    assert len({step.out for step in masks.pretrain}) == 4
    # In turn also where a protocol names seeds that are all even.
    named = replace(settings, named_seeds=(2, 4, 10))
    steps = plan_experiment("few-labels", named, Choices(fields=(1,))).steps
    begun = {step.seed: Path(step.config.init) for step in steps.finetune if step.config.init}
    assert [step.config.seed for step in steps.pretrain] == [0, 1]
    assert list(begun) == [2, 4, 10]
    assert list(begun.values()) == [steps.pretrain[place].out for place in (0, 1, 0)]
    assert not (tmp_path / "out").exists(), "planning writes nothing"


def test_seeds_share_fields_between_arms_and_test_fields_always(small_cube, tmp_path):
    from stcln_geo.data.split import few_label_fields

    settings = Settings(data=(small_cube,), out=tmp_path, seeds=3)
    steps = plan_experiment("few-labels", settings, Choices(fields=(1,))).steps
    fields = open_source(small_cube).fields
    chosen: dict[int, set[bytes]] = {}
    for step in steps.finetune:
        own = few_label_fields(
            fields, fields_per_class=step.config.labels.fields_per_class, seed=step.config.seed
        )
        chosen.setdefault(step.seed, set()).add(own.tobytes())
        assert not own[fields.split == 3].any()
    assert all(len(different) == 1 for different in chosen.values()), "paired by seed"
    assert len({next(iter(one)) for one in chosen.values()}) > 1, "seeds differ"


def test_a_season_that_cannot_be_judged_on_is_refused_at_once(new_cube, tmp_path):
    unsplit = new_cube("unsplit", split=False)
    with pytest.raises(LabelError, match="labels split"):
        plan_experiment("few-labels", Settings(data=(unsplit,), out=tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": 0}, "--seeds 0"),
        ({"jobs": 0}, "--jobs 0"),
        ({"data": ()}, "at least one"),
        ({"data": (Path("a/x.zarr"), Path("b/x.zarr"))}, "must differ"),
    ],
)
def test_settings_that_run_nothing_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        Settings(**{"data": (Path("x.zarr"),), "out": Path("out"), **options})


def test_the_command_names_the_remedy(small_cube, tmp_path, capsys):
    base = ["experiment", "--data", str(small_cube), "--out", str(tmp_path / "out")]
    for more, said in (
        (["nothing"], "there are few-labels"),
        (["few-labels", "--fields", "1;3"], "--fields 1,3,10"),
        (["short-series", "--dates", "30"], "two numbers"),
        (["few-labels", "--device", "abacus"], "abacus"),
        (["few-labels", "--device", "abacus", "--dry-run"], "H100"),
    ):
        assert invoke([base[0], *more, *base[1:]]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("out/**/checkpoints"))


# Tables.


def score(arm: str, seed: int, miou: float, *, data: str = "a", view: str = "season") -> Score:
    figures: dict[str, float | None] = dict.fromkeys(STRICT, 0.5)
    return Score(
        data=data, arm=arm, view=view, seed=seed, season=SEASON, dates="all dates",
        figures={**figures, "macro_miou": miou}, rule=None, published={}, fields=9, pixels=90,
        unseen=1, note="",
    )  # fmt: skip


DESIGN = Design(
    name="trial", title="Trial", question="Which?",
    arms=(Arm(name="new", title="new"), Arm(name="old", title="old")),
    views=(View(name="season", title="whole season"),),
    pairs=(Pair(first=("new", "season"), second=("old", "season"), title="new - old"),),
)  # fmt: skip


def test_a_table_holds_means_and_paired_differences():
    scores = [score("new", 0, 0.5), score("new", 1, 0.7), score("old", 0, 0.4),
              score("old", 1, 0.5)]  # fmt: skip
    table = make_table(DESIGN, scores)
    assert table.reading == "strict"
    assert table.row("new", "season").estimates["macro_miou"].mean == pytest.approx(0.6)
    (difference,) = table.differences
    found = difference.estimates["macro_miou"]
    # Differences 0.1 and 0.2; t(0.975, 1) = 12.7062.
    assert found.mean == pytest.approx(0.15)
    assert found.high - found.mean == pytest.approx(12.7062 * 0.05, rel=1e-4)
    rows = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert [row["kind"] for row in rows] == ["mean", "mean", "difference"]
    assert float(rows[2]["macro_miou_mean"]) == pytest.approx(0.15)
    assert "+0.1500 (sd 0.0707; " in table_markdown(table, differences=True)


def test_several_data_sets_are_averaged_seed_by_seed_first():
    scores = [
        score(arm, seed, value, data=data)
        for data, shift in (("a", 0.0), ("b", 0.2))
        for arm, seed, value in (
            ("new", 0, 0.5 + shift), ("new", 1, 0.6 + shift), ("old", 0, 0.4), ("old", 1, 0.4),
        )
    ]  # fmt: skip
    table = make_table(DESIGN, scores)
    assert [row.data for row in table.rows] == [ALL_DATA] * 3 + ["a"] * 3 + ["b"] * 3
    found = table.row("new", "season", ALL_DATA).estimates["macro_miou"]
    assert (found.count, found.mean) == (2, pytest.approx(0.65))
    assert table.row("new", "season", "b").estimates["macro_miou"].mean == pytest.approx(0.75)
    # A seed that one data set lacks has no mean over all.
    fewer = make_table(DESIGN, [one for one in scores if (one.data, one.seed) != ("b", 1)])
    assert fewer.row("new", "season", ALL_DATA).estimates["macro_miou"].count == 2
    assert fewer.row("new", "season", "b").estimates["macro_miou"].count == 1


def test_readings_never_share_a_column():
    mixed = [
        replace(score("new", 0, 0.5), rule="pastis", published=dict.fromkeys(PUBLISHED, 0.9)),
        score("old", 0, 0.4),
    ]
    header, first, second = csv.reader(io.StringIO(scores_csv(mixed)))
    strict = [name for name in header if name.startswith("strict_")]
    published = [name for name in header if name.startswith("published_pastis_")]
    assert len(strict) == len(STRICT)
    assert len(published) == len(PUBLISHED)
    assert float(first[header.index("published_pastis_miou")]) == 0.9
    assert second[header.index("published_pastis_miou")] == ""
    table = make_table(DESIGN, mixed, published=True)
    assert table.reading == "published (pastis)"
    assert table.row("old", "season").estimates["miou"].count == 0


def test_a_stack_of_a_published_set_is_read_by_its_rule():
    from stcln_geo.datasets.pastis import LEGEND

    names = list(LEGEND.names)
    assert published_rule(names) == "pastis"
    assert published_rule(["Maize", "Winter wheat", "Winter barley"]) is None, "too few to tell"
    generator = np.random.default_rng(5)
    confusion = generator.integers(0, 50, (19, 19))
    whole = np.zeros((20, 20), dtype=np.int64)
    whole[:19, :19] = confusion
    rule, placed = place_by_names(confusion, names)
    found = read_published(rule, placed)
    expected = published_metrics(whole, rule="pastis")
    assert rule == "pastis"
    assert found["miou"] == pytest.approx(expected.miou)
    # Background left out of training: its class is missing, and stays without a pixel.
    without = read_published(*place_by_names(confusion[1:, 1:], names[1:]))
    whole[0], whole[:, 0] = 0, 0
    assert without["f1"] == pytest.approx(published_metrics(whole, rule="pastis").f1)


def test_published_numbers_name_protocol_and_source():
    numbers = read_paper()
    assert {name for one in numbers for name in one.experiments} <= set(EXPERIMENTS)
    assert all(one.protocol and one.source and one.figures() for one in numbers)
    told = "\n".join(paper_lines("cross-year"))
    assert "0.4870" in told
    assert "12 dates of 2017" in told
    assert paper_lines("mask-ratio") == []


def test_the_season_is_the_data_sets(small_cube, tmp_path):
    planned = plan_experiment("early-season", Settings(data=(small_cube,), out=tmp_path))
    assert {step.season for step in planned.steps.finetune} == {choose_season(small_cube, None)}
