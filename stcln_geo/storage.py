"""Where cubes lie: a folder of this machine, or a prefix of an S3-compatible bucket.

A location is a `pathlib.Path` or an `S3Path`, which answers the part of `Path` that cubes need.
What differs between the two (whole-object writes, removal of trees, copies, creation of what must
not exist yet) are the functions of this module. A local location keeps the plain fast path of the
file system; an object store is reached through obstore, the only client with Zarr support and
conditional writes in one small wheel.

Endpoint, region and credentials come from the environment (``AWS_ENDPOINT_URL``, ``AWS_REGION``,
``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``...) of each process; no location, and nothing that is
pickled, holds any of them.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, OutputError, StorageError

if TYPE_CHECKING:
    from obstore.store import S3Store

__all__ = [
    "Location",
    "S3Path",
    "clear_errors",
    "copy_file",
    "copy_tree",
    "create_file",
    "list_files",
    "location",
    "make_folder",
    "object_store",
    "read_version",
    "remove_files",
    "remove_tree",
    "replace_version",
    "write_file",
    "writing",
]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_TRANSFERS = 16
"""Requests under way at a time where many objects are copied."""

_RETRIES = 8
_RETRY_SECONDS = 60
_REQUEST_SECONDS = 300
"""One request, with the bytes it brings: a shard may be hundreds of megabytes."""


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
    """Return where something lies, from a path or an ``s3://bucket/prefix`` address.

    Raises
    ------
    InputError
        If it is an address of another kind, or names no bucket or no prefix in it.
    """
    if isinstance(path, S3Path):
        return path
    # A Path has folded the two slashes into one.
    text = str(path)
    scheme = _SCHEME.match(text)
    if scheme is None or (os.name == "nt" and len(scheme[1]) == 1):
        return Path(path)
    bucket, _, key = text[scheme.end() :].lstrip("/").partition("/")
    parts = [part for part in key.split("/") if part]
    if scheme[1].lower() != "s3" or not bucket or not parts or {".", ".."} & set(parts):
        raise InputError(
            f"Cannot use the location {text!r}: it must be a local path or an address such as "
            "s3://bucket/prefix/cube.zarr. Correct the address; for Google or Azure, give the "
            "S3-compatible endpoint in AWS_ENDPOINT_URL."
        )
    return S3Path(bucket, "/".join(parts))


def write_file(target: Location, content: bytes) -> None:
    """Write a whole file: readers see all of it or nothing."""
    with writing(target):
        if isinstance(target, S3Path):
            object_store(target.bucket).put(target.key, content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_bytes(content)
        temporary.replace(target)


def create_file(target: S3Path, content: bytes) -> bool:
    """Write an object that must not exist yet; return False where it does."""
    return _put_if(target, content, "create")


def read_version(target: S3Path) -> tuple[bytes, str] | None:
    """Return an object's content and version (ETag), or None where there is none."""
    with clear_errors(target), contextlib.suppress(FileNotFoundError):
        answer = object_store(target.bucket).get(target.key)
        return bytes(answer.bytes()), str(answer.meta["e_tag"])
    return None


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
    with clear_errors(folder):
        batches = list(object_store(folder.bucket).list(folder.key))
    return sorted(entry["path"][len(folder.key) + 1 :] for batch in batches for entry in batch)


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
        raise _refusal(path, error) from None
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        raise _refusal(path, error) from None


def _refusal(path: S3Path, error: Exception) -> StorageError:
    text = str(error)
    endpoint = _endpoint() or "AWS"
    # The rest of an answer may quote keys and signatures.
    code = next(iter(re.findall(r"<Code>(\w+)</Code>", text)), "")
    kind = type(error).__name__
    if code == "NoSuchBucket":
        return StorageError(
            f"Cannot use {path}: there is no bucket {path.bucket!r} at {endpoint}. A cube needs a "
            "bucket that exists. Create it, or correct the address or AWS_ENDPOINT_URL."
        )
    if "169.254." in text or ("metadata" in text.lower() and "credential" in text.lower()):
        return StorageError(
            f"Cannot use {path}: no credentials were found. A bucket wants AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Set them, or AWS_SKIP_SIGNATURE=true "
            "for a public bucket."
        )
    if kind in {"PermissionDeniedError", "UnauthenticatedError"}:
        return StorageError(
            f"Cannot use {path}: {endpoint} refuses access{f' ({code})' if code else ''}. The "
            "credentials must allow to list, read, write and delete there. Check AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID, and the bucket's policy."
        )
    if kind == "NotSupportedError" or code == "NotImplemented":
        return StorageError(
            f"Cannot write {path}: {endpoint} knows no conditional writes (If-None-Match, "
            "If-Match), which keep two builds apart. Use a server that does, such as AWS S3 or "
            "MinIO, or build on local disk."
        )
    status = re.search(r"status code: (\d{3} [A-Z][A-Za-z ]+)", text)
    if code or status:
        told = code or (status[1].strip() if status else "")
        return StorageError(
            f"Cannot use {path}: {endpoint} answered {told}. The request was not carried out. "
            "Check the address, AWS_REGION and AWS_ENDPOINT_URL, and run the same command again."
        )
    return StorageError(
        f"Cannot reach {endpoint} for {path}: {_reason(text)}. The server must answer within "
        f"{_RETRY_SECONDS} s. Check AWS_ENDPOINT_URL and the network, and run the same command "
        "again."
    )


def _reason(text: str) -> str:
    for mark in ("dns error", "timed out", "Connection refused", "certificate"):
        if mark.lower() in text.lower():
            return mark
    return "no answer"


def object_store(bucket: str, prefix: str | None = None) -> S3Store:
    """Return a client of a bucket, set up from the environment as it is now.

    Raises
    ------
    InputError
        If the extra for object storage is not installed.
    """
    if importlib.util.find_spec("obstore") is None:
        raise InputError(
            f"Cannot use s3://{bucket}: the package obstore is missing. Cubes in object storage "
            "need an extra. Install it with: pip install 'stcln-geo[s3]'."
        )
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _client(bucket, prefix, environment)


@functools.lru_cache(maxsize=32)
def _client(bucket: str, prefix: str | None, _: tuple[tuple[str, str], ...]) -> S3Store:
    from obstore.store import S3Store

    endpoint = _endpoint()
    provider = _profile_credentials()
    if provider is not None:
        # An error of the user's making would come back from obstore as a refusal.
        provider.found()
    options: dict[str, Any] = {"timeout": f"{_REQUEST_SECONDS}s"}
    if endpoint.startswith("http://"):
        options["allow_http"] = True
    return S3Store(
        bucket,
        prefix=prefix,
        client_options=options,  # type: ignore[arg-type]
        retry_config={
            "max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_SECONDS)
        },
        # Newer than AWS_ENDPOINT_URL, and unknown to obstore.
        **({"endpoint": endpoint} if os.environ.get("AWS_ENDPOINT_URL_S3") else {}),
        **({"credential_provider": provider} if provider is not None else {}),
        **({"region": region} if (region := _region(provider)) else {}),
    )  # fmt: skip


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


@dataclass(frozen=True, slots=True)
class _ProfileCredentials:
    """Asks boto3 for the credentials of a profile; what is pickled is its name alone."""

    profile: str | None

    def __call__(self) -> dict[str, Any]:
        found = self.found()
        frozen = found.get_frozen_credentials()
        expires = getattr(found, "_expiry_time", None)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires,
        }

    def found(self) -> Any:
        """Return the credentials as boto3 has them, not yet asked for where that takes a server."""
        credentials = self.session().get_credentials()
        if credentials is None:
            raise InputError(
                f"Cannot find credentials for the AWS profile {self.profile or 'default'!r}: "
                "~/.aws/credentials or ~/.aws/config must hold them. Check AWS_PROFILE."
            )
        return credentials

    def session(self) -> Any:
        """Return boto3's session of the profile."""
        import boto3
        from botocore.exceptions import ProfileNotFound

        try:
            return boto3.Session(profile_name=self.profile)
        except ProfileNotFound as error:
            raise InputError(
                f"Cannot use the AWS profile {self.profile!r}: ~/.aws/config and "
                "~/.aws/credentials do not hold it. Correct AWS_PROFILE."
            ) from error


def _profile_credentials() -> _ProfileCredentials | None:
    """Return a profile's credentials where one is named, or where there is only a file of them."""
    profile = os.environ.get("AWS_PROFILE")
    if "AWS_ACCESS_KEY_ID" in os.environ or os.environ.get("AWS_SKIP_SIGNATURE"):
        return None
    shared = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    return _ProfileCredentials(profile) if profile or Path(shared).expanduser().is_file() else None


def _region(provider: _ProfileCredentials | None) -> str | None:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and provider is not None:
        region = provider.session().region_name
    return region
