"""Propose the sites of an archive: points spread over the classes of a raster or of polygons.

Points are drawn uniformly by area within each stratum, and kept where their squares overlap no
other of the same UTM zone. The same input and seed give the same points.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..cube.store import writing
from ..errors import InputError, MissingFileError
from ..grid import Window
from ..region import LONLAT, Region, choose_layer, is_geoparquet
from .ground import EQUAL_AREA, pixel_areas
from .sites import check_size, place_site

if TYPE_CHECKING:
    import geopandas

__all__ = ["Allocation", "SampleReport", "allocate", "sample_sites"]

Allocation = Literal["equal", "proportional"]
"""As many sites in every stratum, or as many as its share of the area."""

_RASTERS = {".tif", ".tiff", ".vrt", ".jp2", ".img"}
_TRIES = 20
"""Candidates drawn per site that is wanted: some fall upon others."""

_FEWEST = 200
_SIDE = 2048
"""Side (pixels) of the squares in which a raster is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """What was proposed."""

    path: Path
    picture: Path
    wanted: Mapping[str, int]
    found: Mapping[str, int]
    """Sites per stratum."""

    def __str__(self) -> str:
        told = ", ".join(f"{name}: {count}" for name, count in self.found.items())
        return f"{self.path}: {sum(self.found.values())} sites ({told}); see {self.picture}."

    @property
    def short(self) -> dict[str, tuple[int, int]]:
        """Sites found and wanted, of the strata that have no room for all."""
        return {
            name: (self.found[name], count)
            for name, count in self.wanted.items()
            if self.found[name] < count
        }


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Points of one stratum, in random order, and its area."""

    lon: np.ndarray
    lat: np.ndarray


def sample_sites(
    stratify: str | Path,
    out: str | Path,
    *,
    count: int,
    seed: int = 0,
    column: str | None = None,
    region: Region | None = None,
    size: int = 128,
    resolution: float = 10.0,
    allocation: Allocation = "equal",
) -> SampleReport:
    """Write a GeoPackage of points, with their stratum, and a picture of them beside it.

    Parameters
    ----------
    stratify
        A raster of class codes (nodata is no class), or polygons.
    out
        ``NAME.gpkg``; the picture is ``NAME.png``.
    column
        Of polygons: the attribute that is the stratum; by default they are all one.
    region
        Where the points may lie; by default anywhere.
    size, resolution
        Of the squares that must not overlap (pixels, metres).

    Raises
    ------
    MissingFileError, InputError
        If there is no such file or column, or nothing to sample.
    """
    stratify, out = Path(stratify), Path(out)
    check_size(size, resolution)
    _check(stratify, out, count, allocation)
    if seed < 0:
        raise InputError(f"Cannot sample with --seed {seed}: it must be 0 or more. Use --seed 0.")
    generator = np.random.default_rng(seed)
    if stratify.suffix.lower() in _RASTERS:
        areas, draw = _raster_strata(stratify, region, generator)
    else:
        areas, draw = _polygon_strata(stratify, column, region, generator)
    if not areas:
        raise InputError(
            f"Cannot sample {stratify}: no class lies {'in the region' if region else 'in it'}. "
            "Check the file, its nodata value and the region."
        )
    wanted = allocate(areas, count, allocation)
    candidates = draw({name: max(_TRIES * n, _FEWEST) if n else 0 for name, n in wanted.items()})
    table = _accept(wanted, candidates, size=size, resolution=resolution)
    found = {name: int((table["stratum"] == name).sum()) for name in wanted}
    if not len(table):
        raise InputError(
            f"Cannot sample {stratify}: no point lies between 80 S and 84 N. Check its CRS."
        )
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{os.getpid()}.{out.name}")
        table.to_file(temporary, driver="GPKG", layer=out.stem)
        temporary.replace(out)
    from .picture import draw_sites

    picture = draw_sites(table, out.with_suffix(".png"), region=region, title=out.stem)
    return SampleReport(path=out, picture=picture, wanted=wanted, found=found)


def allocate(areas: Mapping[str, float], count: int, allocation: Allocation) -> dict[str, int]:
    """Share out sites among strata, all of them, by the largest remainders.

    Examples
    --------
    >>> allocate({"a": 70.0, "b": 25.0, "c": 5.0}, 10, "proportional")
    {'a': 7, 'b': 3, 'c': 0}
    >>> allocate({"a": 70.0, "b": 25.0, "c": 5.0}, 10, "equal")
    {'a': 4, 'b': 3, 'c': 3}
    """
    names = sorted(areas, key=lambda name: (-areas[name], name))
    total = sum(areas.values())
    share = {
        name: count * (areas[name] / total if allocation == "proportional" else 1 / len(names))
        for name in names
    }
    whole = {name: int(share[name] + 1e-9) for name in names}
    rest = count - sum(whole.values())
    for name in sorted(names, key=lambda name: -(share[name] - whole[name]))[:rest]:
        whole[name] += 1
    return {name: whole[name] for name in sorted(names)}


def _check(stratify: Path, out: Path, count: int, allocation: str) -> None:
    if not stratify.exists():
        raise MissingFileError(
            f"Cannot sample {stratify}: there is no such file. Check --stratify."
        )
    if count < 1:
        raise InputError(f"Cannot propose {count} sites: give --count 1 or more.")
    if allocation not in {"equal", "proportional"}:
        raise InputError(
            f"Cannot allocate by {allocation!r}: it must be equal or proportional. Choose one of "
            "these with --allocation."
        )
    if out.suffix.lower() != ".gpkg":
        raise InputError(
            f"Cannot write the sites to {out}: they are written as a GeoPackage. Name it "
            f"{out.with_suffix('.gpkg').name}."
        )


def _accept(
    wanted: Mapping[str, int],
    candidates: Mapping[str, _Candidates],
    *,
    size: int,
    resolution: float,
) -> geopandas.GeoDataFrame:
    """Take candidates whose squares overlap none taken before; strata take turns."""
    import geopandas

    taken: dict[tuple[str, int, int], list[Window]] = defaultdict(list)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    waiting = {
        name: iter(zip(points.lon, points.lat, strict=True)) for name, points in candidates.items()
    }
    going = [name for name in wanted if wanted[name]]
    while going:
        for name in list(going):
            for lon, lat in waiting[name]:
                if not -80 <= lat <= 84:
                    continue
                site = place_site("", float(lon), float(lat), size=size, resolution=resolution)
                place = (site.window.row // size, site.window.col // size)
                near = [
                    other
                    for down in (-1, 0, 1)
                    for right in (-1, 0, 1)
                    for other in taken[(site.crs, place[0] + down, place[1] + right)]
                ]
                if all(site.window.intersection(other).is_empty for other in near):
                    taken[(site.crs, *place)].append(site.window)
                    rows[name].append({"stratum": name, "lon": site.lon, "lat": site.lat})
                    break
            else:
                going.remove(name)
                continue
            if len(rows[name]) == wanted[name]:
                going.remove(name)
    flat = [row for name in wanted for row in rows[name]]
    width = max(len(str(len(flat))), 4)
    points = geopandas.points_from_xy([row["lon"] for row in flat], [row["lat"] for row in flat])
    return geopandas.GeoDataFrame(
        {
            "id": [f"site-{number:0{width}d}" for number in range(1, len(flat) + 1)],
            "stratum": [row["stratum"] for row in flat],
        },
        geometry=points,
        crs=LONLAT,
    )


def _raster_strata(
    path: Path, region: Region | None, generator: np.random.Generator
) -> tuple[dict[str, float], Any]:
    """Return the weight of each class, and what draws points of them; the raster is read twice."""
    import rasterio
    from pyproj import Transformer

    with rasterio.open(path) as raster:
        if raster.crs is None or not np.issubdtype(np.dtype(raster.dtypes[0]), np.integer):
            raise InputError(
                f"Cannot stratify by {path}: it must be a raster of whole class codes with a CRS, "
                f"and has {raster.dtypes[0]} and {raster.crs or 'no CRS'}. Convert it, for example "
                "with 'gdal_translate -ot Byte -a_srs EPSG:4326'."
            )
        crs, transform = raster.crs, raster.transform
    areas: dict[str, float] = defaultdict(float)
    for _, codes, weights in _classes(path, region):
        for code in np.unique(codes[weights > 0]):
            areas[str(code)] += float(weights[codes == code].sum())

    def draw(numbers: Mapping[str, int]) -> dict[str, _Candidates]:
        targets = {
            name: np.sort(generator.uniform(0, areas[name], number))
            for name, number in sorted(numbers.items())
        }
        passed = dict.fromkeys(numbers, 0.0)
        found: dict[str, list[np.ndarray]] = {name: [] for name in numbers}
        for window, codes, weights in _classes(path, region):
            for name in sorted(numbers):
                here = np.flatnonzero((codes == int(name)) & (weights > 0))
                if not len(here):
                    continue
                edges = passed[name] + np.cumsum(weights.reshape(-1)[here])
                low, high = np.searchsorted(targets[name], [passed[name], edges[-1]])
                hits = np.searchsorted(edges, targets[name][low:high], side="right")
                pixels = here[np.minimum(hits, len(here) - 1)]
                rows, cols = np.divmod(pixels, codes.shape[1])
                found[name].append(np.stack([window.row + rows, window.col + cols], axis=1))
                passed[name] = edges[-1]
        change = Transformer.from_crs(crs, LONLAT, always_xy=True)
        result = {}
        for name in sorted(numbers):
            places = np.concatenate([np.zeros((0, 2), dtype=int), *found[name]])
            places = generator.permutation(places)
            x, y = transform * (places[:, 1] + 0.5, places[:, 0] + 0.5)
            lon, lat = change.transform(x, y)
            result[name] = _Candidates(np.asarray(lon), np.asarray(lat))
        return result

    return dict(areas), draw


def _classes(path: Path, region: Region | None) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
    """Yield a raster's squares: place, codes, and weight of each pixel (0 where it has no class).

    A pixel's weight is its area on the ground: in degrees the cosine of its latitude, in a
    projected CRS what an equal-area projection says of the cell of some pixels around it.
    """
    import rasterio
    from rasterio.features import geometry_mask

    with rasterio.open(path) as raster:
        shape = region.to_crs(raster.crs.to_string()) if region is not None else None
        for row in range(0, raster.height, _SIDE):
            for col in range(0, raster.width, _SIDE):
                place = Window(
                    row, col, min(_SIDE, raster.height - row), min(_SIDE, raster.width - col)
                )
                window = rasterio.windows.Window(place.col, place.row, place.width, place.height)
                corner = rasterio.windows.transform(window, raster.transform)
                if shape is not None:
                    ends = rasterio.windows.bounds(window, raster.transform)
                    if not _meets(shape, ends):
                        continue
                codes = raster.read(1, window=window)
                weights = (raster.read_masks(1, window=window) > 0).astype(np.float64)
                if shape is not None:
                    weights *= geometry_mask([shape], codes.shape, corner, invert=True)
                if raster.crs.is_geographic:
                    _, lat = corner * (np.zeros(len(codes)), np.arange(len(codes)) + 0.5)
                    weights *= np.maximum(np.cos(np.radians(lat)), 0)[:, None]
                else:
                    weights *= pixel_areas(raster.crs.to_wkt(), corner, codes.shape)
                yield place, codes, weights


def _meets(shape: Any, bounds: tuple[float, float, float, float]) -> bool:
    from shapely.geometry import box

    return bool(shape.intersects(box(*bounds)))


def _polygon_strata(
    path: Path, column: str | None, region: Region | None, generator: np.random.Generator
) -> tuple[dict[str, float], Any]:
    """Return the area of each value of a column, and what draws points within its polygons."""
    import geopandas
    import pyogrio
    import shapely
    from pyproj import Transformer

    try:
        if is_geoparquet(path):
            table = geopandas.read_parquet(path)
        else:
            table = geopandas.read_file(path, layer=choose_layer(path))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, ValueError) as error:
        raise InputError(
            f"Cannot stratify by {path}: {error}. It must be a raster (.tif) or polygons "
            "(GeoPackage, GeoJSON, GeoParquet)."
        ) from error
    if not isinstance(table, geopandas.GeoDataFrame):
        raise InputError(
            f"Cannot stratify by {path}: it is a table without geometry. It must be a raster "
            "(.tif) or polygons (GeoPackage, GeoJSON, GeoParquet)."
        )
    columns = [str(name) for name in table.columns if name != table.geometry.name]
    if column is not None and column not in columns:
        raise InputError(
            f"Cannot stratify by the column {column!r} of {path}: it has {', '.join(columns)}. "
            "Name one of these with --column."
        )
    if table.crs is None:
        raise InputError(
            f"Cannot place the polygons of {path}: the file names no CRS. Assign it, for example "
            f"with 'ogr2ogr -a_srs EPSG:4326 fixed.gpkg {path.name}'."
        )
    shapes = table.to_crs(EQUAL_AREA).geometry.make_valid()
    if region is not None:
        shapes = shapes.intersection(region.to_crs(EQUAL_AREA))
    names = table[column].astype(str) if column is not None else shapes.map(lambda _: "all")
    parts = geopandas.GeoDataFrame({"stratum": names}, geometry=shapes).explode(index_parts=False)
    parts = parts[(parts.geometry.geom_type == "Polygon") & (parts.area > 0)]
    areas = {str(name): float(group.area.sum()) for name, group in parts.groupby("stratum")}

    def draw(numbers: Mapping[str, int]) -> dict[str, _Candidates]:
        change = Transformer.from_crs(EQUAL_AREA, LONLAT, always_xy=True)
        result = {}
        for name in sorted(numbers):
            polygons = parts.geometry[parts["stratum"] == name]
            shares = polygons.area.to_numpy()
            each = generator.multinomial(numbers[name], shares / shares.sum())
            drawn = polygons[each > 0].sample_points(each[each > 0], rng=generator)
            places = shapely.get_coordinates(drawn.to_numpy())
            places = generator.permutation(places)
            lon, lat = change.transform(places[:, 0], places[:, 1])
            result[name] = _Candidates(np.asarray(lon), np.asarray(lat))
        return result

    return areas, draw
