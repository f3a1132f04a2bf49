"""What a training run is about to do, and what it came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InputError
from ..execution import ProgressHook
from ..model.config import PresetName, StclnConfig
from ..model.device import autocast_for, rng_kept
from ..progress import duration_text
from ..storage import Location
from .card import write_model_card
from .config import TrainConfig, to_toml
from .fit import FitOutcome, fit
from .memory import blank_batch, find_batch_size, memory_kept, peak_memory, saved_bytes
from .ranks import Ranks
from .run_directory import RunDirectory
from .sections import DataSection, ModelSection
from .task import TrainingTask
from .trackers import TrackerName

__all__ = [
    "RunResult",
    "TrainingPlan",
    "carry_out",
    "check_shift",
    "choose_batch_size",
    "network_config",
    "rehearse",
]


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
        config = self.config
        epochs = steps * config.global_batch / max(self.chips, 1)
        batch = " x ".join(str(size) for size in self.batch_shape)
        return [
            f"{self.kind} on {self.device}, {self.precision}",
            f"network: {self.parameters:,} parameters, bands {', '.join(self.network.bands)}",
            f"chips: {self.chips} to train on, {self.validation_chips} to judge on",
            f"steps: {steps} ({epochs:.1f} epochs), validation and save every {every}",
            f"chips of a step: {config.rank_batch} x {config.ranks or 1} ranks x "
            f"{config.accumulate} batches = {config.global_batch}",
            f"batch (chips x dates x bands x rows x columns): {batch}",
            f"one step: {self.seconds_per_step:.3f} s; all steps: about {duration_text(self.eta)}",
            f"memory in use: {self.memory / 1e9:.2f} GB",
            *self.notes,
            "options:",
            *(f"  {line}" for line in to_toml(self.config).splitlines()),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run."""

    path: Location
    """Where the run is kept."""
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
    def checkpoint(self) -> Location:
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
    preset = section.preset
    if base is None:
        preset = preset or "base"
        mode = section.mode or "geo"
        config = StclnConfig.preset(preset, bands=bands, classes=classes, mode=mode)
    else:
        sized = base if preset is None else base.resized(preset)
        config = replace(sized, bands=bands, classes=classes)
    wanted = section.model_dump(exclude={"preset", "bands"}, exclude_none=True)
    return replace(config, **wanted), preset


def check_shift(data: DataSection, network: StclnConfig) -> None:
    """Refuse to move the dates of chips where the network does not look at them.

    Raises
    ------
    InputError
        If its positions are indices.
    """
    if data.shift_days and network.positions == "index":
        raise InputError(
            f"Cannot train with data.shift_days={data.shift_days}: the network's positions are the "
            "indices of the dates, so it would change nothing. Set model.positions=days, or leave "
            "shift_days out."
        )


def carry_out(
    task: TrainingTask,
    run: RunDirectory,
    *,
    kind: str,
    resume: bool,
    device: str,
    precision: str,
    checkpoint: Mapping[str, Any],
    notes: tuple[str, ...],
    save_every: float,
    trackers: Sequence[TrackerName],
    progress: ProgressHook | None,
    conclude: Callable[[], Mapping[str, Any]] | None = None,
) -> RunResult:
    """Train, draw the curves and close the run directory; a failure is noted in it.

    Only rank 0 writes.

    Parameters
    ----------
    conclude
        What every rank does after the last step; gives what the run's records shall hold of it.
        What it adds to the task's notes becomes notes of the run.
    """
    if task.ranks.first:
        run.saved()
    try:
        with closing(task.stream):
            outcome = fit(
                task,
                run,
                resume=resume,
                device=device,
                precision=precision,
                checkpoint=checkpoint,
                save_every=save_every,
                trackers=trackers,
                progress=progress,
            )
        concluded = {} if conclude is None else conclude()
        notes = (*notes, *task.notes)
    except Exception as error:
        if task.ranks.first:
            run.update(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    if task.ranks.first:
        _draw_curves(run, monitor=task.monitor)
        run.update(
            status="finished",
            steps=outcome.steps,
            best_step=outcome.best_step,
            monitor=task.monitor,
            best=outcome.best,
            seconds=outcome.seconds,
            stopped_early=outcome.stopped_early,
            notes=[*run.summary().get("notes", []), *task.notes],
            **concluded,
        )
        write_model_card(run)
    return _result(run, kind=kind, outcome=outcome, monitor=task.monitor, notes=notes)


def finished_result(run: RunDirectory, *, kind: str, notes: tuple[str, ...]) -> RunResult:
    """Return the result of a run that was finished before."""
    told = run.summary()
    return RunResult(
        path=run.where,
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


def choose_batch_size(
    config: TrainConfig,
    run: RunDirectory | None,
    make_task: Callable[[], TrainingTask],
    *,
    dates: int,
    chips: int,
    device: str,
    precision: str,
    ranks: Ranks,
) -> int | None:
    """Return what ``batch_size = "auto"`` comes to; None where a number was given.

    A run that was begun keeps the size it was begun with, whatever is free now.

    Parameters
    ----------
    run
        Where the run is written; None for a rehearsal.
    make_task
        Makes a task without streams to try.
    dates
        Most dates of a chip.
    chips
        Training chips.
    """
    if config.batch_size != "auto":
        return None
    # Other nodes need not see the folder.
    earlier = None if run is None else ranks.on_first(lambda: run.settled("batch_size"))
    if isinstance(earlier, int):
        return earlier

    def find() -> int:
        task = make_task().to(device)
        task.compiled = None  # sizes that are only tried are not worth compiling for
        bands = len(task.network.config.bands)

        def attempt(size: int) -> int:
            batch = blank_batch(
                chips=size,
                dates=min(dates, config.data.max_dates or dates),
                bands=bands,
                side=config.data.chip,
                labelled=hasattr(task, "class_weights"),
            ).to(device)
            with autocast_for(precision, device):
                prepared, _ = task.prepare(batch)
                kept = saved_bytes(task.network, lambda: task.error(batch, prepared))
            task.zero_grad()
            return kept

        return find_batch_size(attempt, device=device, chips=chips)

    return ranks.on_first(find)


def rehearse(
    task: TrainingTask,
    *,
    kind: str,
    device: str,
    precision: str,
    notes: tuple[str, ...],
) -> TrainingPlan:
    """Try one batch, forward and backward, and time it; nothing is written."""
    count = task.recipe.accumulate
    with closing(task.stream), closing(task.stream.batches(0, count)) as stream:
        batches = [batch.to(device) for batch in stream]
        task.to(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = 0.0
        # Twice: the first step pays for set-up that no other step pays for.
        with memory_kept(device), autocast_for(precision, device), rng_kept(device):
            for _ in range(2):
                begun = time.perf_counter()
                task.try_step(batches, backward=torch.Tensor.backward)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - begun
                task.zero_grad()
    return TrainingPlan(
        kind=kind,
        config=task.recipe,
        network=task.network.config,
        parameters=sum(
            weight.numel() for weight in task.network.parameters() if weight.requires_grad
        ),
        chips=task.stream.dataset.chips,
        validation_chips=0 if task.validation is None else task.validation.dataset.chips,
        batch_shape=tuple(batches[0].reflectance.shape),
        seconds_per_step=seconds,
        memory=peak_memory(device),
        device=device,
        precision=precision,
        notes=(*notes, *task.notes),
    )


def _result(
    run: RunDirectory, *, kind: str, outcome: FitOutcome, monitor: str, notes: tuple[str, ...]
) -> RunResult:
    return RunResult(
        path=run.where,
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
