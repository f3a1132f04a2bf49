"""Fuse the scenes of one day: the first clear pixel wins, then the first measured one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .clouds import CloudSpec, clear_sky, sky_classes
from .contract import FILL
from .planned import Scene
from .radiometry import harmonise

__all__ = ["ScenePixels", "fuse_scene", "harmonise_scene"]

_PARTLY, _MEASURED, _CLEAR = 1, 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePixels:
    """A scene in the cube's numbers."""

    values: list[np.ndarray]
    """One (H, W) int16 per band; -32768 where there is no data."""
    scl: np.ndarray | None
    """(H, W) uint8."""
    rank: np.ndarray
    """(H, W) uint8: 0 nothing measured, 1 some bands, 2 all bands, 3 all bands and clear."""

    @property
    def is_clear(self) -> np.ndarray:
        """(H, W) bool, True where all bands are measured and the sky is clear."""
        clear: np.ndarray = self.rank == _CLEAR
        return clear


def harmonise_scene(
    scene: Scene,
    raw: list[np.ndarray],
    scl: np.ndarray | None,
    clouds: CloudSpec,
    sky: np.ndarray | None = None,
) -> ScenePixels:
    """Bring a scene's numbers to one scale and say how good each pixel is.

    Parameters
    ----------
    raw : one (H, W) array per band, as read.
    scl : (H + 2p, W + 2p) uint8 with ``p = clouds.padding``, or None where there is none.
    sky : the classes of a cloud model, likewise. With neither, every sky counts as clear.
    """
    some = np.zeros(raw[0].shape, dtype=bool)
    every = np.ones(raw[0].shape, dtype=bool)
    usable = every.copy()
    values = []
    for asset, band in zip(scene.bands, raw, strict=True):
        harmonised, good = harmonise(band, asset.radiometry)
        measured = harmonised != FILL
        some |= measured
        every &= measured
        usable &= good
        values.append(harmonised)
    rank = some.astype(np.uint8) * _PARTLY
    rank[every] = _MEASURED
    inner = None
    if sky is not None:
        usable &= clear_sky(sky_classes(sky, scl, clouds), clouds)
    elif scl is not None:
        usable &= clear_sky(scl, clouds)
    if scl is not None:
        pad = clouds.padding
        inner = scl[pad : scl.shape[0] - pad, pad : scl.shape[1] - pad]
    rank[every & usable] = _CLEAR
    return ScenePixels(values=values, scl=inner, rank=rank)


def fuse_scene(
    pixels: ScenePixels,
    *,
    reflectance: np.ndarray,
    valid: np.ndarray,
    scl: np.ndarray | None,
    rank: np.ndarray,
) -> np.ndarray:
    """Write the pixels that are better than those of the scenes before, in place.

    Parameters
    ----------
    reflectance : (C, H, W) int16 of one day.
    valid : (H, W) bool, True where usable.
    scl : (H, W) uint8, or None where scene classes are not kept.
    rank : (H, W) uint8, what is there so far; zeros before the day's first scene.

    Returns
    -------
    (H, W) bool, True where the pixel is now this scene's.
    """
    better: np.ndarray = pixels.rank > rank
    for index, values in enumerate(pixels.values):
        np.copyto(reflectance[index], values, where=better)
    if scl is not None and pixels.scl is not None:
        np.copyto(scl, pixels.scl, where=better)
    np.copyto(rank, pixels.rank, where=better)
    np.equal(rank, _CLEAR, out=valid)
    return better
