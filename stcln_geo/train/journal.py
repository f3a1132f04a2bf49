"""The journal of a run: its loss trace, its figures, its weights, and what a resumption needs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..data.batch import Batch
from ..errors import CheckpointError
from ..execution import ProgressHook
from ..model.checkpoint import save_checkpoint
from .run_directory import RunDirectory, cannot_write
from .task import TrainingTask
from .trackers import Trackers

__all__ = ["Journal", "read_resumable"]

_FORMAT = 2
"""Version of last.ckpt."""
_FLUSH_EVERY = 10


@dataclass(slots=True)
class _State:
    """What the journal remembers over a resumption."""

    best: float | None = None
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Of the round so far."""


@dataclass(slots=True)
class _Tally:
    """What is timed, since the round began or was taken up again."""

    begun: float = field(default_factory=time.perf_counter)
    samples: int = 0
    waited: float = 0.0


class Journal(Callback):
    """Log steps and rounds, keep the best weights, save what a resumption needs, stop when stale.

    All ranks keep it, as all must know when to stop; rank 0 writes. The order of writing matters:
    logs and weights first, ``last.ckpt`` last. A kill between them repeats what came since the
    last save, with the same result.

    Parameters
    ----------
    checkpoint
        What `save_checkpoint` is told besides the network.
    save_every
        Minutes after which a save comes due within a round; each round saves at its end.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        checkpoint: Mapping[str, Any],
        trackers: Trackers,
        save_every: float,
        progress: ProgressHook | None,
    ) -> None:
        self.state = _State()
        self._run = run
        self._checkpoint = dict(checkpoint)
        self._trackers = trackers
        self._save_every = 60 * save_every
        self._progress = progress
        self._tally = _Tally()
        self._trace: list[dict[str, float]] = []
        self._counted_from = self._saved_at = time.perf_counter()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what an earlier process remembered."""
        self.state = _State(**state)

    def is_done(self, task: TrainingTask) -> bool:
        """Return True where no further step is to be made."""
        patience = task.recipe.validation.patience
        stale = patience > 0 and self.state.stale >= patience
        return task.step >= task.steps or stale

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the time."""
        task = cast(TrainingTask, pl_module)
        self._counted_from = self._saved_at = time.perf_counter()
        if self._progress is not None:
            slow = "compiling the network: the first step is slow"
            self._progress(task.step, task.steps, "starting" if task.compiled is None else slow)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a round, or go on with one."""
        task = cast(TrainingTask, pl_module)
        self._tally = _Tally(waited=task.stream.waited)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sequence[Batch],
        batch_idx: int,
    ) -> None:
        """Note the loss of a step; save if it is time."""
        task = cast(TrainingTask, pl_module)
        self.state.losses.append(task.loss)
        self._tally.samples += sum(len(part) for part in batch) * task.ranks.size
        if not task.ranks.first:
            return
        self._trace.append({"step": task.step, "loss": task.loss, "learning_rate": task.rate})
        if len(self._trace) >= _FLUSH_EVERY:
            self._flush()
        due = time.perf_counter() - self._saved_at >= self._save_every
        if due and not task.ends_round(task.step):
            self._save_resumable(task)
        if self._progress is not None:
            self._progress(task.step, task.steps, f"loss {task.loss:.4f}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, save, compare, and stop if it is time."""
        task = cast(TrainingTask, pl_module)
        state, tally = self.state, self._tally
        elapsed = time.perf_counter() - tally.begun
        figure = task.figures.get(task.monitor)
        # Where nothing could be judged so far, the last weights are the best known.
        improved = state.best is None or (
            figure is not None
            and (figure > state.best if task.larger_is_better else figure < state.best)
        )
        if improved:
            state.best, state.best_step, state.stale = figure, task.step, 0
        else:
            state.stale += 1
        record = {
            "step": task.step,
            "train_loss": math.fsum(state.losses) / len(state.losses),
            **task.figures,
            **task.end_round(),
            "learning_rate": task.rate,
            "samples_per_second": round(tally.samples / elapsed, 3),
            "data_wait": round((task.stream.waited - tally.waited) / elapsed, 4),
        }
        state.losses, task.counted = [], []
        if task.ranks.first:
            if improved:
                self._save(task, self._run.best_file, figure)
                task.write_best(self._run)
            self._save(task, self._run.last_file, figure)
            record["seconds"] = round(self._count_seconds(), 3)
            self._run.log(record)
            self._trackers.log(record)
            self._save_resumable(task)
        if self.is_done(task):
            trainer.should_stop = True

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save before the command ends where it was told to (SIGTERM), as by SLURM at its limit.

        Lightning then ends between two steps. Not where a round ends: its figures are not known.
        """
        task = cast(TrainingTask, pl_module)
        told = isinstance(exception, SIGTERMException)
        if told and task.ranks.first and not task.ends_round(task.step):
            self._save_resumable(task)

    def _count_seconds(self) -> float:
        """Add the time since the last count to that of the run; return it."""
        now = time.perf_counter()
        self.state.seconds += now - self._counted_from
        self._counted_from = now
        return self.state.seconds

    def _flush(self) -> None:
        self._run.log_steps(self._trace)
        self._trackers.log_steps(self._trace)
        self._trace = []

    def _save(self, task: TrainingTask, path: Path, figure: float | None) -> None:
        told = {
            **self._checkpoint,
            "provenance": {
                **self._checkpoint["provenance"],
                "step": task.step,
                task.monitor: figure,
            },
        }
        save_checkpoint(path, task.judged, **told)

    def _save_resumable(self, task: TrainingTask) -> None:
        self._flush()
        self._count_seconds()
        journal = {item.name: getattr(self.state, item.name) for item in fields(self.state)}
        state = {"format": _FORMAT, "journal": journal, "task": task.resumable()}
        if task.notes:
            self._run.update(notes=[*self._run.summary().get("notes", []), *task.notes])
            task.notes = []
        # One name, as one process writes: what a kill leaves is written over by the next save.
        temporary = self._run.resume_file.with_name(".last.ckpt.part")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(state, file)
                # On disk before it takes the place of the earlier one, also when the power goes.
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._run.resume_file)
        except (OSError, RuntimeError) as error:
            # Of a full disk torch tells where in the file it was, after the system said why.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise cannot_write(self._run.resume_file, cause) from error
        finally:
            # Else what was written of it takes the room that is lacking.
            temporary.unlink(missing_ok=True)
        self._run.saved()
        self._saved_at = time.perf_counter()


def read_resumable(path: Path) -> dict[str, Any]:
    """Read last.ckpt onto the CPU: ``journal`` and ``task``.

    Raises
    ------
    CheckpointError
        If it cannot be read, or another version wrote it.
    """
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if loaded["format"] != _FORMAT:
            raise ValueError(f"format {loaded['format']}, and this version reads {_FORMAT}")
    except Exception as error:
        raise CheckpointError(
            f"Cannot resume from {path}: {type(error).__name__}: {error}. The file must be the "
            "last.ckpt that this version wrote. Begin anew with --overwrite."
        ) from error
    return loaded
