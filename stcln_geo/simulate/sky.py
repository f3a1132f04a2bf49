"""Draw clouds, haze and their shadows, and the scene classification that a processor would give.

The classification (SCL) is wrong where real ones are wrong: thin cloud passes as ground, edges of
clouds and of shadows are missed, bright roofs pass as cloud.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..grid import Window
from .noise import Floats, hash_grid, make_key, make_noise, make_uniform, to_uniform
from .spec import RESOLUTION, Acquisition, SimulationSpec

SCL_NODATA, SCL_SHADOW, SCL_VEGETATION, SCL_BARE, SCL_UNCLASSIFIED = 0, 3, 4, 5, 7
SCL_CLOUD_MEDIUM, SCL_CLOUD_HIGH, SCL_CIRRUS = 8, 9, 10

_CLOUD_CELLS = (180, 70, 30, 12, 5)
_CLOUD_WEIGHTS = (1.0, 0.8, 0.5, 0.25, 0.12)
_LEAN = 0.21


@dataclass(frozen=True, slots=True, kw_only=True)
class Sky:
    """What stands between sun, ground and satellite; all arrays are (H, W) float32 from 0 to 1."""

    cloud: Floats
    """Opacity of clouds."""
    cirrus: Floats
    """Opacity of thin high cloud."""
    shadow: Floats
    """Share of the direct light that clouds take from the ground."""


def make_sky(acquisition: Acquisition, window: Window) -> Sky:
    """Draw the sky of one pass over an absolute window of 10 m pixels."""
    empty = np.zeros((window.height, window.width), dtype=np.float32)
    if acquisition.cloud_amount == 0:
        return Sky(cloud=empty, cirrus=empty, shadow=empty)

    cloud = _cloud(acquisition, window)
    # In the morning the sun stands in the south-south-east, and shadows fall to the
    # north-north-west; south of the equator north and south change places.
    rows, cols = _shadow_shift(acquisition)
    shadow = _cloud(acquisition, window.shift(rows, cols)) * (np.float32(1.0) - cloud)

    cirrus = empty
    if make_uniform(acquisition.key, 11) < 0.35:
        veil = make_noise(
            window, cells=(240, 90, 40), weights=(1.0, 0.5, 0.3), key=make_key(acquisition.key, 12)
        )
        cirrus = np.clip((veil - np.float32(0.3)) * np.float32(0.18), 0.0, 0.3).astype(np.float32)
    return Sky(cloud=cloud, cirrus=cirrus, shadow=shadow)


def make_covered(
    spec: SimulationSpec, acquisition: Acquisition, window: Window
) -> NDArray[np.bool_]:
    """Say which pixels of an absolute window the swath covers: (H, W) bool, True = seen."""
    if not acquisition.partial:
        return np.ones((window.height, window.width), dtype=np.bool_)
    x = (window.col + np.arange(window.width) + 0.5) * RESOLUTION
    y = -(window.row + np.arange(window.height) + 0.5) * RESOLUTION
    edge = swath_edge(spec, y.astype(np.float64))
    covered: NDArray[np.bool_] = x[np.newaxis, :] < edge[:, np.newaxis]
    return covered


def swath_edge(spec: SimulationSpec, y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the easting of the partial swath's east edge at northings, both in metres."""
    west, south, east, north = spec.bounds
    return west + 0.62 * (east - west) + _LEAN * (y - (south + north) / 2)


def make_scl(
    acquisition: Acquisition,
    window: Window,
    *,
    sky: Sky,
    ndvi: Floats,
    bright: Floats,
    covered: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    """Classify the sky and the ground of pixels of 20 m as a processor would, with its errors.

    Parameters
    ----------
    acquisition : Acquisition
    window : Window
        Absolute pixels of 20 m.
    sky : Sky
        On the same pixels of 20 m.
    ndvi, bright : (H, W) float32
        Vegetation index, and reflectance in blue, of what the satellite sees.
    covered : (H, W) bool
        True where the swath covers the pixel.

    Returns
    -------
    (H, W) uint8, the classes of Sen2Cor; 0 outside the swath.
    """
    scl = np.where(ndvi > 0.4, SCL_VEGETATION, SCL_BARE).astype(np.uint8)
    pixels = (
        np.arange(window.row, window.row + window.height),
        np.arange(window.col, window.col + window.width),
    )
    grain = to_uniform(hash_grid(*pixels, make_key(acquisition.key, 13)))
    scl[(ndvi > 0.25) & (ndvi < 0.4) & (grain < 0.15)] = SCL_UNCLASSIFIED

    # The processor's thresholds drift: in some places thin cloud passes as ground.
    drift = make_noise(window, cells=(40, 9), weights=(1.0, 0.5), key=make_key(acquisition.key, 14))
    laxity = np.float32(0.07) * drift
    scl[sky.cirrus > 0.13 + np.float32(0.7) * laxity] = SCL_CIRRUS
    scl[sky.shadow > 0.40 + laxity] = SCL_SHADOW
    scl[sky.cloud > 0.30 + laxity] = SCL_CLOUD_MEDIUM
    scl[sky.cloud > 0.62 + laxity] = SCL_CLOUD_HIGH
    scl[(bright > 0.135) & (sky.cloud < 0.05) & (grain > 0.6)] = SCL_CLOUD_MEDIUM
    scl[~covered] = SCL_NODATA
    return scl


def is_cloudy(scl: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Say which classes are cloud or cirrus: bool, True = cloud."""
    cloudy: NDArray[np.bool_] = np.isin(scl, (SCL_CLOUD_MEDIUM, SCL_CLOUD_HIGH, SCL_CIRRUS))
    return cloudy


def _cloud(acquisition: Acquisition, window: Window) -> Floats:
    thickness = make_noise(
        window, cells=_CLOUD_CELLS, weights=_CLOUD_WEIGHTS, key=make_key(acquisition.key, 15)
    )
    threshold = np.float32(NormalDist().inv_cdf(1 - acquisition.cloud_amount))
    optical = np.clip(thickness - threshold, 0.0, None) * np.float32(3.2)
    opacity: Floats = np.float32(1.0) - np.exp(-optical * (np.float32(0.4) + optical))
    return opacity


def _shadow_shift(acquisition: Acquisition) -> tuple[int, int]:
    """Give where the cloud stands that shades a pixel: rows and columns away."""
    zenith = np.radians(48.0 + 23.0 * np.cos((acquisition.year_day + 10) / 365.25 * 2 * np.pi))
    azimuth = np.radians(20.0 if acquisition.south else 160.0)
    height = 700.0 + 900.0 * make_uniform(acquisition.key, 16)
    length = height * float(np.tan(zenith)) / RESOLUTION
    # Whole pixels of 20 m, so that the classes see what the bands see.
    rows = 2 * round(-length * float(np.cos(azimuth)) / 2)
    cols = 2 * round(length * float(np.sin(azimuth)) / 2)
    return rows, cols
