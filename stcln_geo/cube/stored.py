"""What a build keeps beside the seasons: its plan, and a manifest per finished shard."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from typing import Any

from ..errors import CubeError
from ..grid import Window
from ..storage import Location, location, read_files
from .planned import CubePlan, SeasonPlan
from .store import write_json

__all__ = [
    "load_plan",
    "manifest_folder",
    "manifest_path",
    "manifest_paths",
    "parse_manifest",
    "read_manifest",
    "read_manifests",
    "read_plan_file",
    "season_fingerprint",
    "shard_fingerprint",
    "store_plan",
]

PLAN_FILE = "build.json"
ITEMS_FILE = "items.parquet"
LEDGER_FILE = "ledger.jsonl"
MANIFESTS = "manifests"

_FORM = 1
"""Number of the way cubes are computed; a change makes shards of older builds stale."""


def store_plan(plan: CubePlan, path: Location) -> None:
    """Write the plan; what was asked for is kept from the plan or from the earlier run."""
    request = plan.request
    if not request and (path / PLAN_FILE).is_file():
        request = read_plan_file(path).get("request", {})
    write_json(
        path / PLAN_FILE,
        {"fingerprint": plan.fingerprint, "request": request, "plan": plan.to_json()},
    )


def read_plan_file(path: Location) -> dict[str, Any]:
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
    content = read_plan_file(location(cube))
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
    for name in (
        "on_error", "max_failed_fraction", "bands", "crs", "season_start", "layout", "lattice",
        "offset",
    ):  # fmt: skip
        del spec[name]
    content = {
        "form": _FORM,
        "spec": spec,
        "crs": plan.crs,
        "bands": plan.bands,
        "area": asdict(area),
        "dates": [
            [str(date.time), [scene.identity for scene in date.scenes if scene.meets(area)]]
            for date in season.dates
        ],
    }
    return _sha256(content)


def season_fingerprint(plan: CubePlan, season: SeasonPlan) -> str:
    """Return the SHA-256 of all that decides a season's content, its dates' and layout's too."""
    whole = Window(0, 0, *plan.window.shape_yx)
    return _sha256([shard_fingerprint(plan, season, whole), season.name, season.layout.to_json()])


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_folder(path: Location, season: str, *, replacing: bool = False) -> Location:
    """Return the folder of a season's manifests.

    Parameters
    ----------
    replacing
        True for a season under construction that will replace a whole one of its name.
    """
    return path / MANIFESTS / (f"{season}.building" if replacing else season)


def manifest_path(
    path: Location, season: str, shard: Window, *, replacing: bool = False
) -> Location:
    """Return where a shard's manifest lies."""
    return manifest_folder(path, season, replacing=replacing) / f"{shard.row}_{shard.col}.json"


def manifest_paths(path: Location, season: str, *, replacing: bool = False) -> list[Location]:
    """Return the manifests of a season's finished shards."""
    return sorted(manifest_folder(path, season, replacing=replacing).glob("*.json"))


def read_manifest(manifest: Location) -> dict[str, Any]:
    """Return a shard's manifest; empty where there is none that is whole."""
    try:
        return parse_manifest(manifest.read_bytes())
    except OSError:
        return {}


def parse_manifest(text: bytes) -> dict[str, Any]:
    """Return the content of a shard's manifest; empty where it is damaged."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def read_manifests(path: Location, season: str, *, replacing: bool = False) -> list[dict[str, Any]]:
    """Return the manifests of a season's finished shards, in the order of `manifest_paths`."""
    files = manifest_paths(path, season, replacing=replacing)
    return [json.loads(content) for content in read_files(files)]
