"""A picture of proposed sites, to look at before anything is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..cube.store import writing

if TYPE_CHECKING:
    import geopandas

    from ..region import Region

__all__ = ["draw_sites"]

_MOST_NAMED = 20
"""Strata that the legend names."""


def draw_sites(
    table: geopandas.GeoDataFrame, path: Path, *, region: Region | None, title: str
) -> Path:
    """Draw points in lon/lat, coloured by their column ``stratum``, and write a PNG."""
    import math

    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if region is not None:
        for part in getattr(region.geometry, "geoms", [region.geometry]):
            axes.plot(*part.exterior.xy, color="0.5", linewidth=0.8)
    names = sorted(set(table["stratum"]))
    colours = colormaps["tab20" if len(names) > 10 else "tab10"]
    for number, name in enumerate(names):
        points = table.geometry[table["stratum"] == name]
        named = number < _MOST_NAMED
        axes.scatter(
            points.x, points.y, s=14, color=colours(number % colours.N), edgecolor="white",
            linewidth=0.3, label=f"{name} ({len(points)})" if named else None,
        )  # fmt: skip
    middle = math.radians(float(table.geometry.y.mean()))
    axes.set_aspect(1 / max(math.cos(middle), 0.1))
    axes.set_xlabel("longitude (degrees)")
    axes.set_ylabel("latitude (degrees)")
    axes.set_title(f"{title}: {len(table)} sites in {len(names)} strata")
    axes.grid(linewidth=0.3)
    axes.legend(
        title="stratum (sites)", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False,
        fontsize="small",
    )  # fmt: skip
    with writing(path.parent):
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        figure.savefig(temporary, dpi=110, format="png")
        temporary.replace(path)
    return path
