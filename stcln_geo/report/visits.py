"""Say which parcels to visit, before there are labels: see `stcln_geo.data.choice`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..cube.labels import values_as_text
from ..cube.store import Season, open_season
from ..errors import InputError
from ..execution import ProgressHook
from ..legend import Legend
from ..maps.parcels import placed, read_parcels
from ..maps.vector import check_other_layers, check_target, write_vector
from ..storage import Location

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

    from ..data.choice import Choice
    from ..data.profiles import FieldProfiles

__all__ = ["COLUMN", "NotToVisit", "VisitReport", "VisitSpec", "choose_visits"]

COLUMN = "crop"
"""Column to fill in where none is named."""
_LEAST_SEEN = 1 / 3
_MOST_DRAWN = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class VisitSpec:
    """Recipe for a choice of parcels."""

    count: int
    """Parcels to visit."""
    column: str | None = None
    """Column of the crops: parcels with a value in it have been visited."""
    min_pixels: int = 8
    """Pixels that a parcel to visit has at least: smaller ones teach little."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NotToVisit:
    """Numbers of parcels that are not to be visited, by reason."""

    column: str
    visited: int
    """Parcels with a value in the column, and a season to compare with."""
    outside: int
    """Parcels without a pixel in the cube."""
    small: int
    """Parcels with fewer pixels than asked for."""
    unseen: int
    """Parcels that are clear in less than a third of the periods."""

    def __str__(self) -> str:
        """Name the reasons that there are."""
        counts = {
            f"visited before (a value in {self.column!r})": self.visited,
            "outside the cube": self.outside,
            "too small (--min-pixels)": self.small,
            "too rarely clear": self.unseen,
        }
        return ", ".join(f"{parcels} {what}" for what, parcels in counts.items() if parcels)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisitReport:
    """Which parcels of a file to visit."""

    path: Path
    column: str
    """Column to fill in."""
    parcels: int
    """Parcels of the file."""
    others: NotToVisit
    chosen: NDArray[np.intp]
    """(N,) rows of the parcels to visit, counted from 0."""
    stands_for: NDArray[np.intp]
    """(N,) parcels that each of them stands for."""
    groups: FieldProfiles
    """The NDVI of the parcels in periods of thirty days; the first 24 visits are the classes."""

    def lines(self) -> list[str]:
        """Return the report as lines of text for people."""
        count, half = len(self.chosen), -(-len(self.chosen) // 2)
        said = f"{count} of {self.parcels} parcels to visit. They stand for {self.stands_for.sum()}"
        said += f", the first {half} for {self.stands_for[:half].sum()}." if count > 3 else "."
        others = str(self.others)
        return [said, f"Not to visit: {others}."] if others else [said]


def choose_visits(
    cube: str | Path | Location,
    parcels: str | Path,
    out: str | Path,
    spec: VisitSpec,
    *,
    season: str | None = None,
    layer: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: ProgressHook | None = None,
) -> VisitReport:
    """Choose the parcels to visit, and write them into the file of all parcels.

    Columns added (replaced where the file has them): ``visit``, 1 for the parcel that stands for
    most others, null where there is no need to go; ``visit_group``, the visit that stands for the
    parcel, null where a parcel visited before does or it was not compared; and the column to fill
    in, where there is none. Every parcel of the file has a row, in the file's order and CRS.

    Parameters
    ----------
    parcels
        Polygons, in any CRS.
    out
        ``.gpkg``, ``.parquet`` or ``.geoparquet``.
    overwrite
        True replaces ``out`` where it is another file than ``parcels``.

    Raises
    ------
    InputError
        If the file holds anything but polygons, none of them meets the cube, it lacks the column,
        or fewer parcels can be visited than asked for; if ``out`` exists.
    CubeError
        If the cube lacks red or nir.
    """
    target = check_target(out)
    opened = open_season(cube, season)
    frame = read_parcels(parcels, layer=layer)
    _check_files(frame, Path(parcels), target, spec, overwrite=overwrite)
    check_other_layers(parcels, target)
    column = spec.column or COLUMN
    known = np.array([value is not None for value in values_as_text(frame.get(column, []))])
    known = known if len(known) else np.zeros(len(frame), dtype=bool)
    report, choice, compared = _choose(opened, frame, known, spec, target, progress)
    if not dry_run:
        write_vector(_with_columns(frame, choice, compared, column), target)
    return report


def _choose(
    season: Season,
    frame: GeoDataFrame,
    known: NDArray[np.bool_],
    spec: VisitSpec,
    target: Path,
    progress: ProgressHook | None,
) -> tuple[VisitReport, Choice, NDArray[np.intp]]:
    """Return the report, the choice, and the rows of the parcels that it is about."""
    from ..data.choice import choose_parcels, fill_gaps
    from ..data.profiles import MONTH, FieldProfiles, parcel_profiles

    shapes = placed(frame.geometry.to_crs(str(season.geobox.crs)).to_numpy())
    found = parcel_profiles(season, shapes, progress=progress)
    if not found.pixels.any():
        raise InputError(
            f"Cannot choose among {len(frame)} parcels: none holds the centre of a pixel of the "
            f"cube {season.cube}. Give the parcels of this region, or correct the file's CRS."
        )
    periods = np.isfinite(found.ndvi).any(axis=0)
    seen = np.isfinite(found.ndvi[:, periods])
    clear = seen.mean(axis=1) >= _LEAST_SEEN if periods.any() else np.zeros(len(frame), bool)
    inside, large = found.pixels > 0, found.pixels >= spec.min_pixels
    # A small parcel is not visited, but one that was tells what grows there.
    compared = np.flatnonzero(clear & inside & (large | known))
    column = spec.column or COLUMN
    others = NotToVisit(
        column=column,
        visited=int(known[compared].sum()),
        outside=int((~inside).sum()),
        small=int((inside & ~large & ~known).sum()),
        unseen=int((inside & (large | known) & ~clear).sum()),
    )
    if known[compared].all():
        raise InputError(
            f"Cannot choose among {len(frame)} parcels: none is left to visit ({others}). Give "
            "more parcels, or admit smaller ones with --min-pixels."
        )
    choice = choose_parcels(
        fill_gaps(found.ndvi[compared][:, periods]), spec.count, visited=known[compared],
        seed=spec.seed,
    )  # fmt: skip
    drawn = (choice.group >= 0) & (choice.group < _MOST_DRAWN)
    report = VisitReport(
        path=target,
        column=column,
        parcels=len(frame),
        others=others,
        chosen=compared[choice.chosen],
        stands_for=choice.stands_for,
        groups=FieldProfiles(
            season=season.name,
            legend=Legend.from_values(
                [f"visit {visit + 1}" for visit in range(min(spec.count, _MOST_DRAWN))]
            ),
            first=found.first,
            code=choice.group[drawn].astype(np.uint8),
            ndvi=found.ndvi[compared[drawn]],
            step=MONTH,
        ),
    )
    return report, choice, compared


def _check_files(
    frame: GeoDataFrame, parcels: Path, target: Path, spec: VisitSpec, *, overwrite: bool
) -> None:
    if target.exists() and not target.samefile(parcels) and not overwrite:
        raise InputError(
            f"Cannot write {target}: it exists, and crops may have been filled in already. Choose "
            "another name, or pass --overwrite."
        )
    if spec.column is not None and spec.column not in frame.columns:
        names = [str(name) for name in frame.columns if name != frame.geometry.name]
        raise InputError(
            f"Cannot tell which parcels of {parcels} were visited: it has no column "
            f"{spec.column!r} (columns: {', '.join(names) or 'none'}). Name the column that holds "
            "the crops of those, or leave --column out where none was."
        )


def _with_columns(
    frame: GeoDataFrame, choice: Choice, compared: NDArray[np.intp], column: str
) -> GeoDataFrame:
    import pandas

    visit = pandas.array(np.zeros(len(frame), dtype=np.int32), dtype="Int32")
    visit[:] = pandas.NA
    group = visit.copy()
    visit[compared[choice.chosen]] = np.arange(1, len(choice.chosen) + 1, dtype=np.int32)
    stood = choice.group >= 0
    group[compared[stood]] = (choice.group[stood] + 1).astype(np.int32)
    columns: dict[str, Any] = {"visit": visit, "visit_group": group}
    # In a GeoPackage names that differ in upper and lower case alone are one.
    kept = frame.drop(columns=[name for name in frame.columns if str(name).lower() in columns])
    if column not in frame.columns:
        columns[column] = pandas.array([None] * len(frame), dtype="string")
    return kept.assign(**columns)
