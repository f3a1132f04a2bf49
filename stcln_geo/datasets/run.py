"""Carry an import out, shard by shard, so that it can be stopped and run again."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import __version__
from ..cube.contract import FILL, SCALE
from ..cube.lock import cube_lock
from ..cube.replace import recover_swaps, stored_fingerprint
from ..cube.stack import SPLITS_FILE, Stack, open_building_stack
from ..cube.stack_radar import RadarAxis
from ..cube.stack_store import create_stack, finish_stack, write_sites, write_stack_attributes
from ..cube.store import list_seasons, write_json
from ..cube.stored import manifest_folder, manifest_paths, read_manifest, read_manifests
from ..errors import CubeError, OutputError
from ..execution import Execution, ProgressHook, run_tasks
from ..legend import UNLABELLED, Legend
from ..progress import duration_text
from ..storage import Location, location, write_file, writing
from .mtlcc_tiles import read_mtlcc_record, read_mtlcc_tif
from .pastis import read_pastis_site
from .plan import Form, ImportPlan, SeasonImport, SitePixels, SiteSource, size_text

__all__ = [
    "IMPORT_FILE",
    "PARCELS_FILE",
    "SPLITS_FILE",
    "ImportReport",
    "check_target",
    "import_dataset",
]

IMPORT_FILE = "import.json"
"""Beside the seasons: what was imported, from where, and what was left out."""

PARCELS_FILE = "parcels.parquet"
"""Beside the seasons: number, site and number in the source of each parcel."""

_READERS: Mapping[Form, Callable[[SiteSource, Legend], SitePixels]] = {
    "pastis": read_pastis_site,
    "mtlcc-tif": read_mtlcc_tif,
    "mtlcc-tfrecord": read_mtlcc_record,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What a run did."""

    path: Location
    sites: int
    """Site-seasons that are there now."""
    written: int
    """Of these, written in this run."""
    bytes_read: int
    """Pixels of this run, before compression."""
    seconds: float

    def __str__(self) -> str:
        if not self.written:
            return f"{self.path} is complete ({self.sites} sites): nothing to do."
        return (
            f"{self.path}: {self.sites} sites, {self.written} written now "
            f"({size_text(self.bytes_read)} before compression); {duration_text(self.seconds)}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardTask:
    """A shard of a stack to write; its sites tell where their pixels lie."""

    path: str
    season: str
    fingerprint: str
    form: Form
    first: int
    sites: tuple[SiteSource, ...]

    def __str__(self) -> str:
        return f"season {self.season}, site {self.sites[0].id} and {len(self.sites) - 1} more"


def import_dataset(
    plan: ImportPlan,
    path: str | Location,
    *,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Write the stacks of a plan, or what is missing of them.

    Parameters
    ----------
    path
        Folder or address of the stack; it may hold other imports of the same set.
    overwrite
        True replaces whole seasons that were imported from other files.

    Raises
    ------
    OutputError
        If the folder holds something else, or cannot be written.
    CubeError
        If a season is there from other files, or another process is writing.
    TaskError
        If sites could not be read; the other shards are done.
    """
    started = time.monotonic()
    path = location(path)
    check_target(plan.dataset, path)
    with cube_lock(path):
        recover_swaps(path)
        missing = [season for season in plan.seasons if not _is_done(path, season, overwrite)]
        total = sum(-(-len(season.sites) // season.layout.sites) for season in missing)
        # Splits and findings are told anew even where all pixels are there.
        _record(plan, path)
        written = size = before = 0
        for season in missing:

            def advance(finished: int, _: int, what: str, before: int = before) -> None:
                if progress is not None:
                    progress(before + finished, total, what)

            stack = _open_or_create(path, season)
            tasks = [
                _ShardTask(
                    path=str(path), season=season.name, fingerprint=season.fingerprint,
                    form=season.form, first=shard.start,
                    sites=season.sites[shard.start : shard.stop],
                )
                for shard in stack.shards
            ]  # fmt: skip
            done = run_tasks(
                _write_shard, tasks, execution=execution or Execution(), label="shard",
                progress=advance,
            )  # fmt: skip
            written += sum(done)
            size += season.raw_bytes * sum(done) // len(season.sites)
            _finish(path, season, stack)
            before += len(tasks)
    return ImportReport(
        path=path,
        sites=sum(len(season.sites) for season in plan.seasons),
        written=written,
        bytes_read=size,
        seconds=time.monotonic() - started,
    )


def check_target(dataset: str, path: str | Location) -> None:
    """Raise OutputError unless a path is free, or holds imports of the same set."""
    path = location(path)
    if path.exists() and not path.is_dir():
        raise OutputError(
            f"Cannot import into {path}: it is a file, but a stack is a folder. Choose another "
            "path."
        )
    stored = read_manifest(path / IMPORT_FILE)
    if stored and stored.get("dataset") == dataset:
        return
    # A run that was stopped at once may have left the first of its files unfinished.
    if path.is_dir() and any(IMPORT_FILE not in child.name for child in path.iterdir()):
        what = f"an import of {stored['dataset']}" if stored else "other files"
        raise OutputError(
            f"Cannot import {dataset} into {path}: the folder holds {what}, and a stack needs "
            "a folder of its own. Choose a new path."
        )


def _is_done(path: Location, season: SeasonImport, overwrite: bool) -> bool:
    if not (path / "zarr.json").is_file() or season.name not in list_seasons(path):
        return False
    if stored_fingerprint(path, season.name) == season.fingerprint:
        return True
    if overwrite:
        return False
    raise CubeError(
        f"Cannot import season {season.name} into {path}: it is there already, from files that "
        "differ from those of the source now (in number, dates, size or time of change). Choose "
        "another path, or replace it with --overwrite."
    )


def _record(plan: ImportPlan, path: Location) -> None:
    """Write what is imported, and the splits; seasons of earlier imports stay in them."""
    before = read_manifest(path / IMPORT_FILE).get("seasons", {})
    seasons = {
        season.name: {
            "fingerprint": season.fingerprint,
            "source": plan.source,
            "form": season.form,
            "sites": len(season.sites),
            "frames": season.frames,
            "left_out": [
                {"kind": one.kind, "text": one.text, "count": len(one.items), "items": one.items}
                for one in season.findings
            ],
            "notes": plan.notes,
        }
        for season in plan.seasons
    }
    content = {
        "stcln_geo": __version__,
        "dataset": plan.dataset,
        "seasons": {**before, **seasons},
    }
    with writing(path):
        write_json(path / IMPORT_FILE, content)
        if any(season.splits for season in plan.seasons):
            splits = read_manifest(path / SPLITS_FILE)
            splits |= {season.name: dict(season.splits) for season in plan.seasons}
            write_json(path / SPLITS_FILE, splits)


def _open_or_create(path: Location, season: SeasonImport) -> Stack:
    opened = open_building_stack(path, season.name)
    if opened is not None and opened.attrs.get("fingerprint") == season.fingerprint:
        return opened
    with writing(path):
        # Shards of other arrays are no longer there.
        for file in manifest_paths(path, season.name):
            file.unlink()
    sites = season.sites
    dates = np.full((len(sites), season.dates), "NaT", dtype="datetime64[s]")
    for number, site in enumerate(sites):
        dates[number, : len(site.time)] = np.array(site.time, dtype="datetime64[s]")
    columns: dict[str, np.ndarray] = {
        "georeference": np.array([site.georeference for site in sites]),
        "offset_m": np.array([site.offset_m for site in sites], dtype=np.float32),
    }
    if any(site.tile for site in sites):
        columns["tile"] = np.array([site.tile for site in sites])
    return create_stack(
        path,
        season.name,
        site_id=[site.id for site in sites],
        crs=[site.crs for site in sites],
        transform=np.array([site.transform for site in sites]),
        shape_yx=season.shape_yx,
        time=dates,
        bands=season.bands,
        layout=season.layout,
        fold=np.array([site.fold for site in sites]) if any(site.fold for site in sites) else None,
        legend=season.legend,
        with_parcels=season.with_parcels,
        radar=_radar_axis(season),
        attrs={**season.attrs, "fingerprint": season.fingerprint},
        site_attrs=columns,
    )


def _radar_axis(season: SeasonImport) -> RadarAxis | None:
    if not season.pols:
        return None
    shape = (len(season.sites), max(len(site.radar) for site in season.sites))
    times = np.full(shape, "NaT", dtype="datetime64[s]")
    orbits = np.full(shape, "", dtype="<U10")
    for number, site in enumerate(season.sites):
        for place, (date, orbit, _) in enumerate(site.radar):
            times[number, place] = np.datetime64(date)
            orbits[number, place] = orbit
    return RadarAxis(time=times, orbit=orbits, pols=season.pols)


def _write_shard(task: _ShardTask) -> int:
    """Write a shard, unless it is there from exactly these files; return the sites written."""
    path = location(task.path)
    manifest = manifest_folder(path, task.season) / f"{task.first}.json"
    if read_manifest(manifest).get("fingerprint") == task.fingerprint:
        return 0
    stack = open_building_stack(path, task.season)
    if stack is None or stack.legend is None:
        raise CubeError(
            f"Cannot write a shard of {path}: it has no season {task.season} under construction. "
            "Run the import again."
        )
    _, dates, bands, height, width = stack.reflectance.shape
    count = len(task.sites)
    arrays: dict[str, np.ndarray] = {
        "reflectance": np.full((count, dates, bands, height, width), FILL, dtype=np.int16),
        "valid": np.zeros((count, dates, height, width), dtype=bool),
        "labels": np.full((count, height, width), UNLABELLED, dtype=np.uint8),
        "parcels": np.zeros((count, height, width), dtype=np.int32),
    }
    if stack.radar is not None:
        arrays["backscatter"] = np.full(
            (count, *stack.radar.backscatter.shape[1:]), np.nan, dtype=np.float32
        )
    told = []
    for position, site in enumerate(task.sites):
        pixels = _READERS[task.form](site, stack.legend)
        length = len(site.time)
        arrays["reflectance"][position, :length] = pixels.reflectance
        arrays["valid"][position, :length] = pixels.valid
        arrays["labels"][position] = pixels.labels
        if pixels.parcels is not None:
            arrays["parcels"][position] = pixels.parcels
        if pixels.backscatter is not None:
            arrays["backscatter"][position, : len(site.radar)] = pixels.backscatter
        told.append(_tell(site, pixels, len(stack.legend)))
    write_sites(stack, task.first, **arrays)
    write_json(manifest, {"fingerprint": task.fingerprint, "first": task.first, "sites": told})
    return count


def _tell(site: SiteSource, pixels: SitePixels, classes: int) -> dict[str, Any]:
    """Return what a manifest keeps of a site: sums to make statistics of, and its parcels."""
    usable = np.moveaxis(pixels.reflectance, 1, 0)[:, pixels.valid].astype(np.int64)
    return {
        "id": site.id,
        "fold": site.fold,
        "dates": len(site.time),
        "clear_fraction": float(pixels.valid.mean()),
        "pixels": int(usable.shape[1]),
        "sum": [int(value) for value in usable.sum(axis=1)],
        "squares": [int(value) for value in (usable**2).sum(axis=1)],
        "labels": [int(value) for value in np.bincount(pixels.labels.ravel(), minlength=256)]
        [:classes],
        "first_parcel": site.first_parcel,
        "parcels": list(pixels.parcel_ids),
    }  # fmt: skip


def _finish(path: Location, season: SeasonImport, stack: Stack) -> None:
    told = [
        site
        for manifest in sorted(read_manifests(path, season.name), key=lambda one: one["first"])
        for site in manifest["sites"]
    ]
    folds = sorted({site["fold"] for site in told if site["fold"]})
    write_stack_attributes(
        stack,
        {
            "statistics": {
                "unit": "reflectance of valid pixels",
                "all": _statistics(told),
                "folds": {
                    str(fold): _statistics([site for site in told if site["fold"] == fold])
                    for fold in folds
                },
            },
            "label_pixels": np.sum([site["labels"] for site in told], axis=0).tolist(),
        },
    )
    if season.with_parcels:
        _write_parcels(path, told)
    finish_stack(path, season.name)


def _statistics(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation per band over the valid pixels of all dates of sites."""
    pixels = sum(site["pixels"] for site in told)
    if not pixels:
        return {"pixels": 0, "mean": None, "std": None}
    # Sums of whole numbers, exact in Python, so that no order of sites matters.
    sums = [sum(column) for column in zip(*(site["sum"] for site in told), strict=True)]
    squares = [sum(column) for column in zip(*(site["squares"] for site in told), strict=True)]
    variance = [
        max(pixels * square - total * total, 0) / pixels**2
        for total, square in zip(sums, squares, strict=True)
    ]
    return {
        "pixels": pixels,
        "mean": [total / pixels * SCALE for total in sums],
        "std": [value**0.5 * SCALE for value in variance],
    }


def _write_parcels(path: Location, told: list[dict[str, Any]]) -> None:
    import pandas

    rows = [
        (site["first_parcel"] + rank, site["id"], source)
        for site in told
        for rank, source in enumerate(site["parcels"])
    ]
    table = pandas.DataFrame(rows, columns=["number", "site_id", "source_id"])
    content = io.BytesIO()
    table.to_parquet(content, index=False)
    write_file(path / PARCELS_FILE, content.getvalue())
