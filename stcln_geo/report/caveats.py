"""What a reader should know of figures that were estimated from a sample of a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..legend import Legend, LegendClass
from .area import AreaAccuracy, Estimate
from .design import Design
from .reference import Units

__all__ = ["notes_of_sample", "notes_of_unused_design", "with_none_of_these"]

_EQUAL = 1.25
"""Chances count as equal where the largest is at most so many times the smallest."""

_NONE_OF_THESE = "none of the classes"

_NOTHING = 1e-9
"""A standard error below this is 0, but for rounding."""


def with_none_of_these(legend: Legend) -> Legend:
    """Return a legend with one more class, for land that is none of its classes."""
    more = LegendClass(code=len(legend), value=_NONE_OF_THESE, name=_NONE_OF_THESE, color="#9aa5b1")
    return Legend((*legend.classes, more))


def notes_of_sample(
    units: Units,
    estimates: AreaAccuracy,
    legend: Legend,
    *,
    beyond: int,
    truth: NDArray[Any],
    mapped: NDArray[Any],
    strata: NDArray[Any],
    stratum_areas: NDArray[Any],
    stratum_names: Sequence[str],
    stratum_units: NDArray[Any] | None,
) -> list[str]:
    """Return one or two sentences for each thing worth knowing.

    Parameters
    ----------
    legend
        Classes of the map.
    beyond
        Units of land that is none of these.
    truth, mapped, strata : (n,) class codes and stratum of the units that were used.
    stratum_areas : (H,)
    stratum_names
        Of the strata; empty where they are the map's classes.
    stratum_units : (H,), optional
        Units in each stratum; None for many.
    """
    notes = []
    number = np.bincount(strata, minlength=len(stratum_areas))
    if units.kind == "parcels":
        notes.append(
            "The unit is the parcel with the class of most of its pixels; all shares are weighted "
            "by the parcels' areas. Areas per class hold only if the parcels are a random sample "
            "of everything mapped."
        )
    if beyond:
        notes.append(
            f"{beyond} {units.kind} lie on land that is none of the map's classes. The map is "
            "wrong there, whatever it says; macro figures are means over the map's classes."
        )
    if estimates.covered < 1 - 1e-12:
        missing = np.flatnonzero(number == 0).tolist()
        named = [stratum_names[place] for place in missing if stratum_names]
        notes.append(
            f"{int((stratum_areas[missing] > 0).sum())} strata have no unit"
            f"{' (' + ', '.join(named) + ')' if named else ''}: the figures hold for the other "
            f"{100 * estimates.covered:.1f} % of the area."
        )
    if math.isnan(estimates.overall_accuracy.standard_error):
        notes.append(
            "A stratum has a single unit: figures that it takes part in have no standard error. "
            "Two units or more are needed."
        )
    census = stratum_units is not None and bool((number >= stratum_units)[number > 0].all())
    unvaried = [] if census else _without_variation(estimates, legend, truth=truth, mapped=mapped)
    if unvaried:
        notes.append(
            f"All units said the same for {', '.join(unvaried)}: the standard error is 0 and the "
            "interval has no length, which does not make the figure sure. Only more units can tell."
        )
    if units.shared:
        notes.append(f"{units.shared} points share their pixel with another point.")
    if units.vanished:
        notes.append(
            f"{units.vanished} parcels are nothing but border: the inner buffer left none."
        )
    return notes


def notes_of_unused_design(
    design: Design, chosen: str, told: Sequence[str | None], own: NDArray[Any]
) -> list[str]:
    """Say where strata by which points were drawn are passed over, which makes figures biased.

    They may be where all points had the same chance, or where the strata used are the same.

    Parameters
    ----------
    chosen
        Strata used in place of the design's: ``map`` or ``none``.
    told : (n,)
        Stratum of each unit that was used, as the design names it.
    own : (n,) class code of the pixel of each.
    """
    place = {stratum: number for number, stratum in enumerate(design.strata)}
    pairs = {(place[text], int(code)) for text, code in zip(told, own, strict=True)
             if text in place}  # fmt: skip
    counts = np.bincount([place[text] for text in told if text in place], minlength=len(place))
    chances = (counts / np.maximum(design.pixels, 1))[counts > 0]
    if not len(chances) or chances.max() <= _EQUAL * chances.min():
        return []
    if chosen == "map" and all(
        len({pair[side] for pair in pairs}) == len(pairs) for side in (0, 1)
    ):
        return []
    return [
        f"The points were drawn by the strata of {design.path.name}, with unequal chances, and "
        f"--strata {chosen} passes them over: the figures are biased. Leave --strata out."
    ]


def _without_variation(
    estimates: AreaAccuracy, legend: Legend, *, truth: NDArray[Any], mapped: NDArray[Any]
) -> list[str]:
    """Name the accuracies whose standard error is 0, each with the number of its units."""
    classes = len(legend)
    figures = (
        ("user's accuracy of", estimates.users_accuracy, np.bincount(mapped, minlength=classes)),
        ("producer's accuracy of", estimates.producers_accuracy,
         np.bincount(truth, minlength=classes)),
    )  # fmt: skip
    found = []
    if _unvaried(estimates.overall_accuracy):
        found.append(f"the overall accuracy ({len(truth)} units)")
    for words, figure, counts in figures:
        named = [
            f"{entry.name} ({int(counts[entry.code])})"
            for entry in legend.classes
            if _unvaried(figure[entry.code])
        ]
        if named:
            found.append(f"the {words} {', '.join(named)}")
    return found


def _unvaried(one: Estimate) -> bool:
    return one.standard_error < _NOTHING
