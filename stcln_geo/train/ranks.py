"""The processes of one run: which one this is, and what they tell one another.

A run on several GPUs (or, on CPUs, in several processes) is one process a device: a rank. Who
started them says so in the environment: ``stcln-geo --devices``, torchrun, or SLURM's srun.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import InputError, StclnGeoError, TaskError

__all__ = [
    "Ranks",
    "find_ranks",
    "join",
    "lost_ranks_told",
    "sum_over_ranks",
]

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=10)
"""After so long without an answer from another rank, a rank gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which of the processes of a run this is."""

    rank: int = 0
    size: int = 1
    """Processes in all, over all nodes."""
    local_rank: int = 0
    """Place on this node, which is also the number of its GPU."""
    local_size: int = 1
    """Processes on this node."""
    address: str = ""
    """Host on which rank 0 listens."""
    port: int = 0

    @property
    def first(self) -> bool:
        """True for the rank that writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.size // self.local_size

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 only; every rank gets its result, or raises its error."""
        if not _joined():
            return work()
        told: list[Any] = [None]
        if self.first:
            try:
                told = [(True, work())]
            except Exception as error:
                told = [(False, error)]
        distributed.broadcast_object_list(told, 0)
        done, result = told[0]
        if not done:
            raise result
        value: T = result
        return value

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, by rank."""
        if not _joined():
            return [value]
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, value)
        return told

    def check_alike(self, told: Mapping[str, Any]) -> None:
        """Check that all ranks were given the same, such as the same pixels.

        Raises
        ------
        InputError
            In every rank, if they were not.
        """
        every = self.gather(dict(told))
        for rank, other in enumerate(every):
            differ = [name for name in every[0] if other.get(name) != every[0][name]]
            if differ:
                raise InputError(
                    f"Cannot train on {self.size} ranks: rank {rank} was given other "
                    f"{' and '.join(differ)} than rank 0. All ranks make one run, with the same "
                    "options, data and checkpoint to begin from. Start the same command "
                    "everywhere, and copy data anew that lies on each machine by itself."
                )


def find_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read who this process is from the environment; without anything there, it is alone.

    Parameters
    ----------
    environment
        By default that of this process.

    Raises
    ------
    InputError
        If what the launcher says contradicts itself.
    """
    found = os.environ if environment is None else environment
    try:
        if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= found.keys():
            size = int(found["WORLD_SIZE"])
            ranks = Ranks(
                rank=int(found["RANK"]),
                size=size,
                local_rank=int(found["LOCAL_RANK"]),
                local_size=int(found.get("LOCAL_WORLD_SIZE", size)),
                address=found["MASTER_ADDR"],
                port=int(found["MASTER_PORT"]),
            )
        elif int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            # Of the job step that srun began; the job's own variables are also set without srun.
            from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

            size = int(found["SLURM_STEP_NUM_TASKS"])
            nodes = found.get("SLURM_STEP_NODELIST") or found["SLURM_NODELIST"]
            ranks = Ranks(
                rank=int(found["SLURM_PROCID"]),
                size=size,
                local_rank=int(found["SLURM_LOCALID"]),
                local_size=size // int(found.get("SLURM_STEP_NUM_NODES", "1")),
                address=SLURMEnvironment.resolve_root_node_address(nodes),
                # The same for all processes of a job, another for other jobs on the node.
                port=int(found.get("MASTER_PORT", 15000 + int(found["SLURM_JOB_ID"]) % 10000)),
            )
        else:
            return Ranks()
    except (KeyError, ValueError) as error:
        raise InputError(
            f"Cannot tell which process of the run this is: {error!r} in the variables of the "
            "launcher. torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, "
            "srun sets SLURM_PROCID and others. Start the command with one of them, or unset "
            "WORLD_SIZE and SLURM_STEP_NUM_TASKS."
        ) from error
    if not (
        0 <= ranks.rank < ranks.size
        and 0 <= ranks.local_rank < ranks.local_size
        and ranks.size % ranks.local_size == 0
    ):
        raise InputError(
            f"Cannot train as rank {ranks.rank} of {ranks.size}, {ranks.local_rank} of "
            f"{ranks.local_size} on this node: each node must have as many processes as the "
            "others. Ask for the same number of tasks on each node."
        )
    return ranks


@contextmanager
def join(ranks: Ranks, *, device: str) -> Iterator[None]:
    """Connect to the other ranks; within another such block, or alone, nothing happens.

    Parameters
    ----------
    device
        ``cpu`` talks by gloo, ``cuda`` by NCCL, on the GPU of the local rank.
    """
    if ranks.size == 1 or _joined():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{ranks.address}:{ranks.port}",
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=_TIMEOUT,
    )
    try:
        with lost_ranks_told(ranks):
            yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def lost_ranks_told(ranks: Ranks) -> Iterator[None]:
    """Turn the error of a connection to a rank that is gone into one that says so.

    Raises
    ------
    TaskError
        In place of what the connection said.
    """
    try:
        yield
    except StclnGeoError:
        raise
    except RuntimeError as error:
        # gloo has no class of its own.
        if ranks.size == 1 or not (
            isinstance(error, distributed.DistError) or "gloo" in str(error)
        ):
            raise
        raise TaskError(
            f"Cannot go on training: rank {ranks.rank} of {ranks.size} lost another rank "
            f"({error}). A run needs all of its ranks. Look for the first error of another rank, "
            "then run the same command again: it goes on from the last save."
        ) from error


class _SumOverRanks(torch.autograd.Function):
    """Add up a tensor over ranks; each rank's share of the gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        """Return the sum."""
        total = values.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Return the sum of the gradients."""
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, elementwise; gradients flow back to all of them."""
    if not _joined():
        return values
    total: Tensor = _SumOverRanks.apply(values)  # type: ignore[no-untyped-call]
    return total


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
