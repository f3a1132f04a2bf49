"""Where a product is made, and how it gets into a bucket.

A map is made in a folder that all workers share, as its files are filled and read piece by piece.
For an address in object storage that is a work folder, and what is finished is copied into the
bucket. ``delivery.json`` comes last and lists every file, so that a product there is whole or
unfinished, and the next call knows which.
"""

from __future__ import annotations

import json
import mimetypes
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cube.store import write_json
from ..errors import InputError, OutputError
from ..execution import ProgressHook
from ..saves import WORK_FOLDER
from ..storage import (
    Location,
    S3Path,
    download_file,
    list_sizes,
    location,
    remove_files,
    upload_file,
    writing,
)
from .files import file_checksum
from .source import SEARCH_FOLDER
from .windows import PLAN_FILE

__all__ = ["DELIVERY_FILE", "Destination", "destination"]

DELIVERY_FILE = "delivery.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a product is made, and the bucket that it goes to, if any."""

    folder: Path
    """Where it is made: the product's own folder, or the work folder of one for a bucket."""
    bucket: S3Path | None
    """Where it goes; None where it stays."""
    own: bool = False
    """True where the work folder is ours to remove."""

    @property
    def where(self) -> Location:
        """Where the finished product lies."""
        return self.folder if self.bucket is None else self.bucket

    def recall(self) -> None:
        """Bring back what a plan needs to know of a product in the bucket: its search."""
        if self.bucket is None or (self.folder / PLAN_FILE).exists():
            return
        told = self._delivery()
        for name in () if told is None else told["files"]:
            if name.startswith(f"{SEARCH_FOLDER}/"):
                download_file(self.bucket / name, self.folder / name)

    def holds(self, run: str, *, overwrite: bool = False) -> bool:
        """Return True where the bucket has the whole product of a run.

        Parameters
        ----------
        run
            Hash of its plan.
        overwrite
            The product of another run may be replaced.

        Raises
        ------
        OutputError
            If the product of another run is there.
        """
        told = self._delivery()
        if self.bucket is None or told is None:
            return False
        if told["run"] != run:
            if overwrite:
                return False
            raise OutputError(
                f"Cannot predict into {self.bucket}: it holds the map of another run, and a run is "
                "never mixed with another. Choose another --out, or pass --overwrite to replace it."
            )
        there = list_sizes(self.bucket)
        return all(there.get(name) == one["bytes"] for name, one in told["files"].items())

    def deliver(self, run: str, *, progress: ProgressHook | None = None) -> None:
        """Copy a finished product into the bucket; remove a work folder that is ours.

        Files of a product that was there before go, unless the new one has them too; other files
        stay as they are.

        Raises
        ------
        StorageError
            If the bucket cannot be written. The product stays in the work folder, and the next
            call copies it.
        """
        if self.bucket is None:
            return
        before = self._delivery()
        names = _product_files(self.folder)
        files = {
            name: {
                "bytes": (self.folder / name).stat().st_size,
                "sha256": file_checksum(self.folder / name),
            }
            for name in names
        }
        if before is not None:
            remove_files(self.bucket, [DELIVERY_FILE])
            remove_files(self.bucket, sorted(set(before["files"]) - set(names)))
        for done, name in enumerate(names):
            if progress is not None:
                progress(done, len(names), "file delivered")
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            upload_file(self.folder / name, self.bucket / name, media_type=kind)
        write_json(self.bucket / DELIVERY_FILE, {"run": run, "files": files})
        if progress is not None:
            progress(len(names), len(names), "file delivered")
        self._remove_work()

    def leave(self) -> None:
        """Remove what `recall` brought, where nothing is to be made."""
        if self.folder.is_dir() and not (self.folder / PLAN_FILE).exists():
            self._remove_work()

    def _remove_work(self) -> None:
        if not self.own:
            return
        with writing(self.folder):
            shutil.rmtree(self.folder)
            if not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()

    def _delivery(self) -> dict[str, Any] | None:
        """Return what the bucket says of the product in it; None where there is none."""
        if self.bucket is None:
            return None
        try:
            told = json.loads((self.bucket / DELIVERY_FILE).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            told = None
        if not (isinstance(told, Mapping) and {"run", "files"} <= set(told)):
            raise OutputError(
                f"Cannot predict into {self.bucket}: its {DELIVERY_FILE} is not one of ours, so "
                "what lies there is unknown. Choose another --out."
            )
        return dict(told)


def destination(out: str | Location, work: str | Path | None = None) -> Destination:
    """Return where a product is made and where it goes.

    Parameters
    ----------
    out
        A folder, or an address such as ``s3://bucket/prefix/map``.
    work
        For a bucket: the folder below which the product is made, kept afterwards. All workers
        must see it. By default ``stcln-geo-work`` below the current one, removed afterwards.

    Raises
    ------
    InputError
        If a work folder is given for a product that is made where it stays.
    """
    place = location(out)
    if isinstance(place, S3Path):
        # Named as the product, whose item and report take their names from it.
        folder = Path(work or WORK_FOLDER) / place.name
        return Destination(folder=folder, bucket=place, own=work is None)
    if work is not None:
        raise InputError(
            f"Cannot use the work folder {work} for {place}: a map in a folder is made there, and "
            "only one for a bucket is made elsewhere. Leave --work out."
        )
    return Destination(folder=place, bucket=None)


def _product_files(folder: Path) -> list[str]:
    """Return the files of a finished product, without those of its shards."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(
        name.as_posix()
        for name in names
        if "shards" not in name.parts[:-1] and not any(part.startswith(".") for part in name.parts)
    )
