"""Bands that lie close together in wavelength, and are hidden together by one way of masking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import InputError

__all__ = ["WAVELENGTH_GROUPS", "group_numbers"]

WAVELENGTH_GROUPS: dict[str, tuple[str, ...]] = {
    "visible": ("coastal", "blue", "green", "red"),
    "red edge": ("rededge1", "rededge2", "rededge3"),
    "nir": ("nir", "nir08", "nir09"),
    "swir": ("cirrus", "swir16", "swir22"),
}
"""Bands by common STAC name. Neighbours tell much of one another; groups tell less."""


def group_numbers(
    bands: Sequence[str], groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[int, ...]:
    """Return the number of each band's group, from 0; a band in no group is one by itself.

    Parameters
    ----------
    bands
        Bands of the network, by name.
    groups
        Names of bands by name of the group; all must be among ``bands``. None or empty: those of
        ``WAVELENGTH_GROUPS``, as far as there are bands of them.

    Raises
    ------
    InputError
        If a band is unknown or in two groups, or all bands are in one group.
    """
    chosen = {
        name: tuple(dict.fromkeys(band for band in members if groups or band in bands))
        for name, members in (groups or WAVELENGTH_GROUPS).items()
    }
    unknown = [band for members in chosen.values() for band in members if band not in bands]
    if unknown:
        raise InputError(
            f"Cannot hide groups of bands: {', '.join(unknown)} of masking.band_groups is not "
            f"among the bands of this run ({', '.join(bands)}). Groups name bands of the run. "
            "Correct the names, or leave them out."
        )
    twice = [band for band in bands if sum(band in members for members in chosen.values()) > 1]
    if twice:
        raise InputError(
            f"Cannot hide groups of bands: {', '.join(twice)} is in more than one group of "
            "masking.band_groups. A band is in one group at most. Leave it out of the others."
        )
    grouped = [members for members in chosen.values() if members]
    known = {band for members in grouped for band in members}
    grouped += [(band,) for band in bands if band not in known]
    if len(grouped) < 2:
        raise InputError(
            f"Cannot hide groups of bands: all bands of this run ({', '.join(bands)}) are in one "
            "group, so that hiding it hides everything. There must be two groups at least. Name "
            "other groups in masking.band_groups, or use masking.strategy=block, which is the same."
        )
    return tuple(
        next(number for number, members in enumerate(grouped) if band in members) for band in bands
    )
