"""Score a fine-tuned network on the fields of one split, on the windows that prediction uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..cube.contract import FEWEST_CLEAR, SPLITS
from ..cube.season import FieldTable
from ..data.batch import IGNORE_INDEX, Batch
from ..data.chips import ChipDataset, plan_windows
from ..data.dates import DateChoice
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
from ..model.ensemble import Classifier
from ..model.stcln import positions_for, probabilities
from ..report.calibration import Calibration
from ..report.metrics import metrics_from_confusion
from ..report.published import PublishedMetrics, published_confusion, published_metrics
from ..storage import Location
from .baseline import check_forest, forest_baseline
from .card import write_model_card
from .classes import ClassChoice, choose_classes
from .evaluation import Evaluation, EvaluationPlan, SplitName, folder_elsewhere, write_evaluation
from .evidence import figures_hold_for
from .protocol import EvaluationSection, Protocol
from .provenance import fingerprint_labels, fingerprint_season, fingerprints_of
from .run_copy import run_copy
from .run_directory import is_finished
from .scoring import count_confusion, make_lookup, observed_target

__all__ = [
    "Evaluation",
    "EvaluationPlan",
    "SplitName",
    "evaluate_run",
    "label_windows",
    "open_plan",
    "plan_evaluation",
]

_DEFAULT_CHIP = 32
_DEFAULT_HALO = 4


def evaluate_run(
    run_or_checkpoint: str | Location,
    cube: str | Path | Source,
    *,
    season: str | None = None,
    split: SplitName = "test",
    dates: DateChoice | None = None,
    device: Device = "auto",
    workers: int = 2,
    batch_size: int = 8,
    pictures: bool = True,
    progress: ProgressHook | None = None,
    protocol: Protocol | None = None,
    forest: bool = False,
) -> Evaluation:
    """Label the windows that hold fields of a split, and score the pixels of these fields only.

    Windows, halo and dates are those of prediction, so the figures are those of the map. Each site
    of a stack is a map of its own: windows see nothing beyond its edge. For a run directory, writes
    ``evaluation-<split>/`` with metrics.json, confusion.csv, confusion.png and reliability.png into
    it. Classes that training ignored are not counted.

    Parameters
    ----------
    cube
        A cube or stack with labels and a split; or a source that was opened with one.
    batch_size
        Windows of 32 px that are labelled together; of larger ones fewer. In `reference` mode it is
        one, whatever is said: that network does not tell the dates of a window from those that
        others in the batch have more.
    protocol
        Judge by its windows, and count by its rule besides ours; ``evaluation-<split>-<protocol>/``
        is then written.
    dates
        Which dates of a window are used, as of a season that still goes on; None for all. The
        folder's name then ends with what was chosen.
    pictures
        False writes no PNG.
    forest
        Train a random forest on the run's training fields, and judge it on the same pixels
        (`forest_baseline`). Needs scikit-learn.

    Raises
    ------
    CheckpointError
        If the checkpoint is no classifier, or its legend or bands are not the cube's; of a forest,
        if the checkpoint is not of a run.
    LabelError
        If the cube has no field in the split, or was split anew since the training.
    """
    plan = plan_evaluation(
        run_or_checkpoint, cube, season=season, split=split, protocol=protocol, dates=dates
    )
    if forest:
        check_forest(plan)
    network, stream = open_plan(plan, batch_size=batch_size, workers=workers)
    scores = _score(network, stream, plan, device=choose_device(device), progress=progress)
    baseline = None
    if forest:
        right = np.concatenate(scores.right)
        baseline = forest_baseline(plan, right, threads=workers, progress=progress)

    evaluation = Evaluation(
        metrics=metrics_from_confusion(scores.confusion),
        names=plan.classes.legend.names,
        fields=plan.fields,
        unseen_pixels=scores.unseen,
        sparse_pixels=scores.sparse,
        calibration=scores.calibration,
        uncalibrated=scores.uncalibrated,
        temperature=plan.info.temperature,
        ignored=plan.ignored,
        dates=plan.dates,
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
        protocol=plan.protocol,
        judged_by=plan.judged_by,
        published=_count_as_published(scores.confusion, plan),
        baseline=baseline,
        judged_on=fingerprints_of(plan.source),
        finished=is_finished(plan.info.path.parent.parent),
    )
    if evaluation.folder is not None:
        with run_copy(evaluation.folder.parent) as run:
            write_evaluation(evaluation, run.path / evaluation.folder.name, pictures=pictures)
            if run.status == "finished":
                write_model_card(run)
    return evaluation


def plan_evaluation(
    run_or_checkpoint: str | Location,
    cube: str | Path | Source,
    *,
    season: str | None = None,
    split: SplitName = "test",
    protocol: Protocol | None = None,
    dates: DateChoice | None = None,
) -> EvaluationPlan:
    """Find the windows to label, after checking that checkpoint and cube fit each other."""
    path = find_checkpoint(run_or_checkpoint)
    info = read_metadata(path)
    if season is None and protocol is not None:
        season = protocol.season
    opened = open_source(cube, season)
    fields, classes = _labelled(opened, info, split=split)
    band_indices(opened, info.bands, wanted_by=f"checkpoint {path.name}")
    rule = EvaluationSection() if protocol is None else protocol.evaluation
    lattice = _lattice_of(rule, info, opened)
    wanted = (fields.split == SPLITS[split]) & classes.used(fields)
    return EvaluationPlan(
        info=info,
        source=opened,
        classes=classes,
        split=split,
        fields=classes.count(fields, wanted),
        pixels=int(fields.pixels[wanted].sum()),
        lattice=lattice,
        dataset=ChipDataset(
            [opened],
            plan_windows(opened, wanted, lattice=lattice),
            bands=info.bands,
            wanted=[wanted],
            halo=lattice.halo,
            dates=dates,
        ),
        dates=dates,
        same_cube=_trained_on(opened, info),
        ignored=classes.describe_ignored(fields),
        hold_for=figures_hold_for(fields, split),
        protocol=None if protocol is None else protocol.name,
        metric=rule.metric,
        judged_by=None if protocol is None else rule.model_dump(mode="json"),
    )


def open_plan(
    plan: EvaluationPlan, *, batch_size: int = 8, workers: int = 2
) -> tuple[Classifier, OrderedStream]:
    """Load the network of a plan, and begin to read its windows."""
    stream = OrderedStream(
        plan.dataset, batch_size=_at_once(plan, batch_size), memory=0, threads=workers
    )
    network = load_model(plan.info.path)
    if not isinstance(network, Classifier):
        raise CheckpointError(_no_classifier(plan.info))
    return network, stream


def _at_once(plan: EvaluationPlan, windows: int) -> int:
    """Return how many windows are labelled together, where so many of the usual size are."""
    if plan.info.config.mode == "reference":
        return 1
    return max(1, windows * Lattice().window ** 2 // plan.lattice.window**2)


def _lattice_of(rule: EvaluationSection, info: CheckpointInfo, source: Source) -> Lattice:
    """Return the windows to label: those of a protocol, else those the checkpoint was chosen by."""
    window = max(source.shape_yx) if rule.window == "site" else rule.window
    halo = info.halo if rule.halo is None else rule.halo
    return Lattice(
        window=window or info.chip or _DEFAULT_CHIP, halo=_DEFAULT_HALO if halo is None else halo
    )


def _count_as_published(confusion: np.ndarray, plan: EvaluationPlan) -> PublishedMetrics | None:
    if plan.metric is None:
        return None
    values = [entry.value for entry in plan.classes.legend.classes]
    placed = published_confusion(confusion, values, rule=plan.metric)
    return published_metrics(placed, rule=plan.metric)


def _suffix(protocol: str | None) -> str:
    return "" if protocol is None else f"-{protocol.replace(':', '-')}"


@dataclass(slots=True)
class _Scores:
    """What is counted over the windows."""

    confusion: np.ndarray
    """(K, K) int64."""
    calibration: Calibration
    uncalibrated: Calibration
    unseen: int = 0
    """Labelled pixels without any clear date."""
    right: list[np.ndarray] = field(default_factory=list)
    """(N,) bool of each batch: where the class was right, of the pixels that count."""
    sparse: int = 0
    """Pixels that count, and have fewer clear dates than a map asks for."""


def _score(
    network: Classifier,
    stream: OrderedStream,
    plan: EvaluationPlan,
    *,
    device: str,
    progress: ProgressHook | None,
) -> _Scores:
    count, temperature = network.config.classes, plan.info.temperature
    scores = _Scores(np.zeros((count, count), dtype=np.int64), Calibration(), Calibration())
    for batch, target, logits in label_windows(
        network, stream, plan, device=device, progress=progress
    ):
        counted = target != IGNORE_INDEX
        scores.unseen += int(((batch.target != IGNORE_INDEX) & ~counted).sum())
        few = batch.valid.sum(dim=1) < FEWEST_CLEAR
        scores.sparse += int((few & counted).sum())
        scores.confusion += count_confusion(logits, target).cpu().numpy()
        right = (logits.argmax(dim=1) == target)[counted].cpu().numpy()
        scores.right.append(right)
        for calibration, divisor in (
            (scores.uncalibrated, None),
            (scores.calibration, temperature),
        ):
            confidence = probabilities(logits, divisor).amax(dim=1)[counted]
            calibration.add(confidence.cpu().numpy(), right)
    return scores


def label_windows(
    network: Classifier,
    stream: OrderedStream,
    plan: EvaluationPlan,
    *,
    device: str,
    progress: ProgressHook | None,
) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Yield the windows of a plan on the device, what is to be said of them, and what is said.

    Yields
    ------
    A batch; (B, H, W) int64 targets, -100 where a pixel does not count; (B, K, H, W) float32
    logits.
    """
    lookup = make_lookup(plan.classes)
    done = 0
    network.to(device).eval()
    precision = choose_precision("auto", device, width=network.config.dim)
    for batch in stream:
        moved = batch.to(device)
        with torch.inference_mode(), autocast_for(precision, device):
            target = observed_target(batch, lookup).to(device)
            days = positions_for(network.config, moved.days)
            logits = network(moved.images(), days, moved.valid).float()
        yield moved, target, logits
        done += len(batch)
        if progress is not None:
            progress(done, stream.dataset.chips, "windows")


def _labelled(
    source: Source, info: CheckpointInfo, *, split: SplitName
) -> tuple[FieldTable, ClassChoice]:
    """Return fields and classes, after checking that the checkpoint means the same ones."""
    if split not in ("train", "validation", "test"):
        raise InputError(
            f"Cannot evaluate the split {split!r}: splits are train, validation and test. "
            "Use --split test."
        )
    fields, legend = check_labelled(source)
    if info.kind != "classifier" or info.legend is None:
        raise CheckpointError(_no_classifier(info))
    left_out = _values(info.ignored)
    classes = choose_classes(
        legend,
        [entry.code for entry in legend.classes if entry.value in left_out],
        silent=info.silent,
    )
    if not ((fields.split == SPLITS[split]) & classes.used(fields)).any():
        of = " of a class that counts" if classes.left_out or classes.silent else ""
        raise LabelError(
            f"Cannot evaluate on {source}: none of its {len(fields)} fields{of} is in the {split} "
            "split. Run `stcln-geo labels split CUBE` first, or choose another --split."
        )
    learnt = _values(info.legend)
    here = [entry.value for entry in classes.legend.classes]
    if learnt != here:
        also = f" (and ignores {', '.join(left_out)})" if left_out else ""
        raise CheckpointError(
            f"Cannot evaluate {info.path} on {source.path}: it knows the classes "
            f"{', '.join(learnt)}{also}, and the cube's legend is "
            f"{', '.join(entry.value for entry in legend.classes)}. Both must be the same, in the "
            "same order. Burn the cube's labels with the legend of the training."
        )
    return fields, classes


def _values(legend: str | None) -> list[str]:
    if legend is None:
        return []
    return [entry.value for entry in Legend.from_json(legend).classes]


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
    pixels, found = fingerprint_season(season), False
    for cube in info.provenance.get("cubes", []):
        if cube.get("fingerprint") != pixels:
            continue
        if cube.get("labels") not in (None, fingerprint_labels(season)):
            raise LabelError(
                f"Cannot evaluate {info.path} on {season.path}: the labels were burnt or split "
                "again since it was trained, so its training fields may now be test fields. "
                "Fine-tune again, or restore the split with the same --seed."
            )
        found = True
    return found


def _folder(plan: EvaluationPlan) -> Location | None:
    """Return where the figures of a run's checkpoint go; None for a checkpoint without a run."""
    path, source = plan.info.path, plan.source
    run = path.parent.parent
    if path.parent.name != "checkpoints" or not (run / "run.json").is_file():
        return None
    begin = f"evaluation-{plan.split}{_suffix(plan.protocol)}"
    cut = "" if plan.dates is None else plan.dates.suffix(source.season)
    if plan.same_cube:
        return run / f"{begin}{cut}"
    return folder_elsewhere(run, begin, source.path, source.season, cut)
