"""What a run begins from: the bands it shares with a checkpoint, and what of it is held still.

Bands are matched by name, never by position. `model.transfer` does the same with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cube.contract import SCALE
from ..data.chips import ChipDataset, band_statistics
from ..data.corpus import shared_bands
from ..data.reader import band_indices
from ..data.source import Source
from ..errors import CheckpointError, InputError
from ..model.checkpoint import CheckpointInfo
from ..model.description import TROPIC, half_a_year_later
from ..model.stcln import MaskedPretrainer, Stcln
from ..model.transfer import brings_zscore, load_encoder_into, load_pretrainer_into
from ..storage import Location, public_name
from .run_directory import is_finished
from .sections import FinetuneOptimiserSection

__all__ = [
    "BandChoice",
    "check_apart",
    "check_freeze",
    "choose_bands",
    "choose_shared_bands",
    "describe_init",
    "give_first_weights",
    "lacks_statistics",
    "say_differences",
    "say_starts",
]


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
    return _match(source.bands, wanted, init, data="cube", lacking="The cube lacks")


def choose_shared_bands(
    sources: Sequence[Source], wanted: tuple[str, ...] | None, init: CheckpointInfo
) -> BandChoice:
    """Choose the bands of a run on many sources: as `choose_bands`, of those that all have.

    Raises
    ------
    CubeError
        If a source lacks a band that was named, or all have none in common.
    CheckpointError
        If the checkpoint knows none of the bands.
    """
    shared_bands(sources, wanted)
    common, _ = shared_bands(sources)
    return _match(common, wanted, init, data="data", lacking="Not all data have")


def _match(
    available: tuple[str, ...],
    wanted: tuple[str, ...] | None,
    init: CheckpointInfo,
    *,
    data: str,
    lacking: str,
) -> BandChoice:
    """Choose among the bands of the ``data`` by those of a checkpoint."""
    bands = wanted or tuple(band for band in init.bands if band in available)
    if not set(bands) & set(init.bands):
        raise CheckpointError(
            f"Cannot begin from {init.path}: it knows the bands {', '.join(init.bands)}, and the "
            f"run has {', '.join(bands or available)}. Bands are matched by name, and at least "
            f"one must be shared. Give the bands of the {data} their common names, or choose "
            "another checkpoint."
        )
    notes = []
    absent = [band for band in init.bands if band not in available]
    if absent:
        notes.append(
            f"{lacking} {', '.join(absent)}, which the checkpoint knows: the encoder begins as if "
            "these bands were always at their mean."
        )
    unused = [band for band in available if band not in (*bands, *init.bands)]
    if wanted is None and unused:
        notes.append(
            f"The checkpoint does not know {', '.join(unused)} of the {data}: not used. Name all "
            "bands in model.bands to use them."
        )
    return BandChoice(
        bands=bands,
        fresh=tuple(band for band in bands if band not in init.bands),
        notes=tuple(notes),
    )


def lacks_statistics(bands: tuple[str, ...], init: CheckpointInfo | None) -> bool:
    """Tell whether the mean and deviation of a run's bands must be measured on its data.

    A checkpoint brings its own, unless it was published without; a band that it never saw has none
    there.
    """
    return init is None or not brings_zscore(init) or not set(bands) <= set(init.bands)


def give_first_weights(
    network: Stcln | MaskedPretrainer,
    init: CheckpointInfo | None,
    dataset: ChipDataset,
    *,
    seed: int,
) -> tuple[str, ...]:
    """Give a network of random weights those of a checkpoint, and the z-score of its bands.

    Parameters
    ----------
    dataset
        The chips on which mean and deviation are measured, where the checkpoint brings none.

    Returns
    -------
    One sentence for each thing worth telling of what was carried.

    Raises
    ------
    CheckpointError
        If the checkpoint does not fit the network.
    """
    said = []
    if lacks_statistics(network.config.bands, init):
        statistics = band_statistics(dataset, seed=seed)
        network.encoder.set_normalisation(statistics.mean.tolist(), statistics.std.tolist())
        brought = init.bands if init is not None and brings_zscore(init) else ()
        still = [
            band
            for band, std in zip(network.config.bands, statistics.std, strict=True)
            if std <= SCALE and band not in brought
        ]
        if still:
            said.append(
                f"Never varies in the training chips: {', '.join(still)}. That says nothing here, "
                "and where it does vary it would count far too much. Leave it out of model.bands."
            )
    if init is None:
        return tuple(said)
    if isinstance(network, MaskedPretrainer):
        return (*load_pretrainer_into(network, init.path), *said)
    said = [*load_encoder_into(network, init.path), *said]
    if init.kind == "classifier":
        said.append("attention over space and classes begin anew: only the encoder is carried")
    return tuple(said)


def say_starts(sources: Sequence[Source]) -> list[str]:
    """Say where sources count their days from different times of the year.

    Beyond the tropics of the south the same time of the year is half a year later.
    """
    times: dict[str, str] = {}
    for source in sources:
        start, latitude = source.season[5:], source.latitude
        south = latitude is not None and latitude < -TROPIC
        times.setdefault(
            half_a_year_later(start) if south else start, f"{start} in {public_name(source.path)}"
        )
    if len(times) < 2:
        return []
    return [
        f"Days are counted from different times of the year ({'; '.join(times.values())}), which "
        "blurs what is learnt about dates. Build all with one --season-start, and those south of "
        "the tropics half a year later."
    ]


def say_differences(source: Source, init: CheckpointInfo | None) -> list[str]:
    """Say in what a season is unlike those that the checkpoint begun from was trained on.

    Also that the run which trains it still goes on.
    """
    notes: list[str] = []
    if init is None:
        return notes
    start = source.season[5:]
    wanted = init.season_start_at(source.latitude)
    if wanted not in (None, start) and init.config.positions == "days":
        there = init.season_start
        where = there if wanted == there else f"{there} on the other hemisphere, here {wanted}"
        notes.append(
            f"The checkpoint counts days from {where}, this season from {start}: what it learnt "
            "about dates is shifted."
        )
    if not is_finished(init.path.parent.parent):
        notes.append(
            f"The run begun from is not finished: {public_name(init.path)} holds its best weights "
            "so far."
        )
    if init.levels and source.level not in init.levels:
        notes.append(
            f"The checkpoint was trained on {init.levels[0]} reflectance, this season holds "
            f"{source.level} reflectance: what it learnt about colours is off by the haze."
        )
    return notes


def describe_init(init: CheckpointInfo | None) -> dict[str, Any] | None:
    """Return what a run's provenance tells of the checkpoint begun from; None of random weights."""
    if init is None:
        return None
    return {
        "path": public_name(init.path),
        "sha256": init.sha256,
        "kind": init.kind,
        "source": "published" if init.published else "stcln-geo",
        "mode": init.config.mode,
        "positions": init.config.positions,
    }


def check_apart(init: CheckpointInfo | None, out: Location) -> None:
    """Check that beginning anew in a folder does not delete what the run begins from.

    Raises
    ------
    InputError
        If the checkpoint lies in the folder.
    """
    if init is not None and f"{init.path.resolve()}".startswith(f"{out.resolve()}/"):
        raise InputError(
            f"Cannot begin anew in {out}: --overwrite deletes the run in it, and {init.path}, from "
            "which to begin, is part of that run. A run begins from another one. Choose another "
            "--out."
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
        If what is frozen would never learn what it has to, or nothing is to be freed.
    """
    if options.freeze == "none":
        if options.freeze_steps:
            raise InputError(
                f"Cannot freeze for optimiser.freeze_steps={options.freeze_steps}: "
                "optimiser.freeze is none, so nothing would be frozen. Set optimiser.freeze to "
                "encoder or convolutions, or leave optimiser.freeze_steps out."
            )
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
