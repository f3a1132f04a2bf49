"""Fine-tuning on the training fields of a cube or stack, from a checkpoint or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..data.source import Source
from ..execution import ProgressHook
from ..legend import Legend
from ..model.device import Device, choose_device
from ..storage import Location
from .config import FinetuneConfig, to_toml
from .evidence import figures_hold_for
from .finetune_setup import count_fields, make_finetune_task, prepare_finetune, say_counts
from .plan import (
    RunResult,
    TrainingPlan,
    carry_out,
    finished_result,
    rehearse,
)
from .provenance import describe_environment, public_cubes
from .ranks import Ranks, find_ranks, join
from .run_directory import RunDirectory
from .run_keeping import kept_run
from .start import check_apart, describe_init
from .temperature import calibrate
from .trackers import TrackerName, check_trackers

__all__ = ["finetune", "plan_finetune"]


def finetune(
    cube: str | Path | Source,
    out: str | Location,
    config: FinetuneConfig,
    *,
    device: Device = "auto",
    workers: int = 2,
    overwrite: bool = False,
    save_every: float = 10.0,
    trackers: Sequence[str] = (),
    progress: ProgressHook | None = None,
    work: str | Path | None = None,
) -> RunResult:
    """Train a classifier on the pixels of training fields; choose weights on validation fields.

    Called again with the same arguments, an unfinished run goes on from its last save and a
    finished one is left alone. In a process that torchrun or srun started, this is one rank of a
    run on several devices.

    Parameters
    ----------
    cube
        A cube or stack with labels and a split; or a source that was opened with one, as
        `open_split` does.
    out
        The run directory, or an address such as ``s3://bucket/runs/x``.
    workers
        Threads that read.
    overwrite
        True begins anew where ``out`` holds another run.
    save_every
        Minutes between two saves within a round; 0 saves after each step.
    trackers
        Where the figures also go: ``tensorboard``, ``wandb``, ``mlflow``.
    work
        For a run in a bucket: the folder below which it is written; see `kept_run`.
    """
    followed, ranks = check_trackers(trackers), find_ranks()
    with (
        join(ranks, device=choose_device(device)),
        kept_run(out, ranks, overwrite=overwrite, work=work) as run,
    ):
        return _finetune(
            cube,
            run,
            config,
            device=device,
            workers=workers,
            overwrite=overwrite,
            save_every=save_every,
            trackers=followed,
            progress=progress,
            ranks=ranks,
        )


def _finetune(
    cube: str | Path | Source,
    run: RunDirectory,
    config: FinetuneConfig,
    *,
    device: Device,
    workers: int,
    overwrite: bool,
    save_every: float,
    trackers: Sequence[TrackerName],
    progress: ProgressHook | None,
    ranks: Ranks,
) -> RunResult:
    prepared = prepare_finetune(
        cube, config, device=device, ranks=ranks, run=None if overwrite else run
    )
    if overwrite:
        check_apart(prepared.init, run.where)
    environment = describe_environment(
        [prepared.source], device=prepared.device, precision=prepared.precision, labels=True
    )
    described = environment["cubes"][0]
    counts = count_fields(prepared)
    identity = {
        "pixels": described["fingerprint"],
        "built": described["built"],
        "labels": described["labels"],
        "init": prepared.init.sha256 if prepared.init is not None else None,
    }
    ranks.check_alike(
        {"options": to_toml(prepared.config), "precision": prepared.precision, **identity}
    )
    begun = ranks.on_first(
        lambda: run.begin(
            kind="finetune",
            config=prepared.config,
            environment=environment,
            # Of all pixels of the labels: rank 0 reads them for all.
            identity={**identity, "label_pixels": prepared.source.label_pixels},
            summary={
                "chips": prepared.dataset.chips,
                "validation_windows": prepared.held_out.chips,
                "global_batch": prepared.config.global_batch,
                "splits": counts,
                "ignored_classes": _names(prepared.classes.ignored),
                "transductive": figures_hold_for(prepared.fields, "validation", "test"),
                "notes": list(prepared.notes),
            },
            overwrite=overwrite,
        )
    )
    if begun == "finished":
        return ranks.on_first(lambda: finished_result(run, kind="finetune", notes=prepared.notes))
    task, report = make_finetune_task(prepared, workers=workers, begin=begun == "new", ranks=ranks)
    notes = (*prepared.notes, *report)
    if begun == "new" and ranks.first:
        run.update(notes=list(notes))
    ignored = prepared.classes.ignored
    return carry_out(
        task,
        run,
        kind="finetune",
        resume=begun == "resume",
        device=prepared.device,
        precision=prepared.precision,
        checkpoint={
            "kind": "classifier",
            "legend": prepared.classes.legend.to_json(),
            "ignored": ignored.to_json() if ignored is not None else None,
            "silent": prepared.classes.silent,
            "chip": prepared.config.data.chip,
            "halo": prepared.config.data.halo,
            "trained_days": prepared.source.day_range,
            "season_start": prepared.source.season[5:],
            "provenance": {
                "stcln_geo": environment["stcln_geo"],
                "trained": "finetune",
                "seed": prepared.config.seed,
                "cubes": public_cubes(environment["cubes"]),
                "init": describe_init(prepared.init),
                "splits": counts,
            },
        },
        notes=notes,
        save_every=save_every,
        trackers=trackers,
        progress=progress,
        conclude=lambda: {
            "calibration": calibrate(
                task,
                run.best_file,
                labelled=counts["validation"]["pixels"],
                device=prepared.device,
                precision=prepared.precision,
            )
        },
    )


def plan_finetune(
    cube: str | Path | Source,
    config: FinetuneConfig,
    *,
    device: Device = "auto",
    workers: int = 2,
    ranks: int = 1,
) -> TrainingPlan:
    """Resolve a run and try one step of it on one device, writing nothing.

    Parameters
    ----------
    ranks
        Devices that the run shall have.
    """
    share = Ranks(size=ranks, local_size=ranks)
    prepared = prepare_finetune(cube, config, device=device, ranks=share, run=None)
    task, report = make_finetune_task(
        prepared, workers=workers, begin=True, ranks=share, alone=True
    )
    return rehearse(
        task,
        kind="finetune",
        device=prepared.device,
        precision=prepared.precision,
        notes=(*prepared.notes, *report, say_counts(prepared)),
    )


def _names(legend: Legend | None) -> list[str]:
    return [] if legend is None else list(legend.names)
