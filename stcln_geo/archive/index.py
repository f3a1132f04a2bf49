"""The index of an archive: GeoParquet, one row per member, season and site.

It holds nothing that the members do not: it is made anew from them and written as a whole, and
rows of members that have not changed are taken over.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
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
    "IndexRows",
    "list_members",
    "member_location",
    "member_sha",
    "open_archive",
    "read_index",
    "season_rows",
    "unfinished_seasons",
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


@dataclass(slots=True)
class IndexRows:
    """The rows of an archive's members, whose seasons are looked at once, when first asked for.

    Parameters
    ----------
    path
        The archive.
    anew
        Take over no row of the index that is there.
    """

    path: Location
    anew: bool = False
    _seasons: dict[str, list[str]] = field(default_factory=dict)
    _rows: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    _old: dict[tuple[str, str, str], list[dict[str, Any]]] | None = None

    def of(self, member: str) -> list[dict[str, Any]]:
        """Return the rows of all finished seasons of a member; none where it is not there."""
        place = member_location(self.path, member)
        if member not in self._seasons:
            there = (place / "zarr.json").is_file()
            self._seasons[member] = list_seasons(place) if there else []
        for season in self._seasons[member]:
            if (member, season) not in self._rows:
                sha = member_sha(place, season)
                known = self._known().get((member, season, sha))
                self._rows[member, season] = known or season_rows(place, member, season, sha)
        return [row for season in self._seasons[member] for row in self._rows[member, season]]

    def forget(self, member: str, season: str) -> None:
        """Look at a season again: it was written."""
        self._seasons.pop(member, None)
        self._rows.pop((member, season), None)

    def write(self) -> int:
        """Write the index, with a row for what each member has, and return its number of rows."""
        import geopandas
        import pandas

        rows = [row for member in list_members(self.path) for row in self.of(member)]
        if not rows:
            with writing(self.path):
                (self.path / INDEX_FILE).unlink(missing_ok=True)
            return 0
        table = geopandas.GeoDataFrame(rows, geometry="geometry", crs=_CRS84)
        for name in ("time_start", "time_end"):
            table[name] = pandas.to_datetime(table[name], utc=True).astype("datetime64[ms, UTC]")
        content = io.BytesIO()
        table.to_parquet(content, index=False)
        write_file(self.path / INDEX_FILE, content.getvalue())
        return len(rows)

    def _known(self) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
        """Return the rows of the index that is there, by what they were made from."""
        if self._old is None:
            self._old = {}
            if not self.anew and (self.path / INDEX_FILE).is_file():
                for row in read_index(self.path).to_dict("records"):
                    key = (row["path"], row["season"], row["manifest_sha"])
                    self._old.setdefault(key, []).append(row)
        return self._old


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
