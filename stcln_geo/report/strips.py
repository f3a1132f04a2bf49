"""Draw chips date by date: as they are, as a network was shown them, and as it filled them in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .plots import INK, rgb_of, save_figure

__all__ = ["CLOUD_COLOR", "HIDDEN_COLOR", "plot_strip"]

HIDDEN_COLOR = "#4f46e5"
"""Colour of what is hidden."""

CLOUD_COLOR = "#dfe4ea"
"""Colour of what was never clear."""

_ROWS = ("truth", "shown to\nthe network", "filled in")
_SIDE = 1.05
"""Inches of a chip, so that six fit the page."""


def plot_strip(
    truth: NDArray[Any],
    made: NDArray[Any],
    hidden: NDArray[np.bool_],
    dates: Sequence[str],
    out_png: str | Path,
) -> Path:
    """Draw a chip in three rows, a column a date; each colour is stretched over the truth.

    Parameters
    ----------
    truth : (T, 3, H, W)
        Reflectance of what is shown as red, green and blue; NaN where not valid.
    made : (T, 3, H, W)
        The same, with what a network put in the place of hidden values.
    hidden : (T, 3, H, W) bool
        True where the network did not see the value; a pixel is painted where any of its three is.
    dates : (T,) text
    out_png : str or Path
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if truth.ndim != 4 or 0 in truth.shape or truth.shape[:2] != (len(dates), 3):
        raise InputError(
            f"Cannot draw a chip of shape {truth.shape} on {len(dates)} dates: it must be (dates, "
            "3, rows, columns), with one date at least. Choose three bands and the dates to show."
        )
    shown = [_to_colours(values, truth) for values in (truth, truth, made)]
    shown[1][hidden.any(1)] = rgb_of(HIDDEN_COLOR)

    columns, height, width = len(dates), *truth.shape[2:]
    inches = _SIDE * height / width
    figure = Figure(
        figsize=(0.9 + columns * (_SIDE + 0.06), 0.3 + 3 * (inches + 0.06)), facecolor="white"
    )
    FigureCanvasAgg(figure)
    wide, high = figure.get_figwidth(), figure.get_figheight()
    for row, (label, images) in enumerate(zip(_ROWS, shown, strict=True)):
        for column, image in enumerate(images):
            left = 0.9 + column * (_SIDE + 0.06)
            bottom = high - 0.3 - (row + 1) * (inches + 0.06) + 0.06
            axes = figure.add_axes((left / wide, bottom / high, _SIDE / wide, inches / high))
            axes.imshow(image, interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(dates[column], fontsize=8, color=INK, pad=4)
            if column == 0:
                axes.set_ylabel(
                    label, fontsize=8, color=INK, rotation=0, ha="right", va="center", labelpad=6
                )
    save_figure(figure, out_png)
    return Path(out_png)


def _to_colours(values: NDArray[Any], truth: NDArray[Any]) -> NDArray[np.uint8]:
    """Return (T, H, W, 3) uint8: each colour from the 2nd to the 98th percentile of the truth."""
    colours = np.empty((len(values), *values.shape[2:], 3), dtype=np.uint8)
    for place in range(3):
        clear = truth[:, place][np.isfinite(truth[:, place])]
        low, high = np.percentile(clear, (2, 98)) if clear.size else (0.0, 1.0)
        gray = (values[:, place] - low) / max(high - low, 1e-6)
        colours[..., place] = np.nan_to_num(np.clip(gray, 0, 1)) * 255
    colours[~np.isfinite(values).all(1)] = rgb_of(CLOUD_COLOR)
    return colours
