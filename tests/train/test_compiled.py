"""Training by way of torch.compile: the same steps, and clear words where it cannot be."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from stcln_geo.data.chips import ChipDataset
from stcln_geo.data.stream import OrderedStream
from stcln_geo.errors import InputError, TaskError
from stcln_geo.train.compiled import DATE_BUCKETS
from stcln_geo.train.finetune import finetune

from .test_killed import assert_same_run, finish, kill_at, lines
from .test_steps import gradients, make_task, recipe


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Capture whole graphs, but run them by torch itself: dates of each one that was made."""
    lengths: list[int] = []

    def run(graph: Any, examples: list[torch.Tensor]) -> Any:
        images = next(one for one in examples if one.ndim == 5)
        lengths.append(images.shape[1])
        return graph.forward

    plain = functools.partial(torch.compile, backend=run, fullgraph=True)
    monkeypatch.setattr(torch, "compile", plain)
    torch._dynamo.reset()
    return lengths


@pytest.mark.parametrize(
    ("mode", "recompute"),
    [
        ("geo", False),
        pytest.param("geo", True, marks=pytest.mark.slow),
        pytest.param("reference", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_one_graph_gives_the_steps_of_the_plain_network(
    kind: str, mode: str, recompute: bool, dataset: ChipDataset, captured: list[int]
) -> None:
    batch = next(iter(OrderedStream(dataset, batch_size=5, memory=0)))
    dates = batch.days.shape[1]
    assert dates not in DATE_BUCKETS  # or nothing is filled up

    plain = make_task(kind, mode=mode, recompute=recompute)
    compiled = make_task(kind, mode=mode, recompute=recompute, compile=True)
    expected, found = gradients(plain, [batch]), gradients(compiled, [batch])

    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    for one, other in zip(plain.network.buffers(), compiled.network.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    # Dates that are not there are zeros like any other in `reference` mode.
    longer = min(length for length in DATE_BUCKETS if length >= dates)
    assert captured == [longer if mode == "geo" else dates]


@pytest.mark.slow
def test_lengths_of_a_bucket_share_a_graph(dataset: ChipDataset, captured: list[int]) -> None:
    batch = next(iter(OrderedStream(dataset, batch_size=3, memory=0)))
    task = make_task("finetune", compile=True)

    for dates in (5, 6, 3, 4, 5):
        shorter = type(batch)(
            reflectance=batch.reflectance[:, :dates], valid=batch.valid[:, :dates],
            days=batch.days[:, :dates], target=batch.target,
        )  # fmt: skip
        gradients(task, [shorter])

    assert captured == [8, 4]


def test_the_search_for_bad_chips_runs_plainly(dataset: ChipDataset, captured: list[int]) -> None:
    batch = next(iter(OrderedStream(dataset, batch_size=3, memory=0)))
    task = make_task("finetune", compile=True)
    with torch.no_grad():
        task.network.classifier.weight.fill_(torch.nan)

    with pytest.raises(TaskError, match="loss of step 1 is nan"):
        gradients(task, [batch])

    assert len(captured) == 1
    assert task.compiled is not None


def test_what_cannot_be_compiled_is_said(
    dataset: ChipDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: Any, examples: list[torch.Tensor]) -> Any:
        raise ValueError("no such instruction")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=refuse))
    torch._dynamo.reset()
    batch = next(iter(OrderedStream(dataset, batch_size=2, memory=0)))

    with pytest.raises(TaskError, match=r"(?s)no such instruction.*compile=false"):
        gradients(make_task("finetune", compile=True), [batch])


def test_a_missing_compiler_is_said_before_anything_is_written(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))

    with pytest.raises(InputError, match=r"no C\+\+ compiler here \(looked for .*c\+\+\)"):
        finetune(small_cube, tmp_path / "run", recipe(compile=True, steps=2))

    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_run_is_killed_and_resumed(small_cube: Path, tmp_path: Path) -> None:
    """With the compiler of this machine, dropout and all."""
    compiled = ("--set", "compile=true", "--set", "optimiser.ema=0")
    finish("finetune", small_cube, tmp_path / "whole", *compiled)

    kill_at(11, "finetune", small_cube, tmp_path / "parts", *compiled)
    finish("finetune", small_cube, tmp_path / "parts", *compiled)

    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow(minutes=1.5)
def test_two_compiled_ranks_take_the_steps_of_plain_ones(small_cube: Path, tmp_path: Path) -> None:
    """Without dropout, which draws other places in a compiled step."""
    two = ("--devices", "2", "--set", "model.dropout=0", "--max-dates", "4")  # one length
    finish("finetune", small_cube, tmp_path / "plain", *two)
    finish("finetune", small_cube, tmp_path / "compiled", *two, "--set", "compile=true")

    plain, compiled = (
        [line["loss"] for line in lines(tmp_path / run / "steps.jsonl")]
        for run in ("plain", "compiled")
    )
    assert len(plain) == 30
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert max(plain) - min(plain) > 0.01
