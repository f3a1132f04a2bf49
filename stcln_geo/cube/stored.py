"""What a build keeps beside the seasons: its plan, and a manifest per finished shard."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import CubeError
from ..grid import Window
from .planned import CubePlan, SeasonPlan
from .store import write_json

__all__ = [
    "load_plan",
    "manifest_path",
    "manifest_paths",
    "read_plan_file",
    "shard_fingerprint",
    "shard_is_done",
    "store_plan",
]

PLAN_FILE = "build.json"
ITEMS_FILE = "items.parquet"
LEDGER_FILE = "ledger.jsonl"
MANIFESTS = "manifests"

_FORM = 1
"""Number of the way cubes are computed; a change makes shards of older builds stale."""


def store_plan(plan: CubePlan, path: Path) -> None:
    """Write the plan; what was asked for is kept from the plan or from the earlier run."""
    request = plan.request
    if not request and (path / PLAN_FILE).is_file():
        request = read_plan_file(path).get("request", {})
    write_json(
        path / PLAN_FILE,
        {"fingerprint": plan.fingerprint, "request": request, "plan": plan.to_json()},
    )


def read_plan_file(path: Path) -> dict[str, Any]:
    """Return the content of a cube's plan file: fingerprint, request and plan."""
    try:
        content: dict[str, Any] = json.loads((path / PLAN_FILE).read_text(encoding="utf-8"))
        content["plan"]["seasons"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CubeError(
            f"Cannot read the plan of {path}: {PLAN_FILE} is damaged ({error}). It is written by "
            "'cube build'. Build again with --overwrite."
        ) from error
    return content


@functools.lru_cache(maxsize=4)
def load_plan(cube: str, fingerprint: str) -> CubePlan:
    """Read a plan once per process."""
    content = read_plan_file(Path(cube))
    if content["fingerprint"] != fingerprint:
        raise CubeError(
            f"Cannot go on building {cube}: another build has replaced its plan. "
            "Run one build per path at a time."
        )
    return CubePlan.from_json(content["plan"])


def shard_fingerprint(plan: CubePlan, season: SeasonPlan, shard: Window) -> str:
    """Return the SHA-256 of all that decides a shard's content."""
    area = shard.shift(plan.window.row, plan.window.col)
    spec = plan.spec.to_json()
    for name in ("on_error", "bands", "crs", "season_start", "layout", "lattice", "offset"):
        del spec[name]
    content = {
        "form": _FORM,
        "spec": spec,
        "crs": plan.crs,
        "bands": plan.bands,
        "area": asdict(area),
        "dates": [
            [str(date.time), [asdict(scene) for scene in date.scenes if scene.meets(area)]]
            for date in season.dates
        ],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_path(path: Path, season: str, shard: Window) -> Path:
    """Return where a shard's manifest lies."""
    return path / MANIFESTS / season / f"{shard.row}_{shard.col}.json"


def manifest_paths(path: Path, season: str) -> list[Path]:
    """Return the manifests of a season's finished shards."""
    return sorted((path / MANIFESTS / season).glob("*.json"))


def shard_is_done(path: Path, season: str, shard: Window, fingerprint: str) -> bool:
    """Return True where a shard was written from exactly these inputs."""
    manifest = manifest_path(path, season, shard)
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(content.get("fingerprint") == fingerprint)
