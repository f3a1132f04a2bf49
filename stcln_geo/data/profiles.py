"""How green labelled fields and parcels without labels are through a season."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cube.burnt import burn_fields
from ..cube.contract import FILL, SCALE
from ..cube.season import Season
from ..errors import CubeError
from ..execution import ProgressHook
from ..grid import Window
from ..legend import Legend
from .chips import Chip, ChipDataset
from .labelled import plan_labelled_chips
from .source import LabelReader, Source, source_of
from .split import check_labelled

__all__ = ["ClassProfile", "FieldProfiles", "ParcelProfiles", "field_profiles", "parcel_profiles"]

STEP = 10
"""Days of a period, in which the clear dates of a field are averaged."""
MONTH = 30
"""Days of a period of parcels, of which every field should have clear dates."""
_CHIP = 64
_READ_BYTES = 64_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassProfile:
    """The fields of a class through a season; arrays are (D,), NaN where fewer were seen."""

    code: int
    fields: int
    """Fields that are clear in some period."""
    lower: np.ndarray
    """First quartile of the fields' NDVI; NaN of fewer than 3 fields."""
    median: np.ndarray
    """NaN of no field."""
    upper: np.ndarray
    """Third quartile; NaN of fewer than 3 fields."""

    @property
    def peak(self) -> int | None:
        """Period in which the median is highest; None without any."""
        return None if np.isnan(self.median).all() else int(np.nanargmax(self.median))


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldProfiles:
    """The mean NDVI of fields in periods of a season."""

    season: str
    """First day of the season, ``YYYY-MM-DD``."""
    legend: Legend
    first: np.ndarray
    """(D,) datetime64[D], first day of each period."""
    code: np.ndarray
    """(F,) uint8 class of each field."""
    ndvi: np.ndarray
    """(F, D) float32: mean of all clear pixels and dates; NaN where there is none."""
    step: int = STEP
    """Days of a period."""

    def of_class(self, code: int) -> ClassProfile:
        """Return the quartiles over the fields of a class."""
        ndvi = self.ndvi[self.code == code]
        seen = np.isfinite(ndvi)
        quartiles = np.full((3, len(self.first)), np.nan)
        for period in np.flatnonzero(seen.any(axis=0)):
            values = ndvi[seen[:, period], period]
            quartiles[:, period] = np.quantile(values, (0.25, 0.5, 0.75))
            if len(values) < 3:
                quartiles[[0, 2], period] = np.nan
        return ClassProfile(
            code=code,
            fields=int(seen.any(axis=1).sum()),
            lower=quartiles[0],
            median=quartiles[1],
            upper=quartiles[2],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParcelProfiles:
    """The mean NDVI of parcels in periods of thirty days of a season."""

    first: np.ndarray
    """(D,) datetime64[D], first day of each period."""
    ndvi: np.ndarray
    """(P, D) float32: mean of all clear pixels and dates; NaN where there is none."""
    pixels: np.ndarray
    """(P,) int64 pixels whose centre the parcel holds, clear or not."""


def field_profiles(
    source: Source, *, most: int = 100, seed: int = 0, progress: ProgressHook | None = None
) -> FieldProfiles:
    """Average the NDVI of labelled fields over their clear pixels, period by period.

    Parameters
    ----------
    source
        A season of a cube or stack with labels and the bands red and nir. Of pixels in no field,
        those of a class and site count as one field.
    most
        Fields of each class, chosen at random where there are more.

    Raises
    ------
    LabelError
        If there are no labels.
    CubeError
        If red or nir is missing.
    """
    fields, legend = check_labelled(source)
    _ndvi_bands(source)
    order = np.random.default_rng(seed).permutation(len(fields))
    wanted = np.zeros(len(fields), dtype=bool)
    for code in range(len(legend)):
        wanted[order[fields.code[order] == code][:most]] = True
    rows = np.flatnonzero(wanted)
    row = np.full(len(fields), -1)
    row[rows] = np.arange(len(rows))
    inside = fields.number > 0
    by_number = np.full(int(fields.number.max(initial=0)) + 1, -1)
    by_number[fields.number[inside]] = row[inside]
    by_class = np.full((source.sites, 256), -1)
    by_class[fields.site[~inside], fields.code[~inside]] = row[~inside]

    first, last = source.day_range
    periods = (last - first) // STEP + 1
    dataset = ChipDataset(
        [source],
        plan_labelled_chips(source, wanted, chip=min(_CHIP, source.chunk)),
        bands=("red", "nir"),
        wanted=[wanted],
    )
    labels = LabelReader(source)
    sums, counts = np.zeros(len(rows) * periods), np.zeros(len(rows) * periods)
    for unit in range(len(dataset.units)):
        for chip in dataset.read(unit):
            ndvi, seen = _ndvi(chip.reflectance, chip.valid)
            place = _rows(chip, labels, by_number, by_class)
            seen &= place >= 0
            at = (place * periods)[None] + ((chip.days - first) // STEP)[:, None, None]
            sums += np.bincount(at[seen], weights=ndvi[seen], minlength=len(sums))
            counts += np.bincount(at[seen], minlength=len(sums))
        if progress is not None:
            progress(unit + 1, len(dataset.units), "reads")
    ndvi = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    start = np.datetime64(source.season, "D") + np.timedelta64(first, "D")
    return FieldProfiles(
        season=source.season,
        legend=legend,
        first=start + STEP * np.arange(periods),
        code=fields.code[rows],
        ndvi=ndvi.reshape(len(rows), periods).astype(np.float32),
    )


def parcel_profiles(
    season: Season, polygons: np.ndarray, *, progress: ProgressHook | None = None
) -> ParcelProfiles:
    """Average the NDVI of parcels over their clear pixels, period by period.

    Parameters
    ----------
    season
        A season of a cube with the bands red and nir.
    polygons
        (P,) polygons in the season's CRS; where they overlap, the later one has the pixel.

    Raises
    ------
    CubeError
        If red or nir is missing.
    """
    source = source_of(season)
    bands = _ndvi_bands(source)
    burnt = burn_fields(polygons, season.geobox.affine, season.shape_yx, strip=season.layout.shard)
    raster = burnt.through(np.arange(len(polygons) + 1, dtype=np.int32))
    first, last = source.day_range
    periods = (last - first) // MONTH + 1
    sums, counts = np.zeros((2, len(polygons) + 1, periods))
    tops = range(0, source.shape_yx[0], source.chunk)
    for done, top in enumerate(tops):
        rows = raster[top : top + source.chunk]
        for window in _pieces(rows, top, source):
            numbers = rows[:, window.cols]
            block = source.read(window)
            ndvi, seen = _ndvi(block.reflectance[:, bands], block.valid)
            seen &= numbers > 0
            near, row = np.unique(numbers, return_inverse=True)
            period = (block.days - first) // MONTH
            at = (row.reshape(numbers.shape) * periods)[None] + period[:, None, None]
            for totals, weights in ((sums, ndvi[seen]), (counts, None)):
                found = np.bincount(at[seen], weights=weights, minlength=len(near) * periods)
                totals[near] += found.reshape(len(near), periods)
        if progress is not None:
            progress(done + 1, len(tops), "rows of chunks")
    ndvi = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)[1:]
    start = np.datetime64(source.season, "D") + np.timedelta64(first, "D")
    return ParcelProfiles(
        first=start + MONTH * np.arange(periods),
        ndvi=ndvi.astype(np.float32),
        pixels=burnt.pixels,
    )


def _pieces(rows: np.ndarray, top: int, source: Source) -> list[Window]:
    """Cut a row of storage chunks into windows to read: those with a parcel, some at a time."""
    side, width = source.chunk, rows.shape[1]
    held = [bool(rows[:, left : left + side].any()) for left in range(0, width, side)]
    most = max(_READ_BYTES // source.chunk_bytes, 1)
    found: list[Window] = []
    for index in np.flatnonzero(held).tolist():
        left = index * side
        part = Window(top, left, len(rows), min(side, width - left))
        if found and found[-1].col + found[-1].width == left and found[-1].width < most * side:
            last = found.pop()
            part = Window(top, last.col, len(rows), last.width + part.width)
        found.append(part)
    return found


def _ndvi_bands(source: Source) -> list[int]:
    """Return the positions of red and nir."""
    missing = [band for band in ("red", "nir") if band not in source.bands]
    if missing:
        raise CubeError(
            f"Cannot tell how green the fields of {source} are: it lacks {' and '.join(missing)}, "
            "and NDVI is of red and nir. Build the cube with these bands."
        )
    return [source.bands.index(band) for band in ("red", "nir")]


def _ndvi(reflectance: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the NDVI (T, H, W) float32 of (T, 2, H, W) red and nir, and where there is one."""
    red, nir = (reflectance[:, band].astype(np.float32) * SCALE for band in (0, 1))
    total = red + nir
    seen = valid & (reflectance != FILL).all(axis=1) & (total > 0)
    ndvi = np.divide(nir - red, total, out=np.zeros_like(total), where=seen)
    return np.clip(ndvi, -1.0, 1.0), seen


def _rows(
    chip: Chip, labels: LabelReader, by_number: np.ndarray, by_class: np.ndarray
) -> np.ndarray:
    """Return which of the chosen fields each pixel lies in: (H, W), -1 for none."""
    assert chip.source is not None
    assert chip.target is not None
    site = labels.source.site_of(chip.source)
    _, number = labels.read(chip.source.window, site=site)
    # Numbers beyond are of fields without a row.
    known = (number > 0) & (number < len(by_number))
    apart = np.where(number == 0, by_class[site][chip.target], -1)
    rows: np.ndarray = np.where(known, by_number[np.where(known, number, 0)], apart)
    return np.where(chip.target == 255, -1, rows)
