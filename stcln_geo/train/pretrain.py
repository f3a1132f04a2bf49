"""Masked pre-training on any mix of cubes, stacks and archives, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.chips import band_statistics
from ..data.stream import ProblemLog
from ..execution import ProgressHook
from ..model.config import StclnConfig
from ..model.device import Device, choose_device, choose_precision
from ..model.stcln import MaskedPretrainer
from .config import PretrainConfig, settle, to_toml
from .loading import Loading, load_problems, plan_loading
from .modules import PretrainTask, step_seed
from .plan import RunResult, TrainingPlan, carry_out, finished_result, network_config, rehearse
from .run_directory import RunDirectory, describe_environment

__all__ = ["plan_pretrain", "pretrain"]

_DEFAULT_STEPS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A run whose data is known, but not yet read."""

    loading: Loading
    config: PretrainConfig
    network: StclnConfig
    device: str
    precision: str
    notes: tuple[str, ...]


def pretrain(
    cubes: Sequence[str | Path],
    out: str | Path,
    config: PretrainConfig,
    *,
    device: Device = "auto",
    workers: int = 2,
    overwrite: bool = False,
    progress: ProgressHook | None = None,
) -> RunResult:
    """Train a network to fill in hidden observations.

    Called again with the same arguments, an unfinished run goes on from its last checkpoint and
    a finished one is left alone.

    Parameters
    ----------
    cubes
        Cubes, stacks and archives; all their seasons are used, or the one that ``config`` names,
        and the bands that all have, or those that ``config`` names.
    out
        The run directory.
    workers
        Threads that read.
    overwrite
        True begins anew where ``out`` holds another run.
    """
    prepared = _prepare(cubes, config, device=device)
    run = RunDirectory(out)
    loading = prepared.loading
    environment = describe_environment(
        [], device=prepared.device, precision=prepared.precision, labels=False
    )
    environment["cubes"] = loading.describe()
    begun = run.begin(
        kind="pretrain",
        config=to_toml(prepared.config),
        environment=environment,
        identity={"pixels": [cube["fingerprint"] for cube in environment["cubes"]]},
        summary={**loading.summary(), "notes": list(prepared.notes)},
        overwrite=overwrite,
    )
    if begun == "finished":
        return finished_result(run, kind="pretrain", notes=prepared.notes)
    problems = load_problems(run.problems_file, loading)
    result = carry_out(
        _make_task(prepared, workers=workers, measure=begun == "new", problems=problems),
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
                "cubes": environment["cubes"],
                "mask_ratio": prepared.config.masking.mask_ratio,
                "strategy": prepared.config.masking.strategy,
            },
        },
        notes=prepared.notes,
        progress=progress,
    )
    if problems.problems:
        run.update(bad_chunks=sorted(problems.problems))
    return result


def plan_pretrain(
    cubes: Sequence[str | Path],
    config: PretrainConfig,
    *,
    device: Device = "auto",
    workers: int = 2,
) -> TrainingPlan:
    """Resolve a run and try one batch of it, writing nothing."""
    prepared = _prepare(cubes, config, device=device)
    return rehearse(
        _make_task(prepared, workers=workers, measure=True),
        kind="pretrain",
        device=prepared.device,
        precision=prepared.precision,
        notes=prepared.notes,
    )


def _prepare(cubes: Sequence[str | Path], config: PretrainConfig, *, device: Device) -> _Prepared:
    loading = plan_loading(cubes, config)
    bands = loading.corpus.bands
    network, preset = network_config(config.model, bands=bands, classes=0)
    settled = settle(
        config,
        chips=loading.epoch_chips,
        preset=preset,
        default_steps=_DEFAULT_STEPS,
    )
    where = choose_device(device)
    notes = [*loading.notes]
    if config.masking.gate and not {"red", "nir"} <= set(bands):
        notes.append(
            "No vegetation gate: the bands lack red or nir. Observations are hidden on all dates."
        )
    return _Prepared(
        loading=loading,
        config=settled.model_copy(
            update={"model": settled.model.model_copy(update={"bands": bands, "preset": preset})}
        ),
        network=network,
        device=where,
        precision=choose_precision(config.precision, where),
        notes=tuple(notes),
    )


def _make_task(
    prepared: _Prepared, *, workers: int, measure: bool, problems: ProblemLog | None = None
) -> PretrainTask:
    config = prepared.config
    with torch.random.fork_rng():
        torch.manual_seed(step_seed(config.seed, 0))
        network = MaskedPretrainer(prepared.network)
    stream, validation = prepared.loading.streams(
        batch_size=config.batch_size, workers=workers, problems=problems
    )
    if measure:
        statistics = band_statistics(prepared.loading.dataset, seed=config.seed)
        network.encoder.set_normalisation(statistics.mean.tolist(), statistics.std.tolist())
    return PretrainTask(network, config, stream=stream, validation=validation)
