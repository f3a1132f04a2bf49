"""Read the scenes of an area, one after another, while the next ones are already being read."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ..catalog import Access
from ..grid import Window, crop_geobox
from ..storage import Location
from .cost import READERS, SCENES_AHEAD
from .pixels import Pixels
from .planned import Asset, CubePlan, Scene, SeasonPlan
from .read import AssetReader, AssetReadError, LedgerEntry, append_ledger
from .sky import SKY_LATTICE, SkyModel, find_sky

__all__ = [
    "Readers",
    "Reading",
    "SceneReader",
    "classify_sky",
    "seen_around",
    "wanted_scenes",
]

T = TypeVar("T")

Use = Callable[["Reading[Any]", Asset, Pixels], T]
"""Makes something of an asset's pixels, in the thread that read them; they count from the area's
first pixel."""


class Readers:
    """One reader per way of access: the catalog's, and those of substitutes."""

    def __init__(self, access: Access) -> None:
        """Prepare; nothing is opened yet."""
        self._own = AssetReader(access)
        self._others: dict[str, AssetReader] = {}

    def of(self, scene: Scene) -> AssetReader:
        """Return the reader of a scene's assets."""
        if scene.substitute is None:
            return self._own
        key = json.dumps(dict(scene.substitute.access), sort_keys=True)
        if key not in self._others:
            self._others[key] = AssetReader(Access.model_validate(scene.substitute.access))
        return self._others[key]

    @property
    def reads(self) -> int:
        """Asset windows read so far."""
        return self._own.reads + sum(reader.reads for reader in self._others.values())


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """A scene whose assets are being read."""

    number: int
    """Its place among the scenes that are read."""
    date: int
    """Position of its date in the season."""
    scene: Scene
    made: dict[str, Future[T]]
    """What became of its assets, by key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneReader:
    """How the scenes of an area are read.

    Parameters
    ----------
    area
        Absolute pixels.
    ledger
        Where failures are recorded.
    skip_failures
        True leaves a scene out where one of its assets cannot be read.
    """

    plan: CubePlan
    area: Window
    readers: Readers
    ledger: Location
    skip_failures: bool
    threads: int

    def read(
        self, wanted: list[tuple[int, Scene]], use: Use[T], left_out: set[str]
    ) -> Iterator[Reading[T]]:
        """Yield scenes in order, whole ones; add the items of the others to ``left_out``.

        Raises
        ------
        AssetReadError
            If an asset cannot be read and failures are not to be skipped.
        """
        most = self.plan.access.max_connections or 64
        with ThreadPoolExecutor(min(max(self.threads, READERS), most)) as pool:
            try:
                for reading in self._ahead(pool, wanted, use):
                    if self._is_whole(reading):
                        yield reading
                    else:
                        left_out.add(reading.scene.item)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ahead(
        self, pool: ThreadPoolExecutor, wanted: list[tuple[int, Scene]], use: Use[T]
    ) -> Iterator[Reading[T]]:
        def read(reading: Reading[T], asset: Asset) -> T:
            around = seen_around(reading.scene, asset, self.area, self.plan)
            pixels = self.readers.of(reading.scene).fetch(
                asset.href,
                crop_geobox(self.plan.geobox, around.relative_to(self.plan.window)),
                resampling=("nearest" if asset == reading.scene.scl else self.plan.spec.resampling),
                nodata=asset.radiometry.nodata,
            )
            place = around.relative_to(self.area)
            return use(reading, asset, pixels.shift(place.row, place.col))

        ahead: deque[Reading[T]] = deque()
        for number, (date, scene) in enumerate(wanted):
            reading: Reading[T] = Reading(number, date, scene, {})
            for asset in scene.assets:
                if asset != scene.scl or self.plan.with_scl:
                    reading.made[asset.key] = pool.submit(read, reading, asset)
            ahead.append(reading)
            if len(ahead) > SCENES_AHEAD:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()

    def _is_whole(self, reading: Reading[Any]) -> bool:
        """Wait for a scene's assets; record those that could not be read."""
        failures = _failures(reading, self.area.relative_to(self.plan.window))
        for entry in failures:
            append_ledger(self.ledger, entry)
        if failures and not self.skip_failures:
            raise AssetReadError(
                f"{failures[0].item}, asset {failures[0].asset},",
                failures[0].kind,
                failures[0].attempts,
                failures[0].error,
            )
        return not failures


def wanted_scenes(
    season: SeasonPlan, area: Window, reused: Collection[int] = ()
) -> list[tuple[int, Scene]]:
    """Return the scenes that meet an absolute area, with their dates' positions, in order."""
    return [
        (index, scene)
        for index, date in enumerate(season.dates)
        for scene in date.scenes
        if index not in reused and scene.meets(area)
    ]


def seen_around(scene: Scene, asset: Asset, area: Window, plan: CubePlan) -> Window:
    """Return what is read of an asset for an absolute area."""
    near = area.expand(plan.spec.clouds.padding)
    if asset in scene.sky:
        return SKY_LATTICE.cover(near)
    return near if asset == scene.scl else area


def classify_sky(
    scene: Scene, bands: Sequence[np.ndarray], area: Window, plan: CubePlan, model: SkyModel
) -> np.ndarray:
    """Return the cloud model's classes of an absolute area and its padding.

    Parameters
    ----------
    bands : the raw numbers of ``scene.sky`` in the windows of the model's lattice over that.
    """
    near = area.expand(plan.spec.clouds.padding)
    measured = [
        np.where(band == asset.radiometry.nodata, 0, band)
        for asset, band in zip(scene.sky, bands, strict=True)
    ]
    return find_sky(measured, SKY_LATTICE.cover(near), near, model)


def _failures(reading: Reading[Any], area: Window) -> list[LedgerEntry]:
    """Wait for a scene's assets and return those that could not be read."""
    entries = []
    for asset in reading.scene.assets:
        future = reading.made.get(asset.key)
        error = future.exception() if future is not None else None
        if isinstance(error, AssetReadError):
            entries.append(
                LedgerEntry(
                    item=reading.scene.item,
                    asset=asset.key,
                    href=asset.href,
                    kind=error.kind,
                    error=error.reason,
                    attempts=error.attempts,
                    window=(area.row, area.col, area.height, area.width),
                )
            )
        elif error is not None:
            raise error
    return entries
