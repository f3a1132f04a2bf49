"""Where cubes and runs lie: a folder of this machine, or a prefix of an S3-compatible bucket.

A location is a `pathlib.Path` or an `S3Path`, which answers the part of `Path` that cubes need.
What differs between the two (whole-object writes, removal of trees, copies, creation of what must
not exist yet) are the functions of this module. A local location keeps the plain fast path of the
file system; a bucket is reached as `bucket` says.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bucket import object_store, refusal
from .errors import InputError, OutputError
from .web import redact

__all__ = [
    "Location",
    "S3Path",
    "clear_errors",
    "copy_file",
    "copy_tree",
    "create_file",
    "download_file",
    "list_files",
    "list_sizes",
    "location",
    "make_folder",
    "part_path",
    "public_name",
    "read_files",
    "read_version",
    "remove_files",
    "remove_tree",
    "replace_version",
    "tree_bytes",
    "upload_file",
    "version_of",
    "write_file",
    "writing",
]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_TRANSFERS = 16
"""Requests under way at a time where many objects are copied."""


@dataclass(frozen=True, slots=True, order=True)
class S3Path:
    """An object or prefix of a bucket; answers what cubes ask of a `pathlib.Path`.

    Methods that reach the server raise `StorageError` where it refuses or cannot be reached, and
    `FileNotFoundError` where there is no such object.
    """

    bucket: str
    key: str
    """Without slashes at either end; empty for the bucket itself."""

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> S3Path:
        """Return the object or prefix of that name below this one."""
        return S3Path(self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> S3Path:
        """The prefix that holds this one."""
        return S3Path(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> S3Path:
        """Return the neighbour of that name."""
        return self.parent / name

    def resolve(self) -> S3Path:
        """Return the location itself: it is absolute."""
        return self

    def is_file(self) -> bool:
        """Return True where there is an object of this key."""
        with clear_errors(self):
            try:
                object_store(self.bucket).head(self.key)
            except FileNotFoundError:
                # The answer is the same where the bucket is missing; asking for a list tells.
                self.is_dir()
                return False
        return True

    def is_dir(self) -> bool:
        """Return True where there are objects below this prefix."""
        with clear_errors(self):
            for batch in object_store(self.bucket).list(self.key or None, chunk_size=1):
                return bool(batch)
        return False

    def exists(self) -> bool:
        """Return True where there is such an object or prefix."""
        return self.is_file() or self.is_dir()

    def read_bytes(self) -> bytes:
        """Return an object's content."""
        with clear_errors(self):
            return bytes(object_store(self.bucket).get(self.key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return an object's content as text."""
        return self.read_bytes().decode(encoding)

    def iterdir(self) -> Iterator[S3Path]:
        """Yield what lies directly below this prefix."""
        with clear_errors(self):
            found = object_store(self.bucket).list_with_delimiter(self.key or None)
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        yield from sorted(S3Path(self.bucket, path.strip("/")) for path in paths)

    def glob(self, pattern: str) -> Iterator[S3Path]:
        """Yield what lies directly below this prefix and has a fitting name."""
        yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete an object; one that is not there counts as deleted."""
        with clear_errors(self):
            object_store(self.bucket).delete(self.key)


Location = Path | S3Path
"""Where a file or folder lies."""


def location(path: str | Path | S3Path) -> Location:
    """Return where something lies, from a path (``~`` is home) or ``s3://bucket/prefix``.

    Raises
    ------
    InputError
        If it is an address of another kind, holds keys or a signature, or names no bucket or no
        prefix in it.
    """
    if isinstance(path, S3Path):
        return path
    # A Path has folded the two slashes into one.
    text = str(path)
    scheme = _SCHEME.match(text)
    if scheme is None or (os.name == "nt" and len(scheme[1]) == 1):
        try:
            # No shell stands before Python, nor before what follows "=" in an option.
            return Path(path).expanduser()
        except RuntimeError:
            return Path(path)
    given = f"{scheme[0]}/{text[scheme.end() :].lstrip('/')}"
    bucket, _, key = text[scheme.end() :].lstrip("/").partition("/")
    # A secret may have a slash in it.
    if redact(given) != given or {"@", ":"} & set(bucket):
        raise InputError(
            "Cannot use a location with a password, key or signature in it: locations are written "
            "into cubes, runs and logs. Write s3://bucket/prefix, and put the keys of a bucket "
            "into the environment (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        )
    parts = [part for part in key.split("/") if part]
    if scheme[1].lower() != "s3" or not bucket or not parts or {".", ".."} & set(parts):
        raise InputError(
            f"Cannot use the location {given!r}: it must be a local path or an address such as "
            "s3://bucket/prefix/cube.zarr. Correct the address; for Google or Azure, give the "
            "S3-compatible endpoint in AWS_ENDPOINT_URL."
        )
    return S3Path(bucket, "/".join(parts))


def public_name(place: str | Location) -> str:
    """Return what files made to be given away tell of a place: no folder of this machine.

    >>> public_name("/home/me/region.zarr"), public_name("/home/me/a/checkpoints/best.safetensors")
    ('region.zarr', 'a/checkpoints/best.safetensors')
    """
    parts = [part for part in str(place).split("/") if part]
    within = 3 if parts[-2:-1] == ["checkpoints"] else 1
    return "/".join(parts[-within:])


def part_path(target: Path) -> Path:
    """Return a hidden name beside a file, for the time while it is written.

    No other writer takes it: process numbers do not tell the containers of a cluster apart, nor
    two threads of a worker that make the same file.
    """
    return target.with_name(f".{target.name.lstrip('.')}.{uuid.uuid4().hex[:12]}.part")


def write_file(target: Location, content: bytes) -> None:
    """Write a whole file: readers see all of it or nothing."""
    with writing(target):
        if isinstance(target, S3Path):
            object_store(target.bucket).put(target.key, content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = part_path(target)
        try:
            temporary.write_bytes(content)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def create_file(target: S3Path, content: bytes) -> bool:
    """Write an object that must not exist yet; return False where it does."""
    return _put_if(target, content, "create")


def read_version(target: S3Path) -> tuple[bytes, str] | None:
    """Return an object's content and version (ETag), or None where there is none."""
    with clear_errors(target), contextlib.suppress(FileNotFoundError):
        answer = object_store(target.bucket).get(target.key)
        return bytes(answer.bytes()), str(answer.meta["e_tag"])
    return None


def version_of(target: Location) -> str:
    """Return what differs once a file has been written again."""
    if isinstance(target, Path):
        return str(target.stat().st_mtime_ns)
    found = read_version(target)
    return found[1] if found is not None else ""


def replace_version(target: S3Path, content: bytes, version: str) -> bool:
    """Write an object where it still is of a version; return False where it is not."""
    return _put_if(target, content, {"e_tag": version})


def _put_if(target: S3Path, content: bytes, mode: Any) -> bool:
    store = object_store(target.bucket)
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    with writing(target):
        try:
            # Conditions hold for whole writes only, not for those in parts.
            store.put(target.key, content, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError):
            return False
    return True


def make_folder(folder: Location) -> None:
    """Make a folder; an object store needs none."""
    if isinstance(folder, Path):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def list_files(folder: Location) -> list[str]:
    """Return all files below a folder, by path relative to it; none where it does not exist."""
    if isinstance(folder, Path):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(entry["path"][len(folder.key) + 1 :] for entry in _objects(folder))


def tree_bytes(folder: Location) -> int:
    """Return the bytes of all files below a folder; none where it does not exist."""
    if isinstance(folder, Path):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(int(entry["size"]) for entry in _objects(folder))


def list_sizes(folder: S3Path) -> dict[str, int]:
    """Return the bytes of all objects below a prefix, by path relative to it."""
    return {entry["path"][len(folder.key) + 1 :]: int(entry["size"]) for entry in _objects(folder)}


def _objects(folder: S3Path) -> list[Any]:
    with clear_errors(folder):
        return [e for batch in object_store(folder.bucket).list(folder.key) for e in batch]


def read_files(files: Sequence[Location]) -> list[bytes]:
    """Return the content of many files, in their order; several requests are under way at a time.

    Raises
    ------
    FileNotFoundError
        If one of them does not exist.
    """
    if not any(isinstance(file, S3Path) for file in files):
        return [file.read_bytes() for file in files]
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        return list(pool.map(lambda file: file.read_bytes(), files))


def remove_tree(folder: Location) -> None:
    """Remove a folder and all in it; one that does not exist counts as removed.

    In an object store, Zarr's metadata go first, from the top, so that nothing half removed opens
    as whole, and the files at the top last, so that what it was can be told until the end.
    """
    with writing(folder):
        if isinstance(folder, Path):
            shutil.rmtree(folder, ignore_errors=not folder.exists())
            return

        def order(name: str) -> int:
            if name.rpartition("/")[2] == "zarr.json":
                return name.count("/") - 1000
            return 1 if "/" not in name else 0

        names = list_files(folder)
        for rank in sorted({order(name) for name in names}):
            remove_files(folder, [name for name in names if order(name) == rank])


def remove_files(folder: S3Path, names: Iterable[str]) -> None:
    """Delete objects of a prefix, by path relative to it."""
    keys = [(folder / name).key for name in names]
    if keys:
        with writing(folder):
            object_store(folder.bucket).delete(keys)


def copy_file(source: Location, target: Location) -> None:
    """Copy a file within a storage: linked where that is possible, else by the server."""
    with writing(target):
        if isinstance(source, S3Path) and isinstance(target, S3Path):
            object_store(target.bucket).copy(source.key, target.key)
        elif isinstance(source, Path) and isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                shutil.copy2(source, target)
        else:
            raise ValueError(f"{source} and {target} are not of one storage")


def copy_tree(source: S3Path, target: S3Path, names: Iterable[str]) -> None:
    """Copy objects of a prefix to another, by path relative to it; the server does it."""
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        jobs = [pool.submit(copy_file, source / name, target / name) for name in names]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def upload_file(source: Path, target: S3Path, *, media_type: str) -> None:
    """Copy a local file of any size into a bucket, in parts where it is large."""
    with writing(target):
        object_store(target.bucket).put(target.key, source, attributes={"Content-Type": media_type})


def download_file(source: S3Path, target: Path) -> None:
    """Copy an object to a local file, under a temporary name at first."""
    write_file(target, source.read_bytes())


@contextlib.contextmanager
def writing(path: Location) -> Iterator[None]:
    """Turn refusals of the file system, or of the server, into one clear error."""
    try:
        with clear_errors(path):
            yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"Cannot write to {path}: {error.strerror or error}. The folder must be writable and "
            "have room. Choose another output path, or free some space."
        ) from error


@contextlib.contextmanager
def clear_errors(path: Location) -> Iterator[None]:
    """Turn what obstore raises into a sentence without the server's whole answer, or secrets."""
    if isinstance(path, Path):
        yield
        return
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" not in str(error):
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path)) from None
        raise refusal(str(path), path.bucket, error) from None
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        raise refusal(str(path), path.bucket, error) from None
