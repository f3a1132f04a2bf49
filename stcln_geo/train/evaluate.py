"""Score a fine-tuned network on the fields of one split, on the windows that prediction uses."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..cube.contract import SPLITS
from ..cube.season import FieldTable
from ..data.batch import IGNORE_INDEX
from ..data.chips import ChipDataset, plan_windows
from ..data.reader import band_indices
from ..data.source import Source, open_source
from ..data.split import check_labelled
from ..data.stream import OrderedStream
from ..errors import CheckpointError, InputError, LabelError
from ..execution import ProgressHook
from ..grid import Lattice
from ..legend import Legend
from ..model.checkpoint import CheckpointInfo, find_checkpoint, load_model, read_metadata
from ..model.device import Device, autocast_for, choose_device, choose_precision
from ..model.stcln import Stcln, positions_for
from ..report.metrics import Metrics, metrics_from_confusion
from ..storage import Location
from .card import write_model_card
from .modules import count_confusion, observed_target
from .plan import figures_hold_for
from .run_directory import RunDirectory, fingerprint_labels, fingerprint_season, write_text

__all__ = [
    "Evaluation",
    "EvaluationPlan",
    "SplitName",
    "evaluate_run",
    "evaluate_seeds",
    "plan_evaluation",
    "runs_of",
]

SplitName = Literal["test", "validation", "train"]

_DEFAULT_CHIP = 32
_DEFAULT_HALO = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What is to be labelled and scored."""

    info: CheckpointInfo
    source: Source
    legend: Legend
    split: SplitName
    fields: np.ndarray
    """(K,) int64: fields of each class in the split."""
    pixels: int
    """Labelled pixels of the split."""
    lattice: Lattice
    dataset: ChipDataset
    same_cube: bool
    """True where the checkpoint was trained on this season of this cube."""
    hold_for: str
    """What the figures are evidence of, where it was."""

    def lines(self) -> list[str]:
        """Return the plan as lines of text for people."""
        lines = [
            f"{self.info.path}: {self.info.parameters:,} parameters, bands "
            f"{', '.join(self.info.bands)}",
            f"{self.split} split of {self.source}: "
            f"{int(self.fields.sum())} fields, {self.pixels} pixels",
            f"{self.dataset.chips} windows of {self.lattice.window} px with a halo of "
            f"{self.lattice.halo} px",
        ]
        if self.source.kind == "stack":
            sites = len({unit.site for unit in self.dataset.units})
            lines.append(
                f"{sites} sites, each a map of its own: windows see nothing beyond a site's edge"
            )
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The accuracy of one checkpoint on one split of one season."""

    metrics: Metrics
    names: tuple[str, ...]
    """Class names by code."""
    fields: np.ndarray
    """(K,) int64: fields of each class in the split."""
    unseen_pixels: int
    """Labelled pixels without any clear date: no prediction, not counted in the figures."""
    split: SplitName
    cube: Location
    season: str
    checkpoint: Path
    sha256: str
    window: int
    halo: int
    windows: int
    same_cube: bool
    """True where the checkpoint was trained on this season of this cube."""
    hold_for: str
    """What the figures are evidence of, where it was."""
    folder: Path | None
    """Where the figures were written."""

    @property
    def note(self) -> str:
        """Say what the figures hold for."""
        if self.same_cube:
            return self.hold_for
        return (
            "The checkpoint was not trained on this cube and season: the figures are of transfer."
        )

    def lines(self) -> list[str]:
        """Return the figures as lines of text for people."""

        def show(value: float | int | str | None) -> str:
            return (
                f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
            )

        columns = ("iou", "f1", "users_accuracy", "producers_accuracy", "support_pixels")
        lines = [f"{name}: {show(value)}" for name, value in self.metrics.summary().items()]
        lines.append(
            f"{'class':<24}{'IoU':>8}{'F1':>8}{'UA':>8}{'PA':>8}{'pixels':>9}{'fields':>8}"
        )
        for record, count in zip(self.metrics.per_class(self.names), self.fields, strict=True):
            cells = [show(record[column]) for column in columns]
            widths = (8, 8, 8, 8, 9)
            row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            lines.append(f"{str(record['name'])[:23]:<24}{row}{int(count):>8}")
        if self.unseen_pixels:
            lines.append(f"{self.unseen_pixels} pixels have no clear date and are not counted.")
        return [*lines, self.note]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        per_class = self.metrics.per_class(self.names)
        return {
            **self.metrics.summary(),
            "pixels": self.metrics.pixels,
            "unseen_pixels": self.unseen_pixels,
            "fields": int(self.fields.sum()),
            "per_class": [
                {**record, "support_fields": int(count)}
                for record, count in zip(per_class, self.fields, strict=True)
            ],
            "confusion": self.metrics.confusion.tolist(),
            "split": self.split,
            "cube": str(self.cube),
            "season": self.season,
            "checkpoint": str(self.checkpoint),
            "sha256": self.sha256,
            "window": self.window,
            "halo": self.halo,
            "windows": self.windows,
            "note": self.note,
        }


def evaluate_run(
    run_or_checkpoint: str | Path,
    cube: str | Path,
    *,
    season: str | None = None,
    split: SplitName = "test",
    device: Device = "auto",
    workers: int = 2,
    batch_size: int = 8,
    progress: ProgressHook | None = None,
) -> Evaluation:
    """Label the windows that hold fields of a split, and score the pixels of these fields only.

    Windows, halo and dates are those of prediction, so the figures are those of the map. Each site
    of a stack is a map of its own: windows see nothing beyond its edge. For a run directory, writes
    ``evaluation-<split>/`` with metrics.json, confusion.csv and confusion.png into it.

    Raises
    ------
    CheckpointError
        If the checkpoint is no classifier, or its legend or bands are not the cube's.
    LabelError
        If the cube has no field in the split, or was split anew since the training.
    """
    plan = plan_evaluation(run_or_checkpoint, cube, season=season, split=split)
    stream = OrderedStream(plan.dataset, batch_size=batch_size, memory=0, threads=workers)
    network = load_model(plan.info.path)
    if not isinstance(network, Stcln):
        raise CheckpointError(_no_classifier(plan.info))
    confusion, unseen = _score(network, stream, device=choose_device(device), progress=progress)

    evaluation = Evaluation(
        metrics=metrics_from_confusion(confusion),
        names=plan.legend.names,
        fields=plan.fields,
        unseen_pixels=unseen,
        split=split,
        cube=plan.source.path,
        season=plan.source.season,
        checkpoint=plan.info.path,
        sha256=plan.info.sha256,
        window=plan.lattice.window,
        halo=plan.lattice.halo,
        windows=plan.dataset.chips,
        same_cube=plan.same_cube,
        hold_for=plan.hold_for,
        folder=_folder(plan),
    )
    if evaluation.folder is not None:
        _write(evaluation, evaluation.folder)
        run = RunDirectory(evaluation.folder.parent)
        if run.status == "finished":
            write_model_card(run)
    return evaluation


def plan_evaluation(
    run_or_checkpoint: str | Path,
    cube: str | Path,
    *,
    season: str | None = None,
    split: SplitName = "test",
) -> EvaluationPlan:
    """Find the windows to label, after checking that checkpoint and cube fit each other."""
    path = find_checkpoint(run_or_checkpoint)
    info = read_metadata(path)
    opened = open_source(cube, season)
    fields, legend = _labelled(opened, info, split=split)
    band_indices(opened, info.bands, wanted_by=f"checkpoint {path.name}")
    lattice = Lattice(
        window=info.chip or _DEFAULT_CHIP, halo=_DEFAULT_HALO if info.halo is None else info.halo
    )
    wanted = fields.split == SPLITS[split]
    return EvaluationPlan(
        info=info,
        source=opened,
        legend=legend,
        split=split,
        fields=np.bincount(fields.code[wanted], minlength=len(legend)),
        pixels=int(fields.pixels[wanted].sum()),
        lattice=lattice,
        dataset=ChipDataset(
            [opened],
            plan_windows(opened, wanted, lattice=lattice),
            bands=info.bands,
            wanted=[wanted],
            halo=lattice.halo,
        ),
        same_cube=_trained_on(opened, info),
        hold_for=figures_hold_for(fields, split),
    )


def runs_of(path: str | Path) -> list[Path]:
    """Return the runs of a folder of seeds, in order of the seeds; else the path itself."""
    folder = Path(path)
    seeds = [child for child in folder.glob("seed-*") if (child / "run.json").is_file()]
    return sorted(seeds, key=lambda run: int(run.name.partition("-")[2])) or [folder]


def evaluate_seeds(
    path: str | Path,
    cube: str | Path,
    *,
    season: str | None = None,
    split: SplitName = "test",
    device: Device = "auto",
    workers: int = 2,
    progress: ProgressHook | None = None,
    on_result: Callable[[Evaluation], None] | None = None,
) -> dict[str, Any]:
    """Evaluate each run of a folder of seeds; return the mean and deviation of each figure.

    Writes ``evaluation-<split>.json`` into the folder.
    """
    folder = Path(path)
    evaluations = []
    for run in runs_of(folder):
        evaluation = evaluate_run(
            run,
            cube,
            season=season,
            split=split,
            device=device,
            workers=workers,
            progress=progress,
        )
        evaluations.append(evaluation)
        if on_result is not None:
            on_result(evaluation)
    figures = [evaluation.metrics.summary() for evaluation in evaluations]
    told: dict[str, Any] = {"split": split, "runs": [], "note": evaluations[0].note}
    for name in figures[0]:
        values = [figure[name] for figure in figures]
        known = [value for value in values if value is not None]
        told[name] = {
            "mean": float(np.mean(known)) if known else None,
            "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        }
    told["runs"] = [
        {"checkpoint": str(evaluation.checkpoint), **figure}
        for evaluation, figure in zip(evaluations, figures, strict=True)
    ]
    write_text(folder / f"evaluation-{split}.json", json.dumps(told, indent=1) + "\n")
    return told


def _score(
    network: Stcln, stream: OrderedStream, *, device: str, progress: ProgressHook | None
) -> tuple[np.ndarray, int]:
    """Return the confusion matrix (K, K) and the number of labelled pixels never seen."""
    classes = network.config.classes
    confusion = np.zeros((classes, classes), dtype=np.int64)
    unseen, done = 0, 0
    network.to(device).eval()
    precision = choose_precision("auto", device)
    with torch.inference_mode(), autocast_for(precision, device):
        for batch in stream:
            target = observed_target(batch)
            unseen += int(((batch.target != IGNORE_INDEX) & (target == IGNORE_INDEX)).sum())
            moved = batch.to(device)
            days = positions_for(network.config, moved.days)
            logits = network(moved.images(), days, moved.valid)
            confusion += count_confusion(logits, target.to(device)).cpu().numpy()
            done += len(batch)
            if progress is not None:
                progress(done, stream.dataset.chips, "windows")
    return confusion, unseen


def _labelled(
    season: Source, info: CheckpointInfo, *, split: SplitName
) -> tuple[FieldTable, Legend]:
    """Return fields and legend, after checking that the checkpoint means the same classes."""
    if split not in ("train", "validation", "test"):
        raise InputError(
            f"Cannot evaluate the split {split!r}: splits are train, validation and test. "
            "Use --split test."
        )
    fields, legend = check_labelled(season)
    if not (fields.split == SPLITS[split]).any():
        raise LabelError(
            f"Cannot evaluate on {season}: none of its "
            f"{len(fields)} fields is in the {split} split. Run `stcln-geo labels split "
            "CUBE` first, or choose another --split."
        )
    if info.kind != "classifier" or info.legend is None:
        raise CheckpointError(_no_classifier(info))
    learnt = [entry.value for entry in Legend.from_json(info.legend).classes]
    here = [entry.value for entry in legend.classes]
    if learnt != here:
        raise CheckpointError(
            f"Cannot evaluate {info.path} on {season.path}: it knows the classes "
            f"{', '.join(learnt)}, and the cube's legend is {', '.join(here)}. Both must be the "
            "same, in the same order. Burn the cube's labels with the legend of the training."
        )
    return fields, legend


def _no_classifier(info: CheckpointInfo) -> str:
    return (
        f"Cannot evaluate {info.path}: it is a {info.kind} without a legend, and only classifiers "
        "that stcln-geo fine-tuned name classes. Run `stcln-geo finetune CUBE --init` with it "
        "first."
    )


def _trained_on(season: Source, info: CheckpointInfo) -> bool:
    """Return True where the checkpoint was trained on this very season.

    Raises
    ------
    LabelError
        If its labels or split changed since: test fields may have been trained on.
    """
    pixels = fingerprint_season(season)
    for cube in info.provenance.get("cubes", []):
        if cube.get("fingerprint") != pixels:
            continue
        if cube.get("labels") not in (None, fingerprint_labels(season)):
            raise LabelError(
                f"Cannot evaluate {info.path} on {season.path}: the labels were burnt or split "
                "again since it was trained, so its training fields may now be test fields. "
                "Fine-tune again, or restore the split with the same --seed."
            )
        return True
    return False


def _folder(plan: EvaluationPlan) -> Path | None:
    """Return where the figures of a run's checkpoint go; None for a checkpoint without a run."""
    path, source = plan.info.path, plan.source
    run = path.parent.parent
    if path.parent.name != "checkpoints" or not (run / "run.json").is_file():
        return None
    other = "" if plan.same_cube else f"-{source.path.stem}-{source.season}"
    return run / f"evaluation-{plan.split}{other}"


def _write(evaluation: Evaluation, folder: Path) -> None:
    from ..report import plots

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["truth \\ prediction", *evaluation.names])
    for name, row in zip(evaluation.names, evaluation.metrics.confusion, strict=True):
        writer.writerow([name, *row.tolist()])
    write_text(folder / "confusion.csv", table.getvalue())
    plots.plot_confusion(evaluation.metrics.confusion, evaluation.names, folder / "confusion.png")
    write_text(folder / "metrics.json", json.dumps(evaluation.to_json(), indent=1) + "\n")
