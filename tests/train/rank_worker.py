"""One of two ranks on the CPU: computes a step, walks an epoch and judges; writes what it found.

Run as ``python rank_worker.py CUBE FOLDER`` with the variables of torchrun. With WORLD_SIZE 1 it
does with the whole batch what two ranks do with halves.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stcln_geo.cube.store import open_season
from stcln_geo.data.batch import Batch
from stcln_geo.data.chips import ChipDataset, plan_chips
from stcln_geo.data.stream import OrderedStream, TrainingStream
from stcln_geo.errors import InputError
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.stcln import MaskedPretrainer, Stcln
from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config
from stcln_geo.train.finetune_task import FinetuneTask
from stcln_geo.train.pretrain_task import PretrainTask
from stcln_geo.train.ranks import Ranks, find_ranks, join, sum_over_ranks
from stcln_geo.train.run_lock import run_lock
from stcln_geo.train.task import TrainingTask
from stcln_geo.train.temperature import fitted_on

CHIPS = 6
KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("pretrain", "geo", {}),
    ("finetune", "geo", {}),
    ("finetune", "reference", {}),
    ("finetune", "geo", {"loss.kind": "cross-entropy+dice"}),
)
"""Task, mode, and options of its own."""


def name_of(kind: str, mode: str, options: dict[str, Any]) -> str:
    """How a case is called in what is found."""
    return " ".join([kind, mode, *map(str, options.values())])


def make_task(
    kind: str,
    mode: str,
    options: dict[str, Any],
    *,
    ranks: Ranks,
    validation: OrderedStream,
) -> TrainingTask:
    """A small network whose attention counts.

    In float64: series of zeros, as `reference` has them, magnify rounding in their norm.
    """
    base = {"batch_size": CHIPS // ranks.size, "seed": 3, "model.preset": "tiny"}
    gate = {"masking.gate": False} if kind == "pretrain" else {}
    config = load_config(KINDS[kind], overrides={**base, **gate, **options})
    torch.manual_seed(11)
    recipe = StclnConfig(
        bands=("green", "red", "nir", "swir16"), classes=3, widths=(8, 16), layers=1, heads=2,
        feedforward=32, dropout=0.0, mode=mode,
    )  # fmt: skip
    if kind == "pretrain":
        return PretrainTask(
            MaskedPretrainer(recipe).double(), config, validation=validation, ranks=ranks
        )
    network = Stcln(recipe).double()
    with torch.no_grad():
        network.attention.gate.fill_(0.7)
    return FinetuneTask(
        network, config, validation=validation, class_pixels=[900, 100, 30], ranks=ranks
    )


def batches(dataset: ChipDataset, *, count: int) -> list[Batch]:
    """The first chips of the dataset, in their order, a batch of each size."""
    return list(OrderedStream(dataset, batch_size=count, memory=10**9))


def one_step(task: TrainingTask, batch: Batch) -> dict[str, Any]:
    """Loss and gradients of a step, as all ranks know them in the end."""
    task.train()
    task.try_step([batch], backward=torch.Tensor.backward)
    gradients = {
        name: sum_over_ranks(weight.grad) / task.ranks.size
        for name, weight in task.network.named_parameters()
    }
    kept = {name: tensor.clone() for name, tensor in task.network.named_buffers()}
    return {"loss": task.loss, "gradients": gradients, "buffers": kept, "counted": task.counted}


def judge(task: TrainingTask) -> dict[str, Any]:
    """Figures over all validation chips."""
    task.eval()
    task.on_validation_epoch_start()
    with torch.no_grad():
        for place, batch in enumerate(task.val_dataloader()):
            task.validation_step(batch, place)
    task.on_validation_epoch_end()
    return task.figures


def refusal(run: Path, ranks: Ranks) -> str:
    """What a second command into the run of these ranks would be told."""
    with run_lock(run, ranks):
        try:
            with run_lock(run, ranks):
                return "nothing"
        except InputError as error:
            return str(error)


def main(cube: Path, folder: Path) -> None:
    """Do all of it."""
    torch.set_num_threads(1)
    ranks = find_ranks()
    season = open_season(cube)
    wanted = (season.fields.split >= 0,)
    dataset = ChipDataset([season], plan_chips(season, chip=16), bands=season.bands, wanted=wanted)
    found: dict[str, Any] = {}
    with join(ranks, device="cpu"):
        validation = OrderedStream(
            dataset, batch_size=3, memory=0, rank=ranks.rank, world_size=ranks.size
        )
        whole = batches(dataset, count=CHIPS)[1]
        share = CHIPS // ranks.size
        own = whole.part(ranks.rank * share, (ranks.rank + 1) * share)
        for case in CASES:
            task = make_task(*case, ranks=ranks, validation=validation)
            found[name_of(*case)] = {**one_step(task, own), "figures": judge(task)}
            if isinstance(task, PretrainTask):
                found["drawn"] = [
                    (chip.name, list(chip.dates), torch.from_numpy(chip.made))
                    for chip in task.chips
                ]
        generator = torch.Generator().manual_seed(4)
        logits = 3 * torch.randn(40, 3, generator=generator)
        target = torch.randint(0, 3, (40,), generator=generator)
        mine = slice(ranks.rank * 17, None if ranks.rank == ranks.size - 1 else 17)
        fitted = fitted_on(logits[mine], target[mine])
        found["fitted"] = fitted if isinstance(fitted, str) else asdict(fitted)
        stream = TrainingStream(
            dataset, batch_size=2, seed=3, memory=10**9, rank=ranks.rank, world_size=ranks.size
        )
        steps = dataset.chips // (2 * ranks.size)
        found["steps"] = [batch.samples for batch in stream.batches(0, steps)]
        stream.close()
        found["told"] = ranks.on_first(lambda: ranks.rank)
        found["gathered"] = ranks.gather(ranks.rank)
        found["pid"], found["refusal"] = os.getpid(), refusal(folder / f"run-{ranks.size}", ranks)
    torch.save(found, folder / f"{ranks.rank}-of-{ranks.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
