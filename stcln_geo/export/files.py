"""Write an export: walk the cube's shards once for many dates, then make a COG of each.

All dates of a square lie in one shard, so reading date by date would decode the cube as often as
it has dates. Instead each square is read once for a group of dates and put into one plain tiled
GeoTIFF per date; GDAL then makes these cloud-optimized, one after another.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..cog import OverviewResampling, Source, write_cog, write_image_cog
from ..cube.contract import FILL, SCALE, SCENE_COLORS
from ..cube.lock import cube_lock
from ..cube.store import Season, write_json, writing
from ..errors import OutputError
from ..execution import ProgressHook
from ..grid import Window, tiles
from ..legend import UNLABELLED
from ..storage import Location
from .plan import RECORD_FILE, ExportFile, ExportPlan, What, plan_export, read_record
from .stac import write_stac

__all__ = ["ExportReport", "export_cube"]

_DATES_AT_A_TIME = 32
"""Dates per walk over the cube: so many temporary files lie on disk, and a kill loses no more."""

_READ_BYTES = 256_000_000
"""Pixels that are in memory at a time."""

_LARGEST_TILE = 512

_OVERVIEWS: dict[str, OverviewResampling] = {
    "reflectance": "AVERAGE",
    "valid": "MODE",
    "scl": "MODE",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export did."""

    out: Path
    written: tuple[str, ...]
    kept: tuple[str, ...]
    """Files that an earlier run had written."""
    collection: Path

    def __str__(self) -> str:
        if not self.written:
            return f"{self.out} is complete ({len(self.kept)} files): nothing to do."
        kept = f" ({len(self.kept)} kept)" if self.kept else ""
        return f"{self.out}: {len(self.written)} files written{kept}; STAC in {self.collection}"


def export_cube(
    cube: str | Location,
    out: str | Path,
    *,
    season: str | None = None,
    what: Sequence[What] = ("reflectance",),
    bands: Sequence[str] | None = None,
    dates: str | None = None,
    clear_only: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: ProgressHook | None = None,
) -> ExportReport:
    """Write a season as cloud-optimized GeoTIFFs, one per date and kind, with a STAC collection.

    The numbers, the grid and its padding are exactly those of the cube. Run again, files that are
    there and whose dates are unchanged in the cube are skipped.

    Parameters
    ----------
    out
        A folder for one season of one cube.
    what
        Of ``reflectance`` (int16, scale 0.0001, nodata -32768), ``valid`` (uint8, 1 = usable),
        ``scl`` (uint8, nodata 0), ``labels`` (uint8, nodata 255; one file).
    bands
        Bands of ``reflectance``, in this order; by default all.
    dates
        ``START/END``, both included; by default all.
    clear_only
        True writes no data where a pixel is not ``valid``; by default all measured numbers.
    overwrite
        Replace files that are there.
    threads
        Threads that compress; None = all cores.

    Raises
    ------
    MissingFileError, CubeError
        If there is no such cube or season.
    InputError
        If the cube has no such bands, dates or arrays.
    OutputError
        If the folder holds other files of these names, or cannot be written.
    """
    out = Path(out)
    options: dict[str, Any] = {
        "season": season, "what": what, "bands": bands, "dates": dates,
        "clear_only": clear_only, "overwrite": overwrite,
    }  # fmt: skip
    plan_export(cube, out, **options)
    with cube_lock(out):
        plan = plan_export(cube, out, **options)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            for left in out.glob(".export-*"):
                shutil.rmtree(left)
        record = _Record(plan)
        groups = list(_groups(plan))
        tick = _counter(progress, sum(_steps(plan.season, group) for group in groups))
        with _temporary(out) as folder:
            for group in groups:
                for file in _write_group(plan, group, folder, threads, tick):
                    record.add(file)
        collection = write_stac(plan, record.by_date())
    return ExportReport(
        out=out,
        written=tuple(file.name for file in plan.todo),
        kept=tuple(file.name for file in plan.files if file.is_done),
        collection=collection,
    )


class _Record:
    """The list of a folder's files, on disk before the first is written and after each."""

    def __init__(self, plan: ExportPlan) -> None:
        content = read_record(plan.out)
        self._plan = plan
        self.files: dict[str, dict[str, Any]] = {
            name: entry
            for name, entry in content.get("files", {}).items()
            if (plan.out / name).is_file()
        }
        self._choices = content.get("choices")
        if any(file.what == "reflectance" for file in plan.files):
            self._choices = {"bands": list(plan.bands), "clear_only": plan.clear_only}
        # A kill may come between a file and its entry: the next run must know it for ours.
        self._store(begun=[file.name for file in plan.todo])

    def add(self, file: ExportFile) -> None:
        entry: dict[str, Any] = {"identity": file.identity, "what": file.what, "date": file.date}
        if file.what == "reflectance":
            entry["bands"] = list(self._plan.bands)
        self.files[file.name] = entry
        todo = [other.name for other in self._plan.todo]
        self._store(begun=todo[todo.index(file.name) + 1 :])

    def by_date(self) -> dict[str, dict[str, Any]]:
        """Return the files of dates that the cube has, with the position of each date now.

        It may have been another when the file was written: an append puts dates between others.
        """
        places = {stem: date for date, stem in enumerate(self._plan.stems)}
        found = {}
        for name, entry in self.files.items():
            if entry["date"] is None:
                found[name] = entry
            elif (stem := name.removesuffix(f"_{entry['what']}.tif")) in places:
                found[name] = {**entry, "date": places[stem]}
        return found

    def _store(self, *, begun: list[str]) -> None:
        write_json(
            self._plan.out / RECORD_FILE,
            {
                "cube": self._plan.season.cube.name,
                "season": self._plan.season.name,
                "choices": self._choices,
                "begun": begun,
                "files": self.files,
            },
        )


def _groups(plan: ExportPlan) -> Iterator[list[ExportFile]]:
    """Yield the files to write, in groups of one kind."""
    for _, found in itertools.groupby(plan.todo, key=lambda file: file.what):
        files = list(found)
        for start in range(0, len(files), _DATES_AT_A_TIME):
            yield files[start : start + _DATES_AT_A_TIME]


def _steps(season: Season, group: list[ExportFile]) -> int:
    return len(tiles(season.shape_yx, _side(season, group))) + len(group)


def _counter(progress: ProgressHook | None, total: int) -> Callable[[str], None]:
    done = itertools.count(1)

    def tick(what: str) -> None:
        if progress is not None:
            progress(next(done), total, what)

    return tick


def _side(season: Season, group: list[ExportFile]) -> int:
    """Return the square that is read at a time: whole chunks, a divisor of the shard (pixels)."""
    chunk, shard = season.layout.chunk, season.layout.shard
    layers = len(group) * (2 * len(season.bands) if group[0].what == "reflectance" else 1)
    for count in range(shard // chunk, 1, -1):
        side = count * chunk
        fits = side <= _LARGEST_TILE and side * side * layers <= _READ_BYTES
        if fits and (shard // chunk) % count == 0:
            return side
    return chunk


def _write_group(
    plan: ExportPlan,
    group: list[ExportFile],
    folder: Path,
    threads: int | None,
    tick: Callable[[str], None],
) -> Iterator[ExportFile]:
    """Write the files of a group and yield each when it is whole."""
    import rasterio
    from rasterio.errors import RasterioError

    what, side = group[0].what, _side(plan.season, group)
    plain = {file.name: folder / f"plain_{file.name}" for file in group}
    try:
        with contextlib.ExitStack() as stack, rasterio.Env(GDAL_PAM_ENABLED=False):
            targets = [
                stack.enter_context(_create(plan, file, plain[file.name], side)) for file in group
            ]
            for window in tiles(plan.season.shape_yx, side):
                pixels = _read(plan, group, window)
                place = rasterio.windows.Window(window.col, window.row, window.width, window.height)
                for target, image in zip(targets, pixels, strict=True):
                    target.write(image, window=place)
                tick("squares")
    except (RasterioError, OSError) as error:
        raise OutputError(
            f"Cannot write to {plan.out}: {error}. The folder must be writable and have room for "
            "temporary files. Free some space or choose another folder; finished files are kept."
        ) from error
    for file in group:
        source, path = plain[file.name], plan.out / file.name
        if what == "labels":
            height, width = plan.season.shape_yx
            whole = Source(path=source, window=Window(0, 0, height, width))
            write_cog(
                [whole], path, geobox=plan.season.geobox, legend=plan.season.legend,
                threads=threads,
            )  # fmt: skip
        else:
            write_image_cog(source, path, overviews=_OVERVIEWS[what], threads=threads)
        source.unlink()
        tick(file.name)
        yield file


def _create(plan: ExportPlan, file: ExportFile, path: Path, side: int) -> Any:
    """Open a plain tiled GeoTIFF with all that the COG will carry but the pixels."""
    import rasterio

    season = plan.season
    height, width = season.shape_yx
    is_reflectance = file.what == "reflectance"
    names = plan.bands if is_reflectance else (file.what,)
    nodata = {"reflectance": FILL, "valid": None, "scl": 0, "labels": UNLABELLED}[file.what]
    target = rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=len(names),
        dtype="int16" if is_reflectance else "uint8", nodata=nodata,
        crs=str(season.geobox.crs), transform=season.geobox.affine, tiled=True,
        blockxsize=side, blockysize=side, compress="deflate", zlevel=1, predictor=2,
        interleave="band", bigtiff="if_safer",
    )  # fmt: skip
    for number, name in enumerate(names, start=1):
        target.set_band_description(number, name)
    if is_reflectance:
        target.scales = (SCALE,) * len(names)
        target.offsets = (0.0,) * len(names)
        target.units = ("reflectance",) * len(names)
    if file.what == "scl":
        colors = {code: bytes.fromhex(color[1:]) for code, color in enumerate(SCENE_COLORS)}
        target.write_colormap(1, {code: (*color, 255) for code, color in colors.items()})
    target.update_tags(**_tags(plan, file))
    return target


def _tags(plan: ExportPlan, file: ExportFile) -> dict[str, str]:
    tags = {
        "TIFFTAG_SOFTWARE": f"stcln-geo {__version__}",
        "STCLN_GEO_CUBE": plan.season.cube.name,
        "STCLN_GEO_SEASON": plan.season.name,
    }
    if file.date is None:
        return tags
    time = str(plan.season.time[file.date].astype("datetime64[s]"))
    tags |= {
        "TIFFTAG_DATETIME": time.replace("-", ":").replace("T", " "),
        "ACQUISITION_TIME": f"{time}Z",
        "STCLN_GEO_CLEAR_ONLY": json.dumps(plan.clear_only and file.what == "reflectance"),
    }
    told = {name: column[file.date] for name, column in plan.provenance.items()}
    return tags | {f"STCLN_GEO_{name.upper()}": text for name, text in told.items() if text}


def _read(plan: ExportPlan, group: list[ExportFile], window: Window) -> np.ndarray:
    """Return the pixels of a square: (files, bands, H, W)."""
    season, what = plan.season, group[0].what
    if what == "labels":
        labels: Any = season.labels
        return np.asarray(labels[window.rows, window.cols])[None, None]
    dates = [file.date for file in group]
    if what != "reflectance":
        array = getattr(season, what)
        codes = array.oindex[dates, window.rows, window.cols]
        return np.asarray(codes).astype(np.uint8)[:, None]
    bands = [season.bands.index(name) for name in plan.bands]
    values = np.asarray(season.reflectance.oindex[dates, bands, window.rows, window.cols])
    if plan.clear_only:
        valid = np.asarray(season.valid.oindex[dates, window.rows, window.cols])
        values = np.where(valid[:, None], values, np.int16(FILL))
    return values


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    folder = out / f".export-{os.getpid()}"
    with writing(out):
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
