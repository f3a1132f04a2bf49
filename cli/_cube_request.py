"""From the options of ``cube build`` and ``cube plan`` to a search, a spec and a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ..cube.clouds import CloudSource
    from ..cube.planned import CubePlan
    from ..cube.request import SearchRequest
    from ..cube.selection import Selection
    from ..cube.spec import CubeSpec, OnError
    from ..region import Region

__all__ = [
    "error_policy",
    "make_region",
    "make_selection",
    "make_spec",
    "plan_by_zone",
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


def plan_by_zone(search: SearchRequest, spec: CubeSpec) -> dict[str, CubePlan]:
    from ..cube.plan import plan_zones
    from ..cube.request import find_items, request_of

    request = request_of(search, spec)
    plans = plan_zones(find_items(search, spec), search.region, spec)
    return {
        zone: dataclasses.replace(made, request={**request, "zone": zone})
        for zone, made in plans.items()
    }
