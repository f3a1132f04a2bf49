"""Grow crops: cover by green and dry leaves day by day, and the colours of leaves and soil.

Growth follows double logistic curves (green-up and senescence) with a shift, a vigour and a leaf
colour of each field's own. The curves are round numbers in the range of western European farming;
they are not fitted to anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .noise import UInts, make_key, make_uniform, mix, to_normal, to_uniform

if TYPE_CHECKING:
    from .fields import Surfaces

Values = NDArray[np.float64]

BANDS = (
    "blue",
    "green",
    "red",
    "rededge1",
    "rededge2",
    "rededge3",
    "nir",
    "nir08",
    "swir16",
    "swir22",
)
"""Order of the last axis of every table of reflectance here."""

_LEAF = np.array([0.022, 0.058, 0.028, 0.095, 0.29, 0.38, 0.41, 0.43, 0.19, 0.085])
_DRY = np.array([0.075, 0.115, 0.155, 0.195, 0.225, 0.25, 0.28, 0.305, 0.36, 0.26])
_SOIL = np.array([0.075, 0.105, 0.135, 0.16, 0.178, 0.195, 0.215, 0.23, 0.30, 0.255])
_ROOF = np.array([0.13, 0.15, 0.17, 0.18, 0.19, 0.20, 0.21, 0.22, 0.24, 0.22])
_FLOWER = np.array([0.045, 0.16, 0.125, 0.20, 0.33, 0.39, 0.42, 0.43, 0.20, 0.10])
_SEASON_DAYS = 365
_WET_LOSS = 0.38


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """What grows on a surface, with days counted from the season's start."""

    code: str = ""
    """Crop code in the parcels; empty for what is never declared."""
    name: str
    color: str = "#808080"
    share: float = 0.0
    """Share of the fields."""
    permanent: bool = False
    """True where it stays from season to season."""
    leaf_area: float
    """Leaf area index at the peak."""
    sowing: float = 40.0
    """Day of emergence."""
    winter: float = 0.0
    """Share of the peak reached before winter."""
    green_up: float = 200.0
    """Day of half growth."""
    green_up_pace: float = 9.0
    """Days; smaller is steeper."""
    senescence: float = 300.0
    """Day of half senescence."""
    senescence_pace: float = 7.0
    harvest: float = 330.0
    flower_day: float = 0.0
    flower_strength: float = 0.0
    catch_crop: float = 0.0
    """Share of the fields that carry a catch crop in the autumn before."""
    cuts: int = 0
    """Times the grass is cut."""
    shift: float = 5.5
    """Deviation of a field's calendar in days."""
    leaf: tuple[float, ...] = field(default=(1.0,) * len(BANDS))
    """Factors on the colour of a leaf."""
    roof: float = 0.0
    """Share of the ground that is roofs and asphalt."""


CROPS = (
    Cover(
        code="1110",
        name="Winter wheat",
        color="#d8a12d",
        share=0.26,
        leaf_area=4.6,
        sowing=58,
        winter=0.16,
        green_up=207,
        senescence=299,
        senescence_pace=7,
        harvest=329,
    ),
    Cover(
        code="1510",
        name="Winter barley",
        color="#f2d87c",
        share=0.12,
        leaf_area=4.2,
        sowing=44,
        winter=0.26,
        green_up=197,
        senescence=281,
        senescence_pace=7,
        harvest=309,
        leaf=(1.05, 1.08, 1.08, 1.05, 1.0, 0.98, 0.97, 0.97, 1.0, 1.0),
    ),
    Cover(
        code="4351",
        name="Winter rapeseed",
        color="#e8e337",
        share=0.10,
        leaf_area=4.4,
        sowing=22,
        winter=0.42,
        green_up=196,
        senescence=291,
        senescence_pace=8,
        harvest=322,
        flower_day=238,
        flower_strength=0.65,
        leaf=(1.0, 1.05, 0.95, 1.05, 1.03, 1.04, 1.04, 1.03, 0.95, 0.95),
    ),
    Cover(
        code="1200",
        name="Maize",
        color="#e2711d",
        share=0.18,
        leaf_area=4.4,
        sowing=258,
        green_up=290,
        green_up_pace=8,
        senescence=384,
        senescence_pace=8,
        harvest=393,
        catch_crop=0.45,
        leaf=(0.97, 0.96, 0.98, 0.95, 0.96, 0.94, 0.94, 0.94, 1.04, 1.06),
    ),
    Cover(
        code="8100",
        name="Sugar beet",
        color="#b0479a",
        share=0.09,
        leaf_area=4.4,
        sowing=228,
        green_up=273,
        green_up_pace=8,
        senescence=440,
        senescence_pace=20,
        harvest=412,
        catch_crop=0.55,
        leaf=(0.98, 1.10, 0.94, 1.12, 1.10, 1.12, 1.13, 1.12, 0.98, 0.92),
    ),
    Cover(
        code="5100",
        name="Potatoes",
        color="#7a5c3e",
        share=0.09,
        leaf_area=4.0,
        sowing=250,
        green_up=283,
        green_up_pace=7,
        senescence=348,
        senescence_pace=8,
        harvest=376,
        catch_crop=0.4,
        leaf=(1.05, 1.14, 1.04, 1.12, 1.04, 1.02, 1.02, 1.01, 0.92, 0.92),
    ),
    Cover(
        code="9120",
        name="Grassland",
        color="#5fa55a",
        share=0.16,
        permanent=True,
        leaf_area=3.6,
        cuts=3,
        leaf=(1.1, 1.06, 1.12, 1.04, 0.96, 0.93, 0.93, 0.93, 1.04, 1.08),
    ),
)
"""The declared crops, in the order of their codes 0, 1, 2 ... in a simulated truth."""

COVERS = (
    *CROPS,
    Cover(
        name="Wood",
        leaf_area=4.2,
        permanent=True,
        leaf=(0.7, 0.62, 0.66, 0.6, 0.72, 0.74, 0.74, 0.74, 0.6, 0.55),
    ),
    Cover(name="Village", leaf_area=1.4, permanent=True, roof=0.85),
    Cover(name="Meadow", leaf_area=2.8, permanent=True, cuts=0),
    Cover(name="Roads and hedges", leaf_area=2.2, permanent=True, roof=0.3),
)
"""The crops, and what covers the ground elsewhere."""

WOODS, VILLAGE, MEADOW, EDGE = range(len(CROPS), len(COVERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """How far growth strays from the curves of its cover."""

    fields: float = 1.0
    """Factor on how far a field strays in calendar, pace, vigour and colour of leaves."""
    year_days: float = 4.0
    """Days by which the calendar of a year strays at most, earlier or later."""
    late_days: float = 0.0
    """Days by which all calendars of a region are later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All surfaces of a block on one day."""

    leaf_area: Values
    """(S,) leaf area index."""
    leaf: Values
    """(S, band) reflectance of a closed canopy."""
    under: Values
    """(S, band) reflectance of what is under it: soil, straw, roofs."""
    unevenness: Values
    """(S,) how much growth varies within the surface."""


def make_state(
    surfaces: Surfaces,
    *,
    season: int,
    day: float,
    year: int,
    wetness: float,
    variation: Variation | None = None,
) -> State:
    """Grow all surfaces to one day.

    Parameters
    ----------
    surfaces : Surfaces
    season : int
        Index of the season, from 0.
    day : float
        Days since the season's start.
    year : int
        Calendar year in which the season starts; each has a calendar of its own.
    wetness : float
        Of the topsoil, 0 dry to 1 wet.
    variation : Variation, optional
    """
    keys, strays = surfaces.keys, variation or Variation()
    now, before = surfaces.covers[:, season + 1], surfaces.covers[:, season]
    grown, dry, flower = _grow(now, keys, strays, day=day, year=year)
    rest_grown, rest_dry, _ = _grow(before, keys, strays, day=day + _SEASON_DAYS, year=year - 1)

    # The crop of the season before stands until its harvest, grass and woods simply go on.
    goes_on = _table("permanent")[now] > 0
    leaf_area = np.where(goes_on, grown, grown + rest_grown)
    dry = np.where(
        goes_on, 0.0, np.maximum(dry, rest_dry * (day < 150) * (1 - np.minimum(grown / 2.0, 1)))
    )
    leaf_area = leaf_area + np.where(
        goes_on, 0.0, _catch_crop(now, before, keys, day=day, year=year)
    )

    flower = flower * np.minimum(grown / 2.0, 1.0)
    leaf = _LEAF * np.array([cover.leaf for cover in COVERS])[now]
    leaf = leaf * _own_colours(keys, strays.fields)
    leaf = leaf * (1 - flower[:, np.newaxis]) + _FLOWER * flower[:, np.newaxis]
    # Ageing leaves yellow: red and short-wave infrared rise before the cover falls.
    leaf = leaf + (0.45 * dry)[:, np.newaxis] * (_DRY - leaf)

    roof = _table("roof")[now][:, np.newaxis]
    bare = _soils(keys, wetness=wetness) * (1 - dry[:, np.newaxis]) + _DRY * dry[:, np.newaxis]
    return State(
        leaf_area=leaf_area,
        leaf=leaf,
        under=bare * (1 - roof) + _ROOF * roof,
        unevenness=0.06 + 0.22 * to_uniform(mix(keys, 71)) ** 2 + 0.35 * _table("roof")[now],
    )


def make_wetness(*, seed: int, year: int, day: int) -> float:
    """Give the wetness of the topsoil on a day, 0 to 1: rain comes at random and dries away."""
    wetness = 0.0
    for ago in range(12):
        if make_uniform(seed, 73, year, day - ago) < 0.22:
            wetness = max(
                wetness, make_uniform(seed, 79, year, day - ago) * float(np.exp(-ago / 4))
            )
    winter = 0.3 + 0.3 * float(np.cos((day - 130) / _SEASON_DAYS * 2 * np.pi))
    return min(1.0, winter + 0.6 * wetness)


def _grow(
    covers: NDArray[np.uint8], keys: UInts, strays: Variation, *, day: float, year: int
) -> tuple[Values, Values, Values]:
    """Give leaf area, dry share and flower share (S,), `day` days into the covers' season."""
    own = mix(keys, make_key(83, year))
    at = day - strays.late_days - _table("shift")[covers] * strays.fields * to_normal(own)
    at = at - strays.year_days * (2 * make_uniform(89, year) - 1)
    pace, size, cold = (
        strays.fields * to_normal(mix(own, number)).astype(np.float64) for number in (2, 3, 4)
    )
    spread = 1 + 0.15 * pace
    vigour = np.clip(1 + 0.13 * size, 0.45, 1.5)

    winter = _table("winter")[covers] * np.clip(1 + 0.4 * cold, 0.1, 2.2)
    emerged = _rise(at, _table("sowing")[covers], 9.0)
    main = _rise(
        at, _table("green_up")[covers], _table("green_up_pace")[covers] * np.clip(spread, 0.6, 1.5)
    )
    aged = _rise(at, _table("senescence")[covers], _table("senescence_pace")[covers])
    cut = _rise(at, _table("harvest")[covers], 1.5)
    share = (winter * emerged + (1 - winter) * main) * (1 - aged) * (1 - cut)

    # Straw stands, is cut to stubble, then weathers; weeds follow.
    since = np.maximum(at - _table("harvest")[covers], 0.0)
    straw = 0.4 + 0.4 * to_uniform(mix(own, 5))
    dry = 0.85 * aged * (1 - cut) + straw * cut * np.exp(-since / 45)
    weeds = 0.9 * to_uniform(mix(own, 6)) ** 2 * cut * np.minimum(since / 40, 1.0)
    crop_area = _table("leaf_area")[covers] * vigour * share + weeds

    strength = _table("flower_strength")[covers]
    flower = strength * np.exp(-0.5 * ((at - _table("flower_day")[covers]) / 9.0) ** 2)

    grows_on = _table("permanent")[covers] > 0
    leaf_area = np.where(grows_on, _grow_on(covers, own, vigour, day=at), crop_area)
    return leaf_area, np.where(grows_on, 0.0, dry), flower


def _grow_on(covers: NDArray[np.uint8], own: UInts, vigour: Values, *, day: Values) -> Values:
    """Give the leaf area (S,) of grass, woods and gardens, which never end."""
    warm = 0.5 - 0.5 * np.cos((day - 135) / _SEASON_DAYS * 2 * np.pi)
    area = _table("leaf_area")[covers] * vigour * (0.35 + 0.65 * warm)
    cuts = _table("cuts")[covers]
    for number in range(int(cuts.max(initial=0))):
        cut_day = 250 + 48 * number + 24 * (to_uniform(mix(own, 10 + number)) - 0.5)
        since = day - cut_day
        fresh = np.where((since >= 0) & (number < cuts), np.exp(-np.maximum(since, 0) / 16), 0.0)
        area = area * (1 - 0.75 * fresh)
    return area


def _catch_crop(
    now: NDArray[np.uint8], before: NDArray[np.uint8], keys: UInts, *, day: float, year: int
) -> Values:
    """Give the leaf area (S,) of mustard and the like between harvest and a late sowing."""
    own = mix(keys, make_key(97, year))
    start = (
        24
        + 14 * to_uniform(mix(own, 1))
        + np.maximum(_table("harvest")[before] - _SEASON_DAYS, 0.0)
    )
    end = 105 + 80 * to_uniform(mix(own, 2))
    sown = to_uniform(mix(own, 3)) < _table("catch_crop")[now]
    area = 2.6 * (0.5 + to_uniform(mix(own, 4))) * _rise(np.full(len(keys), day), start + 18, 8.0)
    return np.where(sown, area * (1 - _rise(np.full(len(keys), day), end, 10.0)), 0.0)


def _own_colours(keys: UInts, strays: float) -> Values:
    """Give each surface's factors on the colour of its leaves: (S, band)."""
    visible, edge, infrared, short = (
        np.exp(strays * scale * to_normal(mix(keys, 100 + index)).astype(np.float64))
        for index, scale in enumerate((0.08, 0.05, 0.05, 0.08))
    )
    return np.stack([visible] * 3 + [edge] + [infrared] * 4 + [short] * 2, axis=1)


def _soils(keys: UInts, *, wetness: float) -> Values:
    """Give each surface's soil: (S, band); wet soil is dark."""
    brightness = np.exp(0.16 * to_normal(mix(keys, 110)).astype(np.float64))
    slope = 0.05 * to_normal(mix(keys, 111)).astype(np.float64)
    wet = wetness * (0.7 + 0.5 * to_uniform(mix(keys, 112)))
    tilt = 1 + slope[:, np.newaxis] * np.linspace(-1, 1, len(BANDS))
    soils: Values = (
        _SOIL * tilt * (brightness * (1 - _WET_LOSS * np.minimum(wet, 1.0)))[:, np.newaxis]
    )
    return soils


def _rise(at: Values, middle: Values, pace: Values | float) -> Values:
    """Give a logistic step from 0 to 1."""
    return 1 / (1 + np.exp(-np.clip((at - middle) / pace, -40, 40)))


def _table(name: str) -> Values:
    return _TABLES[name]


_TABLES = {
    name: np.array([float(getattr(cover, name)) for cover in COVERS])
    for name in (
        "permanent",
        "leaf_area",
        "sowing",
        "winter",
        "green_up",
        "green_up_pace",
        "senescence",
        "senescence_pace",
        "harvest",
        "flower_day",
        "flower_strength",
        "catch_crop",
        "cuts",
        "shift",
        "roof",
    )
}
