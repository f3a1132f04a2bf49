"""Gather what the demo's commands wrote into the page that shows it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cube.contract import FILL, SCALE
from ..cube.layout import overview_bands
from ..cube.store import Season, open_season
from ..grid import Window, bounds_window
from ..legend import UNLABELLED, Legend
from . import plots
from .html import (
    ClassScore,
    DemoReport,
    OutputFile,
    Picture,
    Scores,
    Stage,
    write_demo_report,
)

__all__ = ["DemoRun", "write_report"]

_WHITE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """Where a demo's commands put their results, and how long they took."""

    out: Path
    cube: Path
    season: str
    pretrained: Path
    """Run directory of the pre-training."""
    with_pretraining: Path
    """Fine-tuning that began from the pre-training; it made the map."""
    from_scratch: Path
    """The same fine-tuning without it."""
    product: Path
    """Folder of the map."""
    simulated: bool
    stages: tuple[Stage, ...]
    commands: tuple[str, ...]
    made: str


def write_report(run: DemoRun) -> Path:
    """Write ``report.html`` into the demo's folder and return its path."""
    season = open_season(run.cube, run.season)
    pictures = run.out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    extent = _extent(run.product / "classes.tif", season)
    legend = _legend(season)
    better = _evaluation(run.with_pretraining)
    plain = _evaluation(run.from_scratch)
    chosen = _read_json(run.with_pretraining / "run.json")["splits"]["train_chosen"]
    height, width = extent.shape_yx
    region = "a simulated region" if run.simulated else "a region"
    report = DemoReport(
        title=f"Crop map of {region}",
        subtitle=(
            f"From {len(season.time)} dates of Sentinel-2 and {chosen['fields']} labelled fields "
            f"to a map of {width} x {height} px, wall to wall."
        ),
        simulated=run.simulated,
        scores=(_scores("Pre-trained", better), _scores("From scratch", plain)),
        held_out_fields=int(better["fields"]),
        held_out_pixels=int(better["pixels"]),
        labelled_fields=int(chosen["fields"]),
        seeds=1,
        legend=legend,
        maps=_maps(run, season, extent, legend, pictures, int(chosen["fields"])),
        curves=_curves(run, pictures),
        confusions=tuple(
            _confusion(name, told, legend, pictures)
            for name, told in (("Pre-trained", better), ("From scratch", plain))
        ),
        per_class=_per_class(better, legend),
        stages=run.stages,
        commands=run.commands,
        files=_files(run),
        facts=_facts(season, better),
        made=run.made,
    )
    return write_demo_report(run.out / "report.html", report)


def _legend(season: Season) -> Legend:
    if season.legend is None or season.labels is None:
        raise ValueError(f"season {season.name} of {season.cube} holds no labels")
    return season.legend


def _extent(path: Path, season: Season) -> Window:
    """Return the map's place, counted from the season's first pixel."""
    import rasterio

    with rasterio.open(path) as source:
        bounds = tuple(source.bounds)
    return bounds_window(bounds, resolution=season.resolution).relative_to(season.window)


def _maps(
    run: DemoRun, season: Season, extent: Window, legend: Legend, pictures: Path, trained: int
) -> tuple[Picture, ...]:
    colour, date, names = _colour(season, extent)
    labels = season.labels[extent.rows, extent.cols]  # type: ignore[index]
    share = float((labels != UNLABELLED).mean())
    temperature = _evaluation(run.with_pretraining)["calibration"]["temperature"]
    said = "uncalibrated"
    if temperature is not None:
        said = f"calibrated by a temperature of {temperature:.2f}"
    shown = "True colour" if names == ("red", "green", "blue") else " / ".join(names)
    return (
        Picture(
            path=plots.plot_rgb(colour, pictures / "colour.png"),
            title=shown,
            alt=f"The region seen by the satellite on {date}.",
            caption=f"{date}, the clearest date of the growing season.",
        ),
        Picture(
            path=plots.plot_classes(labels, legend, pictures / "labels.png", with_legend=False),
            title="Declared crops",
            alt="Map of the parcels with their declared crop; unlabelled pixels are blank.",
            caption=f"{share:.0%} of the pixels; training saw the labels of {trained} fields.",
        ),
        Picture(
            path=plots.plot_class_map(
                run.product / "classes.tif", legend, pictures / "classes.png", with_legend=False
            ),
            title="Mapped crops",
            alt="Map of the class given to every pixel of the region.",
            caption="classes.tif, from the network with pre-training.",
        ),
        Picture(
            path=plots.plot_confidence(
                run.product / "confidence.tif", pictures / "confidence.png", with_bar=False
            ),
            title="Confidence",
            alt="Map of the probability of the class given: dark is unsure, yellow is sure.",
            caption=f"confidence.tif: the probability of the class chosen, dark to yellow; {said}.",
        ),
    )


def _colour(season: Season, extent: Window) -> tuple[Any, str, tuple[str, str, str]]:
    """Return the clearest date of the growing season as (H, W, 3) uint8, its day, its bands."""
    clear = season.coverage[:].sum(axis=(1, 2)).astype(float)
    month = season.time.astype("datetime64[M]").astype(int) % 12 + 1
    northern = _latitude(season) >= 0
    green = (month >= 4) & (month <= 8) if northern else (month >= 11) | (month <= 3)
    best = int(np.argmax(np.where(green, clear, clear * 1e-3)))
    names = overview_bands(season.bands)
    planes = [
        season.reflectance[best, season.bands.index(name), extent.rows, extent.cols]
        for name in names
    ]
    numbers = np.stack(planes, axis=-1).astype(np.float32)
    gray = np.sqrt(np.clip(numbers * SCALE / _WHITE, 0, 1)) * 255
    colour = np.where(numbers == FILL, 0, gray).astype(np.uint8)
    return colour, str(season.time[best].astype("datetime64[D]")), names


def _latitude(season: Season) -> float:
    centre = season.geobox.geographic_extent.centroid
    return float(centre.coords[0][1])


def _curves(run: DemoRun, pictures: Path) -> tuple[Picture, ...]:
    losses = {
        "training": _series(run.pretrained, "train_loss"),
        "validation": _series(run.pretrained, "validation_loss"),
    }
    judged = {
        "pre-trained": _series(run.with_pretraining, "validation_macro_miou"),
        "from scratch": _series(run.from_scratch, "validation_macro_miou"),
    }
    return (
        Picture(
            path=plots.plot_curves(
                {name: points for name, points in losses.items() if points},
                pictures / "pretraining.png",
                x_label="step",
                y_label="squared error of hidden values",
            ),
            title="Pre-training",
            alt="Error of the reconstruction of hidden observations over the training steps.",
            caption="In units of each band's variance; lower is better.",
        ),
        Picture(
            path=plots.plot_curves(
                judged, pictures / "finetuning.png", x_label="step", y_label="macro mIoU"
            ),
            title="Fine-tuning",
            alt="Macro mIoU on validation fields over the steps, with and without pre-training.",
            caption="On the validation fields; the step that is best here is kept.",
        ),
    )


def _confusion(name: str, told: dict[str, Any], legend: Legend, pictures: Path) -> Picture:
    matrix = np.asarray(told["confusion"])
    file = pictures / f"confusion-{name.lower().replace(' ', '-')}.png"
    return Picture(
        path=plots.plot_confusion(matrix, legend.names, file),
        title=name,
        alt=f"Confusion matrix on the held-out fields: {name.lower()}.",
        caption="Rows: declared; columns: mapped; shares of each row.",
    )


def _scores(name: str, told: dict[str, Any]) -> Scores:
    return Scores(
        name=name,
        overall_accuracy=told["overall_accuracy"],
        macro_miou=told["macro_miou"],
        macro_f1=told["macro_f1"],
        kappa=_number(told["kappa"]),
    )


def _per_class(told: dict[str, Any], legend: Legend) -> tuple[ClassScore, ...]:
    return tuple(
        ClassScore(
            name=entry.name,
            color=entry.color,
            fields=row["support_fields"],
            pixels=row["support_pixels"],
            iou=_number(row["iou"]),
            f1=_number(row["f1"]),
            users_accuracy=_number(row["users_accuracy"]),
            producers_accuracy=_number(row["producers_accuracy"]),
        )
        for entry, row in zip(legend.classes, told["per_class"], strict=True)
    )


def _facts(season: Season, told: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    crs: Any = season.geobox.crs
    name = f"EPSG:{crs.epsg}" if crs.epsg else crs.proj.name
    return (
        ("Season", f"{season.name}, {len(season.time)} dates"),
        ("Grid", f"{name}, {season.resolution:g} m"),
        ("Bands", ", ".join(season.bands)),
        ("Window", f"{told['window']} px, {told['halo']} px of halo"),
    )


def _files(run: DemoRun) -> tuple[OutputFile, ...]:
    wanted = (
        (run.product / "classes.tif", "Class map: cloud-optimized GeoTIFF with palette and names"),
        (run.product / "confidence.tif", "Confidence in percent: cloud-optimized GeoTIFF"),
        (run.product / "item.json", "STAC item of the map"),
        (run.with_pretraining / "checkpoints" / "best.safetensors", "The network"),
        (run.cube, "The cube: Zarr, one group per season"),
    )
    return tuple(
        OutputFile(path=str(path.relative_to(run.out)), what=what, size_bytes=_size(path))
        for path, what in wanted
    )


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _evaluation(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "evaluation-test" / "metrics.json")


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _series(folder: Path, name: str) -> list[tuple[float, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(float(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
