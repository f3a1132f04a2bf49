"""Draw the pictures of a report: maps, confusion matrices, curves.

Every function writes one PNG and returns its path. matplotlib's objects are used directly, never
pyplot, so that drawing works in any thread and leaves no state behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingFileError
from ..legend import CLASS_NODATA, Legend
from ..storage import part_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PLAIN_TEXT",
    "figure",
    "plot_areas",
    "plot_class_map",
    "plot_classes",
    "plot_confidence",
    "plot_confusion",
    "plot_curves",
    "plot_rgb",
    "rgb_of",
    "save_figure",
    "style_lines",
]

INK = "#1f2a37"
"""Colour of text and axes."""

LINES = ("#0f766e", "#c2410c", "#4f46e5", "#be185d", "#65a30d", "#0369a1", "#a16207", "#6b7280")
"""Colours of curves, in order."""

_NODATA_COLOR = "#eef1f4"
_DPI = 144
_WIDEST = 30.0
"""Side of the cells of a confusion matrix together, at most (inches)."""
_LARGEST = 1400


def plot_class_map(
    path_tif: str | Path,
    legend: Legend,
    out_png: str | Path,
    *,
    with_legend: bool = True,
    title: str | None = None,
) -> Path:
    """Draw a class map's file; a large one is read from its overviews.

    Parameters
    ----------
    path_tif : str or Path
        Raster of class codes, uint8; its nodata and 255 stay empty.
    legend : Legend
    out_png : str or Path
    with_legend : bool
        True draws the classes that occur below the map.
    title : str, optional
    """
    classes, nodata = _read_reduced(path_tif)
    if nodata is not None:
        classes = np.where(classes == nodata, CLASS_NODATA, classes)
    return plot_classes(classes, legend, out_png, with_legend=with_legend, title=title)


def plot_classes(
    classes: NDArray[Any],
    legend: Legend,
    out_png: str | Path,
    *,
    with_legend: bool = True,
    title: str | None = None,
) -> Path:
    """Draw class codes (H, W); 255 and codes that the legend lacks stay empty."""
    from matplotlib.patches import Patch

    classes = np.asarray(_check_plane(classes, "a class map"))
    table = np.full((256, 3), rgb_of(_NODATA_COLOR), dtype=np.uint8)
    for code, color in legend.colormap().items():
        table[code] = color[:3]
    image = table[np.where((classes >= 0) & (classes < 256), classes, 255).astype(np.int64)]
    present = [entry for entry in legend.classes if (classes == entry.code).any()]
    rows = int(np.ceil(len(present) / 4)) if with_legend else 0
    with _image_figure(image, out_png, title=title, footer=0.24 * rows) as axes:
        if rows:
            handles = [Patch(facecolor=entry.color, label=entry.name) for entry in present]
            axes.legend(
                handles=handles,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.01),
                ncols=min(4, len(handles)),
                frameon=False,
                fontsize=8,
                labelcolor=INK,
            )
    return Path(out_png)


def plot_confidence(
    confidence: str | Path | NDArray[Any],
    out_png: str | Path,
    *,
    with_bar: bool = True,
    title: str | None = None,
) -> Path:
    """Draw confidence in percent, from dark (0) to yellow (100).

    Parameters
    ----------
    confidence : path or (H, W)
        Percent from 0 to 100; 255 and a file's nodata stay empty.
    out_png : str or Path
    with_bar : bool
        True draws a colour bar below the map.
    title : str, optional
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    nodata: float | None = 255
    if isinstance(confidence, str | Path):
        confidence, nodata = _read_reduced(confidence)
    percent = _check_plane(confidence, "a confidence map")
    colors = colormaps["viridis"]
    image = (colors(np.clip(percent / 100.0, 0, 1))[..., :3] * 255).astype(np.uint8)
    image[(percent == (255 if nodata is None else nodata)) | (percent > 100)] = rgb_of(
        _NODATA_COLOR
    )
    with _image_figure(image, out_png, title=title, footer=0.56 if with_bar else 0.0) as axes:
        if with_bar:
            figure: Any = axes.figure
            place = figure.add_axes((0.2, 0.42 / figure.get_figheight(), 0.6, 0.02))
            scale = ScalarMappable(norm=Normalize(0, 100), cmap=colors)
            bar = figure.colorbar(scale, cax=place, orientation="horizontal")
            bar.outline.set_visible(False)
            bar.set_label("confidence, percent", fontsize=8, color=INK, labelpad=1)
            bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    return Path(out_png)


def plot_rgb(rgb: NDArray[np.uint8], out_png: str | Path, *, title: str | None = None) -> Path:
    """Draw a true-colour image (H, W, 3) uint8."""
    rgb = np.asarray(rgb)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise InputError(
            f"Cannot draw an image of shape {rgb.shape} and type {rgb.dtype}: it must be "
            "(height, width, 3) of uint8. Scale reflectance to 0..255 and put the colours last."
        )
    with _image_figure(rgb, out_png, title=title):
        pass
    return Path(out_png)


def plot_confusion(
    matrix: NDArray[Any],
    names: Sequence[str],
    out_png: str | Path,
    *,
    normalise: bool = True,
    title: str | None = None,
) -> Path:
    """Draw a confusion matrix.

    Parameters
    ----------
    matrix : (K, K) counts
        Rows are the truth, columns the prediction.
    names : sequence of str
        One name per class.
    out_png : str or Path
    normalise : bool
        True shows percent of each row; a row without truth stays empty.
    title : str, optional
    """
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.shape != (len(names), len(names)):
        raise InputError(
            f"Cannot draw a confusion matrix of shape {counts.shape} with {len(names)} names: "
            "it must be square with one name per class. Pass the names of its own legend."
        )
    total = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    # Of hundreds of classes the cells shrink: pixels in memory go by the square of the side.
    cell = min(0.52, _WIDEST / len(names))
    side = 1.9 + cell * len(names)
    font = min(8.0, 8.0 * cell / 0.3)
    with figure(side, side - 0.3, out_png) as axes:
        axes.imshow(np.nan_to_num(shares), cmap=_sequential(), vmin=0, vmax=1)
        for row, col in np.ndindex(*counts.shape):
            share, count = shares[row, col], counts[row, col]
            text = "" if np.isnan(share) or not count else f"{100 * share:.0f}"
            if not normalise:
                text = f"{count:.0f}" if count else ""
            color = "white" if share > 0.5 else INK
            if text:
                axes.text(col, row, text, ha="center", va="center", fontsize=font, color=color)
        places = np.arange(len(names))
        axes.set_xticks(places, names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, names)
        axes.set_xticks(places[1:] - 0.5, minor=True)
        axes.set_yticks(places[1:] - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5 * cell / 0.52)
        axes.tick_params(which="both", length=0, labelsize=8, colors=INK)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted", fontsize=9, color=INK)
        axes.set_ylabel("percent of the truth" if normalise else "truth", fontsize=9, color=INK)
        if title:
            axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    return Path(out_png)


def plot_areas(
    legend: Legend,
    *,
    mapped: NDArray[Any],
    adjusted: NDArray[Any],
    intervals: NDArray[Any],
    out_png: str | Path,
) -> Path:
    """Draw the area of each class: mapped as a bar, estimated as a dot with its interval.

    Parameters
    ----------
    legend : Legend
    mapped, adjusted : (K,) hectares
    intervals : (K, 2) hectares, lower and upper end; NaN where there is none.
    """
    places = np.arange(len(legend))
    with figure(6.4, 1.2 + 0.42 * len(legend), out_png) as axes:
        colors = [entry.color for entry in legend.classes]
        axes.barh(places, mapped, height=0.6, color=colors, alpha=0.55, label="mapped")
        known = np.isfinite(intervals).all(axis=1)
        axes.hlines(places[known], *intervals[known].T, color=INK, linewidth=1.6)
        axes.plot(adjusted, places, "o", color=INK, markersize=5, label="adjusted")
        axes.set_yticks(places, legend.names)
        axes.invert_yaxis()
        style_lines(axes, x_label="hectares", y_label="", title=None)
    return Path(out_png)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    out_png: str | Path,
    *,
    x_label: str = "step",
    y_label: str = "loss",
    y_range: tuple[float, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draw curves of (step, value) by label; values that are not finite are left out."""
    if not any(curves.values()):
        raise InputError(
            "Cannot draw curves: there is no point in any of them. Pass at least one (step, value)."
        )
    with figure(6.4, 3.4, out_png) as axes:
        for number, (label, points) in enumerate(curves.items()):
            finite = [(x, y) for x, y in points if np.isfinite(y)]
            marker = "o" if len(finite) < 25 else ""
            axes.plot(
                [x for x, _ in finite],
                [y for _, y in finite],
                label=label,
                color=LINES[number % len(LINES)],
                linewidth=1.8,
                marker=marker,
                markersize=3,
            )
        style_lines(axes, x_label=x_label, y_label=y_label, title=title)
        if y_range is not None:
            axes.set_ylim(*y_range)
    return Path(out_png)


PLAIN_TEXT: Any = {"text.parse_math": False}
"""Names of classes are no formulas, whatever dollar signs they hold."""


@contextmanager
def figure(width: float, height: float, out_png: str | Path) -> Iterator[Axes]:
    """Give axes of a figure in inches, and write the figure when all is drawn."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(PLAIN_TEXT):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        save_figure(figure, out_png)


@contextmanager
def _image_figure(
    image: NDArray[np.uint8], out_png: str | Path, *, title: str | None, footer: float = 0.0
) -> Iterator[Axes]:
    """Give axes filled by an image, with room in inches for what stands below it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 5.0
    picture = width * image.shape[0] / image.shape[1]
    header = 0.32 if title else 0.0
    height = header + picture + footer
    with rc_context(PLAIN_TEXT):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, footer / height, 1, picture / height))
        axes.imshow(image, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        if title:
            axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
        yield axes
        save_figure(figure, out_png)


def save_figure(figure: Any, out_png: str | Path) -> None:
    """Write beside the target, then rename, so that no half picture is ever there."""
    target = Path(out_png)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = part_path(target)
    figure.savefig(partial, dpi=_DPI, format="png")
    os.replace(partial, target)


def style_lines(axes: Axes, *, x_label: str, y_label: str, title: str | None = None) -> None:
    """Give axes of lines their grid and labels, and a legend below, where no line can run."""
    axes.grid(color="#e5e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b6c0cc")
    axes.tick_params(labelsize=8, colors=INK, length=0)
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.set_ylabel(y_label, fontsize=9, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    if handles and axes.figure is not None:
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, len(handles)),
            frameon=False, fontsize=8, labelcolor=INK,
        )  # fmt: skip
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")


def _sequential() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    steps = ["#f4f7f7", "#b9dcd8", "#4fa39b", "#0f766e", "#0a4d48"]
    return LinearSegmentedColormap.from_list("share", steps)


def _read_reduced(path: str | Path) -> tuple[NDArray[Any], float | None]:
    """Read a raster's first band, not larger than a picture needs."""
    import rasterio
    from rasterio.enums import Resampling

    if not Path(path).exists():
        raise MissingFileError(
            f"Cannot draw '{path}': there is no such file. Run the prediction first."
        )
    with rasterio.open(path) as file:
        shrink = max(1.0, max(file.shape) / _LARGEST)
        shape_yx = tuple(max(1, round(size / shrink)) for size in file.shape)
        return file.read(1, out_shape=shape_yx, resampling=Resampling.nearest), file.nodata


def _check_plane(array: NDArray[Any], what: str) -> NDArray[Any]:
    plane = np.asarray(array)
    if plane.ndim != 2 or not plane.size:
        raise InputError(
            f"Cannot draw {what} of shape {plane.shape}: it must be (height, width) with at least "
            "one pixel. Select one band or one date first."
        )
    return plane


def rgb_of(color: str) -> tuple[int, int, int]:
    """Return red, green and blue, from 0 to 255, of a colour ``#rrggbb``."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
