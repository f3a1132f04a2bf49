"""Recipes are typed, refuse what they do not know, and survive being written."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.model.config import StclnConfig
from stcln_geo.train.config import (
    FinetuneConfig,
    PretrainConfig,
    TrainConfig,
    load_config,
    option_keys,
    settle,
    to_toml,
)
from stcln_geo.train.plan import network_config
from stcln_geo.train.sections import ModelSection


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    text = 'steps = 5\nbatch_size = 3\n[model]\nmode = "reference"\n[data]\nchip = 48\n'
    # With the byte order mark that editors on Windows put first.
    file.write_text(text, encoding="utf-8-sig")

    config = load_config(
        FinetuneConfig,
        file=file,
        overrides={"batch_size": 4, "data.chip": None, "steps": 7},
        assignments=["steps=9", "model.widths=[8, 16]", "loss.class_weights=none", "season=x"],
    )

    assert (config.steps, config.batch_size, config.data.chip) == (9, 4, 48)
    assert config.model.mode == "reference"
    assert config.model.widths == (8, 16)
    assert config.loss.class_weights == "none"
    assert config.season == "x"
    file.write_text("season = 2018-09-01\n")
    assert load_config(FinetuneConfig, file=file).season == "2018-09-01"
    told = load_config(PretrainConfig, assignments=["season=2018-09-01"])
    assert told.season == "2018-09-01"


def test_settled_recipe_survives_writing(tmp_path: Path) -> None:
    config = load_config(
        FinetuneConfig,
        overrides={"init": 'a "b"\\c', "labels.fraction": 0.02},
        assignments=["model.bands=['red', 'nir']", "data.max_dates=0"],
    )
    settled = settle(config, chips=40, preset="tiny", default_steps=200)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(settled))

    assert load_config(FinetuneConfig, file=file) == settled


def test_settling() -> None:
    config = load_config(PretrainConfig, overrides={"epochs": 2.5, "batch_size": 4})

    settled = settle(config, chips=41, preset="tiny", default_steps=10)

    assert settled.steps == 26
    assert settled.epochs is None
    assert settled.optimiser.learning_rate == 1e-3
    assert settled.validation.every == 10
    assert settle(settled, chips=9, preset="large", default_steps=1) == settled


def test_a_preset_changes_only_the_sizes_of_the_checkpoint_begun_from() -> None:
    base = StclnConfig(
        bands=("red",), positions="index", position_base=2000.0, affinity_dates=12, sta=False
    )
    bands = ("red", "nir")

    network, preset = network_config(ModelSection(preset="tiny"), bands=bands, classes=3, base=base)

    tiny = StclnConfig.preset("tiny", bands=bands)
    assert preset == "tiny"
    assert network == StclnConfig(
        bands=bands, classes=3, positions="index", position_base=2000.0, affinity_dates=12,
        sta=False, widths=tiny.widths, layers=tiny.layers, heads=tiny.heads,
        feedforward=tiny.feedforward, dropout=tiny.dropout,
    )  # fmt: skip
    plain, preset = network_config(ModelSection(), bands=bands, classes=3)
    assert (plain, preset) == (StclnConfig.preset("base", bands=bands, classes=3), "base")


def test_epochs_given_replace_the_steps_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("steps = 100\n")

    config = load_config(PretrainConfig, file=file, overrides={"epochs": 3.0})

    assert config.steps is None
    assert load_config(PretrainConfig, file=file, assignments=["epochs=3"]).steps is None
    assert load_config(PretrainConfig, file=file, assignments=["epochs=null"]).steps == 100
    with pytest.raises(InputError, match="steps=100 and epochs=3"):
        settle(
            load_config(PretrainConfig, overrides={"epochs": 3, "steps": 100}),
            chips=1,
            preset=None,
            default_steps=1,
        )


@pytest.mark.parametrize("where", ["overrides", "assignments", "file"])
def test_a_number_of_fields_replaces_the_fraction_of_a_protocol(where: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[labels]\nfields_per_class = 3\n")
    given: dict[str, Any] = {
        "overrides": {"overrides": {"labels.fields_per_class": 3}},
        "assignments": {"assignments": ["labels.fields_per_class=3"]},
        "file": {"file": file},
    }[where]
    labels = {"fraction": 0.05, "ignore": ("rye",)}

    config = load_config(FinetuneConfig, base={"labels": labels}, **given)

    assert (config.labels.fraction, config.labels.fields_per_class) == (None, 3)
    assert config.labels.ignore == ("rye",)
    both = ["labels.fields_per_class=3", "labels.fraction=0.1"]
    assert load_config(FinetuneConfig, assignments=both).labels.fraction == 0.1


def test_all_breaches_are_told_with_key_and_value() -> None:
    with pytest.raises(InputError, match="Cannot use the training options") as caught:
        load_config(
            PretrainConfig,
            assignments=["masking.mask_ratio=1.5", "modell.layers=2", "batch_size=many"],
        )

    message = str(caught.value)
    for part in ("masking.mask_ratio", "1.5", "modell", "batch_size", "'many'"):
        assert part in message


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_a_decay_that_the_optimiser_does_not_have_is_refused(kind: type[TrainConfig]) -> None:
    adam = {"optimiser.name": "adam"}
    with pytest.raises(InputError, match=r"weight_decay=0\.1 belongs to adamw, and name is adam"):
        load_config(kind, overrides={**adam, "optimiser.weight_decay": 0.1})
    load_config(kind, overrides={"optimiser.weight_decay": 0.1})
    # As the config.toml of a run has it.
    written = tomllib.loads(to_toml(load_config(kind, overrides=adam)))
    assert load_config(kind, base=written).optimiser.name == "adam"


@pytest.mark.parametrize(
    ("kind", "option", "needed"),
    [
        (FinetuneConfig, "loss.gamma=3.0", "loss.kind=focal"),
        (FinetuneConfig, "loss.beta=0.99", "loss.class_weights=effective-number"),
        (FinetuneConfig, "data.min_dates=6", "data.prefix=0.1"),
        (PretrainConfig, "data.max_bad_fraction=0.2", "data.bad_chunks=skip"),
        (FinetuneConfig, "optimiser.layer_decay=0.8", "optimiser.freeze_steps=9"),
        (FinetuneConfig, "optimiser.encoder_factor=0.1", "optimiser.freeze=convolutions"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    kind: type[TrainConfig], option: str, needed: str
) -> None:
    frozen = ["optimiser.freeze=encoder"] if "optimiser" in option else []
    key, _, value = option.partition("=")
    named = key.partition(".")[2]
    with pytest.raises(InputError, match=rf"{named}={value} belongs to .*leave {named} out"):
        load_config(kind, assignments=[*frozen, option])
    given = load_config(kind, assignments=[*frozen, option, needed])
    assert load_config(kind, base=tomllib.loads(to_toml(given))) == given


def test_options_of_the_other_kind_are_refused_and_its_defaults_are_not() -> None:
    """Runs of before wrote both into their config.toml."""
    with pytest.raises(InputError, match=r"validation\.dates=6 belongs to fine-tuning"):
        load_config(PretrainConfig, assignments=["validation.dates=6"])
    with pytest.raises(InputError, match=r"validation\.chips=9 belongs to pre-training"):
        load_config(FinetuneConfig, assignments=["validation.chips=9"])
    assert load_config(FinetuneConfig, assignments=["validation.chips=64"]).validation.dates is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("masking.ratio=0.3", ", but masking.mask_ratio and masking.mask_ratio_start "),
        ("learning_rate=1e-4", ", but optimiser.learning_rate "),
        ("batchsize=4", ", but batch_size "),
        ("data.drop_date=0.1", ", but data.drop_dates "),
        ("optimizer.name=adam", ", but optimiser (given"),
        ("optimiser.colour=1", ": there is no such option (given"),
    ],
)
def test_an_option_that_does_not_exist_is_told_what_is_like_it(given: str, meant: str) -> None:
    with pytest.raises(InputError, match="there is no such option") as caught:
        load_config(PretrainConfig, assignments=[given])
    assert meant in str(caught.value)


def test_the_keys_of_options_are_those_of_the_file_of_a_run() -> None:
    """Each key can be set to its default, and the file has no other."""
    for kind in (PretrainConfig, FinetuneConfig):
        keys = set(option_keys(kind))
        printed = tomllib.loads(to_toml(kind()))
        for section, values in printed.items():
            if isinstance(values, dict):
                assert {f"{section}.{key}" for key in values if key != "weights"} <= keys
            else:
                assert section in keys
        assert load_config(kind, assignments=[f"{key}=null" for key in sorted(keys)
                                              if _is_optional(kind, key)]) == kind()  # fmt: skip


def _is_optional(kind: type, key: str) -> bool:
    value: object = kind()
    for part in key.split("."):
        value = getattr(value, part)
    return value is None


def test_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="key=value"):
        load_config(PretrainConfig, assignments=["steps"])
    with pytest.raises(InputError, match="is a value, not a section"):
        load_config(PretrainConfig, assignments=["steps=3", "steps.more=4"])
    with pytest.raises(MissingFileError, match="no such file"):
        load_config(PretrainConfig, file=tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(InputError, match="must be TOML"):
        load_config(PretrainConfig, file=tmp_path / "bad.toml")
