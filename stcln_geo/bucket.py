"""Reach a bucket of S3-compatible storage, and say clearly why it cannot be reached.

The client is obstore: it alone has conditional writes and a Zarr store in one small wheel.
Endpoint, region and credentials come from the environment (``AWS_ENDPOINT_URL``, ``AWS_REGION``,
``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``...) of each process, and nothing that is pickled holds a
secret.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError, StorageError
from .web import redact

if TYPE_CHECKING:
    from obstore.store import S3Store

__all__ = ["object_store", "refusal"]

_RETRIES = 8
_RETRY_SECONDS = 60
_REQUEST_SECONDS = 300
"""One request, with the bytes it brings: a shard may be hundreds of megabytes."""


def refusal(address: str, bucket: str, error: Exception) -> StorageError:
    """Return what a server's refusal means, without its whole answer, which may quote secrets."""
    text = str(error)
    endpoint = redact(_endpoint()) or "AWS"
    # The rest of an answer may quote keys and signatures.
    code = next(iter(re.findall(r"<Code>(\w+)</Code>", text)), "")
    kind = type(error).__name__
    if code == "NoSuchBucket":
        return StorageError(
            f"Cannot use {address}: there is no bucket {bucket!r} at {endpoint}. The bucket "
            "must exist. Create it, or correct the address or AWS_ENDPOINT_URL."
        )
    if "169.254." in text or ("metadata" in text.lower() and "credential" in text.lower()):
        return StorageError(
            f"Cannot use {address}: no credentials were found. A bucket wants AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Set them, or AWS_SKIP_SIGNATURE=true "
            "for a public bucket."
        )
    if kind in {"PermissionDeniedError", "UnauthenticatedError"}:
        return StorageError(
            f"Cannot use {address}: {endpoint} refuses access{f' ({code})' if code else ''}. The "
            "credentials must allow to list, read, write and delete there. Check AWS_PROFILE or "
            "AWS_ACCESS_KEY_ID, and the bucket's policy."
        )
    if kind == "NotSupportedError" or code == "NotImplemented":
        return StorageError(
            f"Cannot write {address}: {endpoint} knows no conditional writes (If-None-Match, "
            "If-Match), which keep two writers apart. Use a server that does, such as AWS S3 or "
            "MinIO, or write to local disk."
        )
    status = re.search(r"status code: (\d{3} [A-Z][A-Za-z ]+)", text)
    if code or status:
        told = code or (status[1].strip() if status else "")
        return StorageError(
            f"Cannot use {address}: {endpoint} answered {told}. The request was not carried out. "
            "Check the address, AWS_REGION and AWS_ENDPOINT_URL, and run the same command again."
        )
    return StorageError(
        f"Cannot reach {endpoint} for {address}: {_reason(text)}. The server must answer within "
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
            f"Cannot use s3://{bucket}: the package obstore is missing. Object storage needs "
            "an extra. Install it with: pip install 'stcln-geo[s3]'."
        )
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    return _client(bucket, prefix, environment)


@functools.lru_cache(maxsize=32)
def _client(bucket: str, prefix: str | None, _: tuple[tuple[str, str], ...]) -> S3Store:
    from obstore.store import S3Store

    options: dict[str, Any] = {
        "client_options": {"timeout": f"{_REQUEST_SECONDS}s"},
        "retry_config": {
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
        },
    }
    if _endpoint().startswith("http://"):
        options["client_options"]["allow_http"] = True
    if os.environ.get("AWS_ENDPOINT_URL_S3"):
        # Newer than AWS_ENDPOINT_URL, and unknown to obstore.
        options["endpoint"] = _endpoint()
    provider = _profile_credentials()
    if provider is not None:
        # An error of the user's making would come back from obstore as a refusal.
        provider.found()
        options["credential_provider"] = provider
    region = _region(provider)
    if region:
        options["region"] = region
    return S3Store(bucket, prefix=prefix, **options)


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
    """Return a profile's credentials where one is named, or where there is only a file of them.

    A profile that is named wins over keys in the environment: those may be of the provider that
    the images come from, as GDAL reads them.
    """
    profile = os.environ.get("AWS_PROFILE")
    if profile is None and {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"} & set(os.environ):
        return None
    shared = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    return _ProfileCredentials(profile) if profile or Path(shared).expanduser().is_file() else None


def _region(provider: _ProfileCredentials | None) -> str | None:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and provider is not None:
        region = provider.session().region_name
    return region
