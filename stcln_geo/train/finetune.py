"""Fine-tuning on the training fields of a cube, from a checkpoint or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cube.contract import SPLITS
from ..cube.store import FieldTable, Season, open_season
from ..data.chips import ChipDataset, band_statistics, plan_labelled_chips, plan_windows
from ..data.split import check_labelled, few_label_fields
from ..data.stream import OrderedStream, TrainingStream
from ..errors import LabelError
from ..execution import ProgressHook
from ..grid import Lattice
from ..legend import Legend
from ..model.checkpoint import CheckpointInfo, read_metadata
from ..model.config import StclnConfig
from ..model.device import Device, choose_device, choose_precision
from ..model.stcln import Stcln
from ..model.transfer import load_encoder_into
from .classes import ClassChoice, choose_classes
from .config import FinetuneConfig, settle, to_toml
from .finetune_task import FinetuneTask, make_lookup
from .plan import (
    TRANSDUCTIVE,
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
from .run_lock import run_lock
from .start import check_freeze, choose_bands
from .task import step_seed
from .temperature import calibrate
from .trackers import TrackerName, check_trackers

__all__ = ["finetune", "plan_finetune"]

_DEFAULT_STEPS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A run whose data is known, but not yet read."""

    season: Season
    fields: FieldTable
    classes: ClassChoice
    config: FinetuneConfig
    network: StclnConfig
    init: CheckpointInfo | None
    chosen: np.ndarray
    """(F,) bool: fields to train on."""
    dataset: ChipDataset
    held_out: ChipDataset
    device: str
    precision: str
    notes: tuple[str, ...]


def finetune(
    cube: str | Path,
    out: str | Path,
    config: FinetuneConfig,
    *,
    device: Device = "auto",
    workers: int = 2,
    overwrite: bool = False,
    save_every: float = 10.0,
    trackers: Sequence[str] = (),
    progress: ProgressHook | None = None,
) -> RunResult:
    """Train a classifier on the pixels of training fields; choose weights on validation fields.

    Called again with the same arguments, an unfinished run goes on from its last save and a
    finished one is left alone. In a process that torchrun or srun started, this is one rank of a
    run on several devices.

    Parameters
    ----------
    cube
        A cube with burnt labels and a split.
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
    with join(ranks, device=choose_device(device)), run_lock(Path(out), ranks):
        return _finetune(
            cube,
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


def _finetune(
    cube: str | Path,
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
    prepared = _prepare(cube, config, device=device, ranks=ranks, run=None if overwrite else run)
    environment = describe_environment(
        [prepared.season], device=prepared.device, precision=prepared.precision, labels=True
    )
    described = environment["cubes"][0]
    counts = _counts(prepared)
    begun = ranks.on_first(
        lambda: run.begin(
            kind="finetune",
            config=to_toml(prepared.config),
            environment=environment,
            identity={
                "pixels": described["fingerprint"],
                "labels": described["labels"],
                "init": prepared.init.sha256 if prepared.init is not None else None,
            },
            summary={
                "chips": prepared.dataset.chips,
                "validation_windows": prepared.held_out.chips,
                "global_batch": prepared.config.global_batch,
                "splits": counts,
                "ignored_classes": _names(prepared.classes.ignored),
                "transductive": TRANSDUCTIVE,
                "notes": list(prepared.notes),
            },
            overwrite=overwrite,
        )
    )
    if begun == "finished":
        return ranks.on_first(lambda: finished_result(run, kind="finetune", notes=prepared.notes))
    task, report = _make_task(prepared, workers=workers, begin=begun == "new", ranks=ranks)
    notes = (*prepared.notes, *report)
    if begun == "new" and ranks.first:
        run.update(notes=list(notes))
    days, ignored = prepared.season.days, prepared.classes.ignored
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
            "chip": prepared.config.data.chip,
            "halo": prepared.config.data.halo,
            "trained_days": (int(days.min()), int(days.max())),
            "season_start": prepared.season.name[5:],
            "provenance": {
                "stcln_geo": environment["stcln_geo"],
                "trained": "finetune",
                "seed": prepared.config.seed,
                "cubes": environment["cubes"],
                "init": _describe_init(prepared.init),
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
    cube: str | Path,
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
    prepared = _prepare(cube, config, device=device, ranks=share, run=None)
    task, report = _make_task(prepared, workers=workers, begin=True, ranks=share, alone=True)
    return rehearse(
        task,
        kind="finetune",
        device=prepared.device,
        precision=prepared.precision,
        notes=(*prepared.notes, *report, _say_counts(prepared)),
    )


def _prepare(
    cube: str | Path,
    config: FinetuneConfig,
    *,
    device: Device,
    ranks: Ranks,
    run: RunDirectory | None,
) -> _Prepared:
    season = open_season(cube, config.season)
    fields, classes = _labelled(season, config.labels.ignore)
    init = read_metadata(config.init) if config.init is not None else None
    choice = choose_bands(season, config.model.bands, init)
    bands = choice.bands
    network, preset = network_config(
        config.model,
        bands=bands,
        classes=len(classes.legend),
        base=init.config if init is not None else None,
    )
    chosen = few_label_fields(
        fields,
        fields_per_class=config.labels.fields_per_class,
        fraction=config.labels.fraction,
        seed=config.seed,
    )
    used = classes.used(fields)
    chosen = chosen & used
    judged = (fields.split == SPLITS["validation"]) & used
    lattice = Lattice(window=config.data.chip, halo=config.data.halo)
    trained = plan_labelled_chips(season, chosen, chip=config.data.chip)
    held_out = plan_windows(season, judged, lattice=lattice)
    if not trained:
        raise LabelError(
            f"Cannot fine-tune on {season.cube}: none of the {int(chosen.sum())} chosen training "
            "fields lies where the cube has a clear date. Choose another season, or check the "
            "cube with `stcln-geo cube info`."
        )
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
            lambda: FinetuneTask(Stcln(network), config, class_pixels=[1] * len(classes.legend)),
            dates=len(season.time),
            chips=chips,
            device=where,
            precision=precision,
            ranks=ranks,
        ),
        ranks=ranks.size,
    )
    left_out = classes.describe_ignored(fields)
    notes = [*choice.notes, *([left_out] if left_out else [])]
    frozen = check_freeze(config.optimiser, init, choice.fresh)
    if frozen:
        notes.append(frozen)
    if not judged.any():
        notes.append(
            "No validation fields: the last weights count as the best, nothing stops early, and "
            "confidence is not calibrated."
        )
    if init is not None and init.season_start not in (None, season.name[5:]):
        notes.append(
            f"The checkpoint counts days from {init.season_start}, this season from "
            f"{season.name[5:]}: what it learnt about dates is shifted."
        )
    return _Prepared(
        season=season,
        fields=fields,
        classes=classes,
        config=settled.model_copy(
            update={
                "season": season.name,
                "model": settled.model.model_copy(update={"bands": bands, "preset": preset}),
            }
        ),
        network=network,
        init=init,
        chosen=chosen,
        dataset=ChipDataset([season], trained, bands=bands, wanted=[chosen]),
        held_out=ChipDataset(
            [season], held_out, bands=bands, wanted=[judged], halo=config.data.halo
        ),
        device=where,
        precision=precision,
        notes=tuple(notes),
    )


def _labelled(season: Season, ignore: Sequence[str | int]) -> tuple[FieldTable, ClassChoice]:
    """Return fields and classes of a season that has both, and a split."""
    fields, legend = check_labelled(season)
    classes = choose_classes(legend, ignore)
    if not ((fields.split == SPLITS["train"]) & classes.used(fields)).any():
        left = "" if classes.ignored is None else " of a class that counts"
        raise LabelError(
            f"Cannot fine-tune on {season.cube}, season {season.name}: none of its "
            f"{len(fields)} fields{left} is in the train split. Run `stcln-geo labels split CUBE` "
            "first."
        )
    return fields, classes


def _make_task(
    prepared: _Prepared, *, workers: int, begin: bool, ranks: Ranks, alone: bool = False
) -> tuple[FinetuneTask, tuple[str, ...]]:
    """Build network and streams.

    Parameters
    ----------
    begin
        Give the network its first weights.
    alone
        Make steps without the other ranks.
    """
    config = prepared.config
    with torch.random.fork_rng():
        torch.manual_seed(step_seed(config.seed, 0))
        network = Stcln(prepared.network)
    report: tuple[str, ...] = ()
    if begin:
        # The checkpoint brings its own mean and deviation, unless it was published without; a band
        # that it never saw has none there.
        init = prepared.init
        if init is None or init.published or set(prepared.network.bands) - set(init.bands):
            statistics = band_statistics(prepared.dataset, seed=config.seed)
            network.encoder.set_normalisation(statistics.mean.tolist(), statistics.std.tolist())
        if init is not None:
            report = tuple(load_encoder_into(network, init.path))
    stream = TrainingStream(
        prepared.dataset,
        batch_size=config.rank_batch,
        seed=config.seed,
        memory=config.data.memory,
        threads=workers,
        augmentation=config.data.augmentation,
        rank=ranks.rank,
        world_size=ranks.size,
    )
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
    classes = prepared.classes
    task = FinetuneTask(
        network,
        config,
        stream=stream,
        validation=validation,
        class_pixels=classes.pixels(prepared.fields, prepared.chosen),
        lookup=make_lookup(classes.codes, classes.total),
        ranks=Ranks() if alone else ranks,
    )
    return task, report


def _counts(prepared: _Prepared) -> dict[str, dict[str, int]]:
    """Count fields and pixels of each split; of the train split also those chosen."""
    fields = prepared.fields
    used = prepared.classes.used(fields)
    parts = {
        "train_chosen": prepared.chosen,
        **{name: (fields.split == code) & used for name, code in SPLITS.items()},
    }
    return {
        name: {"fields": int(part.sum()), "pixels": int(fields.pixels[part].sum())}
        for name, part in parts.items()
    }


def _say_counts(prepared: _Prepared) -> str:
    counts = _counts(prepared)
    return "fields: " + ", ".join(
        f"{counts[name]['fields']} {said}"
        for name, said in (
            ("train_chosen", f"of {counts['train']['fields']} training fields chosen"),
            ("validation", "for validation"),
            ("test", "for test"),
        )
    )


def _names(legend: Legend | None) -> list[str]:
    return [] if legend is None else list(legend.names)


def _describe_init(init: CheckpointInfo | None) -> dict[str, Any] | None:
    if init is None:
        return None
    return {"path": str(init.path), "sha256": init.sha256, "kind": init.kind}
