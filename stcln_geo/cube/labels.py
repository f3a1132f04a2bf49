"""Burn a vector file of labelled fields into a season of a cube.

A pixel belongs to the field that holds its centre; where fields overlap, the later one in the
file wins. The season keeps ``labels`` (class codes), ``parcels`` (field numbers) and one row a
field, so that everything later can be divided by field.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..antimeridian import boxes_around
from ..errors import LabelError, MissingFileError
from ..legend import UNLABELLED, Legend
from ..region import choose_layer, is_geoparquet, spatial_layers
from ..storage import Location
from .burnt import NumberedStrips, burn_fields
from .lock import cube_lock
from .store import FieldTable, Season, choose_season, open_season, write_fields

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely.geometry.base import BaseGeometry

__all__ = ["BurnReport", "DroppedClass", "burn_labels", "values_as_text"]

_EDGE_POINTS = 64
"""Points along the longer side of a grid; of one of 110 km the edges are then true to 0.1 m."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedClass:
    """A value of the vector file that got no class."""

    value: str
    fields: int
    """Fields with at least one pixel."""
    pixels: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnReport:
    """What burning found and wrote."""

    cube: Location
    season: str
    legend: Legend
    fields: FieldTable
    dropped: tuple[DroppedClass, ...]
    features: int
    """Polygons near the cube that carry a value."""
    without_pixel: int
    """Polygons of these that hold no pixel centre of the cube (outside, too small, covered)."""
    without_value: int
    """Rows near the cube whose column is empty, or that have no polygon."""
    pixels: int
    """Labelled pixels."""

    def lines(self) -> list[str]:
        """Return the report as lines of text for people."""
        lines = [
            f"{len(self.fields)} fields of {len(self.legend)} classes, {self.pixels} labelled "
            f"pixels, in season {self.season}."
        ]
        for entry in self.legend.classes:
            mine = self.fields.code == entry.code
            lines.append(
                f"  {entry.code:>3} {entry.name}: {int(mine.sum())} fields, "
                f"{int(self.fields.pixels[mine].sum())} pixels"
            )
        lines.extend(
            f"  dropped {drop.value}: {drop.fields} fields, {drop.pixels} pixels, {drop.reason}"
            for drop in self.dropped
        )
        if self.without_pixel:
            lines.append(f"{self.without_pixel} of {self.features} polygons hold no pixel.")
        if self.without_value:
            lines.append(f"{self.without_value} rows have no value or no polygon.")
        return lines


def burn_labels(
    cube: str | Location,
    vector: str | Path,
    *,
    column: str,
    season: str | None = None,
    legend: Legend | None = None,
    min_fields: int = 3,
    all_touched: bool = False,
    erode: int = 0,
    layer: str | None = None,
    dry_run: bool = False,
) -> BurnReport:
    """Write the fields of a vector file into a season, in place of any labels it had.

    Parameters
    ----------
    vector
        Any file that pyogrio reads, or GeoParquet; of any CRS.
    column
        The column that names the crop. Whole numbers stored as 1110.0 count as ``1110``.
    legend
        The classes wanted, each of one value or of several; values not in it stay unlabelled.
        By default all values, sorted.
    min_fields
        Classes with fewer fields (with a pixel) are dropped, since they cannot be both
        trained and tested; their pixels stay unlabelled.
    all_touched
        True burns every pixel a field touches; False those whose centre it holds.
    erode
        Pixels taken off each field's border, where neighbours mix.
    layer
        Layer of a file with several; by default the first.
    dry_run
        True reports without writing.

    Raises
    ------
    LabelError
        If the column or CRS is missing, no field lies in the cube, or fewer than two classes
        are left.
    CubeError
        If another process is writing the cube.
    """
    if erode < 0 or min_fields < 1:
        raise LabelError(
            f"Cannot burn with erode={erode} and min_fields={min_fields}: erode is 0 px or more, "
            "min_fields 1 or more. Leave them out for 0 and 3."
        )
    name = choose_season(cube, season)
    with contextlib.nullcontext() if dry_run else cube_lock(cube):
        opened = open_season(cube, name, mode="r" if dry_run else "r+")
        report, labels, parcels = _burn_season(
            opened,
            Path(vector),
            column=column,
            legend=legend,
            min_fields=min_fields,
            all_touched=all_touched,
            erode=erode,
            layer=layer,
        )
        if not dry_run:
            write_fields(
                opened,
                labels=labels,
                parcels=parcels,
                fields=report.fields,
                legend=report.legend,
            )
    return report


def _burn_season(
    opened: Season,
    vector: Path,
    *,
    column: str,
    legend: Legend | None,
    min_fields: int,
    all_touched: bool,
    erode: int,
    layer: str | None,
) -> tuple[BurnReport, NumberedStrips, NumberedStrips]:
    """Return the report, the labels (Y, X) uint8 and the parcels (Y, X) int32; write nothing."""
    frame = _read_vector(vector, column=column, layer=layer, season=opened)
    values = values_as_text(frame[column])
    usable = np.array([value is not None for value in values], dtype=bool)
    usable &= frame.geometry.geom_type.isin(["Polygon", "MultiPolygon"]).to_numpy(dtype=bool)
    geometries = frame.geometry[usable].to_numpy()
    texts = [value for value, use in zip(values, usable, strict=True) if use and value is not None]

    if not texts:
        kinds = sorted({str(kind) for kind in frame.geometry.geom_type})
        raise LabelError(
            f"Cannot burn {vector}: none of its {len(frame)} features in the cube is a polygon "
            f"with a value in {column!r} (they are {', '.join(kinds)}; {sum(map(bool, values))} "
            "have a value). A field is a polygon with a crop. Give outlines of fields, or the "
            "column of the crops with --column."
        )
    burnt = burn_fields(
        geometries,
        opened.geobox.affine,
        opened.shape_yx,
        all_touched=all_touched,
        erode=erode,
        strip=opened.layout.shard,
    )
    pixels = burnt.pixels
    if not pixels.any():
        raise LabelError(
            f"Cannot burn {vector}: none of its {len(texts)} labelled polygons near the cube "
            f"{opened.cube} holds a pixel. A field needs the centre of a "
            f"{opened.resolution:g} m pixel. Try --all-touched, a smaller --erode, or check the "
            "coordinates."
        )
    kept, dropped = _choose_classes(legend, texts, pixels, min_fields=min_fields)
    if len(kept) < 2:
        found = ", ".join(f"{drop.value}: {drop.fields} fields" for drop in dropped)
        raise LabelError(
            f"Cannot burn {vector}: {len(kept)} class{'' if len(kept) == 1 else 'es'} with at "
            f"least {min_fields} fields in the cube; a map needs two (dropped: {found or 'none'}). "
            "Lower --min-fields, merge classes with --legend, or give more fields."
        )

    codes, numbers, table = _code_fields(kept, texts, pixels)
    report = BurnReport(
        cube=opened.cube,
        season=opened.name,
        legend=kept,
        fields=table,
        dropped=dropped,
        features=len(texts),
        without_pixel=int((pixels == 0).sum()),
        without_value=len(frame) - len(texts),
        pixels=int(table.pixels.sum()),
    )
    return report, burnt.through(codes), burnt.through(numbers)


def _read_vector(path: Path, *, column: str, layer: str | None, season: Season) -> GeoDataFrame:
    """Read the rows whose bounds meet the cube, in the cube's CRS."""
    import geopandas
    from shapely.geometry import box

    if not path.exists():
        raise MissingFileError(
            f"Cannot burn {path}: there is no such file. Give a vector file such as GeoPackage, "
            "GeoJSON, Shapefile or GeoParquet."
        )
    outline = box(*season.geobox.boundingbox.bbox)
    footprint = geopandas.GeoSeries([outline], crs=str(season.geobox.crs))
    # Edges bend where they leave their CRS: corners alone would miss fields beside them.
    footprint = footprint.segmentize(max(season.shape_yx) * season.resolution / _EDGE_POINTS)
    frame = _read_frame(path, column=column, layer=layer, footprint=footprint)
    if frame.crs is None:
        raise LabelError(
            f"Cannot burn {path}: the file names no coordinate reference system, so its polygons "
            "have no place. Assign one, for example with `ogr2ogr -a_srs EPSG:4326 OUT IN`."
        )
    place = _surroundings(footprint, frame.crs)
    frame = frame.iloc[np.flatnonzero(frame.intersects(place).to_numpy())]
    if frame.empty:
        covered = footprint.to_crs(frame.crs).total_bounds
        raise LabelError(
            f"Cannot burn {path}: no feature lies in the cube {season.cube}. The file covers "
            f"{_extent(path, layer)}; the cube covers {_format_bounds(tuple(covered))} "
            f"in the same coordinates ({_crs_name(frame.crs)}). Give the file of this region, or "
            "correct its coordinate reference system."
        )
    return frame.to_crs(footprint.crs)


def _surroundings(footprint: Any, crs: Any) -> BaseGeometry:
    """Return the box around the cube in a file's CRS; several in degrees across 180."""
    outline: BaseGeometry = footprint.to_crs(crs).iloc[0]
    return boxes_around(outline) if crs.is_geographic else outline.envelope


def _read_frame(path: Path, *, column: str, layer: str | None, footprint: Any) -> GeoDataFrame:
    """Read geometry and one column; vector formats give only the rows around the cube."""
    import geopandas
    import pyogrio
    from pyproj import CRS

    try:
        if is_geoparquet(path):
            import pyarrow.parquet

            names = pyarrow.parquet.read_schema(path).names
            place = _geometry_column(path)
            _check_column(path, column, [name for name in names if name != place])
            return geopandas.read_parquet(path, columns=[column, place])
        layer = choose_layer(path, layer)
        info = pyogrio.read_info(path, layer=layer)
        _check_column(path, column, [str(name) for name in info["fields"]])
        if info["geometry_type"] is None:
            raise LabelError(
                f"Cannot burn {path}: it is a table without geometry, so its rows have no place. "
                "Give a vector file of polygons, such as GeoPackage, GeoJSON or GeoParquet."
            )
        around = None
        if info["crs"]:
            near = _surroundings(footprint, CRS.from_user_input(info["crs"]))
            # Only one box can be asked for; where there are more all rows are read.
            around = near.bounds if near.geom_type == "Polygon" else None
        return geopandas.read_file(path, layer=layer, columns=[column], bbox=around)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, ValueError) as error:
        if isinstance(error, LabelError):
            raise
        raise LabelError(
            f"Cannot burn {path}: it cannot be read as a vector file ({error}). Give a GeoPackage, "
            "GeoJSON, Shapefile or GeoParquet file, and --layer if it has several layers."
        ) from error


def _geometry_column(path: Path) -> str:
    """Return the name of the column of a GeoParquet file that says where its rows lie."""
    import pyarrow.parquet

    told = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"geo", b"{}")
    return str(json.loads(told).get("primary_column", "geometry"))


def _check_column(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise LabelError(
            f"Cannot burn {path}: it has no column {column!r}. Its columns are: "
            f"{', '.join(names) or '(none)'}. Name one of them with --column."
        )


def _extent(path: Path, layer: str | None) -> str:
    """Say where a file's features lie, for an error message."""
    import geopandas
    import pyogrio

    if is_geoparquet(path):
        bounds = geopandas.read_parquet(path, columns=[_geometry_column(path)]).total_bounds
    else:
        layer = layer or spatial_layers(path)[0]
        bounds = pyogrio.read_info(path, layer=layer, force_total_bounds=True)["total_bounds"]
    return _format_bounds(tuple(bounds)) if bounds is not None else "nothing"


def _format_bounds(bounds: tuple[float, ...]) -> str:
    return "({})".format(", ".join(f"{float(value):.6g}" for value in bounds))


def _crs_name(crs: Any) -> str:
    authority = crs.to_authority()
    return ":".join(authority) if authority else str(crs.name)


def values_as_text(column: Any) -> list[str | None]:
    """Write values as text; None where the column is empty; 1110.0 as ``1110``."""
    import pandas

    texts: list[str | None] = []
    for value, is_missing in zip(column, pandas.isna(column), strict=True):
        if is_missing or str(value).strip() == "":
            texts.append(None)
        elif isinstance(value, (float, np.floating)) and float(value).is_integer():
            texts.append(str(int(value)))
        else:
            texts.append(str(value).strip())
    return texts


def _in_order(values: set[str]) -> list[str]:
    """Sort values: as numbers if all are, else as text."""
    try:
        return sorted(values, key=lambda value: (float(value), value))
    except ValueError:
        return sorted(values)


def _choose_classes(
    legend: Legend | None, texts: list[str], pixels: np.ndarray, *, min_fields: int
) -> tuple[Legend, tuple[DroppedClass, ...]]:
    """Keep the classes with enough fields; say of every other value why it has no class.

    Without a legend every value may become a class; more than codes can tell apart may be dropped.
    """
    counts: dict[str, tuple[int, int]] = {}
    for text, count in zip(texts, pixels, strict=True):
        fields, total = counts.get(text, (0, 0))
        counts[text] = (fields + int(count > 0), total + int(count))
    known = _in_order(set(counts))
    keep = {value for value in known if counts[value][0] >= min_fields}
    ignored: set[str] = set()
    if legend is not None:
        # Crops that are grouped have enough fields together, or not.
        known = [value for entry in legend.classes for value in entry.values]
        keep = {
            value
            for entry in legend.classes
            if sum(counts.get(value, (0, 0))[0] for value in entry.values) >= min_fields
            for value in entry.values
        }
        ignored = {value for entry in legend.ignored for value in entry.values}
    dropped = tuple(
        DroppedClass(
            value=value,
            fields=counts.get(value, (0, 0))[0],
            pixels=counts.get(value, (0, 0))[1],
            reason=f"fewer than {min_fields} fields"
            if value in known
            else "ignored by the legend"
            if value in ignored
            else "not in the legend",
        )
        for value in [
            *(value for value in known if value not in keep),
            *_in_order(set(counts) - set(known)),
        ]
    )
    if legend is not None:
        return legend.keep(keep), dropped
    chosen = [value for value in known if value in keep]
    return Legend.from_values(chosen) if chosen else Legend(()), dropped


def _code_fields(
    legend: Legend, texts: list[str], pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, FieldTable]:
    """Give classes their codes and fields dense numbers.

    Returns
    -------
    The code (P + 1,) uint8 and the dense number (P + 1,) int32 of each polygon by its number, 0
    standing for none; the table of fields.
    """
    codes = {value: entry.code for entry in legend.classes for value in entry.values}
    code = np.array([codes.get(text, UNLABELLED) for text in texts], dtype=np.uint8)
    kept = np.flatnonzero((code != UNLABELLED) & (pixels > 0))
    number_of = np.zeros(len(texts) + 1, dtype=np.int32)
    number_of[kept + 1] = np.arange(1, kept.size + 1)
    code_of = np.full(len(texts) + 1, UNLABELLED, dtype=np.uint8)
    code_of[kept + 1] = code[kept]
    table = FieldTable(
        number=np.arange(1, kept.size + 1, dtype=np.int32),
        code=code[kept],
        pixels=pixels[kept].astype(np.int32),
        split=np.zeros(kept.size, dtype=np.uint8),
    )
    return code_of, number_of, table
