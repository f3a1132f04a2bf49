"""Masked pre-training on one or more cubes, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..cube.store import Season, choose_season, list_seasons, open_season
from ..data.chips import ChipDataset, ChipUnit, band_statistics, plan_chips
from ..data.reader import band_indices
from ..data.stream import Augmentation, OrderedStream, TrainingStream
from ..errors import InputError
from ..execution import ProgressHook
from ..model.config import StclnConfig
from ..model.device import Device, choose_device, choose_precision
from ..model.stcln import MaskedPretrainer
from .config import PretrainConfig, settle, to_toml
from .modules import PretrainTask
from .plan import (
    RunResult,
    TrainingPlan,
    carry_out,
    choose_batch_size,
    finished_result,
    network_config,
    rehearse,
)
from .ranks import Ranks, find_ranks, join
from .run_directory import RunDirectory, describe_environment
from .task import step_seed
from .trackers import TrackerName, check_trackers

__all__ = ["plan_pretrain", "pretrain"]

_DEFAULT_STEPS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A run whose data is known, but not yet read."""

    seasons: tuple[Season, ...]
    config: PretrainConfig
    network: StclnConfig
    dataset: ChipDataset
    held_out: ChipDataset
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
    save_every: float = 10.0,
    trackers: Sequence[str] = (),
    progress: ProgressHook | None = None,
) -> RunResult:
    """Train a network to fill in hidden observations.

    Called again with the same arguments, an unfinished run goes on from its last save and a
    finished one is left alone. In a process that torchrun or srun started, this is one rank of a
    run on several devices.

    Parameters
    ----------
    cubes
        Cubes with the same bands; all their seasons are used, or the one that ``config`` names.
    out
        The run directory.
    workers
        Threads that read.
    overwrite
        True begins anew where ``out`` holds another run.
    save_every
        Minutes between two saves within a round; 0 saves after each step.
    trackers
        Where the figures also go: ``tensorboard``, ``wandb``, ``mlflow``.
    """
    followed, ranks = check_trackers(trackers), find_ranks()
    with join(ranks, device=choose_device(device)):
        return _pretrain(
            cubes,
            RunDirectory(out),
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
    environment = describe_environment(
        list(prepared.seasons), device=prepared.device, precision=prepared.precision, labels=False
    )
    begun = ranks.on_first(
        lambda: run.begin(
            kind="pretrain",
            config=to_toml(prepared.config),
            environment=environment,
            identity={"pixels": [cube["fingerprint"] for cube in environment["cubes"]]},
            summary={
                "chips": prepared.dataset.chips,
                "validation_chips": prepared.held_out.chips,
                "global_batch": prepared.config.global_batch,
                "notes": list(prepared.notes),
            },
            overwrite=overwrite,
        )
    )
    if begun == "finished":
        return ranks.on_first(lambda: finished_result(run, kind="pretrain", notes=prepared.notes))
    days = np.concatenate([season.days for season in prepared.seasons])
    return carry_out(
        _make_task(prepared, workers=workers, measure=begun == "new", ranks=ranks),
        run,
        kind="pretrain",
        resume=begun == "resume",
        device=prepared.device,
        precision=prepared.precision,
        checkpoint={
            "kind": "pretrainer",
            "chip": prepared.config.data.chip,
            "halo": prepared.config.data.halo,
            "trained_days": (int(days.min()), int(days.max())),
            "season_start": _season_start(prepared.seasons),
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
        save_every=save_every,
        trackers=trackers,
        progress=progress,
    )


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
    return rehearse(
        _make_task(prepared, workers=workers, measure=True, ranks=share, alone=True),
        kind="pretrain",
        device=prepared.device,
        precision=prepared.precision,
        notes=prepared.notes,
    )


def _prepare(
    cubes: Sequence[str | Path],
    config: PretrainConfig,
    *,
    device: Device,
    ranks: Ranks,
    run: RunDirectory | None,
) -> _Prepared:
    if not cubes:
        raise InputError("Cannot pre-train without a cube: name at least one. Build it first.")
    seasons = _open_all(cubes, config.season)
    bands = config.model.bands or seasons[0].bands
    for season in seasons:
        band_indices(season, bands, wanted_by="pre-training")
    network, preset = network_config(config.model, bands=bands, classes=0)
    units = [
        unit
        for index, season in enumerate(seasons)
        for unit in plan_chips(season, chip=config.data.chip, index=index)
    ]
    trained, held_out = hold_out(units, most=config.validation.chips, seed=config.seed)
    where = choose_device(device)
    precision = choose_precision(config.precision, where)
    chips = sum(len(unit.chips) for unit in trained)
    settled = settle(
        config,
        chips=chips,
        preset=preset,
        default_steps=_DEFAULT_STEPS,
        batch_size=choose_batch_size(
            config,
            run,
            lambda: PretrainTask(MaskedPretrainer(network), config),
            dates=max(len(season.time) for season in seasons),
            chips=chips,
            device=where,
            precision=precision,
            ranks=ranks,
        ),
        ranks=ranks.size,
    )
    notes = []
    if config.masking.gate and not {"red", "nir"} <= set(bands):
        notes.append(
            "No vegetation gate: the bands lack red or nir. Observations are hidden on all dates."
        )
    return _Prepared(
        seasons=seasons,
        config=settled.model_copy(
            update={"model": settled.model.model_copy(update={"bands": bands, "preset": preset})}
        ),
        network=network,
        dataset=ChipDataset(seasons, trained, bands=bands),
        held_out=ChipDataset(seasons, held_out, bands=bands),
        device=where,
        precision=precision,
        notes=tuple(notes),
    )


def hold_out(
    units: Sequence[ChipUnit], *, most: int, seed: int
) -> tuple[list[ChipUnit], list[ChipUnit]]:
    """Take chips out of training to judge on: at most ``most``, and an eighth of all.

    Returns
    -------
    Units to train on and units to judge on; each chip is in one of them.
    """
    places = [(unit, chip) for unit, plan in enumerate(units) for chip in range(len(plan.chips))]
    count = min(most, len(places) // 8)
    order = np.random.default_rng([seed, 0x48]).permutation(len(places))
    chosen = {places[place] for place in order[:count]}
    parts: tuple[list[ChipUnit], list[ChipUnit]] = ([], [])
    for number, plan in enumerate(units):
        for part, held in zip(parts, (False, True), strict=True):
            chips = tuple(
                window
                for chip, window in enumerate(plan.chips)
                if ((number, chip) in chosen) == held
            )
            if chips:
                whole = chips[0]
                for window in chips[1:]:
                    whole = whole.union(window)
                part.append(ChipUnit(season=plan.season, window=whole, chips=chips))
    return parts


def _make_task(
    prepared: _Prepared, *, workers: int, measure: bool, ranks: Ranks, alone: bool = False
) -> PretrainTask:
    """Build network and streams; ``alone`` makes steps without the other ranks."""
    config = prepared.config
    with torch.random.fork_rng():
        torch.manual_seed(step_seed(config.seed, 0))
        network = MaskedPretrainer(prepared.network)
    stream = TrainingStream(
        prepared.dataset,
        batch_size=config.rank_batch,
        seed=config.seed,
        memory=config.data.memory,
        threads=workers,
        augmentation=Augmentation(
            max_dates=config.data.max_dates or None, dihedral=config.data.augment
        ),
        rank=ranks.rank,
        world_size=ranks.size,
    )
    if measure:
        statistics = band_statistics(prepared.dataset, seed=config.seed)
        network.encoder.set_normalisation(statistics.mean.tolist(), statistics.std.tolist())
    validation = None
    if prepared.held_out.chips:
        validation = OrderedStream(
            prepared.held_out,
            batch_size=config.rank_batch,
            memory=config.data.memory // 4,
            threads=workers,
            rank=ranks.rank,
            world_size=ranks.size,
        )
    return PretrainTask(
        network,
        config,
        stream=stream,
        validation=validation,
        ranks=Ranks() if alone else ranks,
    )


def _open_all(cubes: Sequence[str | Path], season: str | None) -> tuple[Season, ...]:
    opened = []
    for cube in cubes:
        names = [choose_season(cube, season)] if season is not None else list_seasons(cube)
        opened += [open_season(cube, name) for name in names or [choose_season(cube, None)]]
    return tuple(opened)


def _season_start(seasons: tuple[Season, ...]) -> str:
    return seasons[0].name[5:]
