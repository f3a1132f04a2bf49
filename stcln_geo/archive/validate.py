"""Check an archive: every member against its contract, every row of the index against it."""

from __future__ import annotations

from typing import Any

from ..cube.contract import validate_cube
from ..cube.dataset import open_cube
from ..cube.stack import is_stack
from ..cube.stack_contract import stack_dataset, validate_stack
from ..cube.store import list_seasons
from ..errors import CubeError
from ..storage import Location, location
from .index import list_members, member_sha, open_archive, season_rows, unfinished_seasons

__all__ = ["validate_archive"]

_REMEDY = "Make the index anew with 'stcln-geo archive add' and the archive alone."


def validate_archive(path: str | Location) -> tuple[list[str], list[str]]:
    """Compare members and index with their contracts and with each other.

    Returns
    -------
    errors : what is broken, each with the member, the rule and the remedy.
    warnings : what is allowed but deserves attention.

    Raises
    ------
    MissingFileError
        If there is no archive.
    """
    path = location(path)
    archive = open_archive(path)
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in archive.index.to_dict("records"):
        rows.setdefault((row["path"], row["season"]), []).append(row)
    errors: list[str] = []
    warnings: list[str] = []
    seen: set[tuple[str, str]] = set()
    for member in list_members(path):
        place = archive.member(member)
        if not (place / "zarr.json").is_file():
            errors.append(
                f"{member} is not there any more. Bring it back, or take it out of members.json "
                "and make the index anew."
            )
            seen |= {key for key in rows if key[0] == member}
            continue
        warnings += [
            f"{member}: {name} is unfinished. Run the command that builds it again."
            for name in unfinished_seasons(place)
        ]
        for season in list_seasons(place):
            seen.add((member, season))
            _check_season(place, member, season, rows.get((member, season)), (errors, warnings))
    errors += [
        f"The index names {member}, season {season}, which no member has. {_REMEDY}"
        for member, season in sorted(set(rows) - seen)
    ]
    if not archive.bands:
        errors.append("No band is in all members, so nothing can stream them together.")
    return errors, warnings


def _check_season(
    place: Location,
    member: str,
    season: str,
    rows: list[dict[str, Any]] | None,
    told: tuple[list[str], list[str]],
) -> None:
    errors, warnings = told
    try:
        if is_stack(place, season):
            broken, doubtful = validate_stack(stack_dataset(place, season))
        else:
            broken, doubtful = validate_cube(open_cube(place, season, mask_and_scale=False))
        fresh = season_rows(place, member, season, member_sha(place, season))
    except (CubeError, OSError, KeyError, ValueError) as error:
        errors.append(f"{member}, {season} cannot be opened: {error}")
        return
    errors += [f"{member}, {season}: {text}" for text in broken]
    warnings += [f"{member}, {season}: {text}" for text in doubtful]
    if rows is None:
        errors.append(f"{member}, {season} is not in the index. {_REMEDY}")
        return
    differing = sorted(
        {
            name
            for ours, theirs in zip(fresh, rows, strict=False)
            for name in _differing(ours, theirs)
        }
    )
    if len(fresh) != len(rows) or differing:
        what = ", ".join(differing) or f"{len(rows)} rows for {len(fresh)} sites"
        errors.append(f"{member}, {season}: the index is out of date ({what}). {_REMEDY}")


def _differing(fresh: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Return the columns in which a row of the index is not what the member says."""
    import pandas

    names = []
    for name, value in fresh.items():
        other: Any = row.get(name)
        if name == "geometry":
            same = other is not None and bool(value.equals_exact(other, 1e-9))
        elif name in {"time_start", "time_end"}:
            same = pandas.Timestamp(value, tz="UTC").floor("s") == other
        elif isinstance(value, list):
            same = list(value) == list(other if other is not None else [])
        else:
            same = value == other
        if not same:
            names.append(name)
    return names
