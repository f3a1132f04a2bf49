"""What an export writes: one file per date and kind, and which of them are there already."""

from __future__ import annotations

import hashlib
import json
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from ..cube.repair import find_left_out
from ..cube.store import Season, open_season
from ..cube.time_range import parse_time_range
from ..errors import InputError, OutputError
from ..legend import UNLABELLED
from ..storage import Location, version_of

__all__ = [
    "COLLECTION_FILE",
    "RECORD_FILE",
    "ExportFile",
    "ExportPlan",
    "What",
    "plan_export",
    "read_record",
]

What = Literal["reflectance", "valid", "scl", "labels"]
"""The array that is written."""

RECORD_FILE = "export.json"
"""In the folder of an export: what its files are, so that a second run skips them."""

COLLECTION_FILE = "collection.json"
"""Beside it: the STAC collection of the files."""

_BYTES = {"reflectance": 2, "valid": 1, "scl": 1, "labels": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFile:
    """One GeoTIFF to write."""

    name: str
    what: What
    date: int | None
    """Position in the season; None for labels, which have no date."""
    identity: str
    """SHA-256 of what decides its content."""
    is_done: bool
    """True where an earlier run has written just this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """An export; ``str`` is for people."""

    season: Season
    out: Path
    bands: tuple[str, ...]
    clear_only: bool
    files: tuple[ExportFile, ...]
    provenance: Mapping[str, Sequence[str]]
    """What the cube tells of each date: platform, orbit, item ids, the composite's period."""
    stems: tuple[str, ...]
    """Per date of the season: its day, with the time of day where two dates share one."""

    @property
    def todo(self) -> tuple[ExportFile, ...]:
        """The files that are not there yet."""
        return tuple(file for file in self.files if not file.is_done)

    def raw_bytes(self, file: ExportFile) -> int:
        """Return a file's size before compression, without overviews."""
        height, width = self.season.shape_yx
        layers = len(self.bands) if file.what == "reflectance" else 1
        return height * width * layers * _BYTES[file.what]

    def __str__(self) -> str:
        height, width = self.season.shape_yx
        lines = [
            f"Season {self.season.name}: {width} x {height} px of {self.season.resolution:g} m"
        ]
        for what, count in Counter(file.what for file in self.files).items():
            some = next(file for file in self.files if file.what == what)
            bands = f" of {', '.join(self.bands)}" if what == "reflectance" else ""
            size = self.raw_bytes(some)
            lines.append(
                f"  {count} files {what}{bands}: {_megabytes(size)} each before compression, "
                f"{_megabytes(size * count)} in all"
            )
        done = len(self.files) - len(self.todo)
        lines.append(f"  {done} are there already; {len(self.todo)} to write into {self.out}")
        return "\n".join(lines)


def plan_export(
    cube: str | Location,
    out: str | Path,
    *,
    season: str | None = None,
    what: Sequence[What] = ("reflectance",),
    bands: Sequence[str] | None = None,
    dates: str | None = None,
    clear_only: bool = False,
    overwrite: bool = False,
) -> ExportPlan:
    """Plan an export; writes nothing. The parameters are those of `export_cube`."""
    opened = open_season(cube, season)
    out = Path(out)
    chosen_bands = _checked_bands(opened, bands)
    _check_kinds(opened, what)
    times = parse_time_range(dates)
    indices = [index for index, time in enumerate(opened.time) if times.holds(time)]
    if not indices and set(what) != {"labels"}:
        days = opened.time.astype("datetime64[D]")
        raise InputError(
            f"Cannot export the dates {dates}: season {opened.name} has none of them. It has "
            f"{len(days)} from {days[0]} to {days[-1]}. Choose --dates among these."
        )
    record = read_record(out)
    provenance = _provenance(opened)
    left_out = _left_out(opened)
    stems = _stems(opened.time)
    known: Mapping[str, Mapping[str, Any]] = record.get("files", {})
    files = []
    for kind in dict.fromkeys(what):
        for index in [None] if kind == "labels" else indices:
            identity = _identity(
                opened,
                kind,
                index,
                bands=chosen_bands if kind == "reflectance" else (),
                clear_only=clear_only and kind == "reflectance",
                provenance=provenance,
                left_out=left_out,
            )
            name = f"labels_{opened.name}.tif" if index is None else f"{stems[index]}_{kind}.tif"
            same = known.get(name, {}).get("identity") == identity
            files.append(
                ExportFile(
                    name=name,
                    what=kind,
                    date=index,
                    identity=identity,
                    is_done=same and not overwrite and (out / name).is_file(),
                )
            )
    plan = ExportPlan(
        season=opened,
        out=out,
        bands=chosen_bands,
        clear_only=clear_only,
        files=tuple(files),
        provenance=provenance,
        stems=stems,
    )
    if not overwrite:
        _check_folder(plan, record)
    return plan


def read_record(out: Path) -> dict[str, Any]:
    """Return what earlier runs wrote into a folder; empty where there is nothing."""
    if out.exists() and not out.is_dir():
        raise OutputError(
            f"Cannot export to {out}: it is a file, but an export is a folder. Choose another path."
        )
    try:
        content = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_folder(plan: ExportPlan, record: Mapping[str, Any]) -> None:
    """Refuse a folder with other files of the same names."""
    season = plan.season
    before = record.get("season"), record.get("cube")
    if record and before != (season.name, season.cube.name):
        raise OutputError(
            f"Cannot export to {plan.out}: it holds season {before[0]} of {before[1]}, and a "
            "folder is for one season of one cube. Choose another folder."
        )
    choices = record.get("choices", {})
    now: dict[str, Any] = {"bands": list(plan.bands), "clear_only": plan.clear_only}
    kinds = {file.what for file in plan.files}
    if "reflectance" in kinds and choices and choices != now:
        raise OutputError(
            f"Cannot export to {plan.out}: its reflectance has the bands "
            f"{', '.join(choices['bands'])}{' of clear pixels only' * choices['clear_only']}, and "
            f"now {', '.join(now['bands'])}{' of clear pixels only' * plan.clear_only} is asked "
            "for. Choose another folder, or replace them with --overwrite."
        )
    known = {*record.get("files", {}), *record.get("begun", ())}
    foreign = [file.name for file in plan.files
               if file.name not in known and (plan.out / file.name).exists()]  # fmt: skip
    if not record and (plan.out / COLLECTION_FILE).exists():
        foreign.append(COLLECTION_FILE)
    if foreign:
        raise OutputError(
            f"Cannot export to {plan.out}: {foreign[0]} is there and {RECORD_FILE} does not list "
            "it, so it may be yours. Choose another folder, or replace it with --overwrite."
        )


def _checked_bands(season: Season, bands: Sequence[str] | None) -> tuple[str, ...]:
    if bands is None:
        return season.bands
    unknown = [band for band in bands if band not in season.bands]
    if unknown or not bands or len(set(bands)) != len(bands):
        raise InputError(
            f"Cannot export the bands {', '.join(bands) or '(none)'}: each must be a band of the "
            f"cube, once. It has: {', '.join(season.bands)}. Choose --bands among these."
        )
    return tuple(bands)


def _check_kinds(season: Season, what: Sequence[str]) -> None:
    known = typing.get_args(What)
    unknown = [kind for kind in what if kind not in known]
    if unknown or not what:
        raise InputError(
            f"Cannot export {', '.join(unknown) or 'nothing'}: it must be {', '.join(known)}, or "
            "several by commas. Correct --what."
        )
    lacking = [kind for kind in what if getattr(season, kind) is None]
    if lacking:
        raise InputError(
            f"Cannot export {', '.join(lacking)}: season {season.name} of {season.cube} has none. "
            "Scene classes are kept unless the dates are composites; labels come from "
            "'stcln-geo labels burn'. Leave it out of --what."
        )


def _stems(time: np.ndarray) -> tuple[str, ...]:
    days = [str(day) for day in time.astype("datetime64[D]")]
    if len(set(days)) == len(days):
        return tuple(days)
    return tuple(str(second).replace(":", "") for second in time.astype("datetime64[s]"))


def _provenance(season: Season) -> dict[str, tuple[str, ...]]:
    """Return the coordinates on time that tell where each date is from."""
    group: Any = zarr.open_group(season.cube / season.folder, mode="r", use_consolidated=False)
    names = str(season.attrs.get("coordinates", "")).split()
    return {
        name: tuple(str(value) for value in group[name][:])
        for name in names
        if name not in {"spatial_ref", "days"} and group[name].ndim == 1
    }


def _left_out(season: Season) -> dict[str, int]:
    """Return in how many shards each item lacks: a repair changes pixels, but no date."""
    return {
        entry.item: entry.shards
        for entry in find_left_out(season.cube)
        if entry.season == season.name
    }


def _identity(
    season: Season,
    what: What,
    date: int | None,
    *,
    bands: tuple[str, ...],
    clear_only: bool,
    provenance: Mapping[str, Sequence[str]],
    left_out: Mapping[str, int],
) -> str:
    told = {} if date is None else {name: column[date] for name, column in provenance.items()}
    items = told.get("item_ids", "").split()
    content: dict[str, Any] = {
        "cube": season.cube.name,
        "season": season.name,
        "transform": list(season.geobox.affine)[:6],
        "shape": season.shape_yx,
        "what": what,
        "time": None if date is None else str(season.time[date]),
        "bands": bands,
        "clear_only": clear_only,
        "provenance": told,
        "left_out": {item: left_out[item] for item in items if item in left_out},
    }
    if what == "labels" and season.legend is not None and season.fields is not None:
        content["legend"] = season.legend.to_json()
        content["fields"] = [season.fields.code.tolist(), season.fields.pixels.tolist()]
        content["unlabelled"] = UNLABELLED
        # Fields that were burnt elsewhere may have as many pixels as before.
        content["written"] = version_of(season.cube / season.folder / "labels" / "zarr.json")
    elif not items:
        # A cube made with write_cube does not say what its dates are from.
        array = season.cube / season.folder / "time" / "zarr.json"
        content["written"] = version_of(array)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
