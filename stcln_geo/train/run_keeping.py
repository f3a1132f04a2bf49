"""Where a run is kept: in its folder, or in a bucket, while it is written in a folder beside.

Training appends, renames and replaces files, which a bucket cannot do. For an address in object
storage the run is written in a work folder, and what the folder holds at each save is copied into
the bucket by a thread of its own, so that training does not wait. What counts there is the last
whole save (`saves`): on another machine, whose work folder is empty, a run goes on from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import mimetypes
import secrets
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError, OutputError, StclnGeoError, StclnGeoWarning
from ..saves import (
    STAGE,
    TRANSFERS,
    WORK_FOLDER,
    Save,
    SavedFile,
    fetch_save,
    read_save,
    replace_save,
)
from ..storage import (
    Location,
    S3Path,
    copy_file,
    list_files,
    location,
    remove_files,
    upload_file,
    writing,
)
from .ranks import Ranks
from .run_directory import MADE, RunDirectory
from .run_lock import run_lock

__all__ = ["RunMirror", "is_derived", "kept_run", "upload_all", "work_folder"]

_Stamp = tuple[int, int, int]
"""Time of the last change (ns), bytes and number of a file."""


@contextlib.contextmanager
def kept_run(
    out: str | Location, ranks: Ranks, *, overwrite: bool = False, work: str | Path | None = None
) -> Iterator[RunDirectory]:
    """Give the run directory that is kept at ``out``, locked, with what was saved there.

    Parameters
    ----------
    out
        A folder, or an address such as ``s3://bucket/runs/x``.
    ranks
        Already joined; the first of them fetches and saves.
    overwrite
        True fetches nothing: a run shall begin anew.
    work
        For a bucket: the folder below which the run is written, kept afterwards. By default
        ``stcln-geo-work`` below the current one, removed when the bucket has all of it.

    Raises
    ------
    InputError
        In every rank, if another command is writing the run, the prefix holds other objects, or a
        work folder is given for a run that is written where it stays.
    StorageError
        If the bucket cannot be reached, or an object of the last save is damaged. At the end, if
        the last save cannot be brought there.
    """
    where = location(out)
    with run_lock(where, ranks):
        if isinstance(where, Path):
            if work is not None:
                raise InputError(
                    f"Cannot use the work folder {work} for {where}: a run in a folder is written "
                    "there, and only one for a bucket is written elsewhere. Leave --work out."
                )
            yield RunDirectory(where)
            return
        folder = work_folder(where, work)
        mirror = RunMirror(folder, where)
        ranks.on_first(lambda: mirror.fetch(overwrite=overwrite))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not ranks.first:
            yield RunDirectory(folder, where=where)
            return
        try:
            yield RunDirectory(folder, where=where, on_save=mirror.save)
        except BaseException:
            mirror.end(failed=True)
            raise
        else:
            mirror.end()
        finally:
            if work is None and mirror.is_sent:
                remove_work(folder)


def work_folder(where: S3Path, work: str | Path | None = None) -> Path:
    """Return where a run for a bucket is written: named as the run, apart from others so named."""
    apart = hashlib.sha256(str(where).encode()).hexdigest()[:12]
    return Path(work or WORK_FOLDER).resolve() / apart / where.name


def remove_work(folder: Path) -> None:
    """Remove a work folder, and the folders above it that are then empty."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.parent.rmdir()


def is_derived(name: str) -> bool:
    """Return True for what is made of the rest of a run, by its end or later by ``evaluate``.

    It is no part of a save, so that evaluating a run leaves its saves alone.
    """
    return name.partition("/")[0].startswith(("evaluation-", "model_card."))


def upload_all(folder: Path, where: S3Path, names: Iterable[tuple[str, str]]) -> None:
    """Copy files of a folder to objects: pairs of their names, several at a time."""

    def send(pair: tuple[str, str]) -> None:
        kind = mimetypes.guess_type(pair[0])[0] or "application/octet-stream"
        upload_file(folder / pair[0], where / pair[1], media_type=kind)

    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(send, names))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Snapshot:
    """What a run's folder holds at a save."""

    folder: Path
    """Copies of the files that changed."""
    stamps: dict[str, _Stamp]
    """Of all files, by name."""
    changed: tuple[str, ...]


class RunMirror:
    """Brings the saves of a run's folder into a bucket, and the last one back.

    Parameters
    ----------
    folder
        Where the run is written.
    where
        Where it is kept.
    """

    def __init__(self, folder: Path, where: S3Path) -> None:
        self._folder, self._where = folder, where
        # Beside the folder: which save its content goes on from; copies on their way.
        self._note = folder.with_name(f"{folder.name}.save")
        self._sending = folder.with_name(f"{folder.name}.sending")
        self._save: Save | None = None
        self._fresh = False
        self._sent: dict[str, _Stamp] = {}
        self._lock = threading.Lock()
        self._next: _Snapshot | None = None
        self._at_work: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._refused: InputError | None = None
        self._warned = False
        self.is_sent = False
        """True where the bucket has all that the folder holds."""

    def fetch(self, *, overwrite: bool = False) -> None:
        """Bring the last save into the folder, unless the folder has gone on from it itself."""
        with writing(self._sending):
            shutil.rmtree(self._sending, ignore_errors=True)
            self._sending.mkdir(parents=True)
        self._save = save = read_save(self._where)
        version = "" if save is None else save.version
        noted = self._note.read_text() if self._note.is_file() else ""
        if self._folder.is_dir() and noted == version and not overwrite:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._note.unlink(missing_ok=True)
        if overwrite:
            self._fresh = True
        elif save is None:
            self._adopt()
        else:
            self._save = save = fetch_save(self._where, self._folder)
            version = "" if save is None else save.version
        with writing(self._note):
            self._note.write_text(version)

    def _adopt(self) -> None:
        """Bring a run that was copied into the bucket by other means."""
        names = list_files(self._where)
        foreign = [
            name for name in names if not is_derived(name) and name.split("/")[0] not in MADE
        ]
        foreign = [name for name in foreign if not name.startswith(f"{STAGE}/")]
        if foreign:
            raise InputError(
                f"Cannot write a run into {self._where}: it holds other objects "
                f"({', '.join(foreign[:5])}). A run has a prefix of its own. Choose another --out."
            )
        if "run.json" not in names:
            return
        for name in names:
            if not is_derived(name) and not name.startswith(f"{STAGE}/"):
                target = self._folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((self._where / name).read_bytes())

    def save(self) -> None:
        """Have what the folder holds now brought into the bucket, without waiting for it.

        A save that is still waiting for the one before it gives way to this one.

        Raises
        ------
        InputError
            If another command has saved into the run meanwhile.
        """
        if self._refused is not None:
            raise self._refused
        shot = self._take()
        with self._lock:
            dropped, self._next = self._next, shot
            if self._at_work is None:
                self._at_work = self._pool.submit(self._work)
        if dropped is not None:
            shutil.rmtree(dropped.folder, ignore_errors=True)

    def end(self, *, failed: bool = False) -> None:
        """Bring all of it into the bucket, and wait for it; of a failed run, as far as possible.

        Raises
        ------
        StclnGeoError
            If the bucket could not be written, and the run has not failed.
        """
        with self._lock:
            at_work = self._at_work
        unforeseen = None if at_work is None else at_work.exception()
        self._pool.shutdown()
        if unforeseen is not None and not failed:
            raise unforeseen
        if not (self._folder / "run.json").is_file():
            # The run never began: what lies in the bucket stays.
            self.is_sent = True
            return
        try:
            if self._refused is not None:
                raise self._refused
            self._send(self._take())
            self.is_sent = True
        except InputError:
            if not failed:
                raise
        except StclnGeoError as error:
            told = f"{error} What did not get there lies in {self._folder}"
            if not failed:
                raise type(error)(f"{told}: the same command brings it.") from error
            warnings.warn(f"{told}.", StclnGeoWarning, stacklevel=2)

    def _work(self) -> None:
        """Send what waits, until nothing does."""
        while True:
            with self._lock:
                shot, self._next = self._next, None
                if shot is None:
                    self._at_work = None
                    return
            try:
                self._send(shot)
            except InputError as error:
                self._refused = error
            except (StclnGeoError, OSError) as error:
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"{error} Training goes on, and each save tries again.",
                        StclnGeoWarning,
                        stacklevel=2,
                    )

    def _take(self) -> _Snapshot:
        """Copy what changed since it was last sent; what is only ever replaced is linked."""
        stamps: dict[str, _Stamp] = {}
        for path in sorted(self._folder.rglob("*")):
            below = path.relative_to(self._folder)
            if path.is_symlink() or any(part.startswith(".") for part in below.parts):
                continue
            # What trackers write beside us may be gone by now.
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if path.is_file():
                    stamps[below.as_posix()] = (found.st_mtime_ns, found.st_size, found.st_ino)
        changed = [name for name, stamp in stamps.items() if self._sent.get(name) != stamp]
        shot = self._sending / secrets.token_hex(8)
        try:
            for name in list(changed):
                target = shot / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    if name.startswith("checkpoints/"):
                        copy_file(self._folder / name, target)
                    else:
                        shutil.copyfile(self._folder / name, target)
                except FileNotFoundError:
                    changed.remove(name)
                    del stamps[name]
        except OSError as error:
            raise OutputError(
                f"Cannot save into {self._where}: {error.strerror or error} ({shot}). What is on "
                "its way is copied there first. Free some room and run the same command again."
            ) from error
        return _Snapshot(folder=shot, stamps=stamps, changed=tuple(changed))

    def _send(self, shot: _Snapshot) -> None:
        """Bring a save into the bucket; until ``save.json`` names it, the one before it holds."""
        try:
            before = {} if self._save is None else dict(self._save.files)
            stage = f"{STAGE}/{secrets.token_hex(4)}"
            files: dict[str, SavedFile] = {}
            for name in shot.stamps:
                if is_derived(name):
                    continue
                if name not in shot.changed:
                    files[name] = before[name]
                    continue
                file = _describe(shot.folder / name, at=f"{stage}/{name}")
                known = before.get(name)
                same = known is not None and known.sha256 == file.sha256
                files[name] = known if known is not None and same else file
            new = [name for name, file in files.items() if file.at == f"{stage}/{name}"]
            derived = [(name, name) for name in shot.changed if is_derived(name)]
            upload_all(shot.folder, self._where, [(name, files[name].at) for name in new])
            if new or set(before) - set(files) or self._save is None:
                self._save = replace_save(self._where, files, self._save)
            self._give_names(files)
            upload_all(shot.folder, self._where, derived)
            self._clean(files, shot)
            self._sent = dict(shot.stamps)
            if self._save is not None:
                with writing(self._note):
                    self._note.write_text(self._save.version)
        finally:
            shutil.rmtree(shot.folder, ignore_errors=True)

    def _give_names(self, files: dict[str, SavedFile]) -> None:
        """Copy the objects of a save to the names of their files, and say so."""
        staged = [name for name, file in files.items() if file.at != name]
        if not staged:
            return

        def copy(name: str) -> None:
            copy_file(self._where / files[name].at, self._where / name)

        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(copy, staged))
        named = {name: replace(file, at=name) for name, file in files.items()}
        self._save = replace_save(self._where, named, self._save)

    def _clean(self, files: dict[str, SavedFile], shot: _Snapshot) -> None:
        """Remove the objects of files that are gone, of saves cut short, of an earlier run."""
        gone = [
            name
            for name in list_files(self._where)
            if name.startswith(f"{STAGE}/")
            or (name.split("/")[0] in MADE and not is_derived(name) and name not in files)
            or (self._fresh and is_derived(name) and name not in shot.stamps)
        ]
        if gone:
            remove_files(self._where, gone)
        self._fresh = False


def _describe(path: Path, *, at: str) -> SavedFile:
    with path.open("rb") as file:
        return SavedFile(
            bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest(), at=at
        )
