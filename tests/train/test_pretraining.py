"""How much is hidden at which step, what is told of the errors, and what is drawn of them."""

from __future__ import annotations

import csv
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from stcln_geo.cli.main import invoke
from stcln_geo.cube.store import open_season
from stcln_geo.data.batch import Batch
from stcln_geo.data.chips import ChipDataset, ChipSource, plan_chips
from stcln_geo.data.stream import OrderedStream
from stcln_geo.errors import InputError
from stcln_geo.grid import Window
from stcln_geo.model.checkpoint import load_model
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.stcln import MaskedPretrainer
from stcln_geo.train.config import PretrainConfig, load_config, to_toml
from stcln_geo.train.error_table import ErrorTable, add_up_errors, months_of, read_error_rows
from stcln_geo.train.masking import MaskingSection, check_masking
from stcln_geo.train.pretrain import plan_pretrain, pretrain
from stcln_geo.train.pretrain_task import PretrainTask
from stcln_geo.train.reconstruction import choose_dates, read_reconstructions

BANDS = ("green", "red", "nir", "swir16")
SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": 16,
    "batch_size": 4,
    "seed": 5,
    "masking.strategy": "space-time",
    "masking.mask_ratio": 0.4,
}


def recipe(**options: Any) -> PretrainConfig:
    named = {key.replace("__", "."): value for key, value in options.items()}
    return load_config(PretrainConfig, overrides={**SMALL, **named})


def make_task(**options: Any) -> PretrainTask:
    torch.manual_seed(2)
    network = StclnConfig(
        bands=BANDS, classes=0, widths=(8, 16), layers=1, heads=2, feedforward=32, dropout=0.0
    )
    task = PretrainTask(MaskedPretrainer(network), recipe(**options))
    task.network.encoder.set_normalisation([0.1, 0.2, 0.3, 0.4], [0.05, 0.1, 0.2, 0.4])
    return task


@pytest.fixture(scope="module")
def dataset(small_cube: Path) -> ChipDataset:
    season = open_season(small_cube)
    return ChipDataset([season], plan_chips(season, chip=16), bands=season.bands)


def judge(task: PretrainTask, dataset: ChipDataset, *, batch_size: int) -> PretrainTask:
    task.eval()
    task.on_validation_epoch_start()
    with torch.no_grad():
        for place, batch in enumerate(OrderedStream(dataset, batch_size=batch_size, memory=0)):
            task.validation_step(batch, place)
    task.on_validation_epoch_end()
    return task


# How much is hidden.


def test_schedules_are_functions_of_the_step() -> None:
    linear = MaskingSection(mask_ratio=0.7, mask_ratio_start=0.2, schedule="linear")
    cosine = linear.model_copy(update={"schedule": "cosine"})
    assert [linear.ratio_at(step, steps=6) for step in range(6)] == pytest.approx(
        [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    )
    # (1 - cos(pi k / 4)) / 2 of the way.
    assert [cosine.ratio_at(step, steps=5) for step in range(5)] == pytest.approx(
        [0.2, 0.2 + 0.5 * 0.146447, 0.45, 0.2 + 0.5 * 0.853553, 0.7], abs=1e-6
    )
    for falling in (linear, cosine):
        assert falling.ratio_at(0, steps=1) == 0.7
        assert falling.ratio_at(9, steps=5) == 0.7
    assert MaskingSection(mask_ratio=0.3).ratio_at(4, steps=9) == 0.3


def test_a_step_hides_by_the_schedule_and_validation_by_its_end(dataset: ChipDataset) -> None:
    task = make_task(
        steps=11, masking__schedule="linear", masking__mask_ratio_start=0.05,
        masking__mask_ratio=0.85,
    )  # fmt: skip
    batch = next(iter(OrderedStream(dataset, batch_size=20, memory=0)))
    for step, ratio in ((0, 0.05), (5, 0.45), (10, 0.85)):
        task.step = step
        hidden, usable, allowed = task.prepare(batch)[1].tolist()
        assert hidden / usable == pytest.approx(ratio, abs=0.02)
        assert allowed == usable
    task.step = 0
    judge(task, dataset, batch_size=5)
    assert task.table is not None
    _, hidden, usable = task.table.sums.sum((1, 2))
    assert hidden / usable == pytest.approx(0.85, abs=0.02)


def test_by_default_dates_are_hidden_whole_green_or_not(dataset: ChipDataset) -> None:
    default = MaskingSection()
    task = make_task(**{f"masking__{key}": value for key, value in default.model_dump().items()})
    batch = next(iter(OrderedStream(dataset, batch_size=20, memory=0)))
    made = task._hide(batch, 2, mask_ratio=default.mask_ratio)
    assert batch.valid is not None
    assert torch.equal(made.allowed, batch.valid)
    hidden, usable = made.mask.flatten(2).sum(2), batch.valid.flatten(2).sum(2)
    seen = usable > 0
    assert (hidden[seen] == 0).any()
    assert (hidden[seen] == usable[seen]).any()
    assert ((hidden == 0) | (hidden == usable)).all()


@pytest.mark.parametrize(
    ("assignments", "told"),
    [
        (["masking.strategy=blocks"], "masking.strategy"),
        (["masking.block=0"], "masking.block"),
        (["masking.schedule=linear"], "mask_ratio_start is none"),
        (["masking.mask_ratio_start=0.2"], "schedule is constant"),
        (["masking.schedule=cosine", "masking.mask_ratio_start=1.0"], "mask_ratio_start"),
        (["masking.band_groups.vis=['red']"], "only band-group uses them"),
    ],
)
def test_options_that_contradict_are_refused(assignments: list[str], told: str) -> None:
    with pytest.raises(InputError, match=r"Cannot use the training options") as caught:
        load_config(PretrainConfig, assignments=assignments)
    assert told in str(caught.value)


def test_groups_survive_writing(tmp_path: Path) -> None:
    groups = "masking.band_groups={'red edge'=['rededge1', 'rededge2'], nir=['nir']}"
    config = load_config(PretrainConfig, assignments=["masking.strategy=band-group", groups])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(PretrainConfig, file=tmp_path / "config.toml") == config


def test_options_that_do_not_fit_a_run_are_refused_before_it_begins(
    small_cube: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="squares of 16 px in chips of 16 px"):
        plan_pretrain([small_cube], recipe(masking__strategy="block", masking__block=16))
    out = tmp_path / "run"
    options = ["--set", "masking.strategy=band-group", "--set", "masking.band_groups.a=['blue']"]
    assert invoke(["pretrain", str(small_cube), "--out", str(out), *options]) == 2
    assert "blue of masking.band_groups is not among the bands" in capsys.readouterr().err
    assert not out.exists()


def test_what_a_tube_cannot_see_is_said() -> None:
    options = MaskingSection(strategy="tube", block=9)
    assert "reaches 4 px" in check_masking(options, bands=("red", "nir"), chip=32)[0]
    told = check_masking(
        MaskingSection(strategy="tube", gate=True), bands=("red", "green"), chip=32
    )
    assert len(told) == 1
    assert "No vegetation gate" in told[0]
    # Shared by the runs of an experiment, some of which draw squares: said, not refused.
    (told,) = check_masking(MaskingSection(block=8), bands=("red", "nir"), chip=32)
    assert told.startswith("No squares of 8 px: masking.strategy is time")


# What is told of the errors.


def blank(seasons: tuple[str | None, ...], days: np.ndarray) -> Batch:
    """A batch of 5 x 7 px that says where and when it is from."""
    place = Window(0, 0, 5, 7)
    sources = tuple(
        None if season is None else ChipSource(cube="a.zarr", season=season, window=place)
        for season in seasons
    )
    batch, dates = days.shape
    return Batch(
        reflectance=torch.zeros(batch, dates, 3, 5, 7, dtype=torch.int16),
        valid=torch.ones(batch, dates, 5, 7, dtype=torch.bool),
        days=torch.from_numpy(days.astype(np.float32)),
        target=None,
        sources=sources,
        samples=tuple(range(batch)),
    )


def test_errors_by_month_and_band_agree_with_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    seasons = ("2019-09-01", "2018-04-15", None)
    # Over the turn of a year, and over the 29th of February 2020.
    days = np.array([[0, 121, 122, 181, 182], [0, 15, 16, 260, 261], [0, 30, 60, 90, 120]])
    errors = torch.from_numpy(generator.random((3, 5, 3, 5, 7)))
    hidden = torch.from_numpy(generator.random((3, 5, 3, 5, 7)) < 0.4)
    hidden[:, :, 1] = False
    hidden[0, 3:] = False
    valid = torch.from_numpy(generator.random((3, 5, 5, 7)) < 0.8)
    hidden &= valid[:, :, None]
    errors = torch.where(hidden, errors, 0.0)
    batch = blank(seasons, days)

    months = months_of(batch)
    table = ErrorTable(
        bands=("red", "nir", "swir16"), std=np.array([0.1, 0.2, 0.5]),
        sums=add_up_errors(errors, hidden, valid, months).numpy(),
    )  # fmt: skip

    assert months.tolist() == [[9, 12, 1, 2, 3], [4, 4, 5, 12, 1], [0] * 5]
    expected: dict[tuple[str, str], list[float]] = {}
    for chip, date, band in np.ndindex(3, 5, 3):
        first = seasons[chip]
        month = None
        if first is not None:
            day = datetime.date.fromisoformat(first) + datetime.timedelta(int(days[chip, date]))
            month = f"{day.month:02d}"
        name, std = table.bands[band], (0.1, 0.2, 0.5)[band]
        squared, count = float(errors[chip, date, band].sum()), int(hidden[chip, date, band].sum())
        added = (squared, squared * std**2, count, int(valid[chip, date].sum()))
        for key in ((month, name), (month, "all"), ("all", name), ("all", "all")):
            if key[0] is not None:
                sums = expected.setdefault(key, [0.0] * 4)
                sums[:] = [one + more for one, more in zip(sums, added, strict=True)]
    for row in table.rows():
        squared, scaled, count, usable = expected.get((row["month"], row["band"]), [0, 0, 0, 0])
        assert (row["hidden"], row["usable"]) == (count, usable)
        if count:
            assert row["error"] == pytest.approx(squared / count)
            assert row["rmse"] == pytest.approx((scaled / count) ** 0.5)
        else:
            assert row["error"] is None
            assert row["rmse"] is None
    figures = table.figures()
    assert figures["validation_error/nir"] is None
    assert figures["validation_error/month-02"] is None
    assert figures["validation_rmse/month-04"] == pytest.approx(
        (expected["04", "all"][1] / expected["04", "all"][2]) ** 0.5
    )
    assert len(figures) == 2 * (3 + 12)
    assert read_error_rows(table.to_csv()) == table.rows()


@pytest.mark.parametrize("strategy", ["space-time", "band-group"])
def test_errors_of_a_validation_are_those_of_its_loss(strategy: str, dataset: ChipDataset) -> None:
    task = judge(make_task(masking__strategy=strategy), dataset, batch_size=5)

    assert task.table is not None
    batch = next(iter(OrderedStream(dataset, batch_size=50, memory=0)))
    with torch.no_grad():
        hidden = task._hide(batch, 3, mask_ratio=0.4)
        total = float(task.error(batch, hidden)) / float(task._count(batch, hidden)[0])
    assert task.figures["validation_loss"] == pytest.approx(total, rel=1e-5)
    rows = {row["band"]: row for row in task.table.rows() if row["month"] == "all"}
    assert rows["all"]["error"] == task.figures["validation_loss"]
    # One band: its RMSE is its error in units of its deviation.
    assert rows["nir"]["rmse"] == pytest.approx(0.2 * rows["nir"]["error"] ** 0.5, rel=1e-5)
    counts = [rows[band]["hidden"] for band in BANDS]
    assert sum(counts) == rows["all"]["hidden"]
    # green and red are of one group.
    assert (len(set(counts)) == 1) == (strategy == "space-time")
    assert counts[0] == counts[1]


# What is drawn.


@pytest.mark.parametrize("strategy", ["block", "band-group"])
def test_drawn_chips_do_not_depend_on_the_batches(strategy: str, dataset: ChipDataset) -> None:
    task = make_task(masking__strategy=strategy)
    first = judge(task, dataset, batch_size=3).chips
    second = judge(task, dataset, batch_size=8).chips

    assert len(first) == 4
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.dates, one.order) == (other.name, other.dates, other.order)
        np.testing.assert_allclose(one.made, other.made, atol=1e-5)
        np.testing.assert_array_equal(one.hidden, other.hidden)
        clear = np.isfinite(one.truth)
        np.testing.assert_array_equal(one.made[clear & ~one.hidden], one.truth[clear & ~one.hidden])
        assert (one.made[one.hidden] != one.truth[one.hidden]).any()
        assert not (one.hidden & ~clear).any()
    assert {chip.name for chip in first} != {
        chip.name for chip in judge(make_task(seed=6), dataset, batch_size=8).chips
    }
    together = all((chip.hidden == chip.hidden[:, :1]).all() for chip in first)
    assert together == (strategy == "block")


def test_dates_are_spread_over_those_that_hide_much() -> None:
    hidden = np.array([0, 9, 10, 4, 8, 7, 0, 10, 9, 6, 5, 10])
    assert choose_dates(hidden).tolist() == [1, 4, 5, 8, 9, 11]
    assert choose_dates(np.array([0, 3, 1])).tolist() == [1]
    assert not len(choose_dates(np.zeros(4, dtype=int)))


@pytest.fixture(scope="module")
def run(small_cube: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(
        [small_cube],
        out,
        recipe(
            steps=9, validation__every=3, masking__strategy="block", masking__schedule="linear",
            masking__mask_ratio_start=0.2,
        ),
    )  # fmt: skip
    return out


def test_a_run_tells_its_errors(run: Path) -> None:
    told = json.loads((run / "run.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = next(record for record in records if record["step"] == told["best_step"])
    with (run / "errors.csv").open() as file:
        rows = {(row["month"], row["band"]): row for row in csv.DictReader(file)}

    assert len(rows) == 13 * 5
    assert float(rows["all", "all"]["error"]) == best["validation_loss"] == told["best"]
    assert float(rows["all", "nir"]["rmse"]) == best["validation_rmse/nir"]
    # The cube's dates are of 300 days since September.
    assert rows["08", "all"] == {
        "month": "08", "band": "all", "usable": "0", "hidden": "0", "error": "", "rmse": "",
    }  # fmt: skip
    assert best["validation_error/month-08"] is None
    assert [record["mask_ratio"] for record in records] == pytest.approx([0.25, 0.325, 0.4])
    card = json.loads((run / "model_card.json").read_text())
    assert list(card["figures"][0]["values"]) == ["loss"]


def test_a_run_draws_what_its_best_weights_fill_in(run: Path, small_cube: Path) -> None:
    chips = read_reconstructions(run / "reconstructions" / "chips.npz")
    assert 1 <= len(chips) <= 4
    assert {path.name for path in (run / "reconstructions").iterdir()} == {
        "chips.npz", *(f"chip-{number + 1}.png" for number in range(len(chips)))
    }  # fmt: skip
    chip = chips[0]
    assert chip.bands == ("swir16", "nir", "green")
    network = load_model(run)
    season = open_season(small_cube)
    place = [int(word.rstrip(",")) for word in chip.name.split() if word.rstrip(",").isdigit()]
    rows, cols = slice(place[-4], place[-3]), slice(place[-2], place[-1])
    dates = season.time.astype("datetime64[D]").astype(str).tolist()
    for number, date in enumerate(chip.dates):
        index = dates.index(date)
        valid = season.valid[index, rows, cols]
        for band, name in enumerate(chip.bands):
            stored = season.reflectance[index, season.bands.index(name), rows, cols] * 1e-4
            seen = chip.truth[number, band][: valid.shape[0], : valid.shape[1]]
            np.testing.assert_allclose(seen[valid], stored[valid], atol=1e-6)
            assert np.isnan(seen[~valid]).all()
    assert isinstance(network, MaskedPretrainer)
    height, width = imread(run / "reconstructions" / "chip-1.png").shape[:2]
    assert width > height / 3


def test_the_page_of_a_run_holds_all_of_it(run: Path, small_cube: Path) -> None:
    page = (run / "report.html").read_text()
    assert "squares of 4 px on single dates, with a chance that goes from 0.2 to 0.4" in page
    drawn = list((run / "reconstructions").glob("*.png"))
    assert page.count("data:image/png;base64,") == 1 + len(drawn)
    assert "http" not in page.replace("http-equiv", "")
    # Months in the order of the season; one without a date is said to have none.
    assert page.index(">September<") < page.index(">January<") < page.index(">August<")
    august = page[page.index(">August<") :].partition("</tr>")[0]
    assert "no clear date" in august
    for band in BANDS:
        assert f'scope="row">{band}</th>' in page
    (run / "report.html").unlink()
    config = load_config(PretrainConfig, file=run / "config.toml")
    result = pretrain([small_cube], run, config)
    assert result.already
    assert (run / "report.html").read_text() == page


def test_never_hidden_is_said_and_no_chip_is_no_error(small_cube: Path, tmp_path: Path) -> None:
    pretrain([small_cube], tmp_path / "run", recipe(steps=2, validation__chips=0))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No chip was held out." in page
    assert "Errors per band" not in page
    assert not (tmp_path / "run" / "errors.csv").exists()

    pretrain(
        [small_cube],
        tmp_path / "rare",
        # So rarely that nothing is hidden by chance: no reason to stop.
        recipe(steps=2, masking__mask_ratio=1e-5, masking__strategy="time"),
    )
    page = (tmp_path / "rare" / "report.html").read_text()
    assert page.count("never hidden") > 4
    assert "Nothing was hidden in the chips held out." in page
