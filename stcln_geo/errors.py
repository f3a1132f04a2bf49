"""The errors and warnings a user may meet.

Every message says what could not be done, the offending value, the rule it broke and the
remedy. The library raises; the command line prints the message and exits with code 2.
"""

from __future__ import annotations

__all__ = [
    "BrokenDeviceError",
    "CatalogError",
    "CheckpointError",
    "ChunkError",
    "CubeError",
    "InputError",
    "LabelError",
    "MissingFileError",
    "NothingFoundError",
    "OutputError",
    "SearchError",
    "StclnGeoError",
    "StclnGeoWarning",
    "StorageError",
    "TaskError",
    "UnfitWorkerError",
    "UnreadableError",
    "UnsafeAddressError",
    "stops_all",
]


class StclnGeoError(Exception):
    """Base of all errors that the user can act on."""

    of_one_task = False
    """True where other tasks of a run may succeed, so that it goes on without this one."""


def stops_all(error: BaseException) -> bool:
    """Return True for an error that every task would meet: a full disk, a wrong checkpoint."""
    return isinstance(error, StclnGeoError) and not error.of_one_task


class InputError(StclnGeoError, ValueError):
    """A value, or a combination of values, breaks a rule."""


class MissingFileError(StclnGeoError, FileNotFoundError):
    """A file or folder that was named does not exist."""

    def __str__(self) -> str:
        """Return the sentence itself, without the errno decoration of OSError."""
        return " ".join(str(part) for part in self.args)


class CubeError(InputError):
    """A cube, or the dataset meant to become one, breaks the cube contract."""


class ChunkError(CubeError):
    """The stored bytes of a chunk are damaged."""


class CatalogError(InputError):
    """A catalog (STAC provider description or static catalog) cannot be used."""


class UnsafeAddressError(InputError):
    """An item names an address that it has no business with."""


class SearchError(InputError):
    """A search found nothing usable."""


class NothingFoundError(SearchError):
    """A search was answered, with nothing usable."""


class LabelError(InputError):
    """Labels cannot be burnt, split or used."""


class CheckpointError(InputError):
    """A checkpoint cannot be read, or does not fit the data."""


class OutputError(StclnGeoError, OSError):
    """A result cannot be written."""

    def __str__(self) -> str:
        """Return the sentence itself, without the errno decoration of OSError."""
        return " ".join(str(part) for part in self.args)


class StorageError(StclnGeoError):
    """An object storage cannot be reached, or refuses."""


class UnreadableError(StclnGeoError, OSError):
    """A part of a file or cube cannot be read; the rest of it may be whole."""

    of_one_task = True

    def __str__(self) -> str:
        """Return the sentence itself, without the errno decoration of OSError."""
        return " ".join(str(part) for part in self.args)


class TaskError(StclnGeoError, RuntimeError):
    """Some tasks of a run failed; the others finished."""


class UnfitWorkerError(RuntimeError):
    """A Dask worker lacks what its tasks need; it is sent away, and others do them."""


class BrokenDeviceError(RuntimeError):
    """A device gives errors until the process that uses it ends."""


class StclnGeoWarning(UserWarning):
    """Something is usable but deserves attention."""
