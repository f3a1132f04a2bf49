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
from .modules import PretrainTask, step_seed
from .plan import RunResult, TrainingPlan, carry_out, finished_result, network_config, rehearse
from .run_directory import RunDirectory, describe_environment

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
    progress: ProgressHook | None = None,
) -> RunResult:
    """Train a network to fill in hidden observations.

    Called again with the same arguments, an unfinished run goes on from its last checkpoint and
    a finished one is left alone.

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
    """
    prepared = _prepare(cubes, config, device=device)
    run = RunDirectory(out)
    environment = describe_environment(
        list(prepared.seasons), device=prepared.device, precision=prepared.precision, labels=False
    )
    begun = run.begin(
        kind="pretrain",
        config=to_toml(prepared.config),
        environment=environment,
        identity={"pixels": [cube["fingerprint"] for cube in environment["cubes"]]},
        summary={
            "chips": prepared.dataset.chips,
            "validation_chips": prepared.held_out.chips,
            "notes": list(prepared.notes),
        },
        overwrite=overwrite,
    )
    if begun == "finished":
        return finished_result(run, kind="pretrain", notes=prepared.notes)
    days = np.concatenate([season.days for season in prepared.seasons])
    return carry_out(
        _make_task(prepared, workers=workers, measure=begun == "new"),
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
        progress=progress,
    )


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
    settled = settle(
        config,
        chips=sum(len(unit.chips) for unit in trained),
        preset=preset,
        default_steps=_DEFAULT_STEPS,
    )
    where = choose_device(device)
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
        precision=choose_precision(config.precision, where),
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


def _make_task(prepared: _Prepared, *, workers: int, measure: bool) -> PretrainTask:
    config = prepared.config
    with torch.random.fork_rng():
        torch.manual_seed(step_seed(config.seed, 0))
        network = MaskedPretrainer(prepared.network)
    stream = TrainingStream(
        prepared.dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        memory=config.data.memory,
        threads=workers,
        augmentation=Augmentation(
            max_dates=config.data.max_dates or None, dihedral=config.data.augment
        ),
    )
    if measure:
        statistics = band_statistics(prepared.dataset, seed=config.seed)
        network.encoder.set_normalisation(statistics.mean.tolist(), statistics.std.tolist())
    validation = None
    if prepared.held_out.chips:
        validation = OrderedStream(
            prepared.held_out,
            batch_size=config.batch_size,
            memory=config.data.memory // 4,
            threads=workers,
        )
    return PretrainTask(network, config, stream=stream, validation=validation)


def _open_all(cubes: Sequence[str | Path], season: str | None) -> tuple[Season, ...]:
    opened = []
    for cube in cubes:
        names = [choose_season(cube, season)] if season is not None else list_seasons(cube)
        opened += [open_season(cube, name) for name in names or [choose_season(cube, None)]]
    return tuple(opened)


def _season_start(seasons: tuple[Season, ...]) -> str:
    return seasons[0].name[5:]
