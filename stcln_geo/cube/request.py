"""What is searched for to build a cube, in a form that a later run can compare with its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .selection import Selection

if TYPE_CHECKING:
    from ..region import Region
    from .planned import CubePlan
    from .snapshot import ItemSnapshot
    from .spec import CubeSpec

__all__ = ["SearchRequest", "find_items", "plan_request", "request_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What to search for.

    Parameters
    ----------
    catalog
        Name of a catalog, a YAML file, a folder with ``catalog.json``, or an address.
    collection
        By default the only one that fits.
    region
        None takes all that the catalog has.
    time
        ``START/END``, both days included.
    allow_hosts
        Private hosts that assets may be on.
    """

    catalog: str
    collection: str | None = None
    region: Region | None = None
    time: str | None = None
    selection: Selection = field(default_factory=Selection)
    allow_hosts: tuple[str, ...] = ()


def request_of(search: SearchRequest, spec: CubeSpec) -> dict[str, Any]:
    """Return what was asked for, in a form that two runs can compare and that tells no secret."""
    from .addresses import redact

    catalog = search.catalog
    policy = {"on_error", "max_failed_fraction"}
    choices = {key: value for key, value in spec.to_json().items() if key not in policy}
    request: dict[str, Any] = {
        "catalog": str(Path(catalog).resolve()) if Path(catalog).exists() else redact(catalog),
        "collection": search.collection,
        "region": search.region.to_json() if search.region is not None else None,
        "time": search.time,
        "spec": choices,
    }
    if not search.selection.is_empty:
        request["selection"] = search.selection.to_json()
    if search.allow_hosts:
        request["allow_hosts"] = sorted(search.allow_hosts)
    return request


def find_items(search: SearchRequest, spec: CubeSpec) -> ItemSnapshot:
    """Search, as far around the region as a cube's grid may reach."""
    from ..catalog import load_catalog
    from .search import DEFAULT_MARGIN, search_items

    return search_items(
        load_catalog(search.catalog, allow_hosts=search.allow_hosts),
        search.collection,
        search.region,
        search.time,
        selection=search.selection,
        margin=max(DEFAULT_MARGIN, spec.margin),
    )


def plan_request(search: SearchRequest, spec: CubeSpec) -> CubePlan:
    """Search, and plan the cube of what was found; the plan remembers what was asked for."""
    from .plan import plan_cube

    made = plan_cube(find_items(search, spec), search.region, spec)
    return dataclasses.replace(made, request=request_of(search, spec))
