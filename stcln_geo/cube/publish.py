"""Give a season in object storage its name, where nothing can be renamed.

On a file system ``<season>.building`` is renamed. A bucket knows only whole objects, so there the
season is copied by the server, object by object, and a journal says how far that has come:

1. ``<season>.publish`` is written: *copy*. From here on ``<season>.building``, which is whole,
   is the truth, and nothing of it is touched until all is copied.
2. ``<season>/zarr.json`` is deleted, where a season is replaced: it opens as nothing.
3. Objects that the new season lacks are deleted; all others are copied, and last of all
   ``zarr.json``: by this one write the season is there.
4. The manifests of a season that replaces another take the place of the old ones.
5. The journal is written again: *clean*. What lies under ``.building`` is deleted, then the
   journal.

Every step can be repeated. Whoever next opens the cube for writing finds the journal and repeats
them: after *copy* all, after *clean* the last.

What a reader is promised: a season that opens is whole, the old one or the new one, at any moment
and wherever a writer was stopped. Between 2 and 3 (some seconds per thousand shards) a season that
is replaced does not open, and one that was opened before must be opened again: its chunks are no
longer those it was opened with. A season that is new becomes visible at once.
"""

from __future__ import annotations

import json

from ..storage import (
    S3Path,
    copy_file,
    copy_tree,
    list_files,
    remove_files,
    remove_tree,
    write_file,
)

__all__ = ["JOURNAL", "publish_season", "recover_publications"]

JOURNAL = ".publish"
"""Suffix of a season's journal."""

_MARK = "zarr.json"
_MANIFESTS = "manifests"


def publish_season(cube: S3Path, name: str) -> None:
    """Give a wholly written season its name, and its manifests theirs."""
    _record(cube, name, "copy")
    _copy(cube, name)
    _record(cube, name, "clean")
    _clean(cube, name)


def recover_publications(cube: S3Path) -> None:
    """Complete what an interruption cut short; the caller is the cube's only writer."""
    for journal in list(cube.glob(f"*{JOURNAL}")):
        name = journal.name.removesuffix(JOURNAL)
        if json.loads(journal.read_text())["stage"] == "copy":
            _copy(cube, name)
            _record(cube, name, "clean")
        _clean(cube, name)


def _record(cube: S3Path, name: str, stage: str) -> None:
    write_file(cube / f"{name}{JOURNAL}", json.dumps({"stage": stage}).encode())


def _copy(cube: S3Path, name: str) -> None:
    building, final = cube / f"{name}.building", cube / name
    remove_files(final, [_MARK])
    _mirror(building, final, leaving=_MARK)
    copy_file(building / _MARK, final / _MARK)
    manifests = cube / _MANIFESTS
    if (manifests / building.name).is_dir():
        _mirror(manifests / building.name, manifests / name)


def _mirror(source: S3Path, target: S3Path, *, leaving: str = "") -> None:
    """Make a prefix equal another, but for one object."""
    wanted = [key for key in list_files(source) if key != leaving]
    remove_files(target, sorted(set(list_files(target)) - set(wanted)))
    copy_tree(source, target, wanted)


def _clean(cube: S3Path, name: str) -> None:
    remove_tree(cube / _MANIFESTS / f"{name}.building")
    remove_tree(cube / f"{name}.building")
    (cube / f"{name}{JOURNAL}").unlink()
