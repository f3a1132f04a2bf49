"""Masked pre-training on any mix of cubes, stacks and archives, from any weights or from none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.stream import ProblemLog
from ..execution import ProgressHook
from ..model.checkpoint import CheckpointInfo, read_metadata
from ..model.config import StclnConfig
from ..model.device import Device, choose_device, choose_precision, rng_kept
from ..model.stcln import MaskedPretrainer
from ..model.transfer import check_sizes
from ..storage import Location
from .compiled import check_compiler
from .config import PretrainConfig, settle, to_toml
from .loading import Loading, load_problems, plan_loading, read_problems
from .masking import check_masking
from .plan import (
    RunResult,
    TrainingPlan,
    carry_out,
    check_shift,
    choose_batch_size,
    finished_result,
    network_config,
    rehearse,
)
from .pretrain_page import write_pretrain_page
from .pretrain_task import PretrainTask
from .provenance import describe_environment, public_cubes
from .ranks import Ranks, find_ranks, join
from .run_directory import RunDirectory
from .run_keeping import kept_run
from .sections import ModelSection
from .start import check_apart, describe_init, give_first_weights, say_differences, say_starts
from .task import step_seed
from .trackers import TrackerName, check_trackers

__all__ = ["plan_pretrain", "pretrain"]

_DEFAULT_STEPS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A run whose data is known, but not yet read."""

    loading: Loading
    config: PretrainConfig
    network: StclnConfig
    init: CheckpointInfo | None
    device: str
    precision: str
    notes: tuple[str, ...]


def pretrain(
    cubes: Sequence[str | Path],
    out: str | Location,
    config: PretrainConfig,
    *,
    device: Device = "auto",
    workers: int = 2,
    overwrite: bool = False,
    save_every: float = 10.0,
    trackers: Sequence[str] = (),
    progress: ProgressHook | None = None,
    work: str | Path | None = None,
) -> RunResult:
    """Train a network to fill in hidden observations.

    Called again with the same arguments, an unfinished run goes on from its last save and a
    finished one is left alone. In a process that torchrun or srun started, this is one rank of a
    run on several devices.

    Parameters
    ----------
    cubes
        Cubes, stacks and archives; all their seasons are used, or the one that ``config`` names,
        and the bands that all have, or those that ``config`` names.
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
        return _pretrain(
            cubes,
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


def _pretrain(
    cubes: Sequence[str | Path],
    run: RunDirectory,
    config: PretrainConfig,
    *,
    device: Device,
    workers: int,
    overwrite: bool,
    save_every: float,
    trackers: Sequence[TrackerName],
    progress: ProgressHook | None,
    ranks: Ranks,
) -> RunResult:
    prepared = _prepare(cubes, config, device=device, ranks=ranks, run=None if overwrite else run)
    if overwrite:
        check_apart(prepared.init, run.where)
    loading = prepared.loading
    environment = describe_environment(
        [], device=prepared.device, precision=prepared.precision, labels=False
    )
    environment["cubes"] = loading.describe()
    identity = {
        "pixels": [cube["fingerprint"] for cube in environment["cubes"]],
        "built": [cube["built"] for cube in environment["cubes"]],
        **loading.identity(),
        # Not told of runs from random weights: those of earlier versions go on.
        **({} if prepared.init is None else {"init": prepared.init.sha256}),
    }
    ranks.check_alike(
        {"options": to_toml(prepared.config), "precision": prepared.precision, **identity}
    )
    begun = ranks.on_first(
        lambda: run.begin(
            kind="pretrain",
            config=prepared.config,
            environment=environment,
            identity=identity,
            summary={
                **loading.summary(),
                "global_batch": prepared.config.global_batch,
                "notes": list(prepared.notes),
            },
            overwrite=overwrite,
        )
    )
    if begun == "finished":
        # A kill may have come between the last step and the page.
        ranks.on_first(lambda: None if run.report_file.is_file() else _report(run))
        return ranks.on_first(lambda: finished_result(run, kind="pretrain", notes=prepared.notes))
    problems = load_problems(run.problems_file, loading)
    task, report = _make_task(
        prepared, workers=workers, begin=begun == "new", ranks=ranks, problems=problems
    )
    notes = (*prepared.notes, *report)
    if begun == "new" and ranks.first:
        run.update(notes=list(notes))
    result = carry_out(
        task,
        run,
        kind="pretrain",
        resume=begun == "resume",
        device=prepared.device,
        precision=prepared.precision,
        checkpoint={
            "kind": "pretrainer",
            "chip": prepared.config.data.chip,
            "halo": prepared.config.data.halo,
            "trained_days": loading.trained_days,
            "season_start": loading.corpus.sources[0].season[5:],
            "provenance": {
                "stcln_geo": environment["stcln_geo"],
                "trained": "pretrain",
                "seed": prepared.config.seed,
                "cubes": public_cubes(environment["cubes"]),
                "init": describe_init(prepared.init),
                "masking": prepared.config.masking.model_dump(mode="json", exclude_none=True),
            },
        },
        notes=notes,
        save_every=save_every,
        trackers=trackers,
        progress=progress,
    )
    ranks.on_first(lambda: _report(run))
    return result


def _report(run: RunDirectory) -> None:
    """Put the damaged chunks that any rank has met, ever, into the summary; write the page."""
    problems = read_problems(run.problems_file)
    if problems:
        run.update(bad_chunks=problems)
    write_pretrain_page(run)


def plan_pretrain(
    cubes: Sequence[str | Path],
    config: PretrainConfig,
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
    prepared = _prepare(cubes, config, device=device, ranks=share, run=None)
    task, report = _make_task(prepared, workers=workers, begin=True, ranks=share, alone=True)
    return rehearse(
        task,
        kind="pretrain",
        device=prepared.device,
        precision=prepared.precision,
        notes=(*prepared.notes, *report),
    )


def _prepare(
    cubes: Sequence[str | Path],
    config: PretrainConfig,
    *,
    device: Device,
    ranks: Ranks,
    run: RunDirectory | None,
) -> _Prepared:
    init = read_metadata(config.init) if config.init is not None else None
    loading = plan_loading(cubes, config, init=init)
    bands = loading.corpus.bands
    said = check_masking(config.masking, bands=bands, chip=config.data.chip)
    network, preset = network_config(
        config.model, bands=bands, classes=0, base=_base(init, config.model)
    )
    check_shift(config.data, network)
    if init is not None:
        check_sizes(init, network)
    where = choose_device(device)
    precision = choose_precision(config.precision, where, width=network.dim)
    if config.compile:
        check_compiler(where)
    settled = settle(
        config,
        chips=loading.epoch_chips,
        # A checkpoint's sizes decide on the learning rate as the preset of these sizes would.
        preset=preset or network.preset_name,
        default_steps=_DEFAULT_STEPS,
        batch_size=choose_batch_size(
            config,
            run,
            lambda: PretrainTask(MaskedPretrainer(network), config),
            dates=loading.most_dates,
            chips=loading.dataset.chips,
            device=where,
            precision=precision,
            ranks=ranks,
        ),
        ranks=ranks.size,
    )
    return _Prepared(
        loading=loading,
        config=settled.model_copy(
            update={"model": settled.model.model_copy(update={"bands": bands, "preset": preset})}
        ),
        network=network,
        init=init,
        device=where,
        precision=precision,
        notes=(
            *loading.notes,
            *said,
            *(say_starts(loading.corpus.sources) if network.positions == "days" else ()),
            *say_differences(loading.corpus.sources[0], init),
        ),
    )


def _base(init: CheckpointInfo | None, section: ModelSection) -> StclnConfig | None:
    """Return the network whose sizes a run takes; mode and positions are the run's own."""
    if init is None:
        return None
    mode = section.mode or "geo"
    return replace(init.config, mode=mode, positions="index" if mode == "reference" else "days")


def _make_task(
    prepared: _Prepared,
    *,
    workers: int,
    begin: bool,
    ranks: Ranks,
    problems: ProblemLog | None = None,
    alone: bool = False,
) -> tuple[PretrainTask, tuple[str, ...]]:
    """Build network and streams; return also what of a checkpoint was carried.

    Parameters
    ----------
    begin
        Give the network its first weights.
    alone
        Make steps without the other ranks.
    """
    config = prepared.config
    with rng_kept(prepared.device):
        torch.manual_seed(step_seed(config.seed, 0))
        network = MaskedPretrainer(prepared.network)
    stream, validation = prepared.loading.streams(
        batch_size=config.rank_batch,
        workers=workers,
        problems=problems,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    report: tuple[str, ...] = ()
    if begin:
        report = give_first_weights(
            network, prepared.init, prepared.loading.dataset, seed=config.seed
        )
    task = PretrainTask(
        network,
        config,
        stream=stream,
        validation=validation,
        ranks=Ranks() if alone else ranks,
    )
    return task, report
