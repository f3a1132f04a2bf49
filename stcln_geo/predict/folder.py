"""The folder of a product: whose it is, what of it is ours to remove, what a finished one tells."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cube.store import write_json, writing
from ..errors import OutputError
from ..lock import LockHolder, hold_lock
from ..report.beside import remove_accuracy
from ..storage import Location
from .assemble import EMBEDDING_STORE
from .outputs import OPTIONAL, layers_for
from .source import SEARCH_FOLDER, remove_search
from .windows import PLAN_FILE

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = [
    "COMPANIONS",
    "RUN_FILE",
    "Prediction",
    "claim_folder",
    "folder_lock",
    "prediction_of",
    "read_json",
    "remove_leftovers",
    "remove_rasters",
]

RUN_FILE = "run.json"
COMPANIONS = (
    "classes.tif.aux.xml", "classes.qml", "qa.tif.aux.xml", "qa.qml", "quicklook.png",
    "confidence.png", "qa.png", "legend.json", "legend.csv", "item.json", "report.html",
)  # fmt: skip
_CUBE_FILE = "zarr.json"
_SHARD_FILES = ("*.tif", "*.npy", "*.json")
_TOLD = {
    "fingerprint": "fingerprint, of the cube's season or of the images that a search found",
    "aoi": "the region",
}
"""What parts of a plan are called for people, where their names say too little."""
_OWN = (*(f"{layer.name}.tif" for layer in layers_for(OPTIONAL)), *COMPANIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A finished product."""

    out: Location
    """Its folder, or its prefix in a bucket."""
    classes: Location
    """COG of class codes, uint8, 255 = nodata."""
    confidence: Location
    """COG of the winning class's probability in percent, uint8, 255 = nodata."""
    item: Location
    """STAC item."""
    histogram: dict[int, int]
    """Pixels by class code; 255 counts those without a label."""
    pixels: int
    """Pixels with a label."""
    windows: int
    """Windows the network ran on."""
    seconds: float
    """Of the shards and the assembly, when they were made."""
    resumed_shards: int
    """Shards that an earlier call had finished."""
    quality: dict[str, int]
    """Pixels by the reason for which they have a class or none; see ``qa``."""
    seam_audit: dict[str, Any] | None
    """Share of labels that change with the lattice; None where nothing was compared."""


def folder_lock(out: Path) -> AbstractContextManager[None]:
    """Hold the lock of a product's folder, ``plan.json.lock`` in it.

    It lies inside, since the folder is what must be writable, and not the one that holds it.

    Raises
    ------
    OutputError
        If another process, or another thread of this one, is making a map there.
    """

    def refusal(holder: LockHolder, lock: Location) -> OutputError:
        return OutputError(
            f"Cannot predict into {out}: process {holder.pid} on {holder.host} has been making the "
            f"map there since {holder.time}. A map has one command at a time. Wait until it has "
            f"ended, stop it, or choose another --out; if it runs no longer, remove {lock}."
        )

    return hold_lock(out / PLAN_FILE, refusal=refusal)


def claim_folder(plan: PredictionPlan, out: Path, *, overwrite: bool) -> None:
    """Make the folder this run's: empty, or left by an earlier call of it; its lock is held."""
    if (out / "classes.vrt").exists():
        raise OutputError(
            f"Cannot predict one cube into {out}: the folder holds the map of several zones, whose "
            "mosaic would stay beside it. Choose another --out."
        )
    path = out / PLAN_FILE
    before = read_json(path)
    same = before is not None and before.get("run") == plan.run_hash
    foreign = before is None and any(one.exists() for one in (path, out / "classes.tif"))
    if not same and not overwrite and (before is not None or foreign):
        changed = "its plan cannot be read"
        if before is not None:
            old, new = before.get("identity", {}), plan.to_json()["identity"]
            names = [_TOLD.get(name, name) for name in new if old.get(name) != new[name]]
            changed = f"different: {', '.join(names)}"
        raise OutputError(
            f"Cannot predict into {out}: the folder holds another run ({changed}), and a run is "
            "never mixed with another. Choose another --out, or pass --overwrite to replace it."
        )
    others = [name for name in (RUN_FILE, *_OWN, _CUBE_FILE) if (out / name).exists()]
    if before is None and others and not overwrite:
        raise OutputError(
            f"Cannot predict into {out}: it holds other files, which a map would write over or be "
            f"mixed with ({', '.join(others[:5])}), and a map needs a folder of its own. Choose "
            "another --out, or pass --overwrite to write over them."
        )
    if overwrite and not same:
        _remove_run(out)
    remove_leftovers(out)
    if plan.source is not None:
        plan.source.store()
    write_json(path, plan.to_json())


def read_json(path: Location) -> dict[str, Any] | None:
    """Return a JSON object; None where there is none that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def remove_rasters(out: Path) -> None:
    """Remove the shards' rasters; their manifests stay as the record of the run."""
    with writing(out):
        for pattern in _SHARD_FILES[:-1]:
            for path in (out / "shards").glob(pattern):
                path.unlink(missing_ok=True)


def _remove_run(out: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    with writing(out):
        for name in (RUN_FILE, PLAN_FILE, *_OWN):
            (out / name).unlink(missing_ok=True)
        if (out / EMBEDDING_STORE).is_dir():
            shutil.rmtree(out / EMBEDDING_STORE)
        remove_search(out / SEARCH_FOLDER)
        for pattern in _SHARD_FILES:
            for path in (out / "shards").glob(pattern):
                path.unlink()
        remove_accuracy(out)


def remove_leftovers(out: Path) -> None:
    """Remove temporary files of a call that was killed."""
    with writing(out):
        for folder in (out, out / "shards"):
            for name in (PLAN_FILE, RUN_FILE, *_OWN, EMBEDDING_STORE, *_SHARD_FILES):
                for path in folder.glob(f".{name}.*"):
                    # A worker that is still at it may be faster.
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)


def prediction_of(out: Location, run: Mapping[str, Any], *, resumed: int) -> Prediction:
    """Return the product that ``run.json`` tells of."""
    return Prediction(
        out=out,
        classes=out / "classes.tif",
        confidence=out / "confidence.tif",
        item=out / "item.json",
        histogram={int(value): int(count) for value, count in run["histogram"].items()},
        pixels=int(run["owned_pixels"]),
        windows=int(run["windows"]),
        seconds=float(run["seconds"]["label"] + run["seconds"]["assemble"]),
        resumed_shards=resumed,
        quality=dict(run["quality"]),
        seam_audit=run["seam_audit"],
    )
