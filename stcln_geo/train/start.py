"""What a run begins from: the bands it shares with a checkpoint, and what of it is held still.

Bands are matched by name, never by position. `model.transfer.load_encoder_into` does the same
with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.reader import band_indices
from ..data.source import Source
from ..errors import CheckpointError, InputError
from ..model.checkpoint import CheckpointInfo
from .config import FinetuneOptimiserSection

__all__ = ["BandChoice", "check_freeze", "choose_bands"]


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
    source: Source, wanted: tuple[str, ...] | None, init: CheckpointInfo | None
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
        band_indices(source, wanted, wanted_by="model.bands")
    if init is None:
        return BandChoice(bands=wanted or source.bands)
    bands = wanted or tuple(band for band in init.bands if band in source.bands)
    if not set(bands) & set(init.bands):
        raise CheckpointError(
            f"Cannot begin from {init.path}: it knows the bands {', '.join(init.bands)}, and the "
            f"run has {', '.join(bands or source.bands)}. Bands are matched by name, and at least "
            "one must be shared. Give the cube's bands their common names, or choose another "
            "checkpoint."
        )
    notes = []
    absent = [band for band in init.bands if band not in source.bands]
    if absent:
        notes.append(
            f"The cube lacks {', '.join(absent)}, which the checkpoint knows: the encoder begins "
            "as if these bands were always at their mean."
        )
    unused = [band for band in source.bands if band not in (*bands, *init.bands)]
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


def check_freeze(
    options: FinetuneOptimiserSection, init: CheckpointInfo | None, fresh: tuple[str, ...]
) -> str | None:
    """Return what is frozen, in words; None where nothing is.

    Parameters
    ----------
    fresh
        Bands that the checkpoint begun from never saw.

    Raises
    ------
    InputError
        If what is frozen would never learn what it has to.
    """
    if options.freeze == "none":
        return None
    if init is None:
        raise InputError(
            f"Cannot freeze with optimiser.freeze={options.freeze}: the run begins from random "
            "weights, which must learn. Give a checkpoint with --init, or set optimiser.freeze "
            "to none."
        )
    if fresh and not options.freeze_steps:
        raise InputError(
            f"Cannot freeze with optimiser.freeze={options.freeze}: the checkpoint does not know "
            f"{', '.join(fresh)}, and frozen convolutions never learn to use them. Leave these "
            "bands out of model.bands, or free the weights later with optimiser.freeze_steps."
        )
    until = f"for {options.freeze_steps} steps" if options.freeze_steps else "throughout"
    return f"Frozen {until}, with their statistics: the weights of the {options.freeze}."
