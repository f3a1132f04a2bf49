"""A copy of a run that is kept in a bucket, to add what is made of it after its training."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..saves import fetch_save
from ..storage import Location, list_files, write_file
from .run_directory import RunDirectory
from .run_keeping import is_derived, upload_all

__all__ = ["run_copy", "written_to"]


@contextlib.contextmanager
def run_copy(where: Location) -> Iterator[RunDirectory]:
    """Give a run's directory; of one in a bucket a copy, whose evaluations are brought there.

    The copy lacks what only training needs. Of what is written into it, evaluations and model card
    go into the bucket, unless an error comes first: they are no part of a save, so that a command
    which trains there meanwhile is not disturbed.

    Parameters
    ----------
    where
        A folder or a prefix that holds a run.
    """
    if isinstance(where, Path):
        yield RunDirectory(where)
        return
    with tempfile.TemporaryDirectory(prefix="stcln-geo-") as parent:
        folder = Path(parent) / where.name
        save = fetch_save(where, folder, wanted=_is_read)
        for name in list_files(where):
            # A run that was copied into the bucket by other means has no save.
            if is_derived(name) or (save is None and _is_read(name)):
                write_file(folder / name, (where / name).read_bytes())
        before = _stamps(folder)
        yield RunDirectory(folder, where=where)
        made = [name for name, stamp in _stamps(folder).items() if before.get(name) != stamp]
        upload_all(folder, where, [(name, name) for name in made if is_derived(name)])


@contextlib.contextmanager
def written_to(where: Location) -> Iterator[Path]:
    """Give a folder to write into, whose files lie at ``where`` afterwards."""
    if isinstance(where, Path):
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="stcln-geo-") as folder:
        yield Path(folder)
        upload_all(Path(folder), where, [(name, name) for name in list_files(Path(folder))])


def _is_read(name: str) -> bool:
    """Return True for what evaluations and model cards are made of."""
    return "/" not in name or name == "checkpoints/best.safetensors"


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {name: (folder / name).stat() for name in list_files(folder)}
    return {name: (one.st_mtime_ns, one.st_ino) for name, one in found.items()}
