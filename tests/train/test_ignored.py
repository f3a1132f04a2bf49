"""An ignored class might as well not be there: no output, no loss, no figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stcln_geo.cli.main import invoke
from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import FieldTable, open_season, write_fields
from stcln_geo.errors import CheckpointError, LabelError
from stcln_geo.legend import Legend
from stcln_geo.model.checkpoint import load_model, read_metadata
from stcln_geo.model.export import export_checkpoint
from stcln_geo.train.classes import choose_classes
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.evaluate import evaluate_run, plan_evaluation
from stcln_geo.train.finetune import finetune, plan_finetune
from stcln_geo.train.finetune_setup import make_finetune_task, prepare_finetune
from stcln_geo.train.ranks import Ranks
from stcln_geo.train.scoring import make_lookup

SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": 16,
    "data.halo": 3,
    "batch_size": 4,
    "seed": 5,
    "steps": 5,
}


def recipe(**options: Any) -> FinetuneConfig:
    named = {key.replace("__", "."): value for key, value in options.items()}
    return load_config(FinetuneConfig, overrides={**SMALL, **named})


def drop_class(cube: Path, code: int) -> None:
    """Take the fields of a class out of a cube, and the class out of its legend."""
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    assert season.legend is not None
    fields, kept = season.fields, season.fields.code != code
    gone = np.isin(season.parcels[:], fields.number[~kept])
    labels = season.labels[:]
    moved = np.where((labels > code) & (labels != 255), labels - 1, labels)
    values = [entry.value for entry in season.legend.classes if entry.code != code]
    codes = np.where(fields.code > code, fields.code - 1, fields.code)[kept]
    write_fields(
        season,
        labels=np.where(gone, 255, moved).astype(np.uint8),
        parcels=np.where(gone, 0, season.parcels[:]),
        fields=FieldTable(
            number=fields.number[kept],
            code=codes.astype(np.uint8),
            pixels=fields.pixels[kept],
            split=fields.split[kept],
        ),
        legend=Legend.from_values(values),
    )


def test_fields_and_pixels_of_the_outputs_are_those_counted_one_by_one() -> None:
    generator = np.random.default_rng(2)
    fields = FieldTable(
        number=np.arange(1, 61, dtype=np.int32),
        code=generator.integers(0, 5, 60).astype(np.uint8),
        pixels=generator.integers(1, 99, 60).astype(np.int32),
        split=np.ones(60, dtype=np.uint8),
        site=generator.integers(0, 7, 60).astype(np.int32),
    )
    choice = choose_classes(Legend.from_values(list("abcde")), ["b"], silent=["d", "new"])
    assert choice.legend.names == ("a", "c", "d", "e", "new")
    part, shown = generator.random(60) < 0.6, np.array([1, 3, 0, 2, 1, 1, 5])
    number, pixels, often = (dict.fromkeys(choice.legend.names, 0) for _ in range(3))
    for field in np.flatnonzero(part):
        name = "abcde"[fields.code[field]]
        assert choice.used(fields)[field] == (name in "ace")
        if name in "ace":
            number[name] += 1
            pixels[name] += int(fields.pixels[field])
            often[name] += int(fields.pixels[field] * shown[fields.site[field]])
    assert choice.count(fields, part).tolist() == list(number.values())
    assert choice.pixels(fields, part) == list(pixels.values())
    assert choice.pixels(fields, part, shown=shown) == list(often.values())


def test_ignoring_a_class_is_not_having_it(new_cube: Callable[..., Path], tmp_path: Path) -> None:
    whole, without = new_cube("whole"), new_cube("without")
    drop_class(without, 1)
    without_too = new_cube("another", seed=2)
    drop_class(without_too, 1)

    finetune(whole, tmp_path / "ignoring", recipe(labels__ignore=["crop 1"]))
    finetune(without, tmp_path / "without", recipe())

    one, other = (
        load_file(tmp_path / name / "checkpoints" / "last.safetensors")
        for name in ("ignoring", "without")
    )
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert load_model(tmp_path / "ignoring").config.classes == 2
    figures = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("ignoring", "without")
    ]
    assert figures[0]["validation_macro_miou"] == figures[1]["validation_macro_miou"]

    # Evaluation of both counts the same pixels.
    found = evaluate_run(tmp_path / "ignoring", whole)
    plain = evaluate_run(tmp_path / "without", without)
    assert found.names == plain.names == ("crop 0", "crop 2")
    assert (found.metrics.confusion == plain.metrics.confusion).all()
    assert found.fields.tolist() == plain.fields.tolist()
    assert "Ignored: crop 1 (7 fields)" in "\n".join(found.lines())
    assert plain.ignored is None
    # A cube that never had the class is as good.
    assert plan_evaluation(tmp_path / "ignoring", without_too).ignored is None
    with pytest.raises(CheckpointError, match="knows the classes crop 0, crop 2, and the cube's"):
        evaluate_run(tmp_path / "without", whole)

    info = read_metadata(tmp_path / "ignoring")
    assert info.legend is not None
    assert info.ignored is not None
    assert Legend.from_json(info.legend).names == ("crop 0", "crop 2")
    assert Legend.from_json(info.ignored).names == ("crop 1",)
    card = (tmp_path / "ignoring" / "model_card.md").read_text()
    assert "- classes: crop 0, crop 2\n- ignored, never an output: crop 1\n" in card
    told = json.loads((tmp_path / "ignoring" / "run.json").read_text())
    season = open_season(whole)
    assert season.fields is not None
    tested = (season.fields.split == SPLITS["test"]) & (season.fields.code != 1)
    assert told["splits"]["test"]["fields"] == int(tested.sum())
    assert "Ignored: crop 1" in "\n".join(plan_evaluation(tmp_path / "ignoring", whole).lines())


def test_classes_are_found_by_name_value_or_code() -> None:
    legend = Legend.from_rows(
        [
            {"value": 7, "name": "wheat"},
            {"value": "1", "name": "maize"},
            {"value": "x", "name": "background"},
            {"value": "v", "name": "void"},
        ],
        source="t",
    )
    assert [legend.find(name).code for name in ("maize", "7", "1", "3", 1, 0)] == [1, 0, 1, 3, 1, 0]
    choice = choose_classes(legend, ["background", 3])
    assert choice.codes == (0, 1)
    assert choice.legend.names == ("wheat", "maize")
    assert choice.ignored is not None
    assert choice.ignored.names == ("background", "void")
    assert choose_classes(legend).ignored is None
    with pytest.raises(LabelError, match=r"Cannot find the class 'rye': the legend has 0 wheat"):
        choose_classes(legend, ["rye"])
    with pytest.raises(LabelError, match=r"there must be two left to tell apart \(left: void\)"):
        choose_classes(legend, [0, 1, 2])


def test_a_plan_says_what_is_ignored(small_cube: Path) -> None:
    plan = plan_finetune(small_cube, recipe(labels__ignore=["crop 0"]))

    assert "Ignored: crop 0 (7 fields)" in "\n".join(plan.lines())
    assert plan.network.classes == 2


# Silent classes.


def test_a_silent_class_is_an_output_with_the_weight_nought(
    new_cube: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cube = new_cube()
    recipe_of = recipe(labels__silent=["crop 1", "void"], loss__class_weights="none", steps=3)
    prepared = prepare_finetune(cube, recipe_of, device="cpu", ranks=Ranks(), run=None)
    task, _ = make_finetune_task(prepared, workers=1, begin=True, ranks=Ranks())
    assert task.network.config.classes == 4
    with closing(task.stream), closing(task.stream.batches(0, 3)) as batches:
        for batch in batches:
            target, weight = task.prepare(batch)
            loss = task.error(batch, target) / weight[0]
            assert batch.target is not None
            seen = torch.where(batch.valid.any(1), batch.target, -100)
            plain = torch.nn.functional.cross_entropy(
                task.classify(task.network, batch), seen, weight=torch.tensor([1.0, 0.0, 1.0, 0.0])
            )
            # Means over few pixels of many parts.
            assert loss.item() == pytest.approx(plain.item(), rel=1e-5)

    finetune(cube, tmp_path / "run", recipe_of)
    found = evaluate_run(tmp_path / "run", cube)
    assert found.names == ("crop 0", "crop 1", "crop 2", "void")
    assert found.metrics.support[[1, 3]].tolist() == [0, 0]
    assert found.fields[[1, 3]].tolist() == [0, 0]
    assert found.metrics.pixels > 0
    assert "Silent: crop 1, void." in "\n".join(found.lines())
    info = read_metadata(tmp_path / "run")
    assert info.silent == ("crop 1", "void")
    assert info.ignored is None
    export_checkpoint(tmp_path / "run", tmp_path / "again.safetensors")
    assert read_metadata(tmp_path / "again.safetensors").silent == info.silent
    capsys.readouterr()
    assert invoke(["checkpoint", "info", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "classes: crop 0, crop 1, crop 2, void\n" in told
    assert "never learnt: crop 1, void\n" in told


def test_silent_classes_keep_their_place_and_new_ones_come_last() -> None:
    rows: list[dict[str, object]] = [
        {"value": "0", "name": "background"},
        {"value": "7", "name": "wheat"},
        {"value": "9", "name": "maize"},
        {"value": "19", "name": "void", "ignored": True},
        {"value": "20", "name": "cloud", "ignored": True},
    ]
    legend = Legend.from_rows(rows, source="a test")
    choice = choose_classes(legend, silent=["0", "19", "rye"])
    assert choice.legend.names == ("background", "wheat", "maize", "void", "rye")
    assert [entry.name for entry in choice.legend.ignored] == ["cloud"]
    assert (choice.codes, choice.outputs) == ((1, 2), (1, 2))
    assert choice.silent == ("0", "19", "rye")
    assert make_lookup(choice).tolist() == [-100, 1, 2]
    # Of a class that is ignored there is no output: those after it move up.
    rows.insert(0, {"value": "3", "name": "grass"})
    choice = choose_classes(Legend.from_rows(rows, source="a test"), ["grass"], silent=["0"])
    assert choice.legend.names == ("background", "wheat", "maize")
    assert make_lookup(choice).tolist() == [-100, -100, 1, 2]
    with pytest.raises(LabelError, match="Cannot ignore background and keep it silent"):
        choose_classes(legend, ["background"], silent=["0"])
    with pytest.raises(LabelError, match="Cannot silence background, wheat: of 3 classes"):
        choose_classes(legend, silent=["0", "wheat"])


def test_weights_are_kept_by_the_figure_that_is_named(small_cube: Path, tmp_path: Path) -> None:
    result = finetune(
        small_cube, tmp_path / "run",
        recipe(validation__choose_by="overall_accuracy", validation__every=1, steps=6),
    )  # fmt: skip
    figures = [
        json.loads(line)["validation_overall_accuracy"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert result.monitor == "validation_overall_accuracy"
    assert result.best == max(figures)
    assert result.best_step == figures.index(max(figures)) + 1
    assert read_metadata(tmp_path / "run").provenance["validation_overall_accuracy"] == result.best
