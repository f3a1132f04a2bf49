"""Plan a cube: grid, seasons, dates and scenes, before a pixel is read.

A plan is a pure function of the item snapshot, the region and the spec. It prints itself, it can
be stored as JSON, and a build does nothing but carry it out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, NothingFoundError, SearchError
from ..grid import (
    Window,
    absolute_window,
    bounds_window,
    geobox_from_window,
    snapped_geobox,
    utm_crs,
)
from ..region import LONLAT, Region
from .addresses import asset_access, check_asset
from .calendar import Period, period_index, season_periods
from .contract import season_name
from .cost import summary
from .granules import SCL, Dropped, Granule, band_assets, newest_first
from .layout import plan_layout
from .planned import Asset, CubePlan, DatePlan, Scene, SeasonPlan
from .radiometry import Radiometry, resolve_offset
from .sky import SKY_BANDS, SKY_RESOLUTIONS
from .snapshot import ItemSnapshot
from .spec import DEFAULT_BANDS, CubeSpec

__all__ = ["CubePlan", "CubeSpec", "crop_plan", "default_bands", "plan_cube", "plan_zones"]

_EDGE_PIXELS = 4
_MOST_PIXELS = 10**12
"""Of a grid: Europe at 10 m has a tenth of it."""


def plan_cube(
    snapshot: ItemSnapshot,
    region: Region | None = None,
    spec: CubeSpec | None = None,
    *,
    window: Window | None = None,
) -> CubePlan:
    """Plan a cube; reads no pixel.

    Parameters
    ----------
    region
        None takes the union of the scenes' rasters.
    window
        The grid in absolute pixels of the spec's CRS, as it is; by default the region, padded to
        whole windows of the lattice.

    Raises
    ------
    SearchError
        If no item has the bands asked for within the grid.
    InputError
        If the grid would have more than a million million pixels.
    """
    spec = spec or CubeSpec()
    bands, lacking = _choose_bands(snapshot, spec)
    sky = _sky_bands(snapshot, spec)
    granules, unusable = _with_assets(snapshot, tuple(dict.fromkeys((*bands, *sky))))
    region = region or _union_of(granules)
    crs = _choose_crs(spec.crs, region, granules)
    aoi = region.to_crs(crs)
    if window is None:
        window = absolute_window(
            snapped_geobox(aoi, crs=crs, resolution=spec.resolution, lattice=spec.lattice)
        )
    if window.width * window.height > _MOST_PIXELS:
        raise InputError(
            f"Cannot plan a grid of {window.width:,} x {window.height:,} px of {spec.resolution:g} "
            f"m for {region.source}: it must have at most {_MOST_PIXELS:,} pixels. Correct "
            "--resolution, or divide the region."
        )

    items = {item["id"]: item for item in snapshot.items}
    days: dict[np.datetime64, list[tuple[Granule, Scene]]] = defaultdict(list)
    longitude = region.centre[0]
    for granule in granules:
        day = _solar_day(granule.time, longitude)
        scene = _make_scene(granule, items[granule.item], day, snapshot, (bands, sky), crs, spec)
        if scene.meets(window):
            days[day].append((granule, scene))
        else:
            unusable.append(Dropped(item=granule.item, reason="its raster lies outside the grid"))
    if not days:
        raise NothingFoundError(
            f"Cannot plan a cube for {region.source}: none of {len(snapshot)} items has pixels "
            f"there ({summary(unusable)}). Check the region and the time range."
        )
    used = {scene.item for scenes in days.values() for _, scene in scenes}
    _check_cover(spec, [scene for scenes in days.values() for _, scene in scenes])
    return CubePlan(
        spec=spec,
        catalog=snapshot.catalog.name,
        collection=snapshot.collection,
        access=asset_access(snapshot.catalog, snapshot.collection),
        region=region.source,
        aoi=aoi,
        crs=crs,
        window=window,
        bands=bands,
        level=snapshot.profile.level,
        lacking=lacking,
        seasons=_make_seasons(days, len(bands), window, crs, spec),
        dropped=(*snapshot.dropped, *unusable),
        items=tuple(item for item in snapshot.items if item["id"] in used),
        queries=(snapshot.query,),
    )


def crop_plan(plan: CubePlan, window: Window, *, region: str) -> CubePlan:
    """Return the plan of a part of the grid: what ``plan_cube`` makes of that part alone.

    Parameters
    ----------
    window
        The part, in absolute pixels of the plan's CRS.
    region
        What to call it.

    Returns
    -------
    A plan of the seasons that have scenes there, maybe none.
    """
    from shapely.geometry import box

    seasons = []
    for season in plan.seasons:
        dates = []
        for date in season.dates:
            scenes = tuple(scene for scene in date.scenes if scene.meets(window))
            time = date.time
            if scenes and plan.spec.period is None:
                time = min(np.datetime64(scene.time) for scene in scenes).astype("datetime64[s]")
            if scenes or plan.spec.period is not None:
                dates.append(DatePlan(time=time, scenes=scenes))
        if any(date.scenes for date in dates):
            layout = plan.spec.layout or plan_layout(len(dates), len(plan.bands), window.shape_yx)
            seasons.append(SeasonPlan(name=season.name, dates=tuple(dates), layout=layout))
    used = {scene.item for season in seasons for date in season.dates for scene in date.scenes}
    grid = geobox_from_window(window, crs=plan.crs, resolution=plan.spec.resolution).boundingbox
    return dataclasses.replace(
        plan,
        region=region,
        aoi=box(grid.left, grid.bottom, grid.right, grid.top),
        window=window,
        seasons=tuple(seasons),
        items=tuple(item for item in plan.items if item["id"] in used),
    )


def plan_zones(
    snapshot: ItemSnapshot, region: Region | None = None, spec: CubeSpec | None = None
) -> dict[str, CubePlan]:
    """Plan one cube per UTM zone that the region lies in, by the zone's ``EPSG:32xxx``.

    Each cube holds what its zone owns (`stcln_geo.grid.utm_zone_at`) and the width of a window
    beyond, so that every pixel near the line gets a whole window in its own zone.

    Raises
    ------
    InputError
        If the spec asks for one CRS.
    SearchError
        If no item has the bands asked for within the grid of a zone.
    """
    spec = spec or CubeSpec()
    if spec.crs != "auto":
        raise InputError(
            f"Cannot build one cube per zone in {spec.crs}: each has the CRS of its zone. Leave "
            "--crs out, or --per-zone."
        )
    if region is None:
        bands, _ = _choose_bands(snapshot, spec)
        region = _union_of(_with_assets(snapshot, bands)[0])
    margin = spec.lattice.window * spec.resolution
    return {
        zone: plan_cube(snapshot, part, dataclasses.replace(spec, crs=zone))
        for zone, part in region.by_utm_zone(margin=margin).items()
    }


def default_bands(snapshot: ItemSnapshot) -> tuple[str, ...]:
    """Return the bands a cube of these items gets where none are asked for."""
    return _choose_bands(snapshot, CubeSpec())[0]


def _choose_bands(
    snapshot: ItemSnapshot, spec: CubeSpec
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the cube's bands, and the default bands that the items lack."""
    count: Counter[str] = Counter()
    for item in snapshot.items:
        count.update(list(band_assets(item, snapshot.profile)))
    common = [band for band in count if count[band] * 2 > len(snapshot) and band != SCL]
    if spec.bands is None:
        bands = tuple(band for band in DEFAULT_BANDS if band in common)
        return bands or tuple(common), tuple(band for band in DEFAULT_BANDS if band not in common)
    missing = [band for band in spec.bands if not count[band]]
    if missing:
        raise InputError(
            f"Cannot build the bands {', '.join(missing)}: no item of "
            f"'{snapshot.catalog.name}' has them. The items have: {', '.join(common)}. "
            "Choose among these with --bands."
        )
    return spec.bands, ()


def _sky_bands(snapshot: ItemSnapshot, spec: CubeSpec) -> tuple[str, ...]:
    """Return the bands that the cloud model is shown; none where there is no such model."""
    if spec.clouds.source != "omnicloudmask":
        return ()
    offered = set().union(*(band_assets(item, snapshot.profile) for item in snapshot.items))
    missing = [band for band in SKY_BANDS if band not in offered]
    if missing:
        raise InputError(
            f"Cannot mask clouds with OmniCloudMask: no item of '{snapshot.catalog.name}' has the "
            f"bands {', '.join(missing)}, and the model is shown {', '.join(SKY_BANDS)}, whether "
            "the cube has them or not. Use --cloud-mask scl."
        )
    finest, coarsest = SKY_RESOLUTIONS
    if not finest <= spec.resolution <= coarsest:
        raise InputError(
            f"Cannot mask clouds with OmniCloudMask at {spec.resolution:g} m: it knows pixels of "
            f"{finest:g} to {coarsest:g} m. Choose such a --resolution, or --cloud-mask scl."
        )
    return SKY_BANDS


def _with_assets(
    snapshot: ItemSnapshot, bands: tuple[str, ...]
) -> tuple[list[Granule], list[Dropped]]:
    """Return the granules that have every band, and scene classes if most do."""
    assets = [band_assets(item, snapshot.profile) for item in snapshot.items]
    has_scl = sum(SCL in found for found in assets) * 2 > len(assets)
    needed = (*bands, SCL) if has_scl else bands
    kept, dropped = [], []
    for granule, found in zip(snapshot.granules, assets, strict=True):
        missing = [name for name in needed if name not in found]
        if missing:
            reason = f"lacks the asset of {', '.join(missing)}"
            dropped.append(Dropped(item=granule.item, reason=reason))
        else:
            kept.append(granule)
    if not kept:
        raise SearchError(
            f"Cannot plan a cube of the bands {', '.join(bands)}: none of {len(assets)} items has "
            f"all of them ({summary(dropped)}). Choose fewer with --bands."
        )
    return kept, dropped


def _union_of(granules: Sequence[Granule]) -> Region:
    """Return the region that all scenes cover together, exact where they share a CRS."""
    from pyproj import Transformer
    from shapely import box, union_all

    source = "the extent of the scenes"
    systems = {granule.crs for granule in granules if granule.bounds is not None}
    if len(systems) == 1 and all(granule.bounds for granule in granules):
        crs = str(systems.pop())
        boxes = [box(*granule.bounds) for granule in granules if granule.bounds is not None]
        return Region.from_projected(union_all(boxes), crs, source=source)
    shapes: list[Any] = []
    for granule in granules:
        if granule.bounds is not None:
            change = Transformer.from_crs(granule.crs, LONLAT, always_xy=True)
            around = change.transform_bounds(*granule.bounds, densify_pts=21)
            # West lies east of east where a raster crosses the antimeridian.
            shapes.append(Region.from_bbox(around).geometry)
        elif granule.geometry is not None:
            shapes.append(granule.geometry)
    if not shapes:
        raise SearchError(
            "Cannot find the extent of the scenes: the items have neither a geometry nor "
            "proj:transform and proj:shape. Give the region with --bbox or --region."
        )
    return Region(geometry=union_all(shapes), source=source)


def _choose_crs(asked: str, region: Region, granules: Sequence[Granule]) -> str:
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    systems = {granule.crs for granule in granules}
    shared = str(next(iter(systems))) if len(systems) == 1 and None not in systems else None
    if asked == "auto":
        return shared if shared and CRS(shared).is_projected else utm_crs(region.unwrapped)
    try:
        crs = CRS(asked)
    except CRSError as error:
        raise InputError(
            f"Cannot use the CRS {asked!r}: it is not known. Give a code such as EPSG:32631, or "
            "--crs auto."
        ) from error
    if not crs.is_projected or crs.axis_info[0].unit_conversion_factor != 1.0:
        raise InputError(
            f"Cannot build in {asked}: a cube needs a projected CRS in metres, so that pixels are "
            "squares. Use a UTM zone such as EPSG:32631, or --crs auto."
        )
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt())


def _make_scene(
    granule: Granule,
    item: Mapping[str, Any],
    day: np.datetime64,
    snapshot: ItemSnapshot,
    bands_and_sky: tuple[tuple[str, ...], tuple[str, ...]],
    crs: str,
    spec: CubeSpec,
) -> Scene:
    bands, sky = bands_and_sky
    keys = band_assets(item, snapshot.profile)
    access = asset_access(snapshot.catalog, snapshot.collection)

    def asset(name: str, radiometry: Radiometry) -> Asset:
        what = f"asset {keys[name]} of item {granule.item}"
        href = check_asset(item["assets"][keys[name]], access, what=what)
        return Asset(key=keys[name], href=href, radiometry=radiometry)

    def measured(band: str) -> Asset:
        rule = resolve_offset(
            item, keys[band], snapshot.profile, override=spec.offset, baseline=granule.baseline
        )
        return asset(band, rule)

    return Scene(
        item=granule.item,
        time=str(granule.time),
        day=str(day),
        platform=granule.platform,
        orbit=granule.orbit,
        baseline=granule.baseline,
        crs=granule.crs,
        place=_place(granule, crs, spec.resolution),
        bands=tuple(measured(band) for band in bands),
        scl=asset(SCL, Radiometry(offset=0)) if SCL in keys else None,
        cloud_cover=_cloud_cover(item) if spec.composite == "least-cloudy" else None,
        tile=granule.tile,
        sensing=str(granule.sensing),
        processed=granule.generation,
        sky=tuple(measured(band) for band in sky),
    )


def _cloud_cover(item: Mapping[str, Any]) -> int | None:
    """Return the cloud cover an item tells, in 0.01 %."""
    told = (item.get("properties") or {}).get("eo:cloud_cover")
    if not isinstance(told, int | float) or not 0 <= told <= 100:
        return None
    return round(told * 100)


def _place(granule: Granule, crs: str, resolution: float) -> tuple[int, int, int, int] | None:
    """Return the scene's raster in the cube's absolute pixels, a little too large if it bends."""
    from pyproj import Transformer

    if granule.bounds is None or granule.crs is None:
        return None
    bounds, edge = granule.bounds, 0
    if granule.crs != crs:
        change = Transformer.from_crs(granule.crs, crs, always_xy=True)
        bounds, edge = change.transform_bounds(*bounds, densify_pts=21), _EDGE_PIXELS
        if not np.isfinite(bounds).all():
            return None
    place = bounds_window(bounds, resolution=resolution).expand(edge)
    return place.row, place.col, place.height, place.width


def _solar_day(time: np.datetime64, longitude: float) -> np.datetime64:
    """Return the local date by the sun at a longitude (degrees)."""
    shift = np.timedelta64(round(longitude / 15 * 3600), "s")
    day: np.datetime64 = (time.astype("datetime64[s]") + shift).astype("datetime64[D]")
    return day


def _make_seasons(
    days: Mapping[np.datetime64, list[tuple[Granule, Scene]]],
    bands: int,
    window: Window,
    crs: str,
    spec: CubeSpec,
) -> tuple[SeasonPlan, ...]:
    seasons: dict[str, list[DatePlan]] = defaultdict(list)
    for day in sorted(days):
        preferred = sorted(days[day], key=lambda pair: (pair[0].crs != crs, *newest_first(pair[0])))
        time = min(granule.time for granule, _ in preferred).astype("datetime64[s]")
        date = DatePlan(time=time, scenes=tuple(scene for _, scene in preferred))
        seasons[season_name(time, spec.season_start)].append(date)
    if spec.period is not None:
        seasons = {name: _merged(name, dates, spec.period) for name, dates in seasons.items()}
    return tuple(
        SeasonPlan(
            name=name,
            dates=tuple(dates),
            layout=spec.layout or plan_layout(len(dates), bands, window.shape_yx),
        )
        for name, dates in sorted(seasons.items())
    )


def _merged(season: str, days: Sequence[DatePlan], period: Period) -> list[DatePlan]:
    """Return one date per period of the season, also where no scene was found."""
    spans = season_periods(season, period)
    scenes: list[list[Scene]] = [[] for _ in spans]
    for date in days:
        for scene in date.scenes:
            scenes[period_index(spans, np.datetime64(scene.day))].append(scene)
    return [
        DatePlan(time=span.middle, scenes=tuple(found))
        for span, found in zip(spans, scenes, strict=True)
    ]


def _check_cover(spec: CubeSpec, scenes: Sequence[Scene]) -> None:
    """Refuse to choose by cloud cover where no scene tells it."""
    if spec.composite == "least-cloudy" and all(scene.cloud_cover is None for scene in scenes):
        raise InputError(
            f"Cannot make least-cloudy composites: none of {len(scenes)} items has the property "
            "eo:cloud_cover (0 to 100), by which the scene is chosen. Use --composite medoid or "
            "median."
        )
