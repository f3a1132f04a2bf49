"""How far confidence is from the share of pixels that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .plots import INK, LINES, figure, style_lines

__all__ = ["Calibration", "plot_reliability"]

_BINS = 15


class Calibration:
    """Pixels by confidence, and how many of them were right.

    Parameters
    ----------
    bins
        Of equal width, from 0 to 1; each holds its upper edge.
    """

    def __init__(self, bins: int = _BINS) -> None:
        self.count = np.zeros(bins, dtype=np.int64)
        """(N,) pixels."""
        self.right = np.zeros(bins, dtype=np.int64)
        """(N,) pixels whose class is the true one."""
        self.confidence = np.zeros(bins)
        """(N,) sums of their confidence."""

    def add(self, confidence: np.ndarray, right: np.ndarray) -> None:
        """Count pixels.

        Parameters
        ----------
        confidence : (P,) float, the probability of the class that was given, 0 to 1.
        right : (P,) bool. True where it is the true one.
        """
        bins = len(self.count)
        confidence = np.asarray(confidence, dtype=np.float64)
        place = self._place(confidence)
        self.count += np.bincount(place, minlength=bins)
        self.right += np.bincount(place[right], minlength=bins)
        self.confidence += np.bincount(place, weights=confidence, minlength=bins)

    def add_bins(self, bins: Sequence[Mapping[str, float]]) -> None:
        """Count the pixels of bins as `to_json` gave them, of as many bins as here."""
        for row in bins:
            place = self._place(np.array([row["confidence"]]))
            self.count[place] += int(row["pixels"])
            self.right[place] += round(row["pixels"] * row["right"])
            self.confidence[place] += row["pixels"] * row["confidence"]

    def _place(self, confidence: np.ndarray) -> np.ndarray:
        """Return the bin of each confidence."""
        bins = len(self.count)
        edges = np.linspace(0, 1, bins + 1)
        return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)

    @property
    def error(self) -> float | None:
        """Expected calibration error (Guo et al. 2017), 0 to 1; None without pixels.

        The mean distance of a bin's confidence from its share of right pixels, by pixels.
        """
        total = int(self.count.sum())
        if not total:
            return None
        return float(np.abs(self.confidence - self.right).sum() / total)

    def to_json(self) -> list[dict[str, float | int]]:
        """Return the bins that hold pixels as plain JSON values."""
        return [
            {
                "pixels": int(count),
                "confidence": float(confidence / count),
                "right": float(right / count),
            }
            for count, right, confidence in zip(
                self.count, self.right, self.confidence, strict=True
            )
            if count
        ]


def plot_reliability(calibrations: Mapping[str, Calibration], out_png: str | Path) -> Path:
    """Draw the share of right pixels over confidence; what is calibrated lies on the diagonal.

    Parameters
    ----------
    calibrations : by label; the larger a dot, the more pixels it stands for.
    """
    with figure(4.8, 4.2, out_png) as axes:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":", label="calibrated")
        for number, (label, calibration) in enumerate(calibrations.items()):
            bins = calibration.to_json()
            error = calibration.error
            told = label if error is None else f"{label}: error {error:.3f}"
            at, share = [row["confidence"] for row in bins], [row["right"] for row in bins]
            axes.plot(at, share, color=LINES[number], linewidth=1.6, label=told)
            most = max((row["pixels"] for row in bins), default=1)
            sizes = [8 + 90 * row["pixels"] / most for row in bins]
            axes.scatter(at, share, s=sizes, color=LINES[number], alpha=0.75, linewidths=0)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        style_lines(axes, x_label="confidence", y_label="share of pixels that are right")
    return Path(out_png)
