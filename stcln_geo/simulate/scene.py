"""Render one block of one acquisition: what the satellite stores for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..grid import Window
from .fields import make_landscape
from .noise import Floats, UInts, hash_grid, make_key, make_noise, make_uniform, mix, to_normal
from .phenology import BANDS, Variation, make_state, make_wetness
from .sky import Sky, make_covered, make_scl, make_sky
from .spec import Acquisition, SimulationSpec

FINE_BANDS = ("blue", "green", "red", "nir")
"""Bands of 10 m; the others have pixels of 20 m."""

_HALO = 2
_EXTINCTION = 0.55
_DARKEST = 0.62
# Scattered light still reaches a shadow: most of it blue.
_SHADOW = np.array([0.72, 0.8, 0.86, 0.9, 0.95, 0.97, 1.0, 1.0, 1.05, 1.05])
_CLOUD = np.array([0.98, 0.98, 1.0, 1.0, 1.0, 1.02, 1.03, 1.03, 0.78, 0.62])
_CIRRUS = np.array([1.0, 0.98, 0.96, 0.95, 0.94, 0.93, 0.92, 0.92, 0.6, 0.5])
_HAZE = np.array([1.0, 0.72, 0.55, 0.5, 0.45, 0.4, 0.35, 0.33, 0.1, 0.06])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One block as stored: digital numbers, 0 where the swath does not reach."""

    bands: dict[str, NDArray[np.uint16]]
    """By name: (H, W) for bands of 10 m, (H / 2, W / 2) for bands of 20 m."""
    scl: NDArray[np.uint8]
    """(H / 2, W / 2) scene classification."""


def render_scene(
    spec: SimulationSpec,
    acquisition: Acquisition,
    window: Window,
    *,
    bands: Collection[str] = BANDS,
) -> Scene:
    """Render a block; a pixel does not depend on the block it is rendered in.

    Parameters
    ----------
    spec : SimulationSpec
    acquisition : Acquisition
        One of the spec's.
    window : Window
        Absolute pixels of 10 m; rows, columns, height and width even.
    bands : collection of str
        Names to render; blue, red and nir are always computed for the classification.
    """
    if any(part % 2 for part in (window.row, window.col, window.height, window.width)):
        raise InputError(
            f"Cannot render {window}: its row, column, height and width must be even, because half "
            "of the bands have pixels of 20 m. Widen it to even numbers."
        )
    half = Window(window.row // 2, window.col // 2, window.height // 2, window.width // 2)
    covered = make_covered(spec, acquisition, window)
    covered_half = make_covered_half(covered)
    sky = make_sky(acquisition, window)
    needed = [name for name in BANDS if name in bands or name in ("blue", "red", "nir")]
    seen = _see(spec, acquisition, window, sky=sky, names=needed)

    fine = hash_grid(*_pixels(window), make_key(acquisition.key, 201))
    coarse = hash_grid(*_pixels(half), make_key(acquisition.key, 202))
    stored: dict[str, NDArray[np.uint16]] = {}
    for name in needed:
        if name not in bands:
            continue
        key = make_key(acquisition.key, 203, BANDS.index(name))
        if name in FINE_BANDS:
            stored[name] = _store(
                seen[name], mix(fine, key), covered=covered, offset=acquisition.offset
            )
        else:
            stored[name] = _store(
                _halve(seen[name]),
                mix(coarse, key),
                covered=covered_half,
                offset=acquisition.offset,
            )

    red, nir = _halve(seen["red"]), _halve(seen["nir"])
    scl = make_scl(
        acquisition,
        half,
        sky=Sky(cloud=_halve(sky.cloud), cirrus=_halve(sky.cirrus), shadow=_halve(sky.shadow)),
        ndvi=(nir - red) / (nir + red + np.float32(1e-3)),
        bright=_halve(seen["blue"]),
        covered=covered_half,
    )
    return Scene(bands=stored, scl=scl)


def make_covered_half(covered: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Say which pixels of 20 m are covered: those whose four pixels of 10 m all are."""
    height, width = covered.shape
    squares = covered.reshape(height // 2, 2, width // 2, 2)
    return np.asarray(squares.all(axis=(1, 3)))


def _see(
    spec: SimulationSpec, acquisition: Acquisition, window: Window, *, sky: Sky, names: list[str]
) -> dict[str, Floats]:
    """Give the reflectance that reaches the satellite, by band: (H, W) float32."""
    wide = window.expand(_HALO)
    land = make_landscape(spec, wide)
    year = spec.start_year + acquisition.season
    state = make_state(
        land.surfaces,
        season=acquisition.season,
        day=acquisition.day,
        year=year,
        wetness=make_wetness(seed=spec.seed, year=year, day=acquisition.day),
        variation=Variation(
            fields=spec.field_variation, year_days=spec.year_days, late_days=spec.late_days
        ),
    )
    uneven = np.float32(1.0) + state.unevenness.astype(np.float32)[land.ids] * land.vigour
    area = state.leaf_area.astype(np.float32)[land.ids] * np.clip(uneven, 0.05, None)
    green = np.float32(1.0) - np.exp(np.float32(-_EXTINCTION) * area)
    texture = np.float32(1.0) + np.float32(0.05) * land.soil

    # Haze, the height of the sun and calibration differ a little from date to date.
    haze = 0.004 + 0.022 * make_uniform(acquisition.key, 21) ** 3
    gain = 1 + 0.05 * (make_uniform(acquisition.key, 22) - 0.5)
    core = np.float32(0.5) + np.float32(0.3) * sky.cloud
    lump = make_noise(window, cells=(24, 7), weights=(1.0, 0.5), key=make_key(acquisition.key, 23))
    core = core + np.float32(0.04) * lump
    seen: dict[str, Floats] = {}
    for name in names:
        band = BANDS.index(name)
        under = state.under[:, band].astype(np.float32)[land.ids] * texture
        leaf = state.leaf[:, band].astype(np.float32)[land.ids]
        ground = _blur(under + green * (leaf - under))
        ground = ground * np.float32(gain) + np.float32(haze * _HAZE[band])
        ground = ground * (np.float32(1.0) - np.float32(_DARKEST * _SHADOW[band]) * sky.shadow)
        ground = ground + sky.cirrus * (np.float32(0.55 * _CIRRUS[band]) - ground)
        seen[name] = ground + sky.cloud * (core * np.float32(_CLOUD[band]) - ground)
    return seen


def _blur(image: Floats) -> Floats:
    """Spread light over neighbouring pixels as the optics do, and cut the halo off."""
    side, middle = np.float32(0.12), np.float32(0.76)
    rows = image[1:-3] * side + image[2:-2] * middle + image[3:-1] * side
    blurred: Floats = rows[:, 1:-3] * side + rows[:, 2:-2] * middle + rows[:, 3:-1] * side
    return blurred


def _halve(image: Floats) -> Floats:
    """Average squares of 2 x 2 pixels, always in the same order."""
    total: Floats = (image[0::2, 0::2] + image[0::2, 1::2]) + (
        image[1::2, 0::2] + image[1::2, 1::2]
    )
    return total * np.float32(0.25)


def _store(
    reflectance: Floats, words: UInts, *, covered: NDArray[np.bool_], offset: int
) -> NDArray[np.uint16]:
    """Add the sensor's noise and turn reflectance into digital numbers; 0 is nodata."""
    noise = to_normal(words) * (np.float32(0.0015) + np.float32(0.012) * reflectance)
    numbers = np.rint((reflectance + noise) * np.float32(10_000)) + np.float32(offset)
    return np.where(covered, np.clip(numbers, 1, 65_535), 0).astype(np.uint16)


def _pixels(window: Window) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return (
        np.arange(window.row, window.row + window.height),
        np.arange(window.col, window.col + window.width),
    )
