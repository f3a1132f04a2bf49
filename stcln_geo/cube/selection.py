"""Which scenes to take: by tile, relative orbit and cloud cover.

The server is asked for them where the catalog says that it listens; every answer is checked again
here, because servers that ignore a filter answer with everything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..catalog import Catalog, CollectionProfile, ItemProperties
from ..errors import InputError
from .granules import Granule

__all__ = ["CLOUD_COVER", "Selection", "plain_tile"]

CLOUD_COVER = "eo:cloud_cover"
_MAX_ORBIT = 143
_TILE = re.compile(r"(?:MGRS-|T)?(\d{1,2}[C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V])", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Conditions on scenes; those left empty hold for all.

    Parameters
    ----------
    tiles
        MGRS tiles such as ``31UES``, with or without ``T`` or ``MGRS-`` before.
    orbits
        Relative orbits, 1 to 143.
    max_cloud
        Largest cloud cover of a scene (percent); a scene that does not say it is left out.
    """

    tiles: tuple[str, ...] = ()
    orbits: tuple[int, ...] = ()
    max_cloud: float | None = None

    def __post_init__(self) -> None:
        """Check each condition."""
        for tile in self.tiles:
            if _TILE.fullmatch(tile) is None:
                raise InputError(
                    f"Cannot select the tile {tile!r}: it must be an MGRS tile of Sentinel-2. "
                    "Write for example --tiles 31UES,31UFS."
                )
        for orbit in self.orbits:
            if not 1 <= orbit <= _MAX_ORBIT:
                raise InputError(
                    f"Cannot select the orbit {orbit}: relative orbits of Sentinel-2 are 1 to "
                    f"{_MAX_ORBIT}. Write for example --orbits 51,94."
                )
        if self.max_cloud is not None and not 0 <= self.max_cloud <= 100:
            raise InputError(
                f"Cannot select scenes of at most {self.max_cloud:g} % cloud: it must be 0 to 100. "
                "Write for example --max-cloud 60."
            )

    @property
    def is_empty(self) -> bool:
        """True where every scene is taken."""
        return not self.tiles and not self.orbits and self.max_cloud is None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Selection:
        """Read what ``to_json`` wrote; nothing selects all."""
        return cls(
            tiles=tuple(content.get("tiles", ())),
            orbits=tuple(content.get("orbits", ())),
            max_cloud=content.get("max_cloud"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the conditions as JSON values."""
        return {
            "tiles": sorted({plain_tile(tile) for tile in self.tiles}),
            "orbits": sorted(set(self.orbits)),
            "max_cloud": self.max_cloud,
        }

    def reason_to_drop(self, item: Mapping[str, Any], granule: Granule) -> str | None:
        """Return why a scene is not selected, or None if it is."""
        if self.tiles and plain_tile(granule.tile) not in {plain_tile(tile) for tile in self.tiles}:
            return "is of a tile that is not selected"
        if self.orbits and granule.orbit not in self.orbits:
            return "is of an orbit that is not selected"
        if self.max_cloud is not None:
            cover = (item.get("properties") or {}).get(CLOUD_COVER)
            if not isinstance(cover, int | float):
                return "does not say its cloud cover"
            if cover > self.max_cloud:
                return f"has more than {self.max_cloud:g} % cloud"
        return None

    def server_filter(self, catalog: Catalog, profile: CollectionProfile) -> dict[str, Any]:
        """Return what to add to a search so that the server selects, as far as it honours that.

        Tiles and orbits are asked for only where the collection is described: elsewhere it is not
        known which property tells them, and a wrong name would find nothing.

        Returns
        -------
        Arguments of a pystac-client search: ``query``, or ``filter`` with ``filter_lang``.
        """
        names = profile.properties if catalog.collections else ItemProperties()
        conditions: list[tuple[str, str, Any]] = []
        if self.max_cloud is not None:
            conditions.append((CLOUD_COVER, "lte", self.max_cloud))
        if self.tiles and names.tile:
            conditions.append((names.tile[0], "in", self._spellings(names.tile[0])))
        if self.orbits and names.orbit:
            conditions.append((names.orbit[0], "in", sorted(set(self.orbits))))
        if not conditions or catalog.filters is None:
            return {}
        if catalog.filters == "query":
            return {"query": {name: {operator: value} for name, operator, value in conditions}}
        operators = {"lte": "<=", "in": "in"}
        clauses = [
            {"op": operators[operator], "args": [{"property": name}, value]}
            for name, operator, value in conditions
        ]
        return {"filter": {"op": "and", "args": clauses}, "filter_lang": "cql2-json"}

    def _spellings(self, name: str) -> list[str]:
        """Return the tiles as providers write them: zones below 10 with and without a zero."""
        prefix = "MGRS-" if name == "grid:code" else ""
        tiles = sorted({plain_tile(tile) for tile in self.tiles})
        return [
            f"{prefix}{text}" for tile in tiles for text in dict.fromkeys((tile, tile.zfill(5)))
        ]


def plain_tile(text: str) -> str:
    """Return a tile as ``31UES`` or ``9VXK``; other texts as they are."""
    match = _TILE.fullmatch(text)
    return match[1].upper().lstrip("0") if match else text
