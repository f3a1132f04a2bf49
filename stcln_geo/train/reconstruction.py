"""A few validation chips as they are, as the network was shown them, and as it filled them in.

The chips are those that come first by the seed, among those of which something is hidden: the same
ones at each validation, whatever the batch size and the number of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..cube.layout import overview_bands
from ..data.batch import Batch
from ..storage import public_name, write_file
from .task import step_seed

__all__ = [
    "ReconstructedChip",
    "ReconstructionKeeper",
    "read_reconstructions",
    "write_reconstructions",
]

_CHIPS = 4
_DATES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructedChip:
    """Three bands of a chip on a few dates."""

    order: int
    """Place by the seed; small ones are kept."""
    name: str
    """Where it was cut from, for people."""
    dates: tuple[str, ...]
    """(T,) ``YYYY-MM-DD``."""
    bands: tuple[str, str, str]
    """What is shown as red, green and blue."""
    truth: np.ndarray
    """(T, 3, H, W) float32 reflectance; NaN where not valid."""
    made: np.ndarray
    """(T, 3, H, W) float32 reflectance: the network's where hidden, else the truth."""
    hidden: np.ndarray
    """(T, 3, H, W) bool. True where hidden."""


class ReconstructionKeeper:
    """Look at validation batches as they pass, and keep the chips that are to be drawn.

    Parameters
    ----------
    bands
        Bands of the network.
    seed
        Seed of the run.
    """

    def __init__(self, bands: tuple[str, ...], *, seed: int) -> None:
        self._shown = overview_bands(bands)
        self._places = [bands.index(name) for name in self._shown]
        self._seed = seed
        self.kept: list[ReconstructedChip] = []

    def look(self, batch: Batch, *, images: Tensor, made: Tensor, hidden: Tensor) -> None:
        """Keep chips of a batch that come before those kept so far.

        Parameters
        ----------
        images, made : (B, T, C, H, W) float. Reflectance, true and reconstructed.
        hidden : (B, T, 1 or C, H, W) bool. True where hidden and valid.
        """
        for chip, place in enumerate(batch.samples):
            order = step_seed(self._seed, 4, place)
            last = self.kept[-1].order if len(self.kept) == _CHIPS else None
            source = batch.sources[chip]
            if source is None or (last is not None and order > last):
                continue
            shown = hidden[chip].expand(-1, images.shape[2], -1, -1)[:, self._places].cpu().numpy()
            dates = choose_dates(shown.sum((1, 2, 3)))
            if not len(dates):
                continue
            days = batch.days[chip].cpu().numpy()[dates].astype(np.int64)
            valid = batch.valid[chip].cpu().numpy()[dates][:, None]
            truth, found = (
                values[chip].float().cpu().numpy()[dates][:, self._places]
                for values in (images, made)
            )
            shown = shown[dates]
            self._keep(
                ReconstructedChip(
                    order=order,
                    name=str(replace(source, cube=public_name(source.cube))),
                    dates=tuple(str(np.datetime64(source.season, "D") + day) for day in days),
                    bands=self._shown,
                    truth=np.where(valid, truth, np.nan),
                    made=np.where(valid, np.where(shown, found, truth), np.nan),
                    hidden=shown,
                )
            )

    def _keep(self, chip: ReconstructedChip) -> None:
        self.kept = first_chips([*self.kept, chip])


def first_chips(chips: Iterable[ReconstructedChip]) -> list[ReconstructedChip]:
    """Return the chips that come first by the seed, such as of all ranks."""
    return sorted(chips, key=lambda chip: chip.order)[:_CHIPS]


def choose_dates(hidden: np.ndarray, *, most: int = _DATES) -> np.ndarray:
    """Choose dates to show, spread over those that hide at least half as much as any.

    Parameters
    ----------
    hidden : (T,) int. Hidden values of each date.

    Returns
    -------
    (at most ``most``,) int64, increasing; empty where nothing is hidden.
    """
    telling = np.flatnonzero((hidden > 0) & (2 * hidden >= hidden.max(initial=0)))
    if len(telling) <= most:
        return telling
    places: np.ndarray = telling[np.linspace(0, len(telling) - 1, most).round().astype(np.int64)]
    return places


def write_reconstructions(file: Path, chips: Iterable[ReconstructedChip]) -> None:
    """Write chips into one compressed NumPy file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    for number, chip in enumerate(chips, start=1):
        for name in ("order", "name", "dates", "bands", "truth", "made", "hidden"):
            arrays[f"{name}_{number}"] = np.asarray(getattr(chip, name))
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_file(file, content.getvalue())


def read_reconstructions(file: Path) -> list[ReconstructedChip]:
    """Read what `write_reconstructions` wrote; nothing where there is no file."""
    if not file.is_file():
        return []
    with np.load(file, allow_pickle=False) as arrays:
        count = sum(name.startswith("order_") for name in arrays.files)
        return [
            ReconstructedChip(
                order=int(arrays[f"order_{number}"]),
                name=str(arrays[f"name_{number}"]),
                dates=tuple(arrays[f"dates_{number}"].tolist()),
                bands=tuple(arrays[f"bands_{number}"].tolist()),
                truth=arrays[f"truth_{number}"],
                made=arrays[f"made_{number}"],
                hidden=arrays[f"hidden_{number}"],
            )
            for number in range(1, count + 1)
        ]
