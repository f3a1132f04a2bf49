"""The page that shows the accuracy of a map, with its pictures."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import __version__
from .area import Estimate
from .html import Picture, write_page
from .plots import plot_areas, plot_confusion

if TYPE_CHECKING:
    from .accuracy import MapAccuracy

__all__ = ["write_accuracy_page"]

_FEW_UNITS = 100
"""With fewer units the page says that its intervals are rough."""


def write_accuracy_page(accuracy: MapAccuracy, folder: Path) -> Path:
    """Draw the pictures and write ``report.html``, which holds them, into a folder."""
    legend, found = accuracy.legend, accuracy.estimates
    counts = plot_confusion(
        accuracy.metrics.confusion, legend.names, folder / "confusion.png", normalise=False
    )
    shares = plot_confusion(found.proportions, legend.names, folder / "confusion-area.png")
    areas = plot_areas(
        legend,
        mapped=accuracy.mapped_areas / 1e4,
        adjusted=np.array([one.value for one in accuracy.areas]) / 1e4,
        intervals=np.array([[one.lower, one.upper] for one in accuracy.areas]) / 1e4,
        out_png=folder / "areas.png",
    )
    pictures = (
        Picture(
            path=shares,
            title="Weighted by area",
            alt="Confusion matrix of estimated area shares",
            caption="Percent of each class's true area, as estimated, by what the map says there.",
        ),
        Picture(
            path=counts,
            title=f"Counts of the {accuracy.kind}",
            alt="Confusion matrix of counts",
            caption=f"Number of {accuracy.kind}; colours show the share of each row.",
        ),
    )
    area_picture = Picture(
        path=areas,
        title="Area per class",
        alt="Mapped and estimated area of each class with confidence intervals",
        caption="Bars: counted on the map. Dots: adjusted for the map's errors, with intervals.",
    )
    rows = [
        {
            "entry": entry,
            "support": int(accuracy.metrics.support[entry.code]),
            "users": _interval(found.users_accuracy[entry.code]),
            "producers": _interval(found.producers_accuracy[entry.code]),
            "f1": _interval(found.f1[entry.code]),
            "iou": _interval(found.iou[entry.code]),
            "mapped": f"{accuracy.mapped_areas[entry.code] / 1e4:,.1f}",
            "area": _hectares(accuracy.areas[entry.code]),
        }
        for entry in legend.classes
    ]
    return write_page(
        folder / "report.html",
        "accuracy.html.j2",
        accuracy=accuracy,
        found=found,
        level=f"{100 * found.confidence_level:g}",
        overall=_interval(found.overall_accuracy),
        rows=rows,
        pictures=pictures,
        area_picture=area_picture,
        few=accuracy.used < _FEW_UNITS,
        made=f"{datetime.date.today().isoformat()}, stcln-geo {__version__}",
    )


def _interval(one: Estimate) -> dict[str, str]:
    """Return value, half interval and ends, in percent, as text."""
    if math.isnan(one.value):
        return {"value": "\N{EN DASH}", "ends": ""}
    if math.isnan(one.standard_error):
        return {"value": f"{100 * one.value:.1f}", "ends": "no interval"}
    ends = f"{100 * one.lower:.1f} \N{EN DASH} {100 * one.upper:.1f}"
    return {"value": f"{100 * one.value:.1f}", "ends": ends}


def _hectares(one: Estimate) -> dict[str, str]:
    if math.isnan(one.value):
        return {"value": "\N{EN DASH}", "ends": ""}
    ends = "no interval"
    if not math.isnan(one.standard_error):
        ends = f"{one.lower / 1e4:,.1f} \N{EN DASH} {one.upper / 1e4:,.1f}"
    return {"value": f"{one.value / 1e4:,.1f}", "ends": ends}
