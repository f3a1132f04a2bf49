"""Read and write the vector files that go with a map: points, parcels, polygons."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cube.store import writing
from ..errors import InputError, MissingFileError, OutputError
from ..region import choose_layer, is_geoparquet

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

__all__ = [
    "VectorWriter",
    "check_other_layers",
    "check_target",
    "open_writer",
    "read_vector",
    "write_vector",
]

_SUFFIXES = (".gpkg", ".parquet", ".geoparquet")
_EMPTY = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null")
"""What programs write into a .csv where there is no value."""


def read_vector(path: str | Path, *, layer: str | None = None, purpose: str) -> GeoDataFrame:
    """Read a vector file with all its columns, or a CSV file with the columns lon and lat.

    Parameters
    ----------
    layer
        Layer of a file with several; by default the first.
    purpose
        What cannot be done without it, for messages, such as ``score the map on``.

    Raises
    ------
    MissingFileError
        If there is no such file.
    InputError
        If it cannot be read, has no CRS or no feature.
    """
    import geopandas
    import pyarrow
    import pyogrio

    path = Path(path)
    if not path.exists():
        raise MissingFileError(
            f"Cannot {purpose} {path}: there is no such file. Give a vector file such as "
            "GeoPackage, GeoJSON, Shapefile or GeoParquet."
        )
    if path.is_dir():
        raise InputError(
            f"Cannot {purpose} {path}: it is a folder. Give a vector file such as GeoPackage, "
            "GeoJSON, Shapefile or GeoParquet."
        )
    try:
        if is_geoparquet(path):
            frame = geopandas.read_parquet(path)
        elif path.suffix.lower() == ".csv":
            frame = _read_csv(path, purpose)
        else:
            frame = geopandas.read_file(path, layer=choose_layer(path, layer))
    except InputError:
        raise
    except (
        pyogrio.errors.DataSourceError,
        pyogrio.errors.DataLayerError,
        pyarrow.ArrowException,
        ValueError,
    ) as error:
        raise InputError(
            f"Cannot {purpose} {path}: it cannot be read as a vector file ({error}). Give a "
            "GeoPackage, GeoJSON, Shapefile or GeoParquet file, or a .csv with lon and lat."
        ) from error
    if not isinstance(frame, geopandas.GeoDataFrame) or not len(frame):
        raise InputError(
            f"Cannot {purpose} {path}: it holds no feature with a geometry. Give points or "
            "polygons."
        )
    if frame.crs is None:
        raise InputError(
            f"Cannot {purpose} {path}: the file names no coordinate reference system, so its "
            "features have no place. Assign one, as in `ogr2ogr -a_srs EPSG:4326 OUT IN`."
        )
    return frame


def check_target(path: str | Path) -> Path:
    """Return the path of a vector file to write, if its suffix is one we write."""
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"Cannot write {path}: its name ends in {path.suffix or 'no suffix'!r}, and features "
            f"are written to {', '.join(_SUFFIXES)}. Choose one of these endings."
        )
    return path


def check_other_layers(source: str | Path, target: str | Path) -> None:
    """Raise InputError where writing over a file that was read would remove its other layers."""
    import pyogrio

    source, target = Path(source), Path(target)
    if is_geoparquet(source) or not (target.exists() and target.samefile(source)):
        return
    layers = [str(name) for name in pyogrio.list_layers(source)[:, 0]]
    if len(layers) > 1:
        raise InputError(
            f"Cannot write {target}: it is the file that was read, and of its {len(layers)} layers "
            f"({', '.join(layers[:12])}) one would be left. Choose another name."
        )


def write_vector(frame: GeoDataFrame, path: str | Path) -> Path:
    """Write a GeoPackage or GeoParquet file; it appears under its name only when it is whole."""
    with open_writer(path) as writer:
        writer.append(frame)
    return Path(path)


class VectorWriter:
    """Adds features, batch by batch, to a file that is being written."""

    def __init__(self, part: Path, layer: str) -> None:
        """Begin a file at a temporary path; nothing is written before the first batch."""
        self._part, self._layer = part, layer
        self._parquet: Any = None
        self.features = 0

    def append(self, frame: GeoDataFrame) -> None:
        """Write the features of a frame, whose columns are those of the first one."""
        if is_geoparquet(self._part):
            self._append_parquet(frame)
        else:
            begun = self._part.exists()
            frame.to_file(
                self._part, driver="GPKG", layer=self._layer, engine="pyogrio",
                mode="a" if begun else "w", **({} if begun else _layer_options(frame)),
            )  # fmt: skip
        self.features += len(frame)

    def close(self) -> None:
        """Finish the file."""
        if self._parquet is not None:
            self._parquet.close()

    def _append_parquet(self, frame: GeoDataFrame) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(frame.to_arrow(index=False, geometry_encoding="WKB"))
        # Plain binary with the file's "geo" record: what every reader of GeoParquet 1.0 expects.
        fields = [pyarrow.field(field.name, field.type) for field in table.schema]
        schema = pyarrow.schema(fields, metadata={b"geo": _geo_record(frame)})
        if self._parquet is None:
            self._parquet = pyarrow.parquet.ParquetWriter(self._part, schema, compression="zstd")
        columns = [
            column.cast(field.type) for column, field in zip(table.columns, fields, strict=True)
        ]
        batch = pyarrow.table(columns, schema=schema)
        self._parquet.write_table(batch.cast(self._parquet.schema))


@contextmanager
def open_writer(path: str | Path) -> Iterator[VectorWriter]:
    """Open a GeoPackage or GeoParquet file, by its suffix, to be written batch by batch."""
    import pyogrio

    path = check_target(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    writer = VectorWriter(part, path.stem)
    try:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            yield writer
            writer.close()
            os.replace(part, path)
    except pyogrio.errors.FieldError as error:
        raise InputError(
            f"Cannot write {path}: {error}. In a GeoPackage two columns must differ in more than "
            "upper and lower case. Rename one of the file's columns, or write .parquet."
        ) from error
    except (pyogrio.errors.DataSourceError, pyogrio.errors.FeatureError) as error:
        raise OutputError(
            f"Cannot write {path}: {error}. The folder must be writable and have room. Choose "
            "another path, or free some space."
        ) from error
    finally:
        for leftover in (part, part.with_name(f"{part.name}-journal")):
            leftover.unlink(missing_ok=True)


def _layer_options(frame: GeoDataFrame) -> dict[str, str]:
    """Return names of GeoPackage's own two columns that no column of a frame has."""
    taken = {str(name).lower() for name in frame.columns if name != frame.geometry.name}
    names = {"FID": "fid", "GEOMETRY_NAME": "geom"}
    for option in names:
        while names[option] in taken:
            names[option] += "_"
    return names


def _geo_record(frame: GeoDataFrame) -> bytes:
    """Return the ``geo`` metadata of GeoParquet 1.0.0."""
    column = {
        "encoding": "WKB",
        "geometry_types": [],
        "crs": json.loads(frame.crs.to_json()),
    }
    name = str(frame.geometry.name)
    record = {"version": "1.0.0", "primary_column": name, "columns": {name: column}}
    return json.dumps(record).encode()


def _read_csv(path: Path, purpose: str) -> GeoDataFrame:
    import geopandas
    import pandas

    # Pandas takes "None" for an empty cell by default, and it may well be a class.
    table = pandas.read_csv(path, keep_default_na=False, na_values=list(_EMPTY))
    names = {str(name).lower(): name for name in table.columns}
    lon = names.get("lon", names.get("longitude"))
    lat = names.get("lat", names.get("latitude"))
    if lon is None or lat is None:
        raise InputError(
            f"Cannot {purpose} {path}: a .csv needs the columns lon and lat in degrees, and its "
            f"columns are {', '.join(map(str, table.columns))}. Rename them, or give a GeoPackage."
        )
    points = geopandas.points_from_xy(table[lon], table[lat])
    return geopandas.GeoDataFrame(table, geometry=points, crs="EPSG:4326")
