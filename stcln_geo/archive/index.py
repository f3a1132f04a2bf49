"""The index of an archive: GeoParquet, one row per member, season and site.

It holds nothing that the members do not: it is made anew from them and written as a whole, and
rows of members that have not changed are taken over.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cube.stack import is_stack, open_stack
from ..cube.store import list_seasons, open_season
from ..cube.stored import manifest_paths, read_manifest
from ..errors import MissingFileError
from ..region import footprint
from ..storage import Location, S3Path, location, read_files, write_file, writing

if TYPE_CHECKING:
    import geopandas

__all__ = [
    "INDEX_FILE",
    "MEMBERS_FILE",
    "Archive",
    "index_rows",
    "list_members",
    "member_location",
    "member_sha",
    "open_archive",
    "read_index",
    "season_rows",
    "unfinished_seasons",
    "write_index",
]

INDEX_FILE = "index.parquet"
MEMBERS_FILE = "members.json"
_OWN = ("stacks", "cubes")
_CRS84 = "OGC:CRS84"


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An opened archive."""

    path: Location
    index: geopandas.GeoDataFrame
    """One row per member, season and site: ``id``, ``path``, ``kind`` (stack or cube), ``season``,
    ``site`` (position in a stack, -1 for a cube), ``crs``, ``time_start`` and ``time_end`` (UTC),
    ``dates``, ``bands``, ``clear_fraction`` (of all pixels and dates), ``shape`` (rows, columns),
    ``resolution`` (metres), ``manifest_sha``, ``geometry`` (footprint, OGC:CRS84)."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    @property
    def bands(self) -> tuple[str, ...]:
        """The bands that every member has, in the order of the first."""
        lists = [tuple(bands) for bands in self.index["bands"]]
        return tuple(band for band in lists[0] if all(band in other for other in set(lists)))

    def member(self, path: str) -> Location:
        """Return where a member lies, from the index's column ``path``."""
        return member_location(self.path, path)


def member_location(archive: Location, member: str) -> Location:
    """Return where a member lies: below the archive, or where its path or address says."""
    place = location(member)
    return place if isinstance(place, S3Path) or place.is_absolute() else archive / member


def open_archive(path: str | Location) -> Archive:
    """Open an archive by its index.

    Raises
    ------
    MissingFileError
        If there is no index at the path.
    """
    path = location(path)
    if not (path / INDEX_FILE).is_file():
        raise MissingFileError(
            f"Cannot open the archive {path}: it has no {INDEX_FILE}. Check the path, assemble an "
            "archive with 'stcln-geo archive create', or make one of existing cubes with "
            "'stcln-geo archive add'."
        )
    return Archive(path=path, index=read_index(path))


def read_index(path: Location) -> geopandas.GeoDataFrame:
    """Read the index of an archive that has one."""
    import geopandas

    return geopandas.read_parquet(io.BytesIO((path / INDEX_FILE).read_bytes()))


def list_members(path: Location) -> list[str]:
    """Return the paths of all members, relative to the archive where they lie in it."""
    own = [
        f"{folder}/{name}"
        for folder in _OWN
        for name in sorted(child.name for child in (path / folder).glob("*.zarr"))
        if (path / folder / name / "zarr.json").is_file()
    ]
    added = [str(text) for text in read_manifest(path / MEMBERS_FILE).get("members", [])]
    return [*own, *(text for text in added if text not in own)]


def write_index(path: Location, *, anew: bool = False) -> int:
    """Make the index from the members, and return its number of rows.

    Parameters
    ----------
    anew
        Take over no row of the old index.
    """
    import geopandas
    import pandas

    old: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    if not anew and (path / INDEX_FILE).is_file():
        for row in read_index(path).to_dict("records"):
            old.setdefault((row["path"], row["season"], row["manifest_sha"]), []).append(row)
    rows = list(index_rows(path, old))
    if not rows:
        with writing(path):
            (path / INDEX_FILE).unlink(missing_ok=True)
        return 0
    table = geopandas.GeoDataFrame(rows, geometry="geometry", crs=_CRS84)
    for name in ("time_start", "time_end"):
        table[name] = pandas.to_datetime(table[name], utc=True).astype("datetime64[ms, UTC]")
    content = io.BytesIO()
    table.to_parquet(content, index=False)
    write_file(path / INDEX_FILE, content.getvalue())
    return len(rows)


def index_rows(
    path: Location, old: dict[tuple[str, str, str], list[dict[str, Any]]] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of all finished seasons of all members that are there."""
    for member in list_members(path):
        place = member_location(path, member)
        if not (place / "zarr.json").is_file():
            continue
        for season in list_seasons(place):
            sha = member_sha(place, season)
            known = (old or {}).get((member, season, sha))
            yield from known or season_rows(place, member, season, sha)


def unfinished_seasons(place: Location) -> list[str]:
    """Return the names of the seasons of a member that are under construction."""
    return sorted(child.name for child in place.glob("*.building"))


def member_sha(place: Location, season: str) -> str:
    """Return the SHA-256 of a season's metadata and of the manifests of its shards."""
    digest = hashlib.sha256((place / season / "zarr.json").read_bytes())
    manifests = manifest_paths(place, season)
    for file, content in zip(manifests, read_files(manifests), strict=True):
        digest.update(file.name.encode())
        digest.update(content)
    return digest.hexdigest()


def season_rows(place: Location, member: str, season: str, sha: str) -> list[dict[str, Any]]:
    """Return the rows of one season of a member: one of a cube, one per site of a stack."""
    common = {"path": member, "season": season, "manifest_sha": sha}
    return _of_stack(place, season, common) if is_stack(place, season) else [
        _of_cube(place, season, common)
    ]  # fmt: skip


def _of_cube(place: Location, season: str, common: dict[str, Any]) -> dict[str, Any]:
    cube = open_season(place, season)
    height, width = cube.shape_yx
    epsg = cube.geobox.crs.epsg if cube.geobox.crs is not None else None
    clear = int(cube.coverage[:].sum(dtype=np.int64))
    return {
        "id": place.stem,
        **common,
        "kind": "cube",
        "site": -1,
        "crs": f"EPSG:{epsg}" if epsg else str(cube.geobox.crs),
        "time_start": cube.time[0],
        "time_end": cube.time[-1],
        "dates": len(cube.time),
        "bands": list(cube.bands),
        "clear_fraction": clear / max(len(cube.time) * height * width, 1),
        "shape": [height, width],
        "resolution": cube.resolution,
        "geometry": footprint(cube.geobox),
    }


def _of_stack(place: Location, season: str, common: dict[str, Any]) -> list[dict[str, Any]]:
    from shapely import from_wkt

    stack = open_stack(place, season)
    height, width = stack.shape_yx
    rows = []
    for shard in stack.shards:
        clear = stack.coverage[shard.start : shard.stop].sum(axis=(1, 2, 3), dtype=np.int64)
        for site in shard:
            dates = int(stack.dates[site])
            rows.append(
                {
                    "id": stack.site_id[site],
                    **common,
                    "kind": "stack",
                    "site": site,
                    "crs": stack.crs[site],
                    "time_start": stack.time[site, 0],
                    "time_end": stack.time[site, dates - 1],
                    "dates": dates,
                    "bands": list(stack.bands),
                    "clear_fraction": int(clear[site - shard.start]) / (dates * height * width),
                    "shape": [height, width],
                    "resolution": float(stack.transform[site, 0]),
                    "geometry": from_wkt(stack.footprint[site]),
                }
            )
    return rows
