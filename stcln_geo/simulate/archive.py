"""Write a simulated archive: a static STAC catalog, one COG per band and date, and parcels.

Each date is one task. It renders block after block into plain tiled files under temporary names
and turns each into a COG, so memory does not grow with the region. What exists whole is kept: run
again to go on after an interruption.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError
from ..execution import Execution, ProgressHook, run_tasks
from ..grid import Window, tiles
from ..lock import LockHolder, hold_lock
from ..storage import Location
from .parcels import write_legend, write_parcels
from .phenology import BANDS
from .scene import Scene, render_scene
from .sky import is_cloudy
from .spec import RESOLUTION, SimulationSpec
from .stac import (
    ASSETS,
    COLLECTION,
    asset_resolution,
    asset_shape,
    item_id,
    make_catalog,
    make_collection,
    make_item,
    region_geometry,
)

BLOCK = 512
"""Side of the squares that are rendered at a time, in pixels of 10 m."""

_RECIPE = "simulation.json"
_BESIDE = ("catalog.json", "collection.json", "parcels.gpkg", "legend.csv", "region.geojson")
# Deflate keeps about this share of noisy 16-bit reflectance and of the classification.
_PACKED = {"uint16": 0.72, "uint8": 0.12}
_SMALL = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivePlan:
    """What would be written."""

    scenes: int
    files: int
    pixels: int
    """Pixels of 10 m on one date."""
    raw_bytes: int
    """Bytes of all arrays, overviews left out."""
    packed_bytes: int
    """Estimated bytes on disk."""
    existing: int
    """COGs that are there already and would be kept."""
    first: str
    last: str
    """Dates of the first and the last acquisition, YYYY-MM-DD."""

    def __str__(self) -> str:
        """Describe the plan in a few lines."""
        return (
            f"scenes    {self.scenes} ({self.first} to {self.last})\n"
            f"pixels    {self.pixels:,} per 10 m band\n"
            f"files     {self.files} COGs, {self.existing} of them written already\n"
            f"bytes     {self.raw_bytes / 1e6:,.1f} MB raw, "
            f"about {self.packed_bytes / 1e6:,.1f} MB on disk"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedArchive:
    """Where the parts of a simulated archive lie."""

    folder: Path
    catalog: Path
    """Static STAC catalog."""
    collection: str
    """Id of its one collection."""
    region: Path
    """GeoJSON polygon of the area, longitude and latitude."""
    parcels: Path
    """GeoPackage with field_id, crop_code and crop_name, in the archive's UTM zone."""
    legend: Path
    """CSV with value, name and color of every crop code."""
    items: tuple[str, ...]
    """Ids in the order of time."""
    time_range: str
    """START/END that holds all acquisitions, as the search takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    folder: Path
    spec: SimulationSpec
    index: int

    def __str__(self) -> str:
        return item_id(self.spec, self.spec.acquisitions[self.index])


def plan_archive(out_dir: str | Path, spec: SimulationSpec) -> ArchivePlan:
    """Say what `simulate_archive` would write; nothing is written."""
    folder = Path(out_dir)
    passes = spec.acquisitions
    raw = packed = 0
    for asset in ASSETS:
        dtype = _dtype(asset)
        size = int(np.prod(asset_shape(spec, asset))) * np.dtype(dtype).itemsize * len(passes)
        raw += size
        packed += int(size * _PACKED[dtype])
    paths = [_asset_path(folder, spec, i, asset) for i in range(len(passes)) for asset in ASSETS]
    return ArchivePlan(
        scenes=len(passes),
        files=len(paths),
        pixels=spec.width * spec.height,
        raw_bytes=raw,
        packed_bytes=packed,
        existing=sum(path.exists() for path in paths),
        first=passes[0].when.date().isoformat(),
        last=passes[-1].when.date().isoformat(),
    )


def simulate_archive(
    out_dir: str | Path,
    spec: SimulationSpec,
    *,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
) -> SimulatedArchive:
    """Simulate a Sentinel-2 archive of a farm landscape.

    Parameters
    ----------
    out_dir : str or Path
        Folder to write; made if absent. COGs of the same recipe that lie there are kept.
    spec : SimulationSpec
        The recipe; equal recipes give equal pixels, whatever the execution.
    execution : Execution, optional
        By default everything runs in this process.
    progress : ProgressHook, optional
        Told after every date.

    Raises
    ------
    OutputError
        If the folder holds an archive of another recipe, or other files of the names that an
        archive has; if another process is writing it, or it cannot be written.
    """
    folder = Path(out_dir)

    def refusal(holder: LockHolder, lock: Location) -> Exception:
        return OutputError(
            f"Cannot write a simulated archive to '{folder}': process {holder.pid} on "
            f"{holder.host} has been writing it since {holder.time}. Wait until that has ended or "
            f"stop it; if it runs no longer, remove {lock}."
        )

    _check_recipe(folder, spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / _RECIPE, spec.to_dict())
    except OSError as error:
        raise OutputError(
            f"Cannot write a simulated archive to '{folder}': {error.strerror}. The folder must be "
            "writable. Choose another one."
        ) from error

    with hold_lock(folder, refusal=refusal):
        tasks = [
            _Task(folder=folder, spec=spec, index=index) for index in range(len(spec.acquisitions))
        ]
        names = run_tasks(
            _write_date, tasks, execution=execution or Execution(), label="date", progress=progress
        )

        write_parcels(folder, spec)
        write_legend(folder / "legend.csv")
        _write_json(folder / "region.geojson", _make_region(spec))
        items = [json.loads((folder / name / f"{name}.json").read_text()) for name in names]
        _write_json(folder / "collection.json", make_collection(spec, items))
        _write_json(folder / "catalog.json", make_catalog())
    return SimulatedArchive(
        folder=folder,
        catalog=folder / "catalog.json",
        collection=COLLECTION,
        region=folder / "region.geojson",
        parcels=folder / "parcels.gpkg",
        legend=folder / "legend.csv",
        items=tuple(names),
        time_range=spec.time_range,
    )


def _write_date(task: _Task) -> str:
    """Write all COGs and the item of one date; return the item's id."""
    folder, spec = task.folder, task.spec
    acquisition = spec.acquisitions[task.index]
    name = item_id(spec, acquisition)
    (folder / name).mkdir(exist_ok=True)
    item = folder / name / f"{name}.json"
    missing = [
        asset for asset in ASSETS if not _asset_path(folder, spec, task.index, asset).exists()
    ]
    if not missing and item.exists():
        return name

    bands = [asset for asset in missing if asset in BANDS]
    cloudy = covered = 0
    with ExitStack() as stack:
        raws = {
            asset: stack.enter_context(
                _RawFile(_asset_path(folder, spec, task.index, asset), spec, asset)
            )
            for asset in missing
        }
        for block in _blocks(spec):
            scene = render_scene(spec, acquisition, block, bands=bands)
            relative = block.relative_to(spec.window)
            for raw in raws.values():
                raw.write(scene, relative)
            height, width = asset_shape(spec, "scl")
            scl = scene.scl[: height - relative.row // 2, : width - relative.col // 2]
            cloudy += int(is_cloudy(scl).sum())
            covered += int((scl > 0).sum())
        for raw in raws.values():
            raw.finish()
    _write_json(item, make_item(spec, acquisition, cloud_cover=100 * cloudy / max(covered, 1)))
    return name


class _RawFile:
    """A plain tiled GeoTIFF beside its target, filled block by block, then turned into the COG."""

    def __init__(self, target: Path, spec: SimulationSpec, asset: str) -> None:
        self.target = target
        self.asset = asset
        self.step = asset_resolution(asset) // RESOLUTION
        self.shape_yx = asset_shape(spec, asset)
        self._spec = spec
        # Fixed names, as the folder has one writer: a run after a killed one overwrites and
        # removes what that one left.
        self._raw = target.with_name(f".{target.name}.raw")
        self._cog = target.with_name(f".{target.name}.cog")

    def __enter__(self) -> _RawFile:
        import rasterio
        from rasterio.transform import from_origin

        resolution = asset_resolution(self.asset)
        tiled: dict[str, Any] = {}
        if max(self.shape_yx) > BLOCK:
            tiled = {"tiled": True, "blockxsize": BLOCK // 2, "blockysize": BLOCK // 2}
        self._dataset = rasterio.open(
            self._raw,
            "w",
            driver="GTiff",
            height=self.shape_yx[0],
            width=self.shape_yx[1],
            count=1,
            dtype=_dtype(self.asset),
            crs=self._spec.crs,
            transform=from_origin(self._spec.origin_x, self._spec.origin_y, resolution, resolution),
            nodata=0,
            bigtiff="IF_SAFER",
            **tiled,
        )
        return self

    def write(self, scene: Scene, relative: Window) -> None:
        """Write one block, cut at the edges of the file."""
        from rasterio.windows import Window as FileWindow

        array: NDArray[Any] = scene.scl if self.asset == "scl" else scene.bands[self.asset]
        row, col = relative.row // self.step, relative.col // self.step
        array = array[: self.shape_yx[0] - row, : self.shape_yx[1] - col]
        self._dataset.write(array, 1, window=FileWindow(col, row, array.shape[1], array.shape[0]))

    def finish(self) -> None:
        """Make the COG and give it its name."""
        from rasterio.shutil import copy

        self._dataset.close()
        copy(
            self._raw,
            self._cog,
            driver="COG",
            COMPRESS="DEFLATE",
            LEVEL="4",
            PREDICTOR="YES",
            BLOCKSIZE="256" if max(self.shape_yx) <= _SMALL else "1024",
            OVERVIEW_RESAMPLING="NEAREST" if self.asset == "scl" else "AVERAGE",
            BIGTIFF="IF_SAFER",
        )
        os.replace(self._cog, self.target)

    def __exit__(self, *_: object) -> None:
        self._dataset.close()
        self._raw.unlink(missing_ok=True)
        self._cog.unlink(missing_ok=True)


def _blocks(spec: SimulationSpec) -> Iterator[Window]:
    """Give even-sized absolute windows that cover the region, row by row."""
    even = (spec.height + spec.height % 2, spec.width + spec.width % 2)
    for tile in tiles(even, BLOCK):
        yield tile.shift(spec.window.row, spec.window.col)


def _make_region(spec: SimulationSpec) -> dict[str, Any]:
    feature = {
        "type": "Feature",
        "properties": {"name": "Simulated region"},
        "geometry": region_geometry(spec),
    }
    return {"type": "FeatureCollection", "features": [feature]}


def _check_recipe(folder: Path, spec: SimulationSpec) -> None:
    recipe = folder / _RECIPE
    if not recipe.exists():
        # The recipe is written first: what is there without one is not ours.
        others = [name for name in _BESIDE if (folder / name).exists()]
        if others:
            raise OutputError(
                f"Cannot write a simulated archive to '{folder}': it holds other files of the "
                f"names that an archive has ({', '.join(others)}). Choose another folder."
            )
        return
    try:
        stored = dict(json.loads(recipe.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"Cannot go on with the simulated archive in '{folder}': its recipe {_RECIPE} cannot "
            f"be read ({error}). Choose another folder or remove this one."
        ) from error
    # Recipes of earlier versions lack what then could not be chosen.
    found = {**SimulationSpec().to_dict(), **stored}
    wanted = spec.to_dict()
    if found == wanted:
        return
    differing = sorted(name for name in wanted if found.get(name) != wanted[name])
    told = ", ".join(f"{name} {found.get(name)!r} (now {wanted[name]!r})" for name in differing)
    raise OutputError(
        f"Cannot write a simulated archive to '{folder}': it holds one of another recipe: {told}. "
        "A folder holds one recipe, so that it can be resumed. Choose another folder or remove "
        "this one."
    )


def _asset_path(folder: Path, spec: SimulationSpec, index: int, asset: str) -> Path:
    return folder / item_id(spec, spec.acquisitions[index]) / f"{ASSETS[asset]}.tif"


def _dtype(asset: str) -> str:
    return "uint8" if asset == "scl" else "uint16"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
