"""Write the report of a pre-training run: one HTML page that holds everything it shows."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from .html import Picture, write_page
from .strips import CLOUD_COLOR, HIDDEN_COLOR

__all__ = ["PretrainingReport", "write_pretraining_report"]

_MOST_SOURCES = 40
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingReport:
    """All that the page shows: plain numbers, words and paths."""

    title: str
    run: Mapping[str, Any]
    """Content of ``run.json``."""
    environment: Mapping[str, Any]
    """Content of ``environment.json``."""
    config: Mapping[str, Any]
    """The recipe, as ``config.toml`` has it."""
    errors: Sequence[Mapping[str, Any]]
    """Rows of ``errors.csv``; the error is None where nothing was hidden. Empty: nothing judged."""
    hidden_share: float | None
    """Share of the usable values that was hidden in training, in the last round."""
    first_month: int
    """Calendar month in which seasons begin."""
    curves: Path | None
    """PNG of the losses."""
    chips: Sequence[Picture]
    """Chips that were filled in."""


def write_pretraining_report(out_html: str | Path, report: PretrainingReport) -> Path:
    """Write the page, with all pictures inside it, and return its path.

    Raises
    ------
    MissingFileError
        If a picture does not exist.
    """
    rows = {(row["month"], row["band"]): row for row in report.errors}
    total = rows.get(("all", "all"))
    bands = [
        {"name": row["band"], **_told(row)}
        for row in report.errors
        if row["month"] == "all" and row["band"] != "all"
    ]
    months = []
    for place in range(12):
        month = (report.first_month - 1 + place) % 12 + 1
        row = rows.get((f"{month:02d}", "all"))
        if row is not None:
            months.append({"name": _MONTHS[month - 1], **_told(row)})
    found = [row["error"] for row in (*bands, *months) if row["error"] is not None]
    curves = Picture(
        path=report.curves,
        title="Squared error of hidden values",
        alt="Error in training and in validation over the steps",
        caption="In units of each band's variance. The lowest validation error chose the weights.",
    ) if report.curves is not None else None  # fmt: skip
    return write_page(
        out_html,
        "pretraining.html.j2",
        report=report,
        run=report.run,
        data=report.run.get("data", {}),
        total=total,
        bands=bands,
        months=months,
        largest=max(found, default=0.0) or 1.0,
        curves=curves,
        masking=_describe_masking(report.config.get("masking", {})),
        sources=report.environment.get("cubes", [])[:_MOST_SOURCES],
        more_sources=max(len(report.environment.get("cubes", [])) - _MOST_SOURCES, 0),
        hidden_color=HIDDEN_COLOR,
        cloud_color=CLOUD_COLOR,
        made=f"{datetime.date.today().isoformat()}, stcln-geo {__version__}",
    )


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's numbers, and why there is no error where there is none."""
    why = None
    if row["error"] is None:
        why = "never hidden" if row["usable"] else "no clear date"
    return {**{key: row[key] for key in ("usable", "hidden", "error", "rmse")}, "why": why}


def _describe_masking(options: Mapping[str, Any]) -> str:
    """Say in one sentence what was hidden."""
    block = options.get("block", 4)
    what = {
        "space-time": "pixels of single dates",
        "time": "whole dates",
        "block": f"squares of {block} px on single dates",
        "tube": f"squares of {block} px on all dates",
        "band-group": f"groups of bands in squares of {block} px on single dates",
    }[str(options.get("strategy", "space-time"))]
    ratio = f"with a chance of {options.get('mask_ratio', 0.4):g}"
    if options.get("mask_ratio_start") is not None:
        ratio = (
            f"with a chance that goes from {options['mask_ratio_start']:g} to "
            f"{options.get('mask_ratio', 0.4):g} ({options['schedule']})"
        )
    gate = ", on dates on which nearly the whole chip is green" if options.get("gate", True) else ""
    return f"{what}, {ratio}{gate}"
