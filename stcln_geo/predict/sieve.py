"""The minimum mapping unit: small patches take the class of their surroundings.

A **patch** is a set of pixels of one class that hang together by their sides. A patch of fewer
pixels than the unit is small. All other patches stay as they are. A small patch takes the class
with which it shares the longest border, counted in pixel sides, among the patches that are not
small; the lowest code where borders are equally long. A small patch that touches only small ones
waits until one of those has been merged, for at most ``ROUNDS`` rounds, and then keeps its class:
so do islands in pixels without a class. Pixels without a class never get one, and count as no
border.

So every merged pixel ends in a patch that is not small, and no patch that is not small loses a
pixel. And the rule is local: within a patch of fewer than N pixels no two pixels are N - 1 apart,
so that the class of a pixel is decided by the pixels within ``Sieve.reach``. This is why the
result does not depend on how a map is cut, which the usual sieves, that start from one corner or
merge until nothing changes, cannot promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import InputError
from ..grid import tiles
from ..legend import CLASS_NODATA

__all__ = ["MOST_PIXELS", "ROUNDS", "SIEVED", "Sieve", "sieve", "sieve_for"]

ROUNDS = 3
"""How far a patch may lie from one that is not small, in patches."""

MOST_PIXELS = 256
"""Largest minimum mapping unit (pixels), so that the reach stays below 1024 px."""

SIEVED = ("classes", "qa")
"""The layers of a map that change; all others say what the network said of each pixel."""

_TILE = 1024
_HECTARE = 10_000.0
_EXACT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sieve:
    """A minimum mapping unit."""

    hectares: float
    """As it was asked for."""
    pixels: int
    """Patches of fewer pixels are merged."""

    @property
    def reach(self) -> int:
        """Pixels further away than this, along rows or columns, have no say in a pixel."""
        return (ROUNDS + 1) * (self.pixels - 1)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"hectares": self.hectares, "pixels": self.pixels, "rounds": ROUNDS}


def sieve_for(hectares: float, *, resolution: float) -> Sieve:
    """Return the sieve of a minimum mapping unit.

    Parameters
    ----------
    hectares
        Patches of less area are merged.
    resolution
        Pixel size (metres).

    Raises
    ------
    InputError
        If no patch is that small, or the unit has more pixels than ``MOST_PIXELS``.
    """
    pixel = resolution**2 / _HECTARE
    if not hectares > pixel:
        raise InputError(
            f"Cannot use a minimum mapping unit of {hectares:g} ha: pixels of {resolution:g} m "
            f"have {pixel:g} ha, and no patch is smaller than one. Give --min-mapping-unit more "
            f"than {pixel:g}, or leave it out."
        )
    pixels = np.ceil(hectares / pixel - _EXACT)
    if pixels > MOST_PIXELS:
        raise InputError(
            f"Cannot use a minimum mapping unit of {hectares:g} ha: that is {pixels:g} pixels of "
            f"{resolution:g} m, and it is at most {MOST_PIXELS}, so that a patch and what lies "
            f"around it can be seen at once. Give --min-mapping-unit {MOST_PIXELS * pixel:g} or "
            "less, or generalise the finished map in a GIS."
        )
    return Sieve(hectares=hectares, pixels=int(pixels))


def sieve(classes: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Merge the small patches of a raster.

    Parameters
    ----------
    classes : (H, W) uint8, 255 = no class.
    pixels
        Patches of fewer are small; 1 changes nothing.

    Returns
    -------
    (H, W) uint8. What lies beyond the raster counts as having no class. It is worked on tile by
    tile, each with its reach around it, so that memory does not grow with the raster.
    """
    reach = Sieve(hectares=0.0, pixels=pixels).reach
    merged = classes.copy()
    for tile in tiles((classes.shape[0], classes.shape[1]), _TILE):
        top, left = max(tile.row - reach, 0), max(tile.col - reach, 0)
        around = classes[top : tile.row + tile.height + reach, left : tile.col + tile.width + reach]
        found = _sieve_whole(around, pixels)
        inside = tile.shift(-top, -left)
        merged[tile.rows, tile.cols] = found[inside.rows, inside.cols]
    return merged


def _sieve_whole(classes: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    patches, code_of = _label(classes)
    small = np.bincount(patches.ravel(), minlength=len(code_of)) < pixels
    small[0] = False
    if not small.any():
        return classes
    first, second, sides = _borders(patches, small)

    # Patches that are not small stand from the start; a round settles those that touch a settled
    # one, all at the same time.
    settled = np.where(small, CLASS_NODATA, code_of).astype(np.uint8)
    for _ in range(ROUNDS):
        ready = (settled[first] == CLASS_NODATA) & (settled[second] != CLASS_NODATA)
        if not ready.any():
            break
        wanted = first[ready].astype(np.int64) * 256 + settled[second[ready]]
        offers, place = np.unique(wanted, return_inverse=True)
        length = np.bincount(place, weights=sides[ready])
        patch, code = np.divmod(offers, 256)
        order = np.lexsort((code, -length, patch))
        best = order[np.r_[True, np.diff(patch[order]) > 0]]
        settled[patch[best]] = code[best]
    left = small & (settled == CLASS_NODATA)
    settled[left] = code_of[left]
    result: NDArray[np.uint8] = settled[patches]
    return result


def _label(classes: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Return the patches, numbered from 1, (H, W) int32, and the class of each; 0 has none."""
    patches = np.zeros(classes.shape, dtype=np.int32)
    codes: list[NDArray[np.uint8]] = [np.array([CLASS_NODATA], dtype=np.uint8)]
    last = 0
    for code in np.flatnonzero(np.bincount(classes.ravel(), minlength=256)[:CLASS_NODATA]):
        where = classes == code
        found, count = ndimage.label(where)  # the default structure joins sides, not corners
        np.add(found, last, out=patches, where=where)
        codes.append(np.full(count, code, dtype=np.uint8))
        last += count
    return patches, np.concatenate(codes)


def _borders(
    patches: NDArray[np.int32], small: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the small patches, what each touches, and over how many pixel sides."""
    count = len(small)
    keys = []
    for one, other in ((patches[:, :-1], patches[:, 1:]), (patches[:-1], patches[1:])):
        touch = (one != other) & (one > 0) & (other > 0)
        for first, second in ((one, other), (other, one)):
            wanted = touch & small[first]
            keys.append(first[wanted].astype(np.int64) * count + second[wanted])
    pairs, sides = np.unique(np.concatenate(keys), return_counts=True)
    return *np.divmod(pairs, count), sides
