"""Draw how green the fields of each class are through a season."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..spreadsheet import csv_text
from .html import write_text
from .plots import INK, PLAIN_TEXT, save_figure

if TYPE_CHECKING:
    from ..data.profiles import FieldProfiles

__all__ = ["plot_profiles", "write_profiles"]

_COLUMNS = 4
_OTHERS = "#d5dbe3"


def plot_profiles(
    profiles: FieldProfiles, out_png: str | Path, *, others: str = "the other classes"
) -> Path:
    """Draw the NDVI of each class by itself: median and quartiles of its fields, others in grey.

    ``others`` is what the grey lines are called.
    """
    from matplotlib import dates, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [profiles.of_class(entry.code) for entry in profiles.legend.classes]
    columns = min(_COLUMNS, len(found))
    lines = -(-len(found) // columns)
    middle = profiles.first + np.timedelta64(profiles.step // 2, "D")
    with rc_context(PLAIN_TEXT):
        figure = Figure(
            figsize=(2.6 * columns + 0.5, 1.9 * lines + 0.5), layout="constrained",
            facecolor="white",
        )  # fmt: skip
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(found) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(len(found) - columns, 0) : len(found)]:
            # Below some of these is no other.
            axes.tick_params(labelbottom=True)
        for axes, own, entry in zip(grid.flat, found, profiles.legend.classes, strict=False):
            for other in found:
                seen = np.isfinite(other.median)
                axes.plot(middle[seen], other.median[seen], color=_OTHERS, linewidth=0.9)
            seen = np.isfinite(own.median)
            wide = np.isfinite(own.lower)
            axes.fill_between(
                middle[wide], own.lower[wide], own.upper[wide], color=entry.color, alpha=0.35,
                linewidth=0,
            )  # fmt: skip
            axes.plot(middle[seen], own.median[seen], color=INK, linewidth=2.4)
            axes.plot(middle[seen], own.median[seen], color=entry.color, linewidth=1.4)
            axes.set_title(
                f"{entry.name[:28]}, {own.fields} field{'' if own.fields == 1 else 's'}",
                fontsize=8, color=INK, loc="left", fontweight="bold",
            )  # fmt: skip
            axes.grid(color="#e5e9ee", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color("#b6c0cc")
            axes.tick_params(labelsize=7, colors=INK, length=0)
            axes.set_ylim(-0.1, 1.0)
            axes.xaxis.set_major_locator(dates.MonthLocator(bymonth=range(1, 13, 3)))
            axes.xaxis.set_major_formatter(dates.DateFormatter("%b"))
        figure.supylabel("NDVI", fontsize=8, color=INK)
        figure.supxlabel(
            f"season {profiles.season}: median and quartiles of fields; grey: {others}",
            fontsize=8, color=INK,
        )  # fmt: skip
        save_figure(figure, out_png)
    return Path(out_png)


def write_profiles(profiles: FieldProfiles, out_csv: str | Path) -> Path:
    """Write the quartiles of each class and period as a table; empty where there is none."""
    rows: list[list[object]] = [
        ["class", "first_day", "fields", "lower_quartile", "median", "upper_quartile"]
    ]
    for entry in profiles.legend.classes:
        own = profiles.of_class(entry.code)
        seen = np.isfinite(profiles.ndvi[profiles.code == entry.code]).sum(axis=0)
        for period, day in enumerate(profiles.first):
            figures = (own.lower[period], own.median[period], own.upper[period])
            cells = ["" if np.isnan(value) else f"{value:.4f}" for value in figures]
            rows.append([entry.name, str(day), int(seen[period]), *cells])
    return write_text(out_csv, csv_text(rows))
