"""From the numbers in the files to one scale: reflectance / 0.0001 as int16, negatives kept.

Sentinel-2 products carry an offset since processing baseline 04.00; providers declare it, remove
it, or leave it to the reader. `resolve_offset` decides once per item which of these holds, and
`harmonise` applies it before scenes of one day are fused, so that scenes never mix scales.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..catalog import CollectionProfile
from .contract import FILL, SCALE

__all__ = [
    "MAX_DN",
    "OffsetSource",
    "Radiometry",
    "declared_radiometry",
    "harmonise",
    "resolve_offset",
]

MAX_DN = 32767
"""Largest number the cube holds; brighter pixels are cut to it and never valid."""

OffsetSource = Literal["given by the user", "already applied", "declared", "baseline", "none"]
"""Why an offset was chosen."""


_NO_REFLECTANCE = re.compile(
    r"(scl|aot|wvp|tci|visual|cloud|snow|preview)(_\d\dm)?(-jp2)?", re.IGNORECASE
)
"""Asset keys that are no reflectance; CDSE declares -0.1 for some of them all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Radiometry:
    """How the numbers of one asset become the cube's."""

    offset: int
    """Added after scaling (cube numbers; -1000 is a reflectance of -0.1)."""
    factor: float = 1.0
    """Cube numbers per source number."""
    nodata: int = 0
    """Source number of a pixel without a measurement."""
    source: OffsetSource = "none"


def resolve_offset(
    item: Mapping[str, Any],
    asset_key: str,
    profile: CollectionProfile,
    *,
    override: float | None = None,
    baseline: str = "",
) -> Radiometry:
    """Return the radiometry of an asset.

    Scene classes, aerosol, water vapour and other layers that are no reflectance have no offset,
    whatever they declare. For reflectance the first of these that holds decides on the offset:
    what the user gives; 0 where the item says that it was already removed; what the asset
    declares; the collection's rule by processing baseline; 0.

    Parameters
    ----------
    override
        Reflectance to add, in place of all rules (-0.1 for raw products since baseline 04.00).
    baseline
        The item's processing baseline, such as ``05.09``.
    """
    asset: Mapping[str, Any] = (item.get("assets") or {}).get(asset_key) or {}
    rule = profile.offset
    declared = declared_radiometry(asset)
    scale = declared.get("scale", profile.scale)
    offset, source = 0.0, "none"
    if _NO_REFLECTANCE.fullmatch(asset_key):
        scale = SCALE
    elif override is not None:
        offset, source = override, "given by the user"
    elif rule.applied_property and (item.get("properties") or {}).get(rule.applied_property):
        offset, source = 0.0, "already applied"
    elif rule.declared and "offset" in declared:
        offset, source = declared["offset"], "declared"
    elif rule.baseline is not None and _numbers(baseline) >= _numbers(rule.baseline.since):
        offset, source = rule.baseline.offset, "baseline"
    return Radiometry(
        offset=round(offset / SCALE),
        factor=round(scale / SCALE, 9),
        nodata=int(declared.get("nodata", profile.nodata)),
        source=source,  # type: ignore[arg-type]
    )


def harmonise(raw: np.ndarray, radiometry: Radiometry) -> tuple[np.ndarray, np.ndarray]:
    """Turn source numbers into the cube's.

    Parameters
    ----------
    raw : (H, W) integers or floats as read; what is not finite is no data.

    Returns
    -------
    values : (H, W) int16, -32768 where the source has no data.
    usable : (H, W) bool, False where there is no data or the value had to be cut.
    """
    missing = raw == radiometry.nodata
    if raw.dtype.kind == "f":
        finite = np.isfinite(raw)
        missing, raw = missing | ~finite, np.where(finite, raw, 0)
    if _fits(raw, radiometry):
        plain: np.ndarray = raw.view(np.int16) + np.int16(radiometry.offset)
        np.putmask(plain, missing, FILL)
        return plain, ~missing
    if radiometry.factor == 1.0 and raw.dtype.kind != "f":
        wide = raw.astype(np.int32) + np.int32(radiometry.offset)
    else:
        wide = np.rint(raw.astype(np.float64) * radiometry.factor + radiometry.offset)
    cut = (wide > MAX_DN) | (wide <= FILL)
    values = np.clip(wide, FILL + 1, MAX_DN).astype(np.int16)
    values[missing] = FILL
    return values, ~(missing | cut)


def _fits(raw: np.ndarray, radiometry: Radiometry) -> bool:
    """Return True where 16 bits hold all numbers, before and after the offset."""
    if raw.dtype != np.uint16 or radiometry.factor != 1.0 or not FILL < radiometry.offset <= 0:
        return False
    return int(raw.max(initial=0)) <= MAX_DN


def declared_radiometry(asset: Mapping[str, Any]) -> dict[str, float]:
    """Return scale, offset and nodata as the raster extension (either version) declares them."""
    bands = asset.get("raster:bands") or asset.get("bands") or [{}]
    band: Mapping[str, Any] = bands[0] if isinstance(bands[0], Mapping) else {}
    found: dict[str, float] = {}
    for name in ("scale", "offset", "nodata"):
        for source, key in ((asset, f"raster:{name}"), (band, f"raster:{name}"), (band, name)):
            value = source.get(key)
            if isinstance(value, int | float):
                found[name] = float(value)
                break
    if isinstance(asset.get("nodata"), int | float):
        found.setdefault("nodata", float(asset["nodata"]))
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _numbers(baseline: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", baseline))
