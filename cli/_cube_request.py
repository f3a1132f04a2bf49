"""From the options of ``cube build`` and ``cube plan`` to a search, a spec and a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ..cube.clouds import CloudSource
    from ..cube.planned import CubePlan
    from ..cube.selection import Selection
    from ..cube.snapshot import ItemSnapshot
    from ..cube.spec import CubeSpec, OnError
    from ..region import Region

__all__ = [
    "SearchRequest",
    "error_policy",
    "make_region",
    "make_selection",
    "make_spec",
    "plan_by_zone",
    "plan_one",
    "request_of",
]


def make_spec(
    *,
    bands: str | None,
    window: int,
    halo: int,
    cloud_mask: str,
    cloud_margin: int,
    shadow_margin: int,
    **choices: Any,
) -> CubeSpec:
    from ..cube.clouds import CloudSpec
    from ..cube.spec import CubeSpec
    from ..grid import Lattice

    return CubeSpec(
        bands=tuple(name.strip() for name in bands.split(",")) if bands is not None else None,
        clouds=CloudSpec(
            source=cast("CloudSource", cloud_mask),
            cloud_margin=cloud_margin,
            shadow_margin=shadow_margin,
        ),
        lattice=Lattice(window=window, halo=halo),
        **choices,
    )


def error_policy(text: str | None) -> OnError | None:
    """Return the choice; whether it is one is checked where it is used."""
    return cast("OnError | None", text)


def make_region(bbox: str | None, file: Path | None) -> Region | None:
    from ..errors import InputError
    from ..region import Region

    if bbox is not None and file is not None:
        raise InputError(
            f"Cannot use --bbox {bbox} and --region {file} together: a cube has one region. "
            "Give one of them."
        )
    if file is not None:
        return Region.from_file(file)
    return Region.from_bbox(bbox) if bbox is not None else None


def make_selection(tiles: str | None, orbits: str | None, max_cloud: float | None) -> Selection:
    from ..cube.selection import Selection
    from ..errors import InputError

    try:
        numbers = tuple(int(text) for text in _listed(orbits))
    except ValueError as error:
        raise InputError(
            f"Cannot read the orbits {orbits!r}: they must be whole numbers, by commas. "
            "Write for example --orbits 51,94."
        ) from error
    return Selection(tiles=_listed(tiles), orbits=numbers, max_cloud=max_cloud)


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text is not None else ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What to search for, as given on the command line."""

    catalog: str
    collection: str | None
    region: Region | None
    time: str | None
    selection: Selection
    allow_hosts: tuple[str, ...]


def request_of(search: SearchRequest, spec: CubeSpec) -> dict[str, Any]:
    """Return what was asked for, in a form that two runs can compare and that tells no secret."""
    from ..cube.addresses import redact

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


def plan_one(search: SearchRequest, spec: CubeSpec) -> CubePlan:
    from ..cube.plan import plan_cube

    made = plan_cube(_found(search, spec), search.region, spec)
    return dataclasses.replace(made, request=request_of(search, spec))


def plan_by_zone(search: SearchRequest, spec: CubeSpec) -> dict[str, CubePlan]:
    from ..cube.plan import plan_zones

    request = request_of(search, spec)
    plans = plan_zones(_found(search, spec), search.region, spec)
    return {
        zone: dataclasses.replace(made, request={**request, "zone": zone})
        for zone, made in plans.items()
    }


def _found(search: SearchRequest, spec: CubeSpec) -> ItemSnapshot:
    from ..catalog import load_catalog
    from ..cube.search import DEFAULT_MARGIN, search_items

    return search_items(
        load_catalog(search.catalog, allow_hosts=search.allow_hosts),
        search.collection,
        search.region,
        search.time,
        selection=search.selection,
        margin=max(DEFAULT_MARGIN, spec.margin),
    )
