"""Which pixels show the ground: from Sentinel-2's scene classes, with a margin around clouds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .contract import SCL_CLEAR, SCL_CLOUD, SCL_SHADOW

__all__ = ["CloudSpec", "clear_sky"]

_MAX_MARGIN = 50
_CLASSES = range(12)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudSpec:
    """What counts as a clear sky.

    Parameters
    ----------
    clear
        Scene classes that show the ground: by default vegetation, bare soil, water,
        unclassified and snow.
    cloud_margin, shadow_margin
        Pixels of the cube (not metres) around clouds and around shadows that are not clear
        either. The default 2 is one pixel of the scene classes on a 10 m grid.
    """

    clear: tuple[int, ...] = SCL_CLEAR
    cloud_margin: int = 2
    shadow_margin: int = 2

    def __post_init__(self) -> None:
        """Check classes and margins."""
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


def _near(hidden: np.ndarray, margin: int) -> np.ndarray:
    """Return where a True pixel lies within ``margin`` pixels (Euclidean)."""
    from scipy import ndimage

    if not hidden.any():
        return hidden
    steps = np.arange(-margin, margin + 1)
    disk = steps[:, None] ** 2 + steps[None, :] ** 2 <= margin**2
    near: np.ndarray = ndimage.binary_dilation(hidden, structure=disk)
    return near
