"""The nouns of a plan: scenes, dates, seasons, and the cube they make; stored as JSON."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from ..catalog import Access
from ..errors import CubeError, StclnGeoError
from ..grid import Window, geobox_from_window
from .granules import Dropped
from .layout import Layout
from .radiometry import Radiometry
from .spec import CubeSpec

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

__all__ = ["Asset", "CubePlan", "DatePlan", "Scene", "SeasonPlan", "Substitute"]

LONG_GAP_DAYS = 30
_SEASON = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """A file to read, and what its numbers mean."""

    key: str
    href: str
    radiometry: Radiometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitute:
    """Another catalog's product of a scene, from which its assets are read."""

    catalog: str
    item: str
    baseline: str
    access: Mapping[str, Any]
    """What that catalog says about reading its pixels, as JSON values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One item's part in a date."""

    item: str
    time: str
    day: str
    """Solar day, ``YYYY-MM-DD``."""
    platform: str
    orbit: int | None
    baseline: str
    crs: str | None
    place: tuple[int, int, int, int] | None
    """Row, column, height, width of its raster in absolute pixels of the cube; None: unknown."""
    bands: tuple[Asset, ...]
    """In the order of the cube's bands."""
    scl: Asset | None
    cloud_cover: int | None = None
    """In 0.01 %, where the composite depends on it and the item tells."""
    tile: str = ""
    """Grid tile such as ``31UES``, or the place of the raster."""
    sensing: str = ""
    """Start of the datastrip (UTC), or the acquisition where the datastrip is unknown."""
    processed: str = ""
    """When the product was made, as the item says; empty if unknown."""
    substitute: Substitute | None = None
    """Set where the assets are another catalog's."""
    sky: tuple[Asset, ...] = ()
    """Red, green and near infrared for the cloud model, where one finds the clouds."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the scene's pixels: what it is, not the addresses where it lies."""
        content = self.to_json()
        scl = [content["scl"]] if content["scl"] else []
        for asset in (*content["bands"], *scl, *content.get("sky", ())):
            del asset["href"]
        if content["substitute"] is not None:
            del content["substitute"]["access"]
        return content

    @property
    def assets(self) -> tuple[Asset, ...]:
        """The files to read, each once."""
        scl = (self.scl,) if self.scl is not None else ()
        return (*self.bands, *scl, *(asset for asset in self.sky if asset not in self.bands))

    def to_json(self) -> dict[str, Any]:
        """Return the scene as JSON values."""
        content = asdict(self)
        if not self.sky:
            del content["sky"]
        return content

    def meets(self, area: Window) -> bool:
        """Return False where the scene surely has no pixel in an absolute area."""
        return self.place is None or not Window(*self.place).intersection(area).is_empty


@dataclass(frozen=True, slots=True, kw_only=True)
class DatePlan:
    """A date of the cube: a solar day, or a period whose days are merged."""

    time: np.datetime64
    """Earliest acquisition of the day, or the middle of the period; UTC, to the second."""
    scenes: tuple[Scene, ...]
    """Day after day, the preferred first within a day; a period may have none."""

    def days(self, area: Window | None = None) -> list[str]:
        """Return the solar days of the scenes (of those that meet an absolute area), in order."""
        met = (scene for scene in self.scenes if area is None or scene.meets(area))
        return list(dict.fromkeys(scene.day for scene in met))


@dataclass(frozen=True, slots=True, kw_only=True)
class SeasonPlan:
    """The dates of a season, and how it is stored."""

    name: str
    dates: tuple[DatePlan, ...]
    layout: Layout

    def __post_init__(self) -> None:
        """Check the name: folders are named by it, also where a plan is another's."""
        if not _SEASON.fullmatch(self.name):
            raise CubeError(
                f"Cannot use the season {self.name!r} of a plan: seasons are named by their first "
                "day, YYYY-MM-DD. The plan was damaged or made to do harm; build the cube again."
            )

    @property
    def time(self) -> np.ndarray:
        """(T,) datetime64[s], UTC."""
        return np.array([date.time for date in self.dates], dtype="datetime64[s]")

    @property
    def gaps(self) -> list[tuple[str, str, int]]:
        """First day, last day and length (days) of the gaps without scenes longer than a month."""
        seen = [day for date in self.dates for day in date.days()]
        days = np.array(seen, dtype="datetime64[D]")
        steps = np.diff(days).astype(int)
        return [
            (str(days[index]), str(days[index + 1]), int(steps[index]))
            for index in np.flatnonzero(steps > LONG_GAP_DAYS)
        ]

    def within(self, area: Window) -> SeasonPlan:
        """Return the season with those scenes alone that may have a pixel in an absolute area."""
        dates = (
            replace(date, scenes=tuple(scene for scene in date.scenes if scene.meets(area)))
            for date in self.dates
        )
        return replace(self, dates=tuple(dates))


@dataclass(frozen=True, slots=True, kw_only=True)
class CubePlan:
    """All a build needs, and what it will cost; ``str(plan)`` is for people."""

    spec: CubeSpec
    catalog: str
    collection: str | None
    access: Access
    region: str
    """How the region was given."""
    aoi: BaseGeometry
    """The region in ``crs``."""
    crs: str
    window: Window
    """The grid in absolute pixels of ``crs``."""
    bands: tuple[str, ...]
    lacking: tuple[str, ...]
    """Default bands that the items do not have."""
    seasons: tuple[SeasonPlan, ...]
    dropped: tuple[Dropped, ...]
    items: tuple[dict[str, Any], ...] = field(repr=False, compare=False, default=())
    """The snapshot; empty in a plan that was read back."""
    request: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)
    """What the user asked for, so that a killed build finds its plan again."""
    level: str = "surface"
    """``surface`` or ``top-of-atmosphere`` reflectance."""
    queries: tuple[Mapping[str, Any], ...] = field(repr=False, compare=False, default=())
    """The searches that the items came from; empty in a plan that was read back."""

    @property
    def geobox(self) -> GeoBox:
        """The grid."""
        return geobox_from_window(self.window, crs=self.crs, resolution=self.spec.resolution)

    @property
    def with_scl(self) -> bool:
        """True where every scene has scene classes."""
        return all(scene.scl is not None for scene in self.scenes)

    @property
    def cloud_mask(self) -> str:
        """What finds clouds: ``scl``, ``omnicloudmask``, or ``none`` where nothing does."""
        source = self.spec.clouds.source
        return "none" if source == "scl" and not self.with_scl else source

    @property
    def keeps_scl(self) -> bool:
        """True where scene classes are stored: they are of a day, so composites have none."""
        return self.with_scl and self.spec.keep_scl and self.spec.composite == "none"

    @property
    def scenes(self) -> list[Scene]:
        """All scenes, oldest first."""
        return [scene for season in self.seasons for date in season.dates for scene in date.scenes]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the cube's content."""
        content = self.to_json()
        for key in ("dropped", "lacking", "region", "catalog", "collection", "access", "level"):
            del content[key]
        for key in ("on_error", "max_failed_fraction"):
            del content["spec"][key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def season(self, name: str) -> SeasonPlan:
        """Return a season by name."""
        return next(season for season in self.seasons if season.name == name)

    def describe(self, *, memory: int | None = None, workers: int = 0) -> str:
        """Return the plan as text for people, for some memory (bytes) and number of workers."""
        from .cost import DEFAULT_MEMORY, describe_plan

        return describe_plan(self, memory=memory or DEFAULT_MEMORY, workers=workers)

    def __str__(self) -> str:
        return self.describe()

    def to_json(self) -> dict[str, Any]:
        """Return the plan, without the snapshot, as JSON values."""
        from shapely.geometry import mapping

        content: dict[str, Any] = {
            "spec": self.spec.to_json(),
            "catalog": self.catalog,
            "collection": self.collection,
            "access": self.access.model_dump(),
            "region": self.region,
            "aoi": mapping(self.aoi),
            "crs": self.crs,
            "window": asdict(self.window),
            "bands": self.bands,
            "lacking": self.lacking,
            "level": self.level,
            "seasons": [
                {
                    "name": season.name,
                    "layout": season.layout.to_json(),
                    "dates": [
                        {
                            "time": str(date.time),
                            "scenes": [scene.to_json() for scene in date.scenes],
                        }
                        for date in season.dates
                    ],
                }
                for season in self.seasons
            ],
            "dropped": [asdict(entry) for entry in self.dropped],
        }
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CubePlan:
        """Return the plan that ``to_json`` wrote.

        Raises
        ------
        CubeError
            If it is not what a build writes, such as a season whose name leads out of the cube, or
            an option of GDAL that a catalog may not set.
        """
        from shapely.geometry import shape

        try:
            return cls(
                spec=CubeSpec.from_json(content["spec"]),
                catalog=content["catalog"],
                collection=content["collection"],
                access=Access.model_validate(content["access"]),
                region=content["region"],
                aoi=shape(content["aoi"]),
                crs=content["crs"],
                window=Window(**content["window"]),
                bands=tuple(content["bands"]),
                lacking=tuple(content["lacking"]),
                level=content.get("level", "surface"),
                seasons=tuple(_season_from_json(season) for season in content["seasons"]),
                dropped=tuple(Dropped(**entry) for entry in content["dropped"]),
            )
        except ValidationError as error:
            # The message of pydantic quotes what it refused, which may be a secret.
            told = "; ".join(str(problem["msg"]) for problem in error.errors())
            raise _unfit(told) from None
        except StclnGeoError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise _unfit(f"{type(error).__name__}: {error}") from error


def _unfit(why: str) -> CubeError:
    return CubeError(
        f"Cannot use the plan of a cube: {why}. It must be as 'cube build' wrote it. Build the "
        "cube again, or correct the plan if you know where it comes from."
    )


def _season_from_json(content: Mapping[str, Any]) -> SeasonPlan:
    return SeasonPlan(
        name=content["name"],
        layout=Layout(**content["layout"]),
        dates=tuple(
            DatePlan(
                time=np.datetime64(date["time"], "s"),
                scenes=tuple(_scene_from_json(scene) for scene in date["scenes"]),
            )
            for date in content["dates"]
        ),
    )


def _scene_from_json(content: Mapping[str, Any]) -> Scene:
    return Scene(
        **{
            **content,
            "day": content.get("day", content["time"][:10]),
            "place": tuple(content["place"]) if content["place"] else None,
            "bands": tuple(_asset_from_json(asset) for asset in content["bands"]),
            "scl": _asset_from_json(content["scl"]) if content["scl"] else None,
            "substitute": _substitute_from_json(content["substitute"])
            if content.get("substitute")
            else None,
            "sky": tuple(_asset_from_json(asset) for asset in content.get("sky", ())),
        }
    )


def _substitute_from_json(content: Mapping[str, Any]) -> Substitute:
    Access.model_validate(content["access"])
    return Substitute(**content)


def _asset_from_json(content: Mapping[str, Any]) -> Asset:
    return Asset(**{**content, "radiometry": Radiometry(**content["radiometry"])})
