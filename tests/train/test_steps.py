"""A step: cut into batches, out of memory, not finite, averaged, recomputed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import open_season
from stcln_geo.data.batch import Batch
from stcln_geo.data.chips import ChipDataset, plan_labelled_chips
from stcln_geo.data.stream import OrderedStream
from stcln_geo.errors import InputError, TaskError
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.stcln import MaskedPretrainer, Stcln
from stcln_geo.train import memory
from stcln_geo.train.config import FinetuneConfig, PretrainConfig, TrainConfig, load_config
from stcln_geo.train.finetune import finetune, plan_finetune
from stcln_geo.train.finetune_task import FinetuneTask
from stcln_geo.train.memory import blank_batch, find_batch_size, is_out_of_memory, saved_bytes
from stcln_geo.train.pretrain import pretrain
from stcln_geo.train.pretrain_task import PretrainTask
from stcln_geo.train.task import TrainingTask

SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": 16,
    "batch_size": 4,
    "seed": 5,
    "validation.every": 3,
}
RECIPE = StclnConfig(
    bands=("green", "red", "nir", "swir16"), classes=3, widths=(8, 16), layers=2, heads=2,
    feedforward=32, dropout=0.0,
)  # fmt: skip


def recipe(kind: type[TrainConfig] = FinetuneConfig, **options: Any) -> Any:
    named = {key.replace("__", "."): value for key, value in options.items()}
    return load_config(kind, overrides={**SMALL, **named})


def make_task(
    kind: str, *, dropout: float = 0.0, mode: str = "geo", **options: Any
) -> TrainingTask:
    """A small network whose attention counts, with running statistics of its own."""
    torch.manual_seed(2)
    network = dataclasses.replace(RECIPE, dropout=dropout, mode=mode)
    if kind == "pretrain":
        config = recipe(PretrainConfig, masking__gate=False, **options)
        return PretrainTask(MaskedPretrainer(network), config)
    classifier = Stcln(network)
    with torch.no_grad():
        classifier.attention.gate.fill_(0.7)
    return FinetuneTask(classifier, recipe(**options), class_pixels=[900, 100, 30])


def gradients(
    task: TrainingTask, batches: list[Any], *, training: bool = True
) -> tuple[float, dict[str, torch.Tensor]]:
    task.zero_grad()
    task.train(training)
    task.try_step(batches, backward=torch.Tensor.backward)
    return task.loss, {
        name: weight.grad.clone()
        for name, weight in task.network.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_step_in_uneven_batches_is_the_step_in_one(kind: str, dataset: ChipDataset) -> None:
    whole = next(iter(OrderedStream(dataset, batch_size=7, memory=0)))
    task = make_task(kind)

    # Batch normalisation by running statistics: no chip then sees another.
    one = gradients(task, [whole], training=False)
    parts = [whole.part(0, 1), whole.part(1, 5), whole.part(5, 7)]
    cut = gradients(task, parts, training=False)

    assert cut[0] == pytest.approx(one[0], rel=1e-6)
    for name, gradient in one[1].items():
        torch.testing.assert_close(cut[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # The mean of the batches' means is another number: the weights are uneven.
    means = [
        gradients(task, [part], training=False)[0] for part in (whole.part(0, 1), whole.part(1, 7))
    ]
    assert abs(sum(means) / 2 - one[0]) > 1e-4


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_recomputing_changes_nothing(kind: str, dataset: ChipDataset) -> None:
    batch = next(iter(OrderedStream(dataset, batch_size=4, memory=0)))
    kept, again = (make_task(kind, dropout=0.3, recompute=flag) for flag in (False, True))

    first, second = gradients(kept, [batch]), gradients(again, [batch])

    assert first[0] == second[0]
    for name, gradient in first[1].items():
        torch.testing.assert_close(second[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    bytes_kept = [
        saved_bytes(task.network, lambda task=task: task.error(batch, task.prepare(batch)[0]))
        for task in (kept, again)
    ]
    assert bytes_kept[1] < 0.8 * bytes_kept[0]


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_every_parameter_learns(kind: str, dataset: ChipDataset) -> None:
    """Once the attention's gate is open: no parameter is dead."""
    batch = next(iter(OrderedStream(dataset, batch_size=4, memory=0)))
    task = make_task(kind)

    _, found = gradients(task, [batch])

    assert found.keys() == dict(task.network.named_parameters()).keys()
    for name, gradient in found.items():
        assert float(gradient.abs().max()) > 0, name


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_one_batch_is_learnt_by_heart(kind: str, dataset: ChipDataset) -> None:
    batch = next(iter(OrderedStream(dataset, batch_size=2, memory=0)))
    task = make_task(kind)
    optimiser = torch.optim.Adam(task.network.parameters(), lr=0.01)
    losses = []
    for _ in range(120):
        losses.append(gradients(task, [batch])[0])
        optimiser.step()

    assert losses[-1] < 0.15 * losses[0]


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, *, above: int) -> list[int]:
    """Let more chips than so many take more memory than there is; return the sizes tried."""
    tried: list[int] = []
    forward = Stcln.forward

    def counting(self: Stcln, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self.training:
            tried.append(len(images))
            made = forward(self, images, *rest)
            if len(images) > above:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return made
        return forward(self, images, *rest)

    monkeypatch.setattr(Stcln, "forward", counting)
    return tried


def test_out_of_memory_goes_on_with_halves_as_if_begun_so(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = run_out_of_memory(monkeypatch, above=1)
    # Three dates a chip: none is padded, so not even the last digit differs.
    finetune(small_cube, tmp_path / "cut", recipe(steps=5, batch_size=4, data__max_dates=3))

    assert tried == [4, 2] + [1] * 20
    notes = json.loads((tmp_path / "cut" / "run.json").read_text())["notes"]
    assert any(
        "Memory ran out at step 1: chips go through the network 1 at a" in one for one in notes
    )
    monkeypatch.undo()
    config = recipe(steps=5, batch_size=1, accumulate=4, data__max_dates=3)
    finetune(small_cube, tmp_path / "begun", config)
    cut, begun = (
        load_file(tmp_path / name / "checkpoints" / "last.safetensors") for name in ("cut", "begun")
    )
    for key, tensor in begun.items():
        assert torch.equal(cut[key], tensor), key


def test_one_chip_too_big_says_what_to_set(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, above=0)

    with pytest.raises(TaskError, match=r"one chip alone .* recompute=true"):
        finetune(small_cube, tmp_path / "run", recipe(steps=5))
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    told = str(memory.too_big(recipe(batch_size=8), 8, ranks=2))
    assert "--batch-size 4 --set accumulate=2" in told


def test_the_chip_that_is_no_number_is_named_at_its_step(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chip of the cube makes the loss NaN whenever it is shown."""
    season = open_season(small_cube)
    assert season.fields is not None
    units = plan_labelled_chips(season, season.fields.split == SPLITS["train"], chip=16)
    at_fault = units[len(units) // 2].chips[-1]
    images = Batch.images

    def spoiled(self: Batch) -> torch.Tensor:
        made = images(self)
        for place, source in enumerate(self.sources):
            if source is not None and source.window == at_fault:
                made[place] = torch.nan
        return made

    monkeypatch.setattr(Batch, "images", spoiled)
    config = recipe(steps=30, data__augment=False)
    with pytest.raises(TaskError, match="no number, each by itself") as caught:
        finetune(small_cube, tmp_path / "run", config, save_every=0)

    told = str(caught.value)
    row, col = at_fault.row, at_fault.col
    place = f"rows {row} to {row + 16}, columns {col} to {col + 16}"
    assert f"{small_cube}, season 2018-09-01, {place}, " in told
    assert "dates from 2018-" in told
    assert told.count("rows ") == 1
    steps = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert f"the loss of step {len(steps) + 1} is nan" in told
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    # The weights were not moved by it: without the fault, the run goes on.
    monkeypatch.undo()
    assert finetune(small_cube, tmp_path / "run", config).steps == 30


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, at_fault: Callable[[Batch], bool]) -> None:
    """Let the gradients of some batches be no numbers, though their errors are."""
    error = FinetuneTask.error

    def spoiled(self: FinetuneTask, batch: Batch, prepared: Any) -> torch.Tensor:
        # The slope of the root at 0 is infinite, and 0 times as much is no number.
        zero = (0 * self.network.classifier.weight).sqrt().sum()
        return error(self, batch, prepared) + (zero if at_fault(batch) else 0)

    monkeypatch.setattr(FinetuneTask, "error", spoiled)


def test_a_finite_loss_with_gradients_that_are_no_numbers_moves_nothing(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    season = open_season(small_cube)
    assert season.fields is not None
    units = plan_labelled_chips(season, season.fields.split == SPLITS["train"], chip=16)
    chip = units[len(units) // 2].chips[-1]
    config = recipe(steps=30, data__augment=False)
    spoil_gradients(
        monkeypatch,
        lambda batch: any(source is not None and source.window == chip for source in batch.sources),
    )

    with pytest.raises(
        TaskError, match=r"gradients of step \d+ is nan.*they were not moved"
    ) as told:
        finetune(small_cube, tmp_path / "run", config, save_every=0)

    place = f"rows {chip.row} to {chip.row + 16}, columns {chip.col} to {chip.col + 16}"
    assert f"each by itself: {small_cube}, season 2018-09-01, {place}, " in str(told.value)
    assert str(told.value).count("rows ") == 1
    steps = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert f"gradients of step {len(steps) + 1} is" in str(told.value)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["task"]["step"] == len(steps)
    assert all(weight.isfinite().all() for weight in saved["task"]["network"].values())
    monkeypatch.undo()
    assert finetune(small_cube, tmp_path / "run", config).steps == 30


def test_gradients_not_waited_for_are_looked_at_before_a_save(
    dataset: ChipDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the weights were moved by then."""
    batch = next(iter(OrderedStream(dataset, batch_size=4, memory=0)))
    task = make_task("finetune")
    weights = list(task.network.parameters())
    gradients(task, [batch])
    task._watch.clip(weights, [batch], wait=False)
    task._watch.check()
    spoil_gradients(monkeypatch, lambda batch: True)
    gradients(task, [batch])
    task._watch.clip(weights, [batch], wait=False)
    task.step += 1

    with pytest.raises(TaskError, match=r"step 1 is nan.*those of the last save stay") as told:
        task.resumable()

    assert str(told.value).count("rows ") == 4


def test_weights_gone_astray_name_the_step(small_cube: Path, tmp_path: Path) -> None:
    config = recipe(steps=30, optimiser__learning_rate=1e30, optimiser__warmup=0, optimiser__clip=0)

    with pytest.raises(
        TaskError, match=r"the (loss|norm of the gradients) of step \d+ is (nan|inf).*learning_rate"
    ):
        finetune(small_cube, tmp_path / "run", config)


def test_the_average_is_what_is_saved_and_judged(small_cube: Path, tmp_path: Path) -> None:
    plain, mean = tmp_path / "plain", tmp_path / "mean"
    finetune(small_cube, plain, recipe(steps=7), save_every=0)
    finetune(small_cube, mean, recipe(steps=7, optimiser__ema=0.8), save_every=0)

    trained = torch.load(mean / "checkpoints" / "last.ckpt", weights_only=True)["task"]
    saved = load_file(mean / "checkpoints" / "last.safetensors")
    undisturbed = load_file(plain / "checkpoints" / "last.safetensors")
    name = "classifier.weight"
    # The average changes nothing for the weights that are trained.
    assert torch.equal(trained["network"][name], undisturbed[name])
    assert torch.equal(trained["average"][name], saved[name])
    assert not torch.equal(saved[name], undisturbed[name])
    losses = [(run / "steps.jsonl").read_text() for run in (plain, mean)]
    assert losses[0] == losses[1]
    figures = [(run / "metrics.jsonl").read_text().splitlines() for run in (plain, mean)]
    judged = [[json.loads(line)["validation_macro_f1"] for line in lines] for lines in figures]
    assert judged[0] != judged[1]
    assert "moving average" in (mean / "model_card.md").read_text()


def test_average_follows_the_formula_statistics_included() -> None:
    task = make_task("finetune", optimiser__ema=0.5)
    assert task.average is not None
    norms = [
        network.encoder.convolutions.blocks[1].norm for network in (task.network, task.average)
    ]
    weight, mean = task.network.classifier.weight, task.average.classifier.weight
    expected, variance = mean.clone(), norms[1].running_var.clone()
    for step in range(1, 6):
        with torch.no_grad():
            weight.add_(0.1 * step)
            norms[0].running_var.mul_(1.5)
            norms[0].num_batches_tracked.add_(1)
        task.step = step
        task._follow()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        variance = decay * variance + (1 - decay) * norms[0].running_var

    torch.testing.assert_close(mean, expected)
    assert not mean.requires_grad
    torch.testing.assert_close(norms[1].running_var, variance)
    assert not torch.allclose(norms[1].running_var, norms[0].running_var)
    # What is counted is no mean, and what never changes does not drift.
    assert int(norms[1].num_batches_tracked) == 5
    assert torch.equal(task.average.encoder.std, task.network.encoder.std)


@pytest.mark.parametrize(("free", "size"), [(10**12, 32), (1000, 0), (9000, 4), (160_000, 32)])
def test_batch_size_by_arithmetic(free: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free_memory", lambda: free)

    def attempt(chips: int) -> int:
        return 800 * chips

    if size == 0:
        with pytest.raises(InputError, match="one chip alone"):
            find_batch_size(attempt, device="cpu", chips=300)
    else:
        assert find_batch_size(attempt, device="cpu", chips=300) == size


def test_auto_batch_size_is_settled_once(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = recipe(steps=2, batch_size="auto")
    plan = plan_finetune(small_cube, one)
    assert plan.config.batch_size == 1  # An eighth of the 14 chips.
    assert "chips of a step: 1 x 1 ranks x 1 batches = 1" in plan.lines()
    wide = pretrain(
        [small_cube], tmp_path / "pre",
        recipe(PretrainConfig, steps=2, batch_size="auto", masking__gate=False),
    )  # fmt: skip
    assert "batch_size = 2\n" in (tmp_path / "pre" / "config.toml").read_text()
    assert wide.steps == 2
    (tmp_path / "pre" / "run.json").write_text(
        (tmp_path / "pre" / "run.json").read_text().replace("finished", "running")
    )
    monkeypatch.setattr(memory, "_free_memory", lambda: 1)
    again = pretrain(
        [small_cube], tmp_path / "pre",
        recipe(PretrainConfig, steps=2, batch_size="auto", masking__gate=False),
    )  # fmt: skip
    assert again.steps == 2


def test_what_is_kept_is_measured(dataset: ChipDataset) -> None:
    """Twice the chips keep about twice the bytes, and far more than the batch itself."""
    task = make_task("finetune")
    kept = []
    for chips in (1, 2):
        batch = blank_batch(chips=chips, dates=6, bands=4, side=16, labelled=True)
        prepared, _ = task.prepare(batch)
        kept.append(saved_bytes(task.network, lambda: task.error(batch, prepared)))  # noqa: B023

    assert kept[1] == pytest.approx(2 * kept[0], rel=0.1)
    assert kept[0] > 6 * 16 * 16 * 16 * 4


def test_two_seeds_differ_and_one_repeats(
    small_cube: Path, new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(small_cube, tmp_path / name, recipe(steps=3, seed=seed, deterministic=True))

    traces = [(tmp_path / name / "steps.jsonl").read_text() for name in "abc"]
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]
    assert not torch.are_deterministic_algorithms_enabled()
