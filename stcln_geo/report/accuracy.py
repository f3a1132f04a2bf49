"""Score a finished map on points or parcels: accuracy and area with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cube.labels import values_as_text
from ..cube.store import write_json, writing
from ..errors import InputError
from ..legend import CLASS_NODATA, Legend
from ..maps.classmap import ClassMap, open_class_map
from ..spreadsheet import csv_text
from ..storage import public_name
from .area import AreaAccuracy, Estimate, estimate_accuracy, normal_quantile
from .caveats import notes_of_sample, notes_of_unused_design, with_none_of_these
from .design import Design, design_path, read_design
from .html import write_text
from .metrics import Metrics, confusion_matrix, metrics_from_confusion
from .reference import Matching, Neighbourhood, Units, class_codes, read_reference, read_units

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

__all__ = ["AccuracySpec", "MapAccuracy", "Strata", "evaluate_map", "write_accuracy"]

Strata = Literal["auto", "map", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracySpec:
    """How a reference is read and what sample it is."""

    layer: str | None = None
    match: Matching = "auto"
    """What the reference's column holds: value, name or code of the legend."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Values of the column and the class of the map they stand for."""
    other: tuple[str, ...] = ()
    """Values of the column for land that is none of the map's classes: the map is wrong there."""
    neighbourhood: Neighbourhood = "pixel"
    inner_buffer: float = 0.0
    """Metres taken off parcels before the map is read in them."""
    strata: Strata = "auto"
    """map: the map's classes (also right for a simple random sample of points, which it
    post-stratifies); none: one stratum, a simple random sample; auto: the strata of the design
    file where there is one, else map for points and none for parcels."""
    strata_column: str | None = None
    """Column with the stratum each unit was drawn from; needs a design file."""
    design: Path | None = None
    """Design file; by default ``<reference>.design.json`` where there is one."""
    confidence_level: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class MapAccuracy:
    """What a reference says about a map."""

    class_map: Path
    reference: Path
    kind: Literal["points", "parcels"]
    legend: Legend
    """Classes of the map, then one for land that is none of them where the reference has any."""
    metrics: Metrics
    """Plain figures of the sample's confusion matrix: each unit counts once."""
    estimates: AreaAccuracy
    """Figures of the map: weighted by area, with standard errors."""
    areas: tuple[Estimate, ...]
    """Area (square metres) of each class, adjusted for the map's errors."""
    mapped_areas: NDArray[np.float64]
    """(K,) square metres of each class as mapped."""
    units: int
    """Features of the reference file."""
    used: int
    empty: int
    """Features whose column is empty."""
    outside: int
    """Features with a class that lie beyond the map's raster."""
    nodata: int
    """Features with a class where the map has none."""
    matched_by: str
    """What the column was read as: value, name or code."""
    strata: str
    """What the strata are, in words."""
    notes: tuple[str, ...]
    """What a reader of the figures should know."""

    def lines(self) -> list[str]:
        """Return the figures as lines of text for people."""
        found, level = self.estimates, f"{100 * self.estimates.confidence_level:g} %"
        z = normal_quantile(found.confidence_level)
        lines = [
            f"{self.reference}: {self.used} of {self.units} {self.kind} used "
            f"({self.empty} without a class, {self.outside} outside the map, {self.nodata} where "
            "the map has no label)",
            f"strata: {self.strata}",
            f"Overall accuracy {_percent(found.overall_accuracy, z)} ({level} interval)",
            f"Macro mIoU {_share(found.macro_miou)}, macro F1 {_share(found.macro_f1)}",
            "Confusion, counts (rows: reference, columns: map)",
            *self._matrix(lambda row, col: str(self.metrics.confusion[row, col])),
            "Confusion, percent of the area",
            *self._matrix(lambda row, col: f"{100 * found.proportions[row, col]:.2f}"),
            f"{'class':<22}{'users acc. %':>16}{'producers acc. %':>18}{'F1 %':>14}"
            f"{'mapped ha':>13}{'area ha':>26}",
        ]
        for entry in self.legend.classes:
            code = entry.code
            lines.append(
                f"{entry.name[:21]:<22}{_percent(found.users_accuracy[code], z):>16}"
                f"{_percent(found.producers_accuracy[code], z):>18}"
                f"{_percent(found.f1[code], z):>14}"
                f"{self.mapped_areas[code] / 1e4:>13,.1f}{_hectares(self.areas[code], z):>26}"
            )
        return [*lines, *self.notes]

    def _matrix(self, cell: Any) -> list[str]:
        names = [entry.name[:9] for entry in self.legend.classes]
        rows = [f"{'':<22}" + "".join(f"{name:>11}" for name in names)]
        for entry in self.legend.classes:
            cells = "".join(f"{cell(entry.code, col):>11}" for col in self.legend.codes)
            rows.append(f"{entry.name[:21]:<22}{cells}")
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        found = self.estimates
        per_class = [
            {
                "code": entry.code,
                "value": entry.value,
                "name": entry.name,
                "support": int(self.metrics.support[entry.code]),
                "users_accuracy": found.users_accuracy[entry.code].to_json(),
                "producers_accuracy": found.producers_accuracy[entry.code].to_json(),
                "f1": found.f1[entry.code].to_json(),
                "iou": found.iou[entry.code].to_json(),
                "area_share": found.area_share[entry.code].to_json(),
                "area_m2": self.areas[entry.code].to_json(),
                "mapped_area_m2": float(self.mapped_areas[entry.code]),
            }
            for entry in self.legend.classes
        ]
        return {
            "map": public_name(self.class_map),
            "reference": public_name(self.reference),
            "kind": self.kind,
            "units": self.units,
            "used": self.used,
            "empty": self.empty,
            "outside": self.outside,
            "nodata": self.nodata,
            "matched_by": self.matched_by,
            "strata": self.strata,
            "covered_share": found.covered,
            "confidence_level": found.confidence_level,
            "overall_accuracy": found.overall_accuracy.to_json(),
            "macro_miou": _finite(found.macro_miou),
            "macro_f1": _finite(found.macro_f1),
            "per_class": per_class,
            "confusion_rows": "reference",
            "confusion": self.metrics.confusion.tolist(),
            "confusion_area_share": found.proportions.tolist(),
            "of_the_sample": self.metrics.summary(),
            "notes": list(self.notes),
        }


def evaluate_map(
    class_map: ClassMap | str | Path,
    reference: str | Path,
    *,
    column: str | None = None,
    legend: Legend | str | Path | None = None,
    spec: AccuracySpec | None = None,
) -> MapAccuracy:
    """Score a map on points or parcels whose class is known, and estimate the classes' areas.

    Estimates follow Stehman 2014 and Olofsson et al. 2014 (see ``stcln_geo.report.area``); they
    hold as far as the reference is a probability sample of the map's area.

    Parameters
    ----------
    class_map
        A product's folder, a GeoTIFF of classes, or an open map.
    reference
        Points (a unit is the pixel) or polygons (a unit is the parcel with its majority class,
        weighted by its area): any vector file, or a .csv with lon and lat.
    column
        Column with the class on the ground; by default ``reference``, which the sample designer
        writes. Features whose column is empty, that lie outside the map or where it has no label
        are counted, not used.
    legend
        Classes of a GeoTIFF without a legend.

    Raises
    ------
    LabelError
        If the reference has a class that the map's legend does not know.
    InputError
        If nothing is left to score, or the strata are not known.
    """
    spec = spec or AccuracySpec()
    opened = (
        class_map if isinstance(class_map, ClassMap) else open_class_map(class_map, legend=legend)
    )
    reference = Path(reference)
    design = _design(spec, reference)
    frame = read_reference(
        reference, column=column or ("reference" if design is not None else None), layer=spec.layer
    )
    truth, way = class_codes(
        frame[column or "reference"],
        opened.legend,
        how=spec.match,
        rename=spec.rename,
        other=spec.other,
    )
    units = read_units(
        opened, frame, neighbourhood=spec.neighbourhood, inner_buffer=spec.inner_buffer
    )
    known = truth != CLASS_NODATA
    used = known & (units.predicted != CLASS_NODATA) & ~units.outside
    if not used.any():
        raise InputError(
            f"Cannot score the map {opened.path} on {reference}: of {len(frame)} {units.kind}, "
            f"{int((~known).sum())} have no class, {int((known & units.outside).sum())} lie "
            "outside the map, and the map has no label at the others. Give the reference of this "
            "region, with its column filled in."
        )
    legend = opened.legend
    beyond = int((truth[used] == len(legend)).sum())
    if beyond:
        legend = with_none_of_these(legend)
    classes = len(legend)
    mapped = opened.count_pixels()
    strata = _strata(spec, design, frame, units, mapped.areas, mapped.pixels)
    estimates = estimate_accuracy(
        truth[used],
        units.predicted[used],
        classes=classes,
        strata=strata.of_unit[used],
        stratum_areas=strata.areas,
        stratum_units=strata.pixels,
        sizes=None if units.sizes is None else units.sizes[used],
        confidence_level=spec.confidence_level,
    )
    total = float(strata.areas.sum()) * estimates.covered
    unused: list[str] = []
    if design is not None and spec.strata != "auto" and design.column in frame.columns:
        told = values_as_text(frame[design.column][used])
        unused = notes_of_unused_design(design, spec.strata, told, units.stratum[used])
    metrics = metrics_from_confusion(
        confusion_matrix(truth[used], units.predicted[used], classes=classes)
    )
    return MapAccuracy(
        class_map=opened.path,
        reference=reference,
        kind=units.kind,
        legend=legend,
        metrics=metrics.over(len(opened.legend)),
        estimates=estimates.over(len(opened.legend)),
        areas=tuple(one.times(total) for one in estimates.area_share),
        mapped_areas=np.append(mapped.areas, np.zeros(classes - len(mapped.areas))),
        units=len(frame),
        used=int(used.sum()),
        empty=int((~known).sum()),
        outside=int((known & units.outside).sum()),
        nodata=int((known & ~units.outside & (units.predicted == CLASS_NODATA)).sum()),
        matched_by=way,
        strata=strata.words,
        notes=(
            *notes_of_sample(
                units,
                estimates,
                opened.legend,
                beyond=beyond,
                truth=truth[used],
                mapped=units.predicted[used],
                strata=strata.of_unit[used],
                stratum_areas=strata.areas,
                stratum_names=strata.names,
                stratum_units=strata.pixels,
            ),
            *unused,
            mapped.note,
        ),
    )


def write_accuracy(accuracy: MapAccuracy, folder: str | Path) -> Path:
    """Write report.html, confusion.png, confusion.csv and accuracy.json; return the page's path."""
    from .accuracy_page import write_accuracy_page

    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = accuracy.legend.names
        counts = zip(names, accuracy.metrics.confusion.tolist(), strict=True)
        table = csv_text([["reference \\ map", *names], *([name, *row] for name, row in counts)])
        write_text(folder / "confusion.csv", table)
        write_json(folder / "accuracy.json", accuracy.to_json())
        return write_accuracy_page(accuracy, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strata:
    of_unit: NDArray[np.int64]
    areas: NDArray[np.float64]
    pixels: NDArray[np.int64] | None
    names: tuple[str, ...]
    words: str


def _design(spec: AccuracySpec, reference: Path) -> Design | None:
    """Return the design to use: the one named, or the one beside the reference."""
    if spec.strata not in ("auto", "map", "none"):
        raise InputError(
            f"Cannot use the strata {spec.strata!r}: choose auto, map or none. Use --strata auto."
        )
    if spec.design is not None:
        return read_design(spec.design)
    beside = design_path(reference)
    return read_design(beside) if beside.is_file() else None


def _strata(
    spec: AccuracySpec,
    design: Design | None,
    frame: GeoDataFrame,
    units: Units,
    areas: NDArray[np.float64],
    pixels: NDArray[np.int64],
) -> _Strata:
    """Find the stratum of each unit, and the areas of the strata."""
    column = spec.strata_column
    asked = spec.design is not None or column is not None
    if asked and spec.strata != "auto":
        raise InputError(
            f"Cannot take the strata from {column or spec.design} and use --strata "
            f"{spec.strata}: a unit has one stratum. Leave one of them out."
        )
    by_design = design is not None and spec.strata == "auto"
    if by_design and design is not None:
        return _designed(design, column or design.column, frame)
    if column is not None:
        raise InputError(
            f"Cannot use the strata of column {column!r}: their areas are not known. Give the "
            "design file with --design: JSON with a list 'strata' of stratum, pixels and area_m2."
        )
    whole = spec.strata == "none" or (spec.strata == "auto" and units.kind == "parcels")
    of_pixels = units.kind == "points"
    if whole:
        kind = "pixels" if of_pixels else "parcels"
        return _Strata(
            of_unit=np.zeros(len(frame), dtype=np.int64),
            areas=areas.sum(keepdims=True),
            pixels=pixels.sum(keepdims=True) if of_pixels else None,
            names=("the map",),
            words=f"none: a simple random sample of {kind}",
        )
    return _Strata(
        of_unit=np.where(units.stratum == CLASS_NODATA, 0, units.stratum),
        areas=areas,
        pixels=pixels if of_pixels else None,
        names=(),
        words="the classes of this map (a simple random sample is post-stratified by them)",
    )


def _designed(design: Design, column: str, frame: GeoDataFrame) -> _Strata:
    if column not in frame.columns:
        raise InputError(
            f"Cannot use the design {design.path}: the reference has no column {column!r} with "
            "the stratum of each point. Name it with --strata-column, or pass --strata map."
        )
    number = {stratum: place for place, stratum in enumerate(design.strata)}
    texts = values_as_text(frame[column])
    unknown = sorted({str(text) for text in texts if text not in number})
    if unknown:
        raise InputError(
            f"Cannot use the design {design.path}: column {column!r} holds the strata "
            f"{', '.join(unknown[:12])}, and the design has {', '.join(design.strata)}. Give the "
            "design that the reference was drawn by, or pass --strata map."
        )
    return _Strata(
        of_unit=np.array([number[str(text)] for text in texts], dtype=np.int64),
        areas=design.areas,
        pixels=design.pixels,
        names=design.names,
        words=f"the classes of {design.map_name}, from {design.path.name}",
    )


def _percent(one: Estimate, z: float) -> str:
    return _plus_minus(one.times(100), z)


def _hectares(one: Estimate, z: float) -> str:
    return _plus_minus(one.times(1e-4), z)


def _plus_minus(one: Estimate, z: float) -> str:
    """Return a value and half its interval's length, before that was cut at 0 and at the whole."""
    if math.isnan(one.value):
        return "-"
    if math.isnan(one.standard_error):
        return f"{one.value:,.1f}"
    return f"{one.value:,.1f} \N{PLUS-MINUS SIGN} {z * one.standard_error:,.1f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
