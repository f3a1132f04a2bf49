"""Run a training task to its end, from the beginning or from its last checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from ..execution import ProgressHook
from ..model.device import rng_kept, without_tf32
from .journal import Journal, read_resumable
from .memory import memory_kept
from .ranks import Ranks, lost_ranks_told
from .run_directory import RunDirectory
from .task import TrainingTask, step_seed
from .trackers import TrackerName, Trackers, open_trackers

__all__ = ["FitOutcome", "fit"]

_LIGHTNING_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "float32": "32-true",
    "bf16": "bf16-mixed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOutcome:
    """What a run came to."""

    steps: int
    """Steps done."""
    best_step: int
    """Step of the weights in best.safetensors."""
    best: float | None
    """The figure they were chosen by; None where nothing was judged."""
    seconds: float
    """Time spent, over all resumptions."""
    stopped_early: bool


def fit(
    task: TrainingTask,
    run: RunDirectory,
    *,
    resume: bool,
    device: str,
    precision: str,
    checkpoint: Mapping[str, Any],
    save_every: float = 10.0,
    trackers: Sequence[TrackerName] = (),
    progress: ProgressHook | None = None,
) -> FitOutcome:
    """Train until the last step, or until the figures stop improving.

    Parameters
    ----------
    resume
        True goes on from the run's last save.
    checkpoint
        What `save_checkpoint` is told besides the network: legend, chip, provenance and so on.
    save_every
        Minutes between two saves within a round; 0 saves after each step.
    trackers
        Where the figures also go.

    Raises
    ------
    TaskError
        If the loss is no number, memory runs out, or another rank of the run is gone.
    """
    ranks = task.ranks
    saved = ranks.on_first(lambda: read_resumable(run.resume_file)) if resume else None
    if saved is not None:
        task.resume(saved["task"])
    opened = Trackers()
    if ranks.first:
        if saved is not None:
            run.forget_after(task.step)
        opened = open_trackers(trackers, run, step=task.step, config=task.recipe)
    journal = Journal(
        run, checkpoint=checkpoint, trackers=opened, save_every=save_every, progress=progress
    )
    if saved is not None:
        journal.resume(saved["journal"])
    done = False
    try:
        if not journal.is_done(task):
            _train(task, run, journal, device=device, precision=precision)
        done = True
    finally:
        opened.end(failed=not done)
    state = journal.state
    return FitOutcome(
        steps=task.step,
        best_step=state.best_step,
        best=state.best,
        seconds=round(state.seconds, 3),
        stopped_early=task.step < task.steps,
    )


def _train(
    task: TrainingTask, run: RunDirectory, journal: Journal, *, device: str, precision: str
) -> None:
    ranks, recipe = task.ranks, task.recipe
    strategy: Any = "auto"
    if ranks.size > 1:
        strategy = DDPStrategy(
            cluster_environment=_RankEnvironment(ranks),
            process_group_backend="nccl" if device == "cuda" else "gloo",
            # Statistics are those of all ranks, so buffers agree without being sent.
            broadcast_buffers=False,
        )
    repeatable = _deterministic(recipe.deterministic)
    with (
        _quiet(),
        without_tf32(),
        repeatable,
        memory_kept(device),
        rng_kept(device),
    ):
        torch.manual_seed(step_seed(recipe.seed, 0))
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=ranks.local_size,
            num_nodes=ranks.nodes,
            strategy=strategy,
            # Else Lightning looks for a cluster: in a job of SLURM it would take signals.
            plugins=None if ranks.size > 1 else [_RankEnvironment(ranks)],
            precision=_LIGHTNING_PRECISION[precision],
            max_epochs=task.rounds,
            limit_val_batches=None if task.validation is not None else 0,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[journal],
            default_root_dir=run.path,
        )
        with lost_ranks_told(ranks), _keyboard_interrupt(trainer):
            trainer.fit(task)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Allow only operations that repeat bit for bit, where that is wanted; afterwards as before."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS repeats itself with workspaces of a fixed size only; read when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def _keyboard_interrupt(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C through as KeyboardInterrupt, where Lightning exits and goes deaf to it.

    Whoever listens to SIGTERM hears it after Lightning, which ends between two steps, has saved.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    if in_main and callable(handlers[signal.SIGTERM]):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from error
    finally:
        if in_main:
            for one, handler in handlers.items():
                signal.signal(one, handler)
            if trainer.received_sigterm and callable(handlers[signal.SIGTERM]):
                signal.raise_signal(signal.SIGTERM)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's banners, and its advice on loaders and folders that are not used."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*You defined a `validation_step` but have no `val_dataloader`.*",
            ".*could not find the monitored key.*",
            # What is frozen.
            ".*module\\(s\\) in eval mode at the start of training.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
            ".*`broadcast_buffers` is deprecated.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _RankEnvironment(ClusterEnvironment):
    """Tell Lightning what `Ranks` knows; the processes were started by others."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._ranks.address

    @property
    def main_port(self) -> int:
        return self._ranks.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._ranks.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self._ranks.local_rank

    def node_rank(self) -> int:
        return self._ranks.rank // self._ranks.local_size
