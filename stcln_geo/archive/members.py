"""Take existing cubes and stacks into an archive, by reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cube.lock import cube_lock
from ..cube.store import list_seasons, write_json
from ..cube.stored import read_manifest
from ..errors import CubeError, InputError, MissingFileError
from ..storage import Location, S3Path, location
from .index import INDEX_FILE, MEMBERS_FILE, IndexRows, list_members, member_location

__all__ = ["AddReport", "add_members"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AddReport:
    """What was added."""

    path: Location
    added: tuple[str, ...]
    known: tuple[str, ...]
    """Members that were there before."""
    notes: tuple[str, ...]
    """In what added members differ from the others, and which members are not there."""
    rows: int
    """Of the index now."""

    def __str__(self) -> str:
        known = f", {len(self.known)} were there already" if self.known else ""
        return f"{self.path}: {len(self.added)} members added{known}; {self.rows} site-seasons."


@dataclass(frozen=True, slots=True)
class _Form:
    bands: tuple[str, ...]
    resolution: float


def add_members(path: str | Location, members: Sequence[str | Location]) -> AddReport:
    """Add cubes and stacks to the index of an archive; no pixel is copied.

    Parameters
    ----------
    path
        Folder or address of the archive; a new one is made if there is none.
    members
        Folders or addresses of cubes and stacks; without any, the index is only made anew.

    Raises
    ------
    MissingFileError
        If a member does not exist.
    CubeError
        If a member has no complete season, or no band that all others have.
    """
    path = location(path)
    if path.is_dir() and any(path.iterdir()) and not _is_archive(path):
        raise InputError(
            f"Cannot add to {path}: the folder holds other files and is no archive. Give the "
            "archive first, then its new members; choose a new path for a new archive."
        )
    if not members and not _is_archive(path):
        raise MissingFileError(
            f"Cannot open the archive {path}: there is none. Give the cubes and stacks to make one "
            "of, or assemble one with 'stcln-geo archive create'."
        )
    added: list[str] = []
    known: list[str] = []
    notes: list[str] = []
    with cube_lock(path):
        rows = IndexRows(path, anew=not members)
        present = dict.fromkeys(list_members(path))
        # Members are many and alike: each form counts once.
        forms = dict.fromkeys(form for text in present for form in _forms_of(rows.of(text)))
        for member in members:
            place = location(member)
            _check_whole(place)
            text = _reference(path, place)
            if text in present:
                known.append(text)
                continue
            forms_of = _forms_of(rows.of(text))
            notes += _compare(place, forms_of, list(forms))
            if isinstance(path, S3Path) and not isinstance(place, S3Path):
                notes.append(
                    f"{place} lies on this machine alone: on others, the archive lacks it. Copy it "
                    "into the bucket to share it."
                )
            forms |= dict.fromkeys(forms_of)
            present[text] = None
            added.append(text)
        notes += [
            f"{text} is not there: its rows leave the index until it is back and 'archive add' "
            "runs again, and nothing trains on it."
            for text in present
            if not (member_location(path, text) / "zarr.json").is_file()
        ]
        before = read_manifest(path / MEMBERS_FILE).get("members", [])
        if added:
            write_json(path / MEMBERS_FILE, {"members": [*before, *added]})
        count = rows.write()
    return AddReport(
        path=path, added=tuple(added), known=tuple(known), notes=tuple(notes), rows=count
    )


def _is_archive(path: Location) -> bool:
    return any((path / name).is_file() for name in (INDEX_FILE, MEMBERS_FILE, "archive.json"))


def _reference(archive: Location, member: Location) -> str:
    """Return how the index names a member: relative to the archive where it lies inside."""
    place, root = member.resolve(), archive.resolve()
    if isinstance(place, S3Path):
        return str(place).removeprefix(f"{root}/")
    if isinstance(root, Path) and place.is_relative_to(root):
        return place.relative_to(root).as_posix()
    return place.as_posix()


def _check_whole(place: Location) -> None:
    """Refuse a member that is not there, or has nothing finished."""
    if not list_seasons(place):
        raise CubeError(
            f"Cannot add {place}: it has no complete season. Finish it by running its 'cube "
            "build' or 'archive create' command again, then add it."
        )


def _forms_of(rows: Iterable[Mapping[str, Any]]) -> list[_Form]:
    """Return bands and pixel size of a member's seasons, from its rows of the index."""
    found = {row["season"]: _Form(tuple(row["bands"]), float(row["resolution"])) for row in rows}
    return list(found.values())


def _compare(place: Location, new: Sequence[_Form], others: Sequence[_Form]) -> list[str]:
    """Say in what a new member differs; refuse it where nothing is shared."""
    if not others:
        return []
    shared = [band for band in others[0].bands if all(band in form.bands for form in others)]
    left = [band for band in shared if all(band in form.bands for form in new)]
    if not left:
        raise CubeError(
            f"Cannot add {place}: it has the bands {', '.join(new[0].bands)}, and none of them is "
            f"in all members of the archive ({', '.join(shared) or 'which share none'}). Members "
            "must share a band. Build it again with --bands, or use another archive."
        )
    notes = []
    lacking = [band for band in shared if band not in left]
    if lacking:
        notes.append(
            f"{place} lacks {', '.join(lacking)}: all members now share only {', '.join(left)}."
        )
    more = [band for band in new[0].bands if band not in others[0].bands]
    if more:
        notes.append(f"{place} also has {', '.join(more)}, which other members lack.")
    sizes = sorted({form.resolution for form in others})
    if new[0].resolution not in sizes:
        notes.append(
            f"{place} has pixels of {new[0].resolution:g} m; the others have "
            f"{', '.join(f'{size:g}' for size in sizes)} m."
        )
    return notes
