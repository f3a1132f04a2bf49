"""Which pixels show the ground: by scene classes or a cloud model, with margins."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import InputError
from .contract import SCL_CLEAR, SCL_CLOUD, SCL_SHADOW

__all__ = ["CloudSource", "CloudSpec", "clear_sky", "sky_classes"]

CloudSource = Literal["scl", "omnicloudmask"]
"""What finds clouds and shadows: the provider's scene classes, or the model OmniCloudMask."""

_MAX_MARGIN = 50
_CLASSES = range(12)
_OLDEST_WEIGHTS = 4.0

_SCL_SKY = (2, *SCL_SHADOW, *SCL_CLOUD)
"""Scene classes that a cloud model decides anew: dark areas, shadow, clouds."""

_THICK, _THIN, _SHADOW = 9, 10, 3
"""Scene classes that a cloud model's classes 1, 2 and 3 stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSpec:
    """What counts as a clear sky.

    Parameters
    ----------
    source
        What finds clouds and shadows: ``scl`` or ``omnicloudmask``.
    weights
        Version of OmniCloudMask's weights, where it is the source.
    clear
        Scene classes that show the ground: by default vegetation, bare soil, water,
        unclassified and snow. OmniCloudMask's thick cloud, thin cloud and shadow count as the
        classes 9, 10 and 3.
    cloud_margin, shadow_margin
        Pixels of the cube (not metres) around clouds and around shadows that are not clear
        either. The default 2 is one pixel of the scene classes on a 10 m grid.
    """

    source: CloudSource = "scl"
    weights: float = _OLDEST_WEIGHTS
    clear: tuple[int, ...] = SCL_CLEAR
    cloud_margin: int = 2
    shadow_margin: int = 2

    def __post_init__(self) -> None:
        """Check source, classes and margins."""
        sources = typing.get_args(CloudSource)
        if self.source not in sources:
            raise InputError(
                f"Cannot mask clouds with {self.source!r}: the cloud mask must be "
                f"{' or '.join(sources)}. Choose one of these with --cloud-mask."
            )
        if self.weights < _OLDEST_WEIGHTS:
            raise InputError(
                f"Cannot use version {self.weights:g} of OmniCloudMask's weights: it must be "
                f"{_OLDEST_WEIGHTS:g} or newer, as older ones need other packages. Leave it out."
            )
        if not self.clear or not set(self.clear) <= set(_CLASSES):
            raise InputError(
                f"Cannot take the scene classes {self.clear} as clear: they must be among 0 to 11, "
                f"at least one. Use for example {','.join(map(str, SCL_CLEAR))}."
            )
        for name in ("cloud_margin", "shadow_margin"):
            if not 0 <= getattr(self, name) <= _MAX_MARGIN:
                raise InputError(
                    f"Cannot use {name}={getattr(self, name)}: it must be 0 to {_MAX_MARGIN} "
                    "pixels. Choose a smaller margin."
                )

    @property
    def padding(self) -> int:
        """Pixels around a window that must be read so that its borders come out right."""
        return max(self.cloud_margin, self.shadow_margin)


def clear_sky(scl: np.ndarray, spec: CloudSpec) -> np.ndarray:
    """Return where a scene shows the ground.

    Parameters
    ----------
    scl : (H + 2p, W + 2p) uint8 scene classes, ``p = spec.padding`` pixels wider on each side
        than the result; 0 where there is no data.

    Returns
    -------
    (H, W) bool, True where the class is clear and no cloud or shadow is within the margin.
    """
    pad = spec.padding
    inner = (slice(pad, scl.shape[0] - pad), slice(pad, scl.shape[1] - pad))
    lookup = np.zeros(256, dtype=bool)
    lookup[list(spec.clear)] = True
    clear: np.ndarray = lookup[scl[inner]]
    for classes, margin in ((SCL_CLOUD, spec.cloud_margin), (SCL_SHADOW, spec.shadow_margin)):
        # A class the user calls clear needs no margin.
        hiding = [code for code in classes if code not in spec.clear]
        if margin and hiding:
            clear &= ~_near(np.isin(scl, hiding), margin)[inner]
    return clear


def sky_classes(found: np.ndarray, scl: np.ndarray | None, spec: CloudSpec) -> np.ndarray:
    """Return scene classes that say what a cloud model found.

    Parameters
    ----------
    found : (H, W) uint8: 0 clear, 1 thick cloud, 2 thin cloud, 3 shadow.
    scl : (H, W) uint8, the provider's scene classes, or None. What they say of clouds, shadows and
        dark areas is not used; what they say of the ground, of missing data (0) and of saturated
        pixels (1) is.

    Returns
    -------
    (H, W) uint8, for ``clear_sky``.
    """
    ground = spec.clear[0]
    classes = np.full(found.shape, ground, dtype=np.uint8)
    if scl is not None:
        np.copyto(classes, scl, where=~np.isin(scl, _SCL_SKY))
    for code, scene_class in ((1, _THICK), (2, _THIN), (3, _SHADOW)):
        classes[found == code] = scene_class
    return classes


def _near(hidden: np.ndarray, margin: int) -> np.ndarray:
    """Return where a True pixel lies within ``margin`` pixels (Euclidean)."""
    from scipy import ndimage

    if not hidden.any():
        return hidden
    steps = np.arange(-margin, margin + 1)
    disk = steps[:, None] ** 2 + steps[None, :] ** 2 <= margin**2
    near: np.ndarray = ndimage.binary_dilation(hidden, structure=disk)
    return near
