"""Tiles of MTLCC in both of their forms: a folder of GeoTIFFs, or a gzipped TFRecord.

A tile has 24 or 48 px of 10 m, with half as many of 20 m and a sixth as many of 60 m: coarser bands
are brought to 10 m by repeating each pixel, as in the published loader of the GeoTIFF form.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, UnreadableError
from ..legend import UNLABELLED, Legend
from .pixels import stamp_of, to_digital_numbers
from .plan import SitePixels, SiteSource
from .tfrecord import Features, parse_example, read_records

__all__ = [
    "BANDS",
    "LABEL_FILES",
    "TileLook",
    "look_at_tile",
    "read_mtlcc_record",
    "read_mtlcc_tif",
]

BANDS = (
    "red", "green", "blue", "nir",
    "rededge1", "rededge2", "rededge3", "nir08", "swir16", "swir22",
    "coastal", "nir09", "cirrus",
)  # fmt: skip
"""Bands as the set stacks them: those of 10 m, of 20 m, of 60 m."""

LABEL_FILES = ("y.tif", "labels.tif")
"""Raster of classes in a tile's folder: of the published tree, and of the converter's."""

_GROUPS = (("10m", 4, 1), ("20m", 6, 2), ("60m", 3, 6))
"""Name, bands and pixels of 10 m along an edge of a pixel, of each resolution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLook:
    """What a tile's files say of themselves."""

    problem: str | None = None
    """Why they cannot be read."""
    dates: tuple[tuple[str, int], ...] = ()
    """Date as ``YYYY-MM-DD`` and frame, in the order of the source."""
    padding: int = 0
    """Frames without a date, which fill the series up."""
    bad: tuple[str, ...] = ()
    """Dates that do not exist, or lack a file."""
    shape_yx: tuple[int, int] = (0, 0)
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    classes: tuple[int, ...] = ()
    """Class numbers of the source that the tile holds."""
    labelled: bool = False
    stamp: str = ""


def look_at_tile(path: str) -> TileLook:
    """Look a tile through: a TFRecord wholly, of a folder the names, one image and the classes."""
    place = Path(path)
    try:
        return _look_at_folder(place) if place.is_dir() else _look_at_record(place)
    except (InputError, UnreadableError) as error:
        return TileLook(problem=str(error))


def _look_at_folder(folder: Path) -> TileLook:
    files = _images(folder)
    good, bad = [], []
    for text in sorted(files):
        date = _parse_date(text)
        if date is None or len(files[text]) != len(_GROUPS):
            bad.append(text)
        else:
            good.append(date)
    shape, crs, transform = (0, 0), None, None
    if good:
        with _opened(files[good[0].replace("-", "")]["10m"]) as image:
            shape = (image.height, image.width)
            # Without a place, rasterio says that a pixel is 1 by 1 and y grows downwards.
            if image.transform.e < 0 and image.crs is not None:
                code = image.crs.to_epsg()
                crs = f"EPSG:{code}" if code else image.crs.to_wkt()
                transform = tuple(float(value) for value in image.transform)[:6]
    classes = _read_classes(folder)
    return TileLook(
        dates=tuple((date, frame) for frame, date in enumerate(good)),
        bad=tuple(bad),
        shape_yx=shape,
        crs=crs,
        transform=transform,
        classes=() if classes is None else tuple(int(value) for value in np.unique(classes)),
        labelled=classes is not None and classes.shape == shape,
        stamp=stamp_of(sorted(file for group in files.values() for file in group.values())),
    )


def _look_at_record(path: Path) -> TileLook:
    tile = _load_record(path)
    dates, bad, padding = [], [], 0
    for frame, (year, day) in enumerate(zip(tile.year, tile.doy, strict=True)):
        if day <= 0:
            padding += 1
            continue
        try:
            date = datetime.date(int(year), 1, 1) + datetime.timedelta(days=int(day) - 1)
            if date.year != year:
                raise ValueError(day)
        except (ValueError, OverflowError):
            bad.append(f"day {day} of {year}")
            continue
        dates.append((date.isoformat(), frame))
    labels = tile.labels(dates[0][1] if dates else 0)
    height, width = tile.x10.shape[1:3]
    return TileLook(
        dates=tuple(dates),
        padding=padding,
        bad=tuple(bad),
        shape_yx=(int(height), int(width)),
        classes=tuple(int(value) for value in np.unique(labels)),
        labelled=labels.shape == (height, width),
        stamp=stamp_of([path]),
    )


def read_mtlcc_tif(site: SiteSource, legend: Legend) -> SitePixels:
    """Read the dates of a folder of GeoTIFFs, and its classes."""
    folder = Path(site.path)
    files = _images(folder)
    groups: list[np.ndarray] = []
    for name, bands, factor in _GROUPS:
        images = []
        for date in site.time:
            with _opened(files[date.replace("-", "")][name]) as image:
                images.append(image.read())
            if images[-1].shape[0] != bands or images[-1].shape != images[0].shape:
                raise UnreadableError(
                    f"Cannot import tile {site.id}: its {name} image of {date} has the shape "
                    f"{images[-1].shape}; the tile's first has {images[0].shape}, and it must "
                    f"have {bands} bands. Fetch the tile again."
                )
        groups.append(_enlarge(np.stack(images), factor))
    classes = _read_classes(folder) if site.labelled else None
    return _assemble(site, groups, classes, legend)


def read_mtlcc_record(site: SiteSource, legend: Legend) -> SitePixels:
    """Read the dates of a TFRecord, and the classes of its first."""
    tile = _load_record(Path(site.path))
    frames = list(site.frames)
    groups = [
        _enlarge(np.moveaxis(values[frames], -1, 1), factor)
        for values, (_, _, factor) in zip((tile.x10, tile.x20, tile.x60), _GROUPS, strict=True)
    ]
    classes = tile.labels(frames[0]) if site.labelled else None
    return _assemble(site, groups, classes, legend)


def _assemble(
    site: SiteSource, groups: list[np.ndarray], classes: np.ndarray | None, legend: Legend
) -> SitePixels:
    shapes = {group.shape[2:] for group in groups}
    if len(shapes) > 1:
        raise UnreadableError(
            f"Cannot import tile {site.id}: its bands of 10, 20 and 60 m cover "
            f"{', '.join(str(shape) for shape in sorted(shapes))} pixels of 10 m, not the same. "
            "Fetch the tile again."
        )
    values = np.concatenate(groups, axis=1)
    # Level-1C writes 0 where nothing was measured.
    digital, valid = to_digital_numbers(values, values <= 0)
    labels = np.full(valid.shape[1:], UNLABELLED, dtype=np.uint8)
    if classes is not None:
        for entry in legend.classes:
            labels[classes == int(entry.value)] = entry.code
    return SitePixels(reflectance=digital, valid=valid, labels=labels)


def _enlarge(values: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel of (T, C, Y, X) ``factor`` times along both edges."""
    return values.repeat(factor, axis=2).repeat(factor, axis=3)


# --- GeoTIFFs -----------------------------------------------------------------------------------


def _images(folder: Path) -> dict[str, dict[str, Path]]:
    """Return a tile's images by date as written and resolution, of either tree."""
    found: dict[str, dict[str, Path]] = {}
    groups = {name for name, _, _ in _GROUPS}
    for entry in os.scandir(folder):
        match = re.fullmatch(r"(\d{8})_(10m|20m|60m)\.tiff?", entry.name)
        if match is not None:
            found.setdefault(match[1], {})[match[2]] = Path(entry.path)
        elif entry.name in groups and entry.is_dir():
            for image in os.scandir(entry.path):
                inner = re.fullmatch(r"(\d{8})\.tiff?", image.name)
                if inner is not None:
                    found.setdefault(inner[1], {})[entry.name] = Path(image.path)
    return found


def _parse_date(text: str) -> str | None:
    try:
        return datetime.datetime.strptime(text, "%Y%m%d").date().isoformat()
    except ValueError:
        return None


def _read_classes(folder: Path) -> np.ndarray | None:
    """Return the class numbers of a tile: (Y, X), or None without a raster of them."""
    for name in LABEL_FILES:
        if (folder / name).is_file():
            with _opened(folder / name) as image:
                classes: np.ndarray = image.read(1)
                return classes
    return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an image, and say which one where it cannot be read."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

    try:
        with warnings.catch_warnings():
            # Where a tile lies may stand in geotransforms.csv instead.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as image:
                yield image
    except RasterioIOError as error:
        raise UnreadableError(
            f"Cannot read {path}: {error}. It must be a GeoTIFF, whole. Fetch it again."
        ) from error


# --- TFRecords ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    x10: np.ndarray
    """(T, Y, X, 4) int64, likewise the others."""
    x20: np.ndarray
    x60: np.ndarray
    doy: np.ndarray
    year: np.ndarray
    classes: np.ndarray
    """(T, Y, X), or (Y, X)."""

    def labels(self, frame: int) -> np.ndarray:
        """Return the classes, which repeat in every frame."""
        classes: np.ndarray = self.classes[frame] if self.classes.ndim == 3 else self.classes
        return classes


def _load_record(path: Path) -> _Record:
    """Return the arrays of a tile's TFRecord: little-endian int64, each with its shape."""
    records = list(read_records(path))
    try:
        if len(records) != 1:
            raise ValueError(f"{len(records)} records, where a tile is one")
        features = parse_example(records[0])
        arrays = {
            name: _array(features, f"{name}/data", f"{name}/shape")
            for name in ("x10", "x20", "x60", "labels")
        }
        record = _Record(
            x10=arrays["x10"], x20=arrays["x20"], x60=arrays["x60"],
            doy=_array(features, "dates/doy", "dates/shape"),
            year=_array(features, "dates/year", "dates/shape"), classes=arrays["labels"],
        )  # fmt: skip
        lengths = {
            "x10": len(record.x10), "x20": len(record.x20), "x60": len(record.x60),
            "dates": len(record.doy),
        }  # fmt: skip
        if len(set(lengths.values())) > 1:
            raise ValueError(f"different numbers of frames: {lengths}")
        for values, (name, bands, _) in zip(
            (record.x10, record.x20, record.x60), _GROUPS, strict=True
        ):
            if values.ndim != 4 or values.shape[3] != bands:
                raise ValueError(f"the shape {values.shape} of the bands of {name}")
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"Cannot read {path}: it holds {error}. A tile of MTLCC is one tf.train.Example with "
            "x10, x20, x60, labels and dates. Fetch it again."
        ) from error
    return record


def _array(features: Features, data: str, shape: str) -> np.ndarray:
    for name in (data, shape):
        if not features.get(name):
            raise KeyError(f"no feature {name}")
    content = features[data][0]
    if isinstance(content, int):
        raise ValueError(f"numbers in {data}, where bytes belong")
    sizes = [int(size) for size in features[shape]]
    values = np.frombuffer(content, dtype="<i8")
    if values.size != int(np.prod(sizes)):
        raise ValueError(f"{values.size} numbers in {data} for the shape {tuple(sizes)}")
    return values.reshape(sizes)
