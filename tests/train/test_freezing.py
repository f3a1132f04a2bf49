"""What is frozen does not move by a bit, statistics included; depth sets the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stcln_geo.errors import InputError
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.stcln import Stcln
from stcln_geo.train import journal
from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config
from stcln_geo.train.finetune import finetune
from stcln_geo.train.finetune_task import FinetuneTask
from stcln_geo.train.pretrain import pretrain
from stcln_geo.train.task import step_seed

SMALL: dict[str, Any] = {
    "model.widths": [8, 16],
    "model.layers": 2,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": 16,
    "batch_size": 4,
    "seed": 5,
}


def recipe(**options: Any) -> FinetuneConfig:
    named = {key.replace("__", "."): value for key, value in options.items()}
    return load_config(FinetuneConfig, overrides={**SMALL, "model.dropout": 0.2, **named})


@pytest.fixture(scope="module")
def start(small_cube: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("start") / "pre"
    config = load_config(PretrainConfig, overrides={**SMALL, "steps": 2, "masking.gate": False})
    pretrain([small_cube], out, config)
    return out


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{name}.safetensors")


def begun_with(start: Path) -> dict[str, torch.Tensor]:
    """The weights before the first step: the encoder of the start, the head of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(step_seed(5, 0))
        network = Stcln(
            StclnConfig(
                bands=("green", "red", "nir", "swir16"), classes=3, widths=(8, 16), layers=2,
                heads=2, feedforward=32,
            )
        )  # fmt: skip
    return {**network.state_dict(), **weights(start, "best")}


@pytest.mark.parametrize(("freeze", "ema"), [("convolutions", 0.9), ("encoder", 0.0)])
def test_frozen_weights_and_statistics_stay_and_the_others_move(
    small_cube: Path, start: Path, tmp_path: Path, freeze: str, ema: float
) -> None:
    config = recipe(init=str(start), steps=4, optimiser__freeze=freeze, optimiser__ema=ema)

    result = finetune(small_cube, tmp_path / "run", config)

    before, after = begun_with(start), weights(tmp_path / "run")
    held = "encoder.convolutions." if freeze == "convolutions" else "encoder."
    assert sum(key.startswith(held) for key in after) >= 16
    for key, value in after.items():
        still = key.startswith(held) or key in ("encoder.mean", "encoder.std")
        assert torch.equal(value, before[key]) == still, key
    assert any(f"Frozen throughout, with their statistics: the weights of the {freeze}" in note
               for note in result.notes)  # fmt: skip


@pytest.mark.slow
def test_frozen_for_the_first_steps_then_free_also_when_resumed(
    small_cube: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"init": str(start), "optimiser__freeze": "encoder", "optimiser__freeze_steps": 3}
    finetune(small_cube, tmp_path / "held", recipe(**options, steps=3))
    config = recipe(**options, steps=7, validation__every=7)
    finetune(small_cube, tmp_path / "whole", config)
    end = journal.Journal.on_train_batch_end
    for stop in (2, 5):

        def dying(self: Any, trainer: Any, *args: Any, stop: int = stop) -> None:
            end(self, trainer, *args)
            if args[0].step == stop:
                raise RuntimeError("killed")

        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "on_train_batch_end", dying)
            with pytest.raises(RuntimeError, match="killed"):
                finetune(small_cube, tmp_path / "parts", config, save_every=0)
    finetune(small_cube, tmp_path / "parts", config, save_every=0)

    before, held = begun_with(start), weights(tmp_path / "held")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for key, value in before.items():
        if key.startswith("encoder."):
            assert torch.equal(held[key], value), key
            if key not in ("encoder.mean", "encoder.std"):
                assert not torch.equal(whole[key], value), key
        if not key.startswith(("token", "reconstruction")):
            torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=1e-6, msg=key)
    # Statistics began to move after the third step only: four batches.
    tracked = "encoder.convolutions.blocks.0.norm.num_batches_tracked"
    assert int(whole[tracked] - before[tracked]) == 4


def test_freezing_what_must_learn_is_refused(small_cube: Path, start: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"begins from random weights, which must learn.*--init"):
        finetune(small_cube, tmp_path / "a", recipe(steps=1, optimiser__freeze="encoder"))
    red = load_config(
        PretrainConfig,
        overrides={**SMALL, "steps": 1, "masking.gate": False, "model.bands": ["red", "nir"]},
    )
    pretrain([small_cube], tmp_path / "red", red)
    options = {
        "init": str(tmp_path / "red"),
        "steps": 2,
        "model__bands": ["red", "nir", "green"],
        "optimiser__freeze": "convolutions",
    }
    with pytest.raises(InputError, match=r"does not know green.*freeze_steps"):
        finetune(small_cube, tmp_path / "b", recipe(**options))
    finetune(small_cube, tmp_path / "b", recipe(**options, optimiser__freeze_steps=1))
    with pytest.raises(InputError, match=r"freeze_steps=2: optimiser\.freeze is none"):
        finetune(small_cube, tmp_path / "c", recipe(steps=1, optimiser__freeze_steps=2))


def test_layers_near_the_bands_move_more_slowly() -> None:
    network = Stcln(StclnConfig(bands=("red", "nir"), classes=3, widths=(8, 16), layers=2, heads=2))
    config = recipe(optimiser__layer_decay=0.5, optimiser__encoder_factor=0.8)
    task = FinetuneTask(network, config, class_pixels=[1, 1, 1])

    groups = task.parameter_groups(0.01)

    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    assert len(rates) == len(list(network.parameters()))
    found = {name: rates[id(weight)] for name, weight in network.named_parameters()}
    assert found["classifier.weight"] == found["attention.gate"] == 0.01
    assert found["encoder.temporal.layers.1.expand.bias"] == pytest.approx(0.01 * 0.8 / 2)
    assert found["encoder.temporal.layers.0.expand.bias"] == pytest.approx(0.01 * 0.8 / 4)
    assert found["encoder.temporal.norm.weight"] == pytest.approx(0.01 * 0.8 / 4)
    for block in range(4):
        name = f"encoder.convolutions.blocks.{block}.convolution.weight"
        assert found[name] == pytest.approx(0.01 * 0.8 / 2 ** (6 - block))
    plain = FinetuneTask(network, recipe(), class_pixels=[1, 1, 1]).parameter_groups(0.01)
    assert [group["lr"] for group in plain] == [0.01, 0.01]
