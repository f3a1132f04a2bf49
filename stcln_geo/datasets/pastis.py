"""PASTIS (Garnot and Landrieu 2021): 2433 squares of France with fields, seen for 14 months.

The set lies in a folder with ``metadata.geojson``, ``DATA_S2/S2_<id>.npy`` (dates, 10 bands, rows,
columns), ``ANNOTATIONS/TARGET_<id>.npy`` (the first of its channels is the class) and
``ANNOTATIONS/ParcelIDs_<id>.npy``. Frames stand in no promised order: they are sorted by date here,
with their pixels. PASTIS-R adds Sentinel-1: ``DATA_S1A`` of ascending, ``DATA_S1D`` of descending
orbits.
"""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, MissingFileError
from ..execution import Execution, ProgressHook, run_tasks
from ..legend import UNLABELLED, Legend
from .georeference import place_square
from .pastis_metadata import FIRST_DAY, RADAR, Feature, order_dates, read_metadata
from .pixels import stamp_of, to_digital_numbers
from .plan import Finding, Findings, ImportPlan, SeasonImport, SitePixels, SiteSource

__all__ = ["BANDS", "LEGEND", "POLS", "SEASON", "VOID", "plan_pastis", "read_pastis_site"]

BANDS = (
    "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22",
)  # fmt: skip
"""Bands of ``DATA_S2``, in its order: B02 to B8A, B11, B12."""

POLS = ("vv", "vh")
"""First channels of ``DATA_S1A`` and ``DATA_S1D``; the third is their difference, and not kept."""

SEASON = FIRST_DAY
"""The only season: from the set's reference date. Its dates run to November 2019, all are kept."""

VOID = 19
"""Source code of parcels that lie mostly outside the square: unlabelled in the stack."""

_NODATA = -10_000
"""What Theia writes where nothing was measured."""

_NAMES = (
    "Background", "Meadow", "Soft winter wheat", "Corn", "Winter barley", "Winter rapeseed",
    "Spring barley", "Sunflower", "Grapevine", "Beet", "Winter triticale", "Winter durum wheat",
    "Fruits, vegetables, flowers", "Potatoes", "Leguminous fodder", "Soybeans", "Orchard",
    "Mixed cereal", "Sorghum",
)  # fmt: skip
_COLORS = (
    "#000000", "#aec7e8", "#ff7f0e", "#ffbb78", "#2ca02c", "#98df8a", "#d62728", "#ff9896",
    "#9467bd", "#c5b0d5", "#8c564b", "#c49c94", "#e377c2", "#f7b6d2", "#7f7f7f", "#c7c7c7",
    "#bcbd22", "#dbdb8d", "#17becf",
)  # fmt: skip

LEGEND = Legend.from_rows(
    [
        {"value": str(code), "name": name, "color": color}
        for code, (name, color) in enumerate(zip(_NAMES, _COLORS, strict=True))
    ],
    source="PASTIS",
)
"""Background is class 0, as in the source; void has no class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """What the files of a square say of themselves."""

    problem: str | None = None
    """Why a file cannot be read."""
    shape: tuple[int, ...] = ()
    parcels: int | None = None
    """Distinct parcels, None without a file of them."""
    labelled: bool = False
    unknown: tuple[int, ...] = ()
    """Class codes that are not of PASTIS."""
    radar: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Direction of flight and shape of each Sentinel-1 series."""


def plan_pastis(
    source: str | Path,
    *,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
) -> ImportPlan:
    """Look a PASTIS folder through: every header and annotation is read, no series.

    Raises
    ------
    MissingFileError
        If the folder does not hold PASTIS.
    InputError
        If metadata or arrays are damaged, or no square can be imported.
    """
    root = _root(Path(source))
    features, crs, findings = read_metadata(root / "metadata.geojson")
    looked = run_tasks(
        _look,
        [(str(root), feature.id) for feature in features],
        execution=execution or Execution(),
        label="site",
        progress=progress,
    )
    damaged = [files.problem for files in looked if files.problem]
    if damaged:
        raise InputError(
            f"Cannot import PASTIS from {root}: {len(damaged)} files are damaged "
            f"({'; '.join(damaged[:3])}). Nothing was written. Fetch and unzip them again."
        )
    shapes = collections.Counter(files.shape[1:] for files in looked if len(files.shape) == 4)
    shape = shapes.most_common(1)[0][0] if shapes else (len(BANDS), 0, 0)
    sites: list[SiteSource] = []
    parcels = 1
    for feature, files in zip(features, looked, strict=True):
        site = _plan_site(root, feature, files, shape, crs, findings)
        if site is not None:
            sites.append(replace(site, first_parcel=parcels if files.parcels else 0))
            parcels += files.parcels or 0
    if not sites:
        raise InputError(
            f"Cannot import PASTIS from {root}: none of the {len(features)} squares of "
            f"metadata.geojson is whole ({_all(findings.all())}). Unzip the set wholly, and give "
            "the folder that holds metadata.geojson, DATA_S2 and ANNOTATIONS."
        )
    pols = POLS if any(site.radar for site in sites) else ()
    statistics = _published_statistics(root / "NORM_S2_patch.json", findings)
    season = SeasonImport(
        name=SEASON,
        form="pastis",
        bands=BANDS,
        shape_yx=(shape[1], shape[2]),
        sites=tuple(sites),
        legend=LEGEND,
        with_parcels=True,
        pols=pols,
        attrs={
            "dataset": "pastis",
            "season_start": SEASON[5:],
            "level": "surface",
            "clouds_masked": False,
            "void": {"source": VOID, "stored": UNLABELLED},
            "published_normalisation": statistics,
            "published_normalisation_s1": {
                orbit: _published_statistics(root / f"NORM_{name}_patch.json", findings)
                for orbit, name in RADAR.items()
                if pols
            },
        },
        findings=findings.all(),
    )
    return ImportPlan(
        dataset="pastis",
        source=str(root),
        seasons=(season,),
        notes=("PASTIS ships no cloud mask: 'valid' is True wherever all bands were measured.",),
    )


def read_pastis_site(site: SiteSource, legend: Legend) -> SitePixels:
    """Read the frames of a square in order of time, its classes and parcels."""
    root = Path(site.path)
    series = np.load(root / "DATA_S2" / f"S2_{site.id}.npy", mmap_mode="r")
    values = series[list(site.frames)]
    digital, valid = to_digital_numbers(values, values <= _NODATA)
    labels = np.full(valid.shape[1:], UNLABELLED, dtype=np.uint8)
    if site.labelled:
        target = _target(root, site.id)
        known = (target >= 0) & (target < len(legend))
        labels[known] = target[known]
    numbers = np.zeros(labels.shape, dtype=np.int32)
    found: tuple[int, ...] = ()
    if site.first_parcel:
        ids = np.load(root / "ANNOTATIONS" / f"ParcelIDs_{site.id}.npy")
        distinct, place = np.unique(ids, return_inverse=True)
        before = int((distinct <= 0).sum())
        rank = place.reshape(ids.shape) - before
        numbers = np.where(rank >= 0, rank + site.first_parcel, 0).astype(np.int32)
        found = tuple(int(value) for value in distinct[before:])
    return SitePixels(
        reflectance=digital, valid=valid, labels=labels, parcels=numbers, parcel_ids=found,
        backscatter=_read_radar(site, root) if site.radar else None,
    )  # fmt: skip


def _read_radar(site: SiteSource, root: Path) -> np.ndarray:
    """Return the images of both directions in order of time: (T1, 2, Y, X) float32."""
    series = {
        orbit: np.load(_radar_file(root, name, site.id), mmap_mode="r")
        for orbit, name in RADAR.items()
        if any(direction == orbit for _, direction, _ in site.radar)
    }
    images = [series[orbit][frame, : len(POLS)] for _, orbit, frame in site.radar]
    values = np.stack(images).astype(np.float32)
    values[~np.isfinite(values)] = np.nan
    return values


def _root(source: Path) -> Path:
    if (source / "metadata.geojson").is_file():
        return source
    if not source.exists():
        raise MissingFileError(
            f"Cannot import PASTIS from {source}: there is nothing at this path. Give the folder "
            "that holds metadata.geojson, DATA_S2 and ANNOTATIONS."
        )
    if source.is_file():
        raise InputError(
            f"Cannot import PASTIS from {source}: it is a file, but the set is read from a folder. "
            "Unzip it, and give the folder that holds metadata.geojson, DATA_S2 and ANNOTATIONS."
        )
    inner = sorted(file.parent for file in source.glob("*/metadata.geojson"))
    hint = f"Did you mean {inner[0]}?" if inner else "Unzip the set wholly."
    raise MissingFileError(
        f"Cannot import PASTIS from {source}: it has no metadata.geojson. The folder must hold "
        f"metadata.geojson, DATA_S2 and ANNOTATIONS. {hint}"
    )


def _files_of(root: Path, name: str) -> tuple[Path, Path, Path]:
    notes = root / "ANNOTATIONS"
    return (
        root / "DATA_S2" / f"S2_{name}.npy",
        notes / f"TARGET_{name}.npy",
        notes / f"ParcelIDs_{name}.npy",
    )


def _radar_file(root: Path, series: str, name: str) -> Path:
    return root / f"DATA_{series}" / f"{series}_{name}.npy"


def _target(root: Path, name: str) -> np.ndarray:
    """Return the classes of a square: (Y, X) of any whole number type."""
    target: np.ndarray = np.load(_files_of(root, name)[1])
    return target[0] if target.ndim == 3 else target


def _look(task: tuple[str, str]) -> _Files:
    """Read the header of a series, and the annotations."""
    root, name = Path(task[0]), task[1]
    series, target, parcels = _files_of(root, name)
    if not series.is_file():
        return _Files()
    file = series
    try:
        # Mapped, a file that is cut short is noticed without reading it.
        shape = np.load(series, mmap_mode="r").shape
        unknown: tuple[int, ...] = ()
        file = target
        labelled = target.is_file() and _target(root, name).shape == shape[2:]
        if labelled:
            codes = np.unique(_target(root, name))
            unknown = tuple(int(code) for code in codes if not 0 <= code <= VOID)
        file = parcels
        count = None
        if parcels.is_file():
            ids = np.load(parcels)
            count = int((np.unique(ids) > 0).sum()) if ids.shape == shape[2:] else None
        radar = []
        for orbit, series_name in RADAR.items():
            file = _radar_file(root, series_name, name)
            if file.is_file():
                radar.append((orbit, np.load(file, mmap_mode="r").shape))
    except (ValueError, OSError, EOFError) as error:
        return _Files(problem=f"{file.relative_to(root)}: {error}")
    return _Files(shape=shape, parcels=count, labelled=labelled, unknown=unknown,
        radar=tuple(radar),
    )  # fmt: skip


def _plan_site(
    root: Path,
    feature: Feature,
    files: _Files,
    shape: tuple[int, ...],
    crs: str,
    findings: Findings,
) -> SiteSource | None:
    """Return what to read of a square, or None where it must be left out; note why."""
    name = feature.id
    if not files.shape:
        findings.add("missing_series", name, "Squares without a file in DATA_S2, left out")
        return None
    if files.shape[1:] != shape or len(files.shape) != 4 or shape[0] != len(BANDS):
        findings.add(
            "other_shape", name,
            f"Squares that are not of {len(BANDS)} bands and the others' size, left out",
        )  # fmt: skip
        return None
    if len(feature.dates) != files.shape[0]:
        findings.add(
            "dates_disagree", name,
            "Squares with more or fewer dates in metadata.geojson than frames in DATA_S2, left "
            "out, since it is unknown which date a frame has",
        )  # fmt: skip
        return None
    if feature.corners is None:
        findings.add("no_footprint", name, "Squares without a footprint, left out")
        return None
    time, frames = order_dates(name, feature.dates, findings)
    if not time:
        findings.add("no_dates", name, "Squares without a date that exists, left out")
        return None
    if not files.labelled:
        findings.add("missing_target", name, "Squares without a TARGET of their size, unlabelled")
    if files.parcels is None:
        findings.add(
            "missing_parcels", name, "Squares without ParcelIDs of their size, without parcels"
        )
    if files.unknown:
        findings.add(
            "unknown_class", name, "Squares with pixels of no known class, unlabelled there"
        )
    placed = place_square(feature.corners, side=shape[1], tile=feature.tile, crs=crs)
    if placed.rule == "utm-centre":
        findings.add(
            "uncertain_place", name,
            "Footprints that are no square of the nominal size: the grid lies around their centre",
        )  # fmt: skip
    return SiteSource(
        id=name, path=str(root), time=time, frames=frames, crs=placed.crs,
        transform=placed.transform, georeference=placed.rule, offset_m=placed.offset_m,
        tile=feature.tile, fold=feature.fold, labelled=files.labelled,
        radar=_plan_radar(feature, files, findings),
        stamp=stamp_of(
            [*_files_of(root, name), *(_radar_file(root, one, name) for one in RADAR.values())]
        ),
    )  # fmt: skip


def _plan_radar(
    feature: Feature, files: _Files, findings: Findings
) -> tuple[tuple[str, str, int], ...]:
    """Return date, direction and frame of the Sentinel-1 images of a square, in order of time."""
    images = []
    shapes = dict(files.radar)
    for orbit, name in RADAR.items():
        item = f"{feature.id} {name}"
        dates, shape = feature.radar.get(orbit, ()), shapes.get(orbit)
        if shape is None:
            if dates:
                findings.add("missing_radar", item, "Series of Sentinel-1 without a file, left out")
            continue
        if len(shape) != 4 or shape[1] < len(POLS) or shape[2:] != files.shape[2:]:
            findings.add(
                "radar_shape", item,
                "Series of Sentinel-1 that are not of their square's size, left out",
            )  # fmt: skip
        elif len(dates) != shape[0]:
            findings.add(
                "radar_dates_disagree", item,
                "Series of Sentinel-1 with more or fewer dates than frames, left out",
            )  # fmt: skip
        else:
            ordered = zip(*order_dates(item, dates, findings), strict=True)
            images += [(date, orbit, frame) for date, frame in ordered]
    return tuple(sorted(images))


def _published_statistics(path: Path, findings: Findings) -> dict[str, Any] | None:
    """Return mean and standard deviation by fold, in digital numbers, as they were published."""
    if not path.is_file():
        findings.add("missing_statistics", path.name, "Missing files of published statistics")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(fold): {key: [float(value) for value in told[key]] for key in ("mean", "std")}
            for fold, told in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Cannot import PASTIS from {path.parent}: {path.name} is damaged ({error}). It holds "
            "mean and std of ten bands for Fold_1 to Fold_5. Fetch it again, or remove it to do "
            "without."
        ) from error


def _all(findings: tuple[Finding, ...]) -> str:
    return "; ".join(str(finding) for finding in findings) or "it names none"
