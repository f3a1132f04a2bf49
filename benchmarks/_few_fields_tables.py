"""Scores and tables of ``real_few_fields.py``, from the confusion matrices that its runs kept."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _few_fields_statistics import Estimate, estimate, estimate_difference

SCORES = {"macro_miou": "macro mIoU", "macro_f1": "macro F1", "overall_accuracy": "OA"}
_PAIRS = (
    ("pretrained", "scratch"),
    ("scratch", "forest"),
    ("pretrained", "forest"),
    ("pretrained", "forest-means"),
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one contender reached with one seed, on all test fields of a setting."""

    study: str
    setting: str
    """The split, or ``all`` where those of a study are added up."""
    fields: int
    arm: str
    seed: int
    macro_miou: float
    macro_f1: float
    overall_accuracy: float
    test_pixels: int
    trained_fields: int
    """Training fields of all classes together, summed over the splits of the setting."""
    trained_pixels: int


def write_tables(
    out: Path, runs: Sequence[tuple[Any, Path]], studies: Mapping[str, Any]
) -> list[Path]:
    """Write scores.csv and table.md of the runs that are there."""
    scores = list(collect(runs, studies))
    with (out / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Score.__dataclass_fields__)
        for score in scores:
            values = (getattr(score, name) for name in Score.__dataclass_fields__)
            writer.writerow(f"{v:.6f}" if isinstance(v, float) else v for v in values)
    lines = []
    for name in dict.fromkeys(score.study for score in scores):
        lines += [f"## {name}", "", *_splits(out / "inputs" / name, studies[name]), ""]
        lines += _results([score for score in scores if score.study == name])
    missing = sum(not file.is_file() for _, file in runs)
    if missing:
        lines += [f"{missing} of {len(runs)} models are missing.", ""]
    (out / "table.md").write_text("\n".join(lines))
    return [out / "scores.csv", out / "table.md"]


def collect(runs: Sequence[tuple[Any, Path]], studies: Mapping[str, Any]) -> Iterator[Score]:
    """Derive the scores; matrices of a pooled study are added up once all its parts are there."""
    from stcln_geo.report.metrics import metrics_from_confusion

    found: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
    for run, file in runs:
        if file.is_file():
            setting = "all" if studies[run.study].pooled else run.part
            key = (run.study, setting, run.fields, run.arm, run.seed)
            found[key][run.part] = json.loads(file.read_text())
    for (study, setting, fields, arm, seed), parts in found.items():
        if setting == "all" and len(parts) < len(studies[study].parts):
            continue
        metrics = metrics_from_confusion(
            np.sum([part["confusion"] for part in parts.values()], axis=0)
        )
        yield Score(
            study=study, setting=setting, fields=fields, arm=arm, seed=seed,
            **{name: getattr(metrics, name) for name in SCORES},
            test_pixels=metrics.pixels,
            trained_fields=sum(part["trained"]["fields"] for part in parts.values()),
            trained_pixels=sum(part["trained"]["pixels"] for part in parts.values()),
        )  # fmt: skip


def _splits(inputs: Path, study: Any) -> list[str]:
    """Tell fields and pixels of each class on either side of each split."""
    from stcln_geo.cube.contract import SPLITS
    from stcln_geo.data.source import open_source
    from stcln_geo.data.split import check_labelled

    lines = ["| split | class | fields to train on | to test on |", "|---|---|---|---|"]
    for part in study.parts:
        fields, legend = check_labelled(open_source(inputs / f"{part}.zarr"))
        for entry in legend.classes:
            cells = []
            for name in ("train", "test"):
                own = (fields.code == entry.code) & (fields.split == SPLITS[name])
                cells.append(f"{int(own.sum())} ({int(fields.pixels[own].sum())} px)")
            lines.append(f"| {part} | {entry.name} | {' | '.join(cells)} |")
    return lines


def _results(scores: Sequence[Score]) -> Iterator[str]:
    by_setting: dict[tuple[str, int], dict[str, list[Score]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for score in scores:
        by_setting[score.setting, score.fields][score.arm].append(score)
    header = " | ".join(f"{said}, 95 % interval" for said in SCORES.values())
    for (setting, fields), arms in by_setting.items():
        pixels = sorted({score.test_pixels for own in arms.values() for score in own})
        yield f"### {setting}, {fields} fields a class ({', '.join(map(str, pixels))} test px)"
        yield ""
        yield f"| contender | {header} | deviation of mIoU | mIoU of each seed |"
        yield "|---|---|---|---|---|---|"
        for arm, own in arms.items():
            cells = [say(estimate(list(by_seed(own, name).values()))) for name in SCORES]
            values = by_seed(own, "macro_miou").values()
            deviation = estimate(list(values)).deviation
            cells.append("-" if deviation is None else f"{deviation:.3f}")
            cells.append(" ".join(f"{value:.3f}" for value in values))
            yield f"| {arm} | {' | '.join(cells)} |"
        yield ""
        yield f"| difference, by seed | {header} |"
        yield "|---|---|---|---|"
        for one, other in _PAIRS:
            if one in arms and other in arms:
                cells = [
                    say(
                        estimate_difference(*(by_seed(arms[arm], name) for arm in (one, other))),
                        "+",
                    )
                    for name in SCORES
                ]
                yield f"| {one} - {other} | {' | '.join(cells)} |"
        yield ""


def by_seed(scores: Sequence[Score], name: str) -> dict[int, float]:
    """Return one figure by seed."""
    return {score.seed: getattr(score, name) for score in scores}


def say(found: Estimate, sign: str = "") -> str:
    """Say a mean with its interval."""
    if found.mean is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:{sign}.3f} (one seed)"
    return f"{found.mean:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"
