"""Run a training task to its end, from the beginning or from its last checkpoint."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..data.batch import Batch
from ..errors import CheckpointError
from ..execution import ProgressHook
from ..model.checkpoint import save_checkpoint
from .modules import FinetuneTask, PretrainTask, step_seed
from .run_directory import RunDirectory

__all__ = ["FitOutcome", "fit"]

_LIGHTNING_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "float32": "32-true",
    "bf16": "bf16-mixed",
}
_SHOW_LOSS_EVERY = 10


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
    task: PretrainTask | FinetuneTask,
    run: RunDirectory,
    *,
    resume: bool,
    device: str,
    precision: str,
    checkpoint: Mapping[str, Any],
    progress: ProgressHook | None = None,
) -> FitOutcome:
    """Train until the last step, or until the figures stop improving.

    Parameters
    ----------
    resume
        True goes on from the run's last checkpoint.
    checkpoint
        What `save_checkpoint` is told besides the network: legend, chip, provenance and so on.
    """
    journal = _Journal(run, checkpoint=checkpoint, progress=progress)
    if resume:
        journal.load_state_dict(_resume_state(run.resume_file))
        run.forget_after(journal.state.step)
    if not journal.is_done(task):
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(step_seed(task.recipe.seed, 0))
            trainer = Trainer(
                accelerator="gpu" if device == "cuda" else "cpu",
                devices=1,
                precision=_LIGHTNING_PRECISION[precision],
                max_epochs=task.rounds,
                gradient_clip_val=task.recipe.optimiser.clip or None,
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
            with _keyboard_interrupt(trainer):
                trainer.fit(task, ckpt_path=run.resume_file if resume else None, weights_only=True)
    state = journal.state
    return FitOutcome(
        steps=state.step,
        best_step=state.best_step,
        best=state.best,
        seconds=round(state.seconds, 3),
        stopped_early=state.step < task.steps,
    )


@dataclass(slots=True)
class _State:
    """What the journal remembers over a resumption."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Tally:
    """What is summed up over a round."""

    begun: float = field(default_factory=time.perf_counter)
    losses: torch.Tensor | None = None
    samples: int = 0
    steps: int = 0
    waited: float = 0.0


class _Journal(Callback):
    """Log each round, keep the best weights, save what a resumption needs, stop when stale.

    The order of writing matters: weights and figures first, ``last.ckpt`` last. A kill between
    them repeats the round, with the same result.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        checkpoint: Mapping[str, Any],
        progress: ProgressHook | None,
    ) -> None:
        self.state = _State()
        self._run = run
        self._checkpoint = dict(checkpoint)
        self._progress = progress
        self._tally = _Tally()
        self._shown = ""

    @property
    def state_key(self) -> str:
        """Name the entry in last.ckpt."""
        return "journal"

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for last.ckpt."""
        state = self.state
        return {name: getattr(state, name) for name in _State.__slots__}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what an earlier process remembered."""
        self.state = _State(**state_dict)

    def is_done(self, task: PretrainTask | FinetuneTask) -> bool:
        """Return True where no further step is to be made."""
        patience = task.recipe.validation.patience
        stale = patience > 0 and self.state.stale >= patience
        return self.state.step >= task.steps or stale

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a round."""
        task: Any = pl_module
        self._tally = _Tally(waited=task.stream.waited)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Sum up the loss without waiting for the device."""
        task: Any = pl_module
        tally = self._tally
        loss = outputs["loss"].detach().float()
        tally.losses = loss if tally.losses is None else tally.losses + loss
        tally.samples += len(batch)
        tally.steps += 1
        step = int(trainer.global_step)
        if self._progress is not None:
            # Reading the loss waits for the device: now and then only.
            if step % _SHOW_LOSS_EVERY == 0 or step == task.steps or not self._shown:
                self._shown = f"loss {float(loss):.4f}"
            self._progress(step, task.steps, self._shown)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, save, compare, and stop if it is time."""
        task: Any = pl_module
        state, tally = self.state, self._tally
        elapsed = time.perf_counter() - tally.begun
        loss = float(tally.losses) / tally.steps if tally.losses is not None else math.nan
        step = int(trainer.global_step)
        if not math.isfinite(loss):
            raise CheckpointError(
                f"Cannot go on training: the loss is {loss} at step {step}. Weights that are no "
                "numbers never recover. Begin anew (--overwrite) with a lower learning rate, "
                "--set optimiser.learning_rate=..."
            )
        state.step = step
        state.seconds += elapsed
        figure = task.figures.get(task.monitor)
        # Where nothing could be judged so far, the last weights are the best known.
        improved = state.best is None or (
            figure is not None
            and (figure > state.best if task.larger_is_better else figure < state.best)
        )
        if improved:
            state.best, state.best_step, state.stale = figure, step, 0
            self._save(task, self._run.best_file, step, figure)
        else:
            state.stale += 1
        self._save(task, self._run.last_file, step, figure)
        self._run.log(
            {
                "step": step,
                "train_loss": loss,
                **task.figures,
                **task.end_round(),
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                "samples_per_second": round(tally.samples / elapsed, 3),
                "data_wait": round((task.stream.waited - tally.waited) / elapsed, 4),
                "seconds": round(state.seconds, 3),
            }
        )
        self._save_resumable(trainer)
        if self.is_done(task):
            trainer.should_stop = True

    def _save(self, task: Any, path: Path, step: int, figure: float | None) -> None:
        told = {
            **self._checkpoint,
            "provenance": {
                **self._checkpoint["provenance"],
                "step": step,
                task.monitor: figure,
            },
        }
        save_checkpoint(path, task.network, **told)

    def _save_resumable(self, trainer: Trainer) -> None:
        temporary = self._run.resume_file.with_name(f".last.{os.getpid()}.ckpt")
        trainer.save_checkpoint(temporary, weights_only=False)
        temporary.replace(self._run.resume_file)


def _resume_state(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state: dict[str, Any] = loaded["callbacks"]["journal"]
    except Exception as error:
        raise CheckpointError(
            f"Cannot resume from {path}: {type(error).__name__}: {error}. The file must be the "
            "last.ckpt that this version wrote. Begin anew with --overwrite."
        ) from error
    return state


@contextmanager
def _keyboard_interrupt(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C through as KeyboardInterrupt, where Lightning exits and goes deaf to it."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from error
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)


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
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
