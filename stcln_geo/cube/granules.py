"""What a STAC item is: which scene, where, from which processing, and which asset is which band."""

from __future__ import annotations

import datetime
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..antimeridian import split_at_antimeridian
from ..catalog import CollectionProfile
from ..errors import SearchError
from .contract import BANDS

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["Dropped", "Granule", "band_assets", "describe_item", "drop_duplicates", "newest_first"]

SCL = "scl"
"""Name of the scene classes among the assets."""

SAME_SCENE_SECONDS = 5
"""Two products of one tile are the same scene if their sensing started this close together."""

LONGEST_DATATAKE = np.timedelta64(1, "h")
"""A pass over land lasts less than half of this."""

_BY_NUMBER = {
    "B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge1",
    "B06": "rededge2", "B07": "rededge3", "B08": "nir", "B8A": "nir08", "B09": "nir09",
    "B10": "cirrus", "B11": "swir16", "B12": "swir22",
}  # fmt: skip
_NUMBERED = re.compile(r"(B\d\d|B8A)(?:_\d\dm)?", re.IGNORECASE)
_SCENE_CLASSES = re.compile(r"SCL(?:_\d\dm)?", re.IGNORECASE)
_NOT_PIXELS = {"thumbnail", "overview", "visual", "metadata", "tiles"}
_RESAMPLED = {"sampling:downsampled", "sampling:upsampled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """An item that is not used, and why."""

    item: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Granule:
    """An item as a satellite scene."""

    item: str
    """Id of the item."""
    time: np.datetime64
    """Acquisition, UTC, to the millisecond; after midnight in a pass that began before it, the
    start of the datatake, so that the pass is of one day (UTC) wherever it is looked at."""
    platform: str
    tile: str
    """Grid tile such as ``31UES``; without one, the place of the raster."""
    orbit: int | None
    """Relative orbit."""
    baseline: str
    """Processing baseline such as ``05.09``; empty if unknown."""
    generation: str
    """Time of processing (ISO text), or empty."""
    sequence: str
    sensing: np.datetime64
    """Start of the datastrip, or the acquisition where the datastrip is unknown."""
    datatake: str
    """Start of the datatake (``YYYYMMDDTHHMMSS``), or empty."""
    crs: str | None
    bounds: tuple[float, float, float, float] | None
    """Left, bottom, right, top of the raster in ``crs``, if the item tells."""
    geometry: BaseGeometry | None
    """Footprint in lon/lat, split at the antimeridian."""

    @property
    def rank(self) -> tuple[tuple[int, ...], str, str]:
        """Sort key: the newer processing is the greater."""
        return _version(self.baseline), self.generation, self.sequence


def describe_item(item: Mapping[str, Any], profile: CollectionProfile) -> Granule:
    """Read an item's identity by the names its collection uses."""
    from shapely.geometry import shape

    properties = item.get("properties") or {}
    names = profile.properties
    identifier = str(item.get("id", ""))
    product = str(_first(properties, names.product) or identifier)
    time = _item_time(item)
    datastrip = str(_first(properties, names.datastrip) or "")
    sensing = _stamp(re.search(r"_S(\d{8}T\d{6})", datastrip)) or time.astype("datetime64[s]")
    datatake = re.search(r"(\d{8}T\d{6})", str(_first(properties, names.datatake) or ""))
    take = datatake[1] if datatake else ""
    crs, bounds = _raster_extent(item)
    geometry = split_at_antimeridian(shape(item["geometry"])) if item.get("geometry") else None
    tile = str(_first(properties, names.tile) or _in_name(product, r"_T(\d{2}[A-Z]{3})") or "")
    orbit = _first(properties, names.orbit) or _in_name(product, r"_R(\d{3})")
    baseline = str(_first(properties, names.baseline) or _baseline_in_name(product))
    return Granule(
        item=identifier,
        time=_time_of_pass(time, take),
        platform=str(properties.get("platform") or properties.get("constellation") or "").lower(),
        tile=tile.removeprefix("MGRS-").removeprefix("T")
        or repr((crs, bounds) if bounds else tuple(item.get("bbox") or ())),
        orbit=int(orbit) if orbit is not None else None,
        baseline=baseline,
        generation=str(_first(properties, names.generation) or ""),
        sequence=str(_first(properties, names.sequence) or ""),
        sensing=sensing,
        datatake=take,
        crs=crs,
        bounds=bounds,
        geometry=geometry,
    )


def band_assets(item: Mapping[str, Any], profile: CollectionProfile) -> dict[str, str]:
    """Return the asset key of each band the item has, and of ``scl``.

    Where the profile lists no bands, keys are recognised by common name, by Sentinel-2 number,
    or by the name their ``bands`` entry gives.
    """
    assets: Mapping[str, Any] = item.get("assets") or {}
    if profile.bands:
        wanted = dict(profile.bands)
        if profile.scl is not None:
            wanted[SCL] = profile.scl
        return {name: band.asset for name, band in wanted.items() if band.asset in assets}
    found: dict[str, tuple[float, str]] = {}
    for key, asset in assets.items():
        name = _band_of(key, asset)
        size = float(asset.get("gsd") or 0)
        if name is not None and (name not in found or size < found[name][0]):
            found[name] = (size, key)
    return {name: found[name][1] for name in (*BANDS, SCL) if name in found}


def newest_first(granule: Granule) -> tuple[tuple[int, ...], str]:
    """Return the sort key of a mosaic: the newest baseline first, unknown last; then the id."""
    # What ends it is greater than any negative part: a shorter version is the older.
    return (*(-part for part in _version(granule.baseline)), 1), granule.item


def drop_duplicates(granules: Iterable[Granule]) -> tuple[list[Granule], list[Dropped]]:
    """Keep one product of each scene: the newest baseline, then the newest processing.

    Products are of one scene if platform, tile, orbit and datatake agree and their sensing began
    within a few seconds. The halves of a tile that two datastrips share are two scenes.
    """
    groups: dict[tuple[Any, ...], list[Granule]] = defaultdict(list)
    for granule in granules:
        takes = granule.datatake or str(granule.time.astype("datetime64[D]"))
        groups[(granule.platform, granule.tile, granule.orbit, takes)].append(granule)
    kept: list[Granule] = []
    dropped: list[Dropped] = []
    for group in groups.values():
        for scene in _same_sensing(group):
            best = max(scene, key=lambda granule: (granule.rank, granule.item))
            kept.append(best)
            dropped.extend(
                Dropped(item=granule.item, reason=f"older processing of {best.item}")
                for granule in scene
                if granule is not best
            )
    return sorted(kept, key=lambda granule: (granule.time, granule.item)), dropped


def _same_sensing(group: Sequence[Granule]) -> list[list[Granule]]:
    scenes: list[list[Granule]] = []
    for granule in sorted(group, key=lambda one: (one.sensing, one.item)):
        limit = np.timedelta64(SAME_SCENE_SECONDS, "s")
        if scenes and granule.sensing - scenes[-1][0].sensing <= limit:
            scenes[-1].append(granule)
        else:
            scenes.append([granule])
    return scenes


def _band_of(key: str, asset: Mapping[str, Any]) -> str | None:
    roles = set(asset.get("roles") or ())
    if key.lower().endswith("-jp2") or roles & (_NOT_PIXELS | _RESAMPLED):
        return None
    named = _by_name(key)
    if named is not None:
        return named
    described = asset.get("eo:bands") or asset.get("bands") or []
    if len(described) != 1:
        return None
    entry = described[0]
    common = entry.get("common_name") or entry.get("eo:common_name")
    return _by_name(str(entry.get("name", ""))) or _by_name(str(common or ""))


def _by_name(text: str) -> str | None:
    if text.lower() in BANDS:
        return text.lower()
    if _SCENE_CLASSES.fullmatch(text):
        return SCL
    match = _NUMBERED.fullmatch(text)
    return _BY_NUMBER.get(match[1].upper()) if match else None


def _item_time(item: Mapping[str, Any]) -> np.datetime64:
    properties = item.get("properties") or {}
    text = properties.get("datetime") or properties.get("start_datetime")
    try:
        moment = datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError as error:
        raise SearchError(
            f"Cannot use item {item.get('id')!r}: its datetime is {text!r}, not an ISO time. "
            "Correct the catalog, or leave the item out."
        ) from error
    if moment.tzinfo is not None:
        moment = moment.astimezone(datetime.UTC).replace(tzinfo=None)
    return np.datetime64(moment, "ms")


def _time_of_pass(time: np.datetime64, datatake: str) -> np.datetime64:
    """Return a scene's time, or the datatake's start where midnight UTC lies between the two."""
    try:
        start = _stamp(re.fullmatch(r"(\d{8}T\d{6})", datatake))
    except ValueError:  # no time of any calendar
        return time
    if start is None or not start <= time <= start + LONGEST_DATATAKE:
        return time
    same_day = start.astype("datetime64[D]") == time.astype("datetime64[D]")
    return time if same_day else start.astype("datetime64[ms]")


def _raster_extent(
    item: Mapping[str, Any],
) -> tuple[str | None, tuple[float, float, float, float] | None]:
    """Return CRS and bounds from the projection extension, of the item or of its assets."""
    properties = item.get("properties") or {}
    sources = [asset for asset in (item.get("assets") or {}).values() if "proj:transform" in asset]
    crs, bounds = _crs_of(properties), None
    for source in (*sources, properties):
        transform, shape = source.get("proj:transform"), source.get("proj:shape")
        if transform is None or shape is None or len(transform) < 6:
            continue
        crs = _crs_of(source) or crs
        a, _, left, _, e, top = (float(value) for value in transform[:6])
        right, bottom = left + a * float(shape[1]), top + e * float(shape[0])
        bounds = (min(left, right), min(bottom, top), max(left, right), max(bottom, top))
        break
    return crs, bounds if crs else None


def _crs_of(source: Mapping[str, Any]) -> str | None:
    code = source.get("proj:code")
    if code:
        return str(code)
    epsg = source.get("proj:epsg")
    return f"EPSG:{int(epsg)}" if epsg else None


def _first(properties: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if properties.get(name) is not None:
            return properties[name]
    return None


def _in_name(product: str, pattern: str) -> str | None:
    match = re.search(pattern, product)
    return match[1] if match else None


def _baseline_in_name(product: str) -> str:
    digits = _in_name(product, r"_N(\d{4})_")
    return f"{digits[:2]}.{digits[2:]}" if digits else ""


def _stamp(match: re.Match[str] | None) -> np.datetime64 | None:
    if match is None:
        return None
    moment = datetime.datetime.strptime(match[1], "%Y%m%dT%H%M%S")
    return np.datetime64(moment, "s")


def _version(baseline: str) -> tuple[int, ...]:
    """Return ``05.09`` as (5, 9), which sorts as versions do; unknown is the oldest."""
    return tuple(int(part) for part in re.findall(r"\d+", baseline))
