"""What an evaluation is about to judge, and what it found: as text, as JSON, as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..cube.contract import FEWEST_CLEAR
from ..data.chips import ChipDataset
from ..data.dates import DateChoice
from ..data.source import Source
from ..grid import Lattice
from ..model.checkpoint import CheckpointInfo
from ..report.calibration import Calibration, plot_reliability
from ..report.metrics import Metrics
from ..report.published import PublishedMetrics, PublishedRule
from ..spreadsheet import csv_text
from ..storage import Location, location
from .classes import ClassChoice
from .run_directory import write_text

if TYPE_CHECKING:
    from .baseline import Baseline

__all__ = ["Evaluation", "EvaluationPlan", "SplitName", "folder_elsewhere", "write_evaluation"]

SplitName = Literal["test", "validation", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What is to be labelled and scored."""

    info: CheckpointInfo
    source: Source
    classes: ClassChoice
    """Those of the checkpoint, among those of the cube."""
    split: SplitName
    fields: np.ndarray
    """(K,) int64: fields of each class in the split."""
    pixels: int
    """Labelled pixels of the split."""
    lattice: Lattice
    dataset: ChipDataset
    dates: DateChoice | None
    """Which dates of a window are used; None for all."""
    same_cube: bool
    """True where the checkpoint was trained on this season of this cube."""
    hold_for: str
    """What the figures are evidence of, where it was."""
    ignored: str | None
    """What is not counted, in words."""
    protocol: str | None = None
    """The protocol by which it is judged."""
    metric: PublishedRule | None = None
    """A published rule of counting, besides ours."""
    judged_by: Mapping[str, Any] | None = None
    """The protocol's windows and rule as it names them."""

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
        if self.dates is not None:
            lines.append(f"of each window {self.dates.describe(self.source.season)}")
        if self.source.kind == "stack":
            sites = len({unit.site for unit in self.dataset.units})
            lines.append(
                f"{sites} sites, each a map of its own: windows see nothing beyond a site's edge"
            )
        return [*lines, self.ignored] if self.ignored else lines


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
    sparse_pixels: int
    """Pixels that are counted, and that a map leaves without a class unless it is told otherwise:
    they have fewer than three clear dates."""
    split: SplitName
    cube: Location
    season: str
    checkpoint: Location
    sha256: str
    window: int
    halo: int
    windows: int
    same_cube: bool
    """True where the checkpoint was trained on this season of this cube."""
    hold_for: str
    """What the figures are evidence of, where it was."""
    folder: Location | None
    """Where the figures were written."""
    calibration: Calibration
    """How often pixels of a confidence were right; confidence as ``predict`` gives it."""
    uncalibrated: Calibration
    """The same without the checkpoint's temperature."""
    temperature: float | None
    ignored: str | None
    """What is not counted, in words."""
    protocol: str | None = None
    """The protocol by which it was judged."""
    judged_by: Mapping[str, Any] | None = None
    """The protocol's windows and rule as it names them."""
    published: PublishedMetrics | None = None
    """The same pixels, counted by a published rule."""
    baseline: Baseline | None = None
    """What a random forest makes of the same pixels, if one was trained."""
    dates: DateChoice | None = None
    """Which dates of a window were used; None for all."""
    judged_on: Mapping[str, str | None] = field(default_factory=dict)
    """Hashes of the season's pixels, and of its labels with their split."""
    finished: bool = True
    """False where the checkpoint is of a run that is still to go on."""

    @property
    def note(self) -> str:
        """Say what the figures hold for."""
        said = self.hold_for
        if not self.same_cube:
            said = (
                "The checkpoint was not trained on this cube and season: the figures are of "
                "transfer."
            )
        if not self.finished:
            said += " The run is not finished: these are its best weights so far."
        return said

    def figures(self) -> dict[str, float | None]:
        """Return the figures over all classes; None where there is none."""
        return {
            **self.metrics.summary(),
            "expected_calibration_error": self.calibration.error,
        }

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
        if self.sparse_pixels:
            lines.append(
                f"{self.sparse_pixels} of {self.metrics.pixels} pixels have fewer than "
                f"{FEWEST_CLEAR} clear dates: they are counted here, and `predict` gives them no "
                "class unless --min-clear says so."
            )
        if self.published is not None:
            told = ", ".join(
                f"{name} {show(value)}" for name, value in self.published.summary().items()
            )
            lines.append(
                f"by the published rule of {self.published.rule}, to be compared with published "
                f"figures alone: {told} ({self.published.classes} classes)"
            )
        lines.append(self._say_calibration(show))
        if self.baseline is not None:
            lines += self.baseline.lines(self.metrics)
        if self.dates is not None:
            lines.append(f"Of each window {self.dates.describe(self.season)}.")
        if self.ignored:
            lines.append(self.ignored)
        return [*lines, self.note]

    def _say_calibration(self, show: Callable[[float | None], str]) -> str:
        before = show(self.uncalibrated.error)
        if self.temperature is None:
            return f"expected calibration error: {before} (the checkpoint has no temperature)"
        return (
            f"expected calibration error: {show(self.calibration.error)} (before temperature "
            f"scaling, by {self.temperature:.3f}: {before})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        per_class = self.metrics.per_class(self.names)
        return {
            **self.metrics.summary(),
            "pixels": self.metrics.pixels,
            "unseen_pixels": self.unseen_pixels,
            "sparse_pixels": self.sparse_pixels,
            "fields": int(self.fields.sum()),
            "per_class": [
                {**record, "support_fields": int(count)}
                for record, count in zip(per_class, self.fields, strict=True)
            ],
            "confusion": self.metrics.confusion.tolist(),
            "split": self.split,
            "cube": str(self.cube),
            "season": self.season,
            "judged_on": dict(self.judged_on),
            "dates": None if self.dates is None else self.dates.describe(self.season),
            "checkpoint": str(self.checkpoint),
            "sha256": self.sha256,
            "window": self.window,
            "halo": self.halo,
            "windows": self.windows,
            "calibration": {
                "temperature": self.temperature,
                "expected_calibration_error": self.calibration.error,
                "expected_calibration_error_uncalibrated": self.uncalibrated.error,
                "bins": self.calibration.to_json(),
                "bins_uncalibrated": self.uncalibrated.to_json(),
            },
            "ignored": self.ignored,
            "protocol": self.protocol,
            "judged_by": None if self.judged_by is None else dict(self.judged_by),
            "published": None
            if self.published is None
            else {
                "rule": self.published.rule,
                **self.published.summary(),
                "classes": self.published.classes,
                "pixels": self.published.pixels,
            },
            "baseline": None if self.baseline is None else self.baseline.to_json(self.metrics),
            "note": self.note,
        }


def folder_elsewhere(
    run: Location, begin: str, cube: Location, season: str, end: str = ""
) -> Location:
    """Return where the figures of a run on another cube or season go.

    It is named after the cube; where another cube of this name has been judged on, and is still
    there, after the cube's folder too.
    """
    plain = run / f"{begin}-{cube.stem}-{season}{end}"
    file = plain / "metrics.json"
    if file.is_file():
        before = location(json.loads(file.read_text(encoding="utf-8"))["cube"])
        if before.exists() and before.resolve() != cube.resolve():
            return run / f"{begin}-{cube.parent.name}-{cube.stem}-{season}{end}"
    return plain


def write_evaluation(evaluation: Evaluation, folder: Path, *, pictures: bool = True) -> None:
    """Write figures, confusion matrix and, if wanted, pictures into a folder."""
    names = evaluation.names
    counts = zip(names, evaluation.metrics.confusion.tolist(), strict=True)
    table = csv_text([["truth \\ prediction", *names], *([name, *row] for name, row in counts)])
    write_text(folder / "confusion.csv", table)
    if pictures:
        _draw(evaluation, folder)
    write_text(folder / "metrics.json", json.dumps(evaluation.to_json(), indent=1) + "\n")


def _draw(evaluation: Evaluation, folder: Path) -> None:
    from ..report import plots

    plots.plot_confusion(evaluation.metrics.confusion, evaluation.names, folder / "confusion.png")
    plot_reliability(
        {"as predicted": evaluation.calibration}
        if evaluation.temperature is None
        else {
            f"temperature {evaluation.temperature:.2f}": evaluation.calibration,
            "without": evaluation.uncalibrated,
        },
        folder / "reliability.png",
    )
