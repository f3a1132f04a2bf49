"""What a training run is about to do, and what it came to."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..execution import ProgressHook
from ..model.config import PresetName, StclnConfig
from ..model.device import autocast_for
from .config import ModelSection, TrainConfig, to_toml
from .fit import FitOutcome, fit
from .modules import FinetuneTask, PretrainTask, parameters_of
from .run_directory import RunDirectory

__all__ = ["TRANSDUCTIVE", "RunResult", "TrainingPlan", "carry_out", "network_config", "rehearse"]

TRANSDUCTIVE = (
    "Pre-training on this cube, the bands' mean and deviation, and the network's attention see the "
    "pixels of validation and test fields, never their labels. The figures hold for mapping this "
    "region and season from few labels, not for other regions or seasons."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """A run that was resolved and rehearsed, but not begun."""

    kind: str
    config: TrainConfig
    network: StclnConfig
    parameters: int
    chips: int
    validation_chips: int
    batch_shape: tuple[int, ...]
    """(B, T, C, H, W) of the batch that was tried."""
    seconds_per_step: float
    memory: int
    """Most bytes in use during the trial: of the GPU, or of this process."""
    device: str
    precision: str
    notes: tuple[str, ...]

    @property
    def eta(self) -> float:
        """Seconds that the steps will take, without reading and validation."""
        return self.seconds_per_step * int(self.config.steps or 0)

    def lines(self) -> list[str]:
        """Return the plan as lines of text for people."""
        steps = int(self.config.steps or 0)
        every = int(self.config.validation.every or 1)
        epochs = steps * self.config.batch_size / max(self.chips, 1)
        batch = " x ".join(str(size) for size in self.batch_shape)
        return [
            f"{self.kind} on {self.device}, {self.precision}",
            f"network: {self.parameters:,} parameters, bands {', '.join(self.network.bands)}",
            f"chips: {self.chips} to train on, {self.validation_chips} to judge on",
            f"steps: {steps} ({epochs:.1f} epochs), validation and save every {every}",
            f"batch (chips x dates x bands x rows x columns): {batch}",
            f"one step: {self.seconds_per_step:.3f} s; all steps: about {self.eta:.0f} s",
            f"memory in use: {self.memory / 1e9:.2f} GB",
            *self.notes,
            "options:",
            *(f"  {line}" for line in to_toml(self.config).splitlines()),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    path: Path
    kind: str
    already: bool
    """True where the run was finished before, and nothing was done."""
    steps: int
    best_step: int
    monitor: str
    best: float | None
    """The figure by which best.safetensors was chosen; None where nothing was judged."""
    seconds: float
    stopped_early: bool
    notes: tuple[str, ...]

    @property
    def checkpoint(self) -> Path:
        """The weights to use."""
        return self.path / "checkpoints" / "best.safetensors"


def network_config(
    section: ModelSection, *, bands: tuple[str, ...], classes: int, base: StclnConfig | None = None
) -> tuple[StclnConfig, PresetName | None]:
    """Return the network's recipe and, where it has one, its preset.

    Parameters
    ----------
    base
        Network of the checkpoint begun from; its sizes hold unless a preset is named.
    """
    preset: PresetName | None = section.preset
    if preset is None and base is None:
        preset = "base"
    if preset is not None:
        mode = section.mode or (base.mode if base is not None else "geo")
        config = StclnConfig.preset(preset, bands=bands, classes=classes, mode=mode)
        if base is not None:
            config = replace(config, positions=base.positions)
    else:
        config = replace(base or StclnConfig(bands=bands), bands=bands, classes=classes)
    wanted = section.model_dump(exclude={"preset", "bands"}, exclude_none=True)
    return replace(config, **wanted), preset


def carry_out(
    task: PretrainTask | FinetuneTask,
    run: RunDirectory,
    *,
    kind: str,
    resume: bool,
    device: str,
    precision: str,
    checkpoint: Mapping[str, Any],
    notes: tuple[str, ...],
    progress: ProgressHook | None,
) -> RunResult:
    """Train, draw the curves and close the run directory; a failure is noted in it."""
    try:
        with closing(task.stream):
            outcome = fit(
                task,
                run,
                resume=resume,
                device=device,
                precision=precision,
                checkpoint=checkpoint,
                progress=progress,
            )
    except Exception as error:
        run.update(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    _draw_curves(run, monitor=task.monitor)
    run.update(
        status="finished",
        steps=outcome.steps,
        best_step=outcome.best_step,
        monitor=task.monitor,
        best=outcome.best,
        seconds=outcome.seconds,
        stopped_early=outcome.stopped_early,
    )
    return _result(run, kind=kind, outcome=outcome, monitor=task.monitor, notes=notes)


def finished_result(run: RunDirectory, *, kind: str, notes: tuple[str, ...]) -> RunResult:
    """Return the result of a run that was finished before."""
    told = run.summary()
    return RunResult(
        path=run.path,
        kind=kind,
        already=True,
        steps=told["steps"],
        best_step=told["best_step"],
        monitor=told["monitor"],
        best=told["best"],
        seconds=told["seconds"],
        stopped_early=told["stopped_early"],
        notes=notes,
    )


def rehearse(
    task: PretrainTask | FinetuneTask,
    *,
    kind: str,
    device: str,
    precision: str,
    notes: tuple[str, ...],
) -> TrainingPlan:
    """Try one batch, forward and backward, and time it; nothing is written."""
    with closing(task.stream), closing(task.stream.batches(0, 1)) as batches:
        batch = next(batches).to(device)
        task.to(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = 0.0
        # Twice: the first step pays for set-up that no other step pays for.
        for _ in range(2):
            task.on_train_epoch_start()
            begun = time.perf_counter()
            with autocast_for(precision, device):
                loss = task.training_step(batch, 0)
            loss.backward()
            seconds = time.perf_counter() - begun + 0.0 * float(loss.detach())
            task.zero_grad()
    return TrainingPlan(
        kind=kind,
        config=task.recipe,
        network=task.network.config,
        parameters=parameters_of(task.network),
        chips=task.stream.dataset.chips,
        validation_chips=0 if task.validation is None else task.validation.dataset.chips,
        batch_shape=tuple(batch.reflectance.shape),
        seconds_per_step=seconds,
        memory=_peak_memory(device),
        device=device,
        precision=precision,
        notes=notes,
    )


def _result(
    run: RunDirectory, *, kind: str, outcome: FitOutcome, monitor: str, notes: tuple[str, ...]
) -> RunResult:
    return RunResult(
        path=run.path,
        kind=kind,
        already=False,
        steps=outcome.steps,
        best_step=outcome.best_step,
        monitor=monitor,
        best=outcome.best,
        seconds=outcome.seconds,
        stopped_early=outcome.stopped_early,
        notes=notes,
    )


def _draw_curves(run: RunDirectory, *, monitor: str) -> None:
    from ..report import plots

    records = run.records()
    curves: dict[str, list[tuple[float, float]]] = {
        name: [
            (int(record["step"]), float(record[name]))
            for record in records
            if record.get(name) is not None
        ]
        for name in ("train_loss", monitor)
    }
    drawn = {name: curve for name, curve in curves.items() if curve}
    if drawn:
        plots.plot_curves(drawn, run.curves_file, y_label="loss, share")


def _peak_memory(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
