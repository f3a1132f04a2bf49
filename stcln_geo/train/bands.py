"""Which bands a run uses, where the cube and the checkpoint it begins from know different ones.

Bands are matched by name, never by position. `model.checkpoint.load_encoder_into` does the same
with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cube.store import Season
from ..data.reader import band_indices
from ..errors import CheckpointError
from ..model.checkpoint import CheckpointInfo

__all__ = ["BandChoice", "choose_bands"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BandChoice:
    """The bands of a run."""

    bands: tuple[str, ...]
    """In the order of the network's channel axis."""
    fresh: tuple[str, ...] = ()
    """Those that the checkpoint begun from never saw."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing worth telling."""


def choose_bands(
    season: Season, wanted: tuple[str, ...] | None, init: CheckpointInfo | None
) -> BandChoice:
    """Choose the bands: those named, else the checkpoint's that the cube has, else the cube's.

    Parameters
    ----------
    wanted
        What the recipe names; None names none.
    init
        The checkpoint begun from.

    Raises
    ------
    CubeError
        If the cube lacks a band that was named.
    CheckpointError
        If the checkpoint knows none of the bands.
    """
    if wanted is not None:
        band_indices(season, wanted, wanted_by="model.bands")
    if init is None:
        return BandChoice(bands=wanted or season.bands)
    bands = wanted or tuple(band for band in init.bands if band in season.bands)
    if not set(bands) & set(init.bands):
        raise CheckpointError(
            f"Cannot begin from {init.path}: it knows the bands {', '.join(init.bands)}, and the "
            f"run has {', '.join(bands or season.bands)}. Bands are matched by name, and at least "
            "one must be shared. Give the cube's bands their common names, or choose another "
            "checkpoint."
        )
    notes = []
    absent = [band for band in init.bands if band not in season.bands]
    if absent:
        notes.append(
            f"The cube lacks {', '.join(absent)}, which the checkpoint knows: the encoder begins "
            "as if these bands were always at their mean."
        )
    unused = [band for band in season.bands if band not in (*bands, *init.bands)]
    if wanted is None and unused:
        notes.append(
            f"The checkpoint does not know {', '.join(unused)} of the cube: not used. Name all "
            "bands in model.bands to use them."
        )
    return BandChoice(
        bands=bands,
        fresh=tuple(band for band in bands if band not in init.bands),
        notes=tuple(notes),
    )
