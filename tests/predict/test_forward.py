"""Batches, padding and devices change no label."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from stcln_geo.errors import BrokenDeviceError, CheckpointError, InputError
from stcln_geo.grid import Window
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.predict.forward import Answer, Network, Recipe, Sample, load_network
from stcln_geo.predict.outputs import decide

RECIPE = Recipe(layers=("classes", "confidence"))


def samples_of(world: Any, count: int) -> list[Sample]:
    """Return windows with different numbers of dates."""
    found = []
    for index in range(count):
        place = Window(world.extent.row + 9 * index, world.extent.col + 5 * index, 16, 16)
        numbers, valid = world.pixels_at(place, 8, 3)
        if index % 3 == 1:
            valid[2:6] = False
        dates = np.flatnonzero(valid.any(axis=(1, 2)))
        days = np.arange(8, dtype=np.int32) * 37
        found.append(Sample(reflectance=numbers, valid=valid, days=days, dates=dates))
    assert len({len(sample.dates) for sample in found}) > 1
    return found


def network_of(world: Any, mode: str = "geo") -> Network:
    return Network(world.make_network(4, mode=mode), device="cpu", precision="float32")


def agree(one: list[Answer], other: list[Answer]) -> bool:
    """Return True where classes are equal and confidences within a percent."""
    return all(
        np.array_equal(a.layers["classes"], b.layers["classes"])
        and np.abs(np.subtract(a.layers["confidence"], b.layers["confidence"], dtype=int)).max()
        <= 1
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0, 20.0])
def test_a_temperature_changes_confidence_and_no_class(world: Any, temperature: float) -> None:
    plain, scaled = (
        Network(world.make_network(4), device="cpu", precision="float32", temperature=value)
        for value in (None, temperature)
    )
    samples = samples_of(world, 3)
    recipe = Recipe(layers=("classes", "confidence"), probability=True)

    pairs = zip(*(each.label(samples, recipe, threads=1) for each in (plain, scaled)), strict=True)

    for one, other in pairs:
        assert np.array_equal(one.layers["classes"], other.layers["classes"])
        assert one.probability is not None
        assert other.probability is not None
        # softmax(z / T) is the power 1 / T of softmax(z), made to add up to one.
        power = one.probability.astype(np.float64) ** (1 / temperature)
        expected = power / power.sum(axis=0)
        np.testing.assert_allclose(other.probability, expected, rtol=1e-3, atol=1e-6)
        percent = np.floor(other.probability.max(axis=0) * 100 + 0.5)
        assert np.array_equal(other.layers["confidence"], percent)


@pytest.mark.parametrize("mode", ["geo", "reference"])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_batches_give_the_labels_in_order(
    world: Any, monkeypatch: pytest.MonkeyPatch, mode: str, batch_size: int | None
) -> None:
    """What a GPU does, done on a CPU: grouped by length, filled up, put back in order."""
    network = network_of(world, mode)
    samples = samples_of(world, 7)
    alone = list(network.label(samples, RECIPE, threads=2))
    if mode == "geo":
        monkeypatch.setattr(network, "_padded", lambda dates: -(-dates // 5) * 5)
    assert agree(list(network._label_in_batches(samples, RECIPE, batch_size)), alone)


def test_a_full_gpu_halves_the_batch_and_goes_on(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(world)
    samples = [samples_of(world, 2)[0]] * 9
    alone = next(network.label(samples[:1], RECIPE, threads=1))
    launch, sizes = network._launch, []

    def launch_at_most_three(batch: list[Sample], recipe: Recipe) -> Any:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return launch(batch, recipe)

    monkeypatch.setattr(network, "_launch", launch_at_most_three)
    labels = list(network._label_in_batches(samples, RECIPE, None))
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert agree(labels, [alone] * 9)


def test_a_gpu_without_room_for_one_window_is_an_error(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(world)

    def launch_never(batch: list[Sample], recipe: Recipe) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(network, "_launch", launch_never)
    with pytest.raises(InputError, match="too little memory even for one"):
        list(network._label_in_batches(samples_of(world, 2)[:1], RECIPE, None))


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
    ids=["assert", "illegal-access", "cudnn", "memory", "shapes"],
)
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
def test_errors_that_poison_the_process_are_told_apart(
    world: Any, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, broken: bool, late: bool
) -> None:
    network = network_of(world)

    def fail(*_: Any) -> Any:
        raise error

    if late:  # what a GPU finds wrong is often told by the next call that waits for it

        class Launched:
            answers = fail

        monkeypatch.setattr(network, "_launch", lambda *_: Launched())
    else:
        monkeypatch.setattr(network, "_launch", fail)
    expected = BrokenDeviceError if broken else type(error)
    with pytest.raises(expected, match=re.escape(str(error))) as caught:
        list(network._label_in_batches(samples_of(world, 2), RECIPE, None))
    assert isinstance(caught.value, BrokenDeviceError) == broken


BREAK_A_GPU = """
import sys
import torch
from stcln_geo.errors import BrokenDeviceError, BrokenDeviceError
from stcln_geo.predict.forward import Network, Recipe

network = Network(torch.nn.Linear(1, 1), device="cuda", precision="float32")
network._padded = lambda dates: dates
def launch(samples, recipe):
    table = torch.zeros(2, device="cuda")
    return table[torch.tensor([99], device="cuda")].cpu()
network._launch = launch
try:
    list(network._label_in_batches([type("One", (), {"dates": [0]})()], Recipe(), None))
except BrokenDeviceError:
    sys.exit(71)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_broke_is_recognised() -> None:
    """In a process of its own, as the device is of no use to it afterwards."""
    assert subprocess.run([sys.executable, "-c", BREAK_A_GPU], check=False).returncode == 71


def test_ties_take_the_lowest_code_and_halves_round_up() -> None:
    logits = torch.full((1, 8, 1, 2), -torch.inf)
    logits[0, [2, 5], 0, 0] = 1.0
    logits[0, :, 0, 1] = 0.0
    made = decide(torch.softmax(logits, 1), ("classes", "confidence"))
    assert made["classes"].tolist() == [[[2, 0]]]
    assert made["confidence"].tolist() == [[[50, 13]]], "12.5 % rounds up"
    assert made["classes"].dtype == made["confidence"].dtype == torch.uint8


def test_low_precision_gives_nearly_the_same_labels(world: Any) -> None:
    samples = samples_of(world, 6)
    exact = list(network_of(world).label(samples, RECIPE, threads=1))
    low = Network(world.make_network(4), device="cpu", precision="bf16")
    rough = list(low.label(samples, RECIPE, threads=1))
    same = np.mean(
        [a.layers["classes"] == b.layers["classes"] for a, b in zip(exact, rough, strict=True)]
    )
    assert same > 0.9


def test_a_network_is_loaded_once_per_process(world: Any) -> None:
    info = read_metadata(world.checkpoint)
    options = {"sha256": info.sha256, "device": "cpu", "precision": "float32"}
    first = load_network(world.checkpoint, **options)
    assert load_network(world.checkpoint, **options) is first


def test_a_checkpoint_changed_since_the_plan_is_refused(world: Any) -> None:
    with pytest.raises(CheckpointError, match="not the file that was planned with"):
        load_network(world.checkpoint, sha256="0" * 64, device="cpu", precision="float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(world: Any) -> None:
    with pytest.raises(InputError, match="--device cpu"):
        load_network(world.checkpoint, sha256="", device="cuda", precision="auto")
