"""Look at an item before anything relies on it: servers answer with what is no STAC item, too."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..catalog import CollectionProfile
from .granules import SCL, Granule, band_assets
from .radiometry import declared_radiometry

__all__ = ["check_declared", "check_item", "check_place"]

_LARGEST = 10.0
"""Reflectance: more than any scale or offset of an image can be."""

_FARTHEST = 1e8
"""Metres from the origin of a CRS; twice around the Earth."""

_CODE = re.compile(r"[A-Za-z]\w*:[\w.]+")


def check_item(item: Mapping[str, Any]) -> None:
    """Raise ValueError unless an item has an id and a place, and the rest can be read."""
    identifier = item.get("id")
    if not isinstance(identifier, str) or not identifier:
        raise ValueError(f"its id is {identifier!r}")
    if not isinstance(item.get("geometry"), Mapping):
        raise ValueError("it has no geometry")
    if not isinstance(item.get("properties") or {}, Mapping):
        raise ValueError("its properties are no JSON object")
    assets = item.get("assets") or {}
    if not isinstance(assets, Mapping):
        raise ValueError("its assets are no JSON object")
    for key, asset in assets.items():
        if not isinstance(asset, Mapping):
            raise ValueError(f"its asset {key!r} is no JSON object")


def check_declared(item: Mapping[str, Any], profile: CollectionProfile) -> None:
    """Raise ValueError where a band has no address, or a scale, offset or nodata of no image."""
    for name, key in band_assets(item, profile).items():
        if not isinstance(item["assets"][key].get("href"), str):
            raise ValueError(f"its asset {key!r} has no address")
        told = declared_radiometry(item["assets"][key]) if name != SCL else {}
        limits = {"scale": _LARGEST, "offset": _LARGEST, "nodata": float(np.iinfo("int64").max)}
        for what, limit in limits.items():
            value = told.get(what, 0.0)
            if abs(value) >= limit or (what == "scale" and told.get(what, 1.0) <= 0):
                raise ValueError(f"asset {key!r} declares the {what} {value:g}")


def check_place(granule: Granule) -> None:
    """Raise ValueError, or CRSError, unless a raster lies somewhere on Earth, if it is placed."""
    if granule.crs is not None:
        _check_crs(granule.crs)
    if granule.bounds is not None:
        left, bottom, right, top = granule.bounds
        inside = all(abs(side) <= _FARTHEST for side in granule.bounds)
        if not inside or left >= right or bottom >= top:
            raise ValueError(f"its proj:transform and proj:shape give {list(granule.bounds)}")


@functools.lru_cache(maxsize=256)
def _check_crs(code: str) -> None:
    # Other texts that PROJ understands can name files and addresses.
    from pyproj import CRS

    if _CODE.fullmatch(code) is None:
        raise ValueError(f"its proj:code is {code!r}")
    CRS(code)
