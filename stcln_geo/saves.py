"""The last save of a run in a bucket: the objects it consists of, and what they must hold.

``RUN/save.json`` lists each file with its size, its SHA-256 and the object that holds it. It is
written after these objects and on condition that nobody has written it since, so that a run there
is always that of one save, whole, and of one writer. The objects of a new save lie below
``RUN/.saving/`` until ``save.json`` names them, and get the names of the files after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import InputError, MissingFileError, StclnGeoError, StorageError
from .storage import (
    Location,
    S3Path,
    create_file,
    read_version,
    replace_version,
    write_file,
)

__all__ = [
    "SAVE_FILE",
    "STAGE",
    "TRANSFERS",
    "WORK_FOLDER",
    "Save",
    "SavedFile",
    "fetch_save",
    "is_saved",
    "local_copy",
    "read_save",
    "replace_save",
]

SAVE_FILE = "save.json"
STAGE = ".saving"
"""Prefix of objects that are not yet, or no longer, part of a save."""
WORK_FOLDER = "stcln-geo-work"
"""Below the current folder: where what goes into a bucket is made, unless one is named."""
TRANSFERS = 8
"""Files on their way at a time."""

_FORMAT = 1
_TRIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """A file of a save."""

    bytes: int
    sha256: str
    at: str
    """Object that holds it, relative to the run: its own name, or one below ``.saving/``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """What ``save.json`` says."""

    files: Mapping[str, SavedFile]
    """By path relative to the run."""
    version: str
    """ETag of ``save.json``."""


def read_save(run: S3Path) -> Save | None:
    """Return the last save of a run; None where there is none.

    Raises
    ------
    StorageError
        If ``save.json`` is not as we write it.
    """
    found = read_version(run / SAVE_FILE)
    if found is None:
        return None
    content, version = found
    try:
        told = json.loads(content)
        if told["format"] != _FORMAT:
            raise ValueError(f"format {told['format']}, and this version reads {_FORMAT}")
        files = {name: SavedFile(**one) for name, one in told["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"Cannot read the run {run}: its {SAVE_FILE} is damaged or of another version "
            f"({error}). It lists the files of the last save. Restore the object, or choose "
            "another address."
        ) from error
    return Save(files=files, version=version)


def is_saved(run: Location, name: str) -> bool:
    """Return True where a file is of the last save of a run in a bucket.

    There may be no object of its name yet; `local_copy` finds it nevertheless.
    """
    save = read_save(run) if isinstance(run, S3Path) else None
    return save is not None and name in save.files


def replace_save(run: S3Path, files: Mapping[str, SavedFile], before: Save | None) -> Save:
    """Write which files are the last save, where the save before it still is the last one.

    Raises
    ------
    InputError
        If another writer has written a save since ``before``.
    """
    told = {"format": _FORMAT, "files": {name: asdict(one) for name, one in files.items()}}
    content = (json.dumps(told, indent=1, sort_keys=True) + "\n").encode()
    target = run / SAVE_FILE
    with contextlib.suppress(FileNotFoundError):
        if before is None:
            create_file(target, content)
        else:
            replace_version(target, content, before.version)
    # A request that was answered too late is sent twice: what lies there decides.
    found = read_version(target)
    if found is None or found[0] != content:
        done = "removed" if found is None else "written"
        raise InputError(
            f"Cannot save into {run}: its {SAVE_FILE} was {done} meanwhile, not by this command. A "
            "run has one command at a time. Make sure that only "
            "one is running, and run it again: it goes on from what lies there."
        )
    return Save(files=dict(files), version=found[1])


def fetch_save(
    run: S3Path, folder: Path, *, wanted: Callable[[str], bool] = lambda _: True
) -> Save | None:
    """Bring the files of the last save into a folder, each compared with its SHA-256.

    Parameters
    ----------
    wanted
        Is told the name of each file.

    Returns
    -------
    The save; None where there is none.

    Raises
    ------
    StorageError
        If an object is missing or damaged; it is named.
    """
    save = read_save(run)
    for _ in range(_TRIES):
        if save is None:
            return None
        names = [name for name in save.files if wanted(name)]
        try:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(lambda name, save=save: _bring(run, save, name, folder), names))
            return save
        except StorageError:
            # A writer puts the next save in the place of this one: then read that.
            now = read_save(run)
            if now is not None and now.version == save.version:
                raise
            # What was brought of the save before may be no part of the next one.
            for name in names:
                if _lies_in(folder, name):
                    (folder / name).unlink(missing_ok=True)
            save = now
    raise StorageError(
        f"Cannot read the run {run}: it was saved anew each of {_TRIES} times. It must rest while "
        "it is read. Try again, or save less often."
    )


def _bring(run: S3Path, save: Save, name: str, folder: Path) -> None:
    """Copy a file of a save into a folder; raise StorageError unless it is what was saved."""
    file = save.files[name]
    if not _lies_in(folder, name):
        raise StorageError(
            f"Cannot read the run {run}: its {SAVE_FILE} names {name!r}, which lies outside of the "
            "run. No command of ours writes that. Choose another address."
        )
    held = run / file.at
    try:
        content = held.read_bytes()
    except FileNotFoundError as error:
        raise StorageError(
            f"Cannot read the run {run}: the object {held} is missing, and {SAVE_FILE} lists it as "
            f"{name}. All files of the last save must be there. Restore the object, or begin anew "
            "with --overwrite."
        ) from error
    if len(content) != file.bytes or hashlib.sha256(content).hexdigest() != file.sha256:
        raise StorageError(
            f"Cannot read the run {run}: the object {held} is damaged. It has {len(content)} "
            f"bytes, and {SAVE_FILE} lists {name} with {file.bytes} bytes of another SHA-256. "
            "Restore the object, or begin anew with --overwrite."
        )
    write_file(folder / name, content)


def _lies_in(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


@contextlib.contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """Give a file that lies on this machine: a path itself, or a copy of an object for a while.

    A file that is part of a run's last save is compared with what was saved. Errors of ours that
    name the copy name the object instead.

    Raises
    ------
    MissingFileError
        If there is no such object.
    StorageError
        If it is damaged.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stcln-geo-") as folder:
        # Below the names that it has in its run, if it is of one.
        run = path.parent.parent
        name = f"{path.parent.name}/{path.name}"
        copy = Path(folder) / name
        save = fetch_save(run, Path(folder), wanted=lambda one: one == name)
        if save is None or name not in save.files:
            try:
                write_file(copy, path.read_bytes())
            except FileNotFoundError as error:
                raise MissingFileError(
                    f"Cannot read {path}: there is no such object. Correct the address."
                ) from error
        try:
            yield copy
        except StclnGeoError as error:
            if str(copy) not in str(error):
                raise
            raise type(error)(str(error).replace(str(copy), str(path))) from error
