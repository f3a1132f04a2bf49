"""Errors of reconstruction by band and by calendar month, summed over chips and ranks."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch

__all__ = ["ALL", "MONTHS", "ErrorTable", "add_up_errors", "months_of", "read_error_rows"]

MONTHS = tuple(f"{month:02d}" for month in range(1, 13))
ALL = "all"
"""Name of the row over all months, and of the column over all bands."""

_COLUMNS = ("month", "band", "usable", "hidden", "error", "rmse")


def months_of(batch: Batch) -> np.ndarray:
    """Return the calendar month of each date, (B, T) int64 from 1 to 12.

    0 where a chip's season is not known, as of blank chips.
    """
    months = np.zeros(tuple(batch.days.shape), dtype=np.int64)
    days = batch.days.cpu().numpy().astype(np.int64)
    for chip, source in enumerate(batch.sources):
        if source is not None:
            dates = np.datetime64(source.season, "D") + days[chip]
            months[chip] = dates.astype("datetime64[M]").astype(np.int64) % 12 + 1
    return months


def add_up_errors(errors: Tensor, hidden: Tensor, valid: Tensor, months: np.ndarray) -> Tensor:
    """Add up the errors of a batch by month and band.

    Parameters
    ----------
    errors : (B, T, C, H, W) float. Squared errors, in normalised units; 0 where not hidden.
    hidden : (B, T, 1 or C, H, W) bool. True where hidden and valid.
    valid : (B, T, H, W) bool. True where usable.
    months : (B, T) int, as `months_of` gives them.

    Returns
    -------
    (3, 13, C) float64 on the device of ``errors``: squared errors, hidden values, usable values.
    """
    bands = errors.shape[2]
    usable = valid.sum((-2, -1))[:, :, None]
    each = torch.stack(
        [
            errors.sum((-2, -1), dtype=torch.float64),
            hidden.sum((-2, -1)).double().expand(-1, -1, bands),
            usable.double().expand(-1, -1, bands),
        ]
    )  # (3, B, T, C)
    place = torch.from_numpy(months.reshape(-1)).to(errors.device)
    table = torch.zeros(3, 13, bands, dtype=torch.float64, device=errors.device)
    return table.index_add_(1, place, each.flatten(1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorTable:
    """What `add_up_errors` gave, over all batches and ranks."""

    bands: tuple[str, ...]
    std: np.ndarray
    """(C,) float64: deviation of each band in reflectance, by which errors were normalised."""
    sums: np.ndarray
    """(3, 13, C) float64: squared errors, hidden values, usable values; by month from 1."""

    @property
    def mean(self) -> float | None:
        """Mean squared error over all hidden values; None where none was hidden."""
        error: float | None = self._row(ALL, ALL, self.sums.sum(1), self.std)["error"]
        return error

    def figures(self) -> dict[str, float | None]:
        """Return errors and RMSE per band and per month, by name; None where nothing was hidden."""
        found: dict[str, float | None] = {}
        rows = self.rows()
        for row in rows:
            if (row["month"] == ALL) == (row["band"] == ALL):
                continue
            name = row["band"] if row["month"] == ALL else f"month-{row['month']}"
            found[f"validation_error/{name}"] = row["error"]
            found[f"validation_rmse/{name}"] = row["rmse"]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each month and band, and for all of either.

        ``error`` is the mean squared error in normalised units, ``rmse`` the root of it in
        reflectance; both None where nothing was hidden.
        """
        months = {ALL: self.sums.sum(1)}
        months |= {name: self.sums[:, place] for place, name in enumerate(MONTHS, start=1)}
        bands = {ALL: slice(None)}
        bands |= {name: slice(place, place + 1) for place, name in enumerate(self.bands)}
        return [
            self._row(month, band, sums[:, chosen], self.std[chosen])
            for month, sums in months.items()
            for band, chosen in bands.items()
        ]

    def _row(self, month: str, band: str, sums: np.ndarray, std: np.ndarray) -> dict[str, Any]:
        squared, hidden, usable = sums.sum(1)
        return {
            "month": month,
            "band": band,
            "usable": int(usable),
            "hidden": int(hidden),
            "error": float(squared / hidden) if hidden else None,
            "rmse": math.sqrt(float((sums[0] * std**2).sum()) / hidden) if hidden else None,
        }

    def to_csv(self) -> str:
        """Return the rows as CSV; error and rmse are empty where nothing was hidden."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()


def read_error_rows(text: str) -> list[dict[str, Any]]:
    """Read what `ErrorTable.to_csv` wrote."""

    def read(row: Mapping[str, str]) -> dict[str, Any]:
        return {
            "month": row["month"],
            "band": row["band"],
            "usable": int(row["usable"]),
            "hidden": int(row["hidden"]),
            "error": float(row["error"]) if row["error"] else None,
            "rmse": float(row["rmse"]) if row["rmse"] else None,
        }

    return [read(row) for row in csv.DictReader(io.StringIO(text))]
