"""What is known on the ground, beside what a map says: points and parcels with a class."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cube.labels import values_as_text
from ..errors import InputError, LabelError
from ..grid import Window
from ..legend import CLASS_NODATA, Legend
from ..maps.classmap import ClassMap
from ..maps.parcels import count_parcels, placed
from ..maps.vector import read_vector

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

__all__ = [
    "Matching",
    "Neighbourhood",
    "Units",
    "class_codes",
    "match_classes",
    "read_reference",
    "read_units",
]

Matching = Literal["auto", "value", "name", "code"]
Neighbourhood = Literal["pixel", "3x3"]

_SIDE = 512
_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The n features of a reference file, in its order, and the map there."""

    kind: Literal["points", "parcels"]
    predicted: NDArray[np.int64]
    """(n,) class code of the map; 255 where it has none."""
    stratum: NDArray[np.int64]
    """(n,) class code of the unit itself, whatever is read around it; 255 where it has none."""
    outside: NDArray[np.bool_]
    """(n,) True beyond the map's raster, or without a geometry or an area."""
    sizes: NDArray[np.float64] | None
    """(n,) square metres a unit stands for: the parcel, or a pixel where pixels differ."""
    shared: int
    """Points that lie in a pixel another point lies in."""
    vanished: int
    """Parcels that the inner buffer left nothing of; the map is not read there."""


def read_reference(path: str | Path, *, column: str | None, layer: str | None) -> GeoDataFrame:
    """Read points or polygons, after checking that the column of the class is there."""
    frame = read_vector(path, layer=layer, purpose="score the map on")
    names = [str(name) for name in frame.columns if name != frame.geometry.name]
    if column is None or column not in names:
        wrong = "no column is named" if column is None else f"it has no column {column!r}"
        raise InputError(
            f"Cannot score the map on {path}: {wrong}. Its columns are: "
            f"{', '.join(names) or '(none)'}. Name the one with the class as seen on the ground "
            "with --column."
        )
    kinds = set(frame.geometry.geom_type.dropna())
    if not kinds or not (kinds <= {"Point"} or kinds <= {"Polygon", "MultiPolygon"}):
        raise InputError(
            f"Cannot score the map on {path}: it holds "
            f"{', '.join(sorted(kinds)) or 'no geometry'}, and a reference is a file of "
            "points, or one of polygons. Keep one kind."
        )
    return frame


def match_classes(
    texts: set[str], legend: Legend, how: Matching = "auto"
) -> tuple[str, dict[str, int]]:
    """Find the class code of each text.

    Parameters
    ----------
    texts
        Different values of the reference's column.
    how
        ``value`` (of the legend: the crop's code in the source), ``name`` (upper and lower case
        alike) or ``code`` (pixel code, 0 to K-1). ``auto`` takes the first of these that knows
        every text; numbers that are values and also codes of other classes must be settled.

    Returns
    -------
    The way that was taken, and the codes.

    Raises
    ------
    LabelError
        If a text is no class of the map, or its meaning is not certain.
    """
    names = [name.casefold() for name in legend.names]
    tables: dict[str, dict[str, int]] = {
        "value": {value: entry.code for entry in legend.classes for value in entry.values},
        "name": {name: code for code, name in enumerate(names) if names.count(name) == 1},
        "code": {str(code): code for code in legend.codes},
    }
    if how != "auto" and how not in tables:
        raise InputError(
            f"Cannot match classes by {how!r}: they are matched by auto, value, name or code. "
            "Use --match auto."
        )
    by_value, by_code = tables["value"], tables["code"]
    both = texts and texts <= by_value.keys() & by_code.keys()
    if how == "auto" and both and any(by_value[text] != by_code[text] for text in texts):
        raise LabelError(
            f"Cannot tell what the reference's classes {', '.join(sorted(texts)[:_SHOWN])} mean: "
            "they are values of the map's legend and also its pixel codes, of other classes. Say "
            "which with --match value or --match code, or write names."
        )
    ways = [how] if how != "auto" else list(tables)
    unknown: dict[str, list[str]] = {}
    for way in ways:
        found = {text: text.casefold() if way == "name" else text for text in texts}
        unknown[way] = sorted(text for text, key in found.items() if key not in tables[way])
        if not unknown[way]:
            return way, {text: tables[way][key] for text, key in found.items()}
    way = min(ways, key=lambda one: len(unknown[one]))
    shown = ", ".join(map(repr, unknown[way][:_SHOWN]))
    more = len(unknown[way]) - _SHOWN
    shown += f" and {more} more" if more > 0 else ""
    raise LabelError(
        f"Cannot score the map: the reference has {shown}, which the map's legend does not "
        "know. Its classes are (name, value, code): "
        f"{', '.join(f'{entry.name} ({entry.value}, {entry.code})' for entry in legend.classes)}. "
        "Correct them, or say which class they are with --rename, as in --rename "
        f"{unknown[way][0]!r}={legend.names[0]!r}; name land that is none of them with --other, as "
        f"in --other {unknown[way][0]!r}."
    )


def class_codes(
    column: Any,
    legend: Legend,
    *,
    how: Matching = "auto",
    rename: Mapping[str, str] | None = None,
    other: Collection[str] = (),
) -> tuple[NDArray[np.int64], str]:
    """Return the class code of each feature, 255 where the column is empty, and how it was read.

    A text that is renamed is the class it is renamed to, by name or as the others are matched,
    whatever way the other texts are classes.

    Parameters
    ----------
    other
        Values of land that is none of the legend's classes; they get the code after the last.
    """
    strange = {str(text).strip().casefold() for text in other}
    both = [
        entry
        for entry in legend.classes
        if strange & {text.casefold() for text in (entry.name, *entry.values)}
    ]
    if both:
        raise LabelError(
            f"Cannot take {both[0].name} for land that is none of the map's classes: it is one of "
            f"them ({', '.join(legend.names)}). Leave it out of --other."
        )
    if strange and len(legend) == CLASS_NODATA:
        raise LabelError(
            f"Cannot take {', '.join(other)} for land that is none of the map's classes: the map "
            f"has {len(legend)} of them, and no code is left. Leave --other out."
        )
    texts = values_as_text(column)
    present = {text for text in texts if text is not None}
    renamed = {str(old): str(new) for old, new in (rename or {}).items() if str(old) in present}
    foreign = {text for text in present if renamed.get(text, text).casefold() in strange}
    way, table = match_classes(present - foreign - renamed.keys(), legend, how)
    for old in renamed.keys() - foreign:
        new = renamed[old]
        named = [code for code, name in enumerate(legend.names) if name == new]
        table[old] = named[0] if len(named) == 1 else match_classes({new}, legend, how)[1][new]
    table |= dict.fromkeys(foreign, len(legend))
    codes = [CLASS_NODATA if text is None else table[text] for text in texts]
    return np.array(codes, dtype=np.int64), way


def read_units(
    class_map: ClassMap,
    frame: GeoDataFrame,
    *,
    neighbourhood: Neighbourhood = "pixel",
    inner_buffer: float = 0.0,
) -> Units:
    """Read the map at points, or in parcels.

    Parameters
    ----------
    neighbourhood
        For points: the pixel, or the most frequent class of 3 x 3 pixels around it (the
        pixel's own among equals, then the lowest code; where the pixel has no label, none).
    inner_buffer
        For parcels: metres taken off the border before the map is read there.
    """
    if neighbourhood not in ("pixel", "3x3") or inner_buffer < 0:
        raise InputError(
            f"Cannot read the map with the neighbourhood {neighbourhood!r} and an inner buffer of "
            f"{inner_buffer:g} m: the neighbourhood is pixel or 3x3, the buffer 0 m or more. Use "
            "the defaults, pixel and 0."
        )
    points = set(frame.geometry.geom_type.dropna()) == {"Point"}
    if points and inner_buffer:
        raise InputError(
            f"Cannot take {inner_buffer:g} m off points: an inner buffer is for parcels. Leave "
            "--inner-buffer out."
        )
    if not points and neighbourhood != "pixel":
        raise InputError(
            "Cannot read 3x3 pixels at parcels: a parcel takes the majority of its own pixels. "
            "Leave --neighbourhood out."
        )
    place = frame.geometry.to_crs(class_map.crs.to_wkt())
    if points:
        return _at_points(class_map, place, three=neighbourhood == "3x3")
    return _in_parcels(class_map, place, inner_buffer=inner_buffer)


def _at_points(class_map: ClassMap, place: Any, *, three: bool) -> Units:
    height, width = class_map.shape_yx
    there = ~(place.is_empty | place.isna()).to_numpy()
    x, y = np.full(len(place), np.nan), np.full(len(place), np.nan)
    x[there], y[there] = place[there].x, place[there].y
    inverse = ~class_map.transform
    col = np.floor(inverse.a * x + inverse.b * y + inverse.c)
    row = np.floor(inverse.d * x + inverse.e * y + inverse.f)
    inside = there & (col >= 0) & (col < width) & (row >= 0) & (row < height)
    col, row = (np.where(inside, one, 0).astype(np.int64) for one in (col, row))

    predicted = np.full(len(place), CLASS_NODATA, dtype=np.int64)
    own = predicted.copy()
    square = (row // _SIDE) * (width // _SIDE + 1) + col // _SIDE
    order = np.flatnonzero(inside)[np.argsort(square[inside], kind="stable")]
    _, starts = np.unique(square[order], return_index=True)
    with class_map.reader() as reader:
        for group in np.split(order, starts[1:]) if len(order) else []:
            rows, cols = row[group], col[group]
            # One pixel around, as far as the raster goes.
            top, left = max(rows.min() - 1, 0), max(cols.min() - 1, 0)
            bottom, right = min(rows.max() + 2, height), min(cols.max() + 2, width)
            codes = reader.read(Window(int(top), int(left), int(bottom - top), int(right - left)))
            own[group] = codes[rows - top, cols - left]
            if three:
                codes = np.pad(codes, 1, constant_values=CLASS_NODATA)
                predicted[group] = _majority(codes, rows - top + 1, cols - left + 1)
            else:
                predicted[group] = own[group]
    _, counts = np.unique(row[inside] * width + col[inside], return_counts=True)
    sizes = None
    ground = class_map.ground()
    if ground is not None:
        sizes = ground.at(row, col)
    elif class_map.crs.is_geographic:
        sizes = class_map.row_areas()[row]
    return Units(
        kind="points", predicted=predicted, stratum=own, outside=~inside, sizes=sizes,
        shared=int(counts[counts > 1].sum()), vanished=0,
    )  # fmt: skip


def _majority(
    codes: NDArray[np.uint8], rows: NDArray[Any], cols: NDArray[Any]
) -> NDArray[np.int64]:
    """Return the most frequent class of the 3 x 3 pixels around each place."""
    offsets = np.arange(-1, 2)
    around = codes[
        rows[:, None, None] + offsets[None, :, None], cols[:, None, None] + offsets[None, None, :]
    ].reshape(len(rows), 9)
    own = codes[rows, cols].astype(np.int64)
    votes = np.zeros((len(rows), CLASS_NODATA + 1))
    np.add.at(votes, (np.repeat(np.arange(len(rows)), 9), around.reshape(-1)), 1.0)
    votes[:, CLASS_NODATA] = 0
    votes[np.arange(len(rows)), own] += 0.5  # among equals the pixel's own class
    return np.where(own == CLASS_NODATA, CLASS_NODATA, votes.argmax(axis=1))


def _in_parcels(class_map: ClassMap, place: Any, *, inner_buffer: float) -> Units:
    import shapely

    place = _repaired(place)
    areas = _square_metres(class_map, place)
    vanished = 0
    if inner_buffer:
        metric = place.to_crs(place.estimate_utm_crs()) if class_map.crs.is_geographic else place
        metres = 1.0 if class_map.crs.is_geographic else class_map.crs.linear_units_factor[1]
        smaller = metric.buffer(-inner_buffer / metres).to_crs(place.crs)
        vanished = int((smaller.is_empty & ~place.is_empty).sum())
        place = smaller
    table = count_parcels(class_map, place.to_numpy())
    beyond = (table.outside >= 1) & ~np.asarray(shapely.is_empty(place.to_numpy()))
    return Units(
        kind="parcels",
        predicted=table.majority,
        stratum=table.majority,
        outside=beyond | ~(areas > 0),
        sizes=areas,
        shared=0,
        vanished=vanished,
    )


def _repaired(place: Any) -> Any:
    """Return outlines whose rings do not cross, so that they have an area and an inside."""
    import shapely

    outlines = placed(place.to_numpy())
    crossed = np.flatnonzero(~shapely.is_missing(outlines) & ~shapely.is_valid(outlines))
    outlines[crossed] = shapely.make_valid(
        outlines[crossed], method="structure", keep_collapsed=False
    )
    return type(place)(outlines, index=place.index, crs=place.crs)


def _square_metres(class_map: ClassMap, place: Any) -> NDArray[np.float64]:
    """Return the area of each parcel: of its outline in the map's CRS, or on the ellipsoid."""
    if class_map.is_mosaic and not class_map.crs.is_geographic:
        place = place.to_crs(place.crs.geodetic_crs)
    elif not class_map.crs.is_geographic:
        return np.asarray(place.area) * float(class_map.crs.linear_units_factor[1]) ** 2
    import shapely
    from shapely.geometry.polygon import orient

    geod = place.crs.get_geod()
    areas = np.zeros(len(place))
    parts, owners = shapely.get_parts(place.to_numpy(), return_index=True)
    for part, owner in zip(parts, owners, strict=True):
        # Rings count by the way they run, which files do not agree on.
        areas[owner] += geod.geometry_area_perimeter(orient(part))[0]
    return areas
