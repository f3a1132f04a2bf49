"""Draw experiments: curves with intervals, arms side by side, differences against zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .plots import INK, LINES, figure, style_lines

__all__ = ["Dot", "plot_dots", "plot_levels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A mean with its interval, and the values it is of."""

    label: str
    """What stands at the axis."""
    mean: float
    low: float | None = None
    high: float | None = None
    """Ends of the interval; None of a single value."""
    values: tuple[float, ...] = ()
    place: float | None = None
    """Where it lies on the horizontal axis of `plot_levels`; by default one after the other."""
    hue: int | None = None
    """Number of its colour in `plot_dots`; by default that of its row."""


def plot_levels(
    curves: Mapping[str, Sequence[Dot]],
    out_png: str | Path,
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
) -> Path:
    """Draw curves of means, intervals as bands and bars, and single values as small dots.

    Where all places are known and above 0, and the largest is more than 8 times the smallest, the
    horizontal axis is logarithmic.
    """
    with figure(6.4, 3.9, out_png) as axes:
        first = next(iter(curves.values()))
        known = [dot.place for dots in curves.values() for dot in dots]
        places = {dot.label: float(at) for at, dot in enumerate(first)}
        scaled = all(place is not None for place in known)
        if scaled:
            places = {dot.label: float(dot.place or 0) for dots in curves.values() for dot in dots}
            if min(places.values()) > 0 and max(places.values()) > 8 * min(places.values()):
                axes.set_xscale("log")
        for number, (name, dots) in enumerate(curves.items()):
            color = LINES[number % len(LINES)]
            at = [places[dot.label] for dot in dots]
            bars = [
                (place, dot.low, dot.high) for place, dot in zip(at, dots, strict=True)
                if dot.low is not None and dot.high is not None
            ]  # fmt: skip
            if len(bars) > 1:
                across, low, high = zip(*bars, strict=True)
                axes.fill_between(across, low, high, color=color, alpha=0.14, linewidth=0)
            for place, bottom, top in bars:
                axes.plot([place, place], [bottom, top], color=color, linewidth=1.2, alpha=0.8)
            for place, dot in zip(at, dots, strict=True):
                axes.plot(
                    [place] * len(dot.values), dot.values, "o", color=color, markersize=3,
                    alpha=0.35, markeredgewidth=0,
                )  # fmt: skip
            axes.plot(at, [dot.mean for dot in dots], "o-", color=color, markersize=5,
                      linewidth=1.6, label=name)  # fmt: skip
        axes.set_xticks(list(places.values()), list(places))
        axes.minorticks_off()
        style_lines(axes, x_label=x_label, y_label=y_label, title=title)
        if len(places) > 8:
            axes.tick_params(axis="x", rotation=35)
    return Path(out_png)


def plot_dots(
    dots: Sequence[Dot],
    out_png: str | Path,
    *,
    x_label: str,
    title: str | None = None,
    zero: bool = False,
) -> Path:
    """Draw means one below the other, with intervals and single values.

    Parameters
    ----------
    zero
        True draws a line at 0, for differences.
    """
    longest = max(len(dot.label) for dot in dots)
    with figure(4.4 + 0.065 * longest, 1.1 + 0.36 * len(dots), out_png) as axes:
        if zero:
            axes.axvline(0.0, color=INK, linewidth=1.0)
        for row, dot in enumerate(dots):
            hue = row if dot.hue is None else dot.hue
            color = LINES[0 if zero else hue % len(LINES)]
            if dot.low is not None and dot.high is not None:
                axes.plot([dot.low, dot.high], [row, row], color=color, linewidth=2.0)
            axes.plot(dot.values, [row] * len(dot.values), "o", color=color, markersize=3.5,
                      alpha=0.35, markeredgewidth=0)  # fmt: skip
            axes.plot([dot.mean], [row], "o", color=color, markersize=6)
        axes.set_yticks(range(len(dots)), [dot.label for dot in dots])
        axes.set_ylim(len(dots) - 0.5, -0.5)
        axes.grid(color="#e5e9ee", linewidth=0.8, axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#b6c0cc")
        axes.tick_params(labelsize=8, colors=INK, length=0)
        axes.set_xlabel(x_label, fontsize=9, color=INK)
        if title:
            axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    return Path(out_png)
