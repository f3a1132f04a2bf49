"""Build the same cube with stcln-geo and with odc-stac + xarray, and compare.

Both read the same simulated archive, with the same GDAL settings and number of workers, undo
the same offsets, mask the same clouds and write the same Zarr layout; the results are checked
to be equal before any ratio is printed. Each contender runs in a process of its own; its memory
is the peak of the resident memory of that process and all its children, sampled.

    python benchmarks/cube_build.py --size 2048x2048 --dates 12 --workers 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _measure import measure_process

OURS, AGAIN = "stcln-geo", "stcln-geo again"
GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_INGESTED_BYTES_AT_OPEN": "32768"}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    options = parse(arguments)
    if options.contender:
        run_contender(options)
        return {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        archive = options.archive or folder / "archive"
        if not archive.exists():
            simulate(archive, options)
        # Ours comes first and last, so that a machine that grows busier or quieter shows.
        names = [OURS, *(f"odc-stac-{chunk}" for chunk in options.chunks), AGAIN]
        figures = {name: measure(name, archive, folder / f"{name}.zarr", options) for name in names}
        check_equal(folder, names[:-1])
    report(figures, options)
    return figures


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2048x2048", help="pixels, WxH")
    parser.add_argument("--dates", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="8GB", help="budget given to stcln-geo")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[512, 1024, 2048], help="sides of theirs, px"
    )
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the data")
    parser.add_argument("--archive", type=Path, help="simulated before, or to simulate and keep")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def simulate(archive: Path, options: argparse.Namespace) -> None:
    from stcln_geo.execution import Execution
    from stcln_geo.simulate import SimulationSpec, simulate_archive

    width, height = (int(side) for side in options.size.split("x"))
    spec = SimulationSpec(width=width, height=height, dates=options.dates)
    simulate_archive(archive, spec, execution=Execution(workers=options.workers))


def measure(name: str, archive: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run a contender in its own process; return seconds and peak memory in bytes."""
    measured = measure_process([
        __file__, "--contender", name, "--archive", archive, "--out", out,
        "--workers", str(options.workers), "--memory", options.memory,
    ])  # fmt: skip
    return {"seconds": measured.seconds, "memory": measured.memory, **measured.told}


def run_contender(options: argparse.Namespace) -> None:
    import os

    os.environ.update(GDAL)
    if options.contender in (OURS, AGAIN):
        told = build_ours(options)
    else:
        told = build_theirs(options, int(options.contender.rsplit("-", 1)[1]))
    print(json.dumps(told))


def plan(archive: Path):
    from stcln_geo.catalog import load_catalog
    from stcln_geo.cube.clouds import CloudSpec
    from stcln_geo.cube.plan import plan_cube
    from stcln_geo.cube.search import search_items
    from stcln_geo.cube.spec import CubeSpec

    snapshot = search_items(load_catalog(str(archive)))
    spec = CubeSpec(clouds=CloudSpec(cloud_margin=0, shadow_margin=0), keep_scl=False)
    return plan_cube(snapshot, None, spec)


def build_ours(options: argparse.Namespace) -> dict[str, float]:
    from stcln_geo.cli._common import parse_memory
    from stcln_geo.cube.build import build_cube
    from stcln_geo.cube.cost import plan_blocks
    from stcln_geo.execution import Execution

    made = plan(options.archive)
    memory = parse_memory(options.memory)
    report = build_cube(
        made, options.out, execution=Execution(workers=options.workers), memory=memory
    )
    blocks = sum(
        len(plan_blocks(made, season, memory=memory, workers=options.workers))
        for season in made.seasons
    )
    return {"tasks": blocks, "windows": report.windows_read}


def build_theirs(options: argparse.Namespace, chunk: int) -> dict[str, float]:
    import numpy as np
    import odc.stac
    import pystac
    import xarray as xr
    from distributed import Client, LocalCluster
    from zarr.codecs import BloscCodec

    from stcln_geo.cube.contract import SCL_CLEAR
    from stcln_geo.cube.layout import CODEC_LEVEL

    made = plan(options.archive)
    (season,) = made.seasons
    offsets = [date.scenes[0].bands[0].radiometry.offset for date in season.dates]
    items = list(
        pystac.Catalog.from_file(str(options.archive / "catalog.json")).get_items(recursive=True)
    )
    threads = max(2 // max(options.workers, 1), 1)
    with (
        LocalCluster(
            n_workers=max(options.workers, 1), threads_per_worker=threads, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        odc.stac.configure_rio(cloud_defaults=False, client=client, **GDAL)
        loaded = odc.stac.load(
            items,
            bands=[*made.bands, "scl"],
            geobox=made.geobox,
            groupby="solar_day",
            chunks={"time": 1, "y": chunk, "x": chunk},
            resampling={"*": "bilinear", "scl": "nearest"},
            fail_on_error=True,
        )
        stack = xr.concat([loaded[band] for band in made.bands], dim="band").transpose(
            "time", "band", "y", "x"
        )
        shift = xr.DataArray(np.asarray(offsets, dtype="int32"), dims="time")
        measured = stack != 0
        numbers = stack.astype("int32") + shift
        fits = measured & (numbers <= 32767)
        reflectance = numbers.clip(-32767, 32767).where(measured, -32768).astype("int16")
        valid = fits.all("band") & loaded["scl"].isin(SCL_CLEAR)
        dataset = xr.Dataset({"reflectance": reflectance, "valid": valid}).drop_vars("spatial_ref")
        layout = season.layout
        dates, bands = len(season.dates), len(made.bands)
        dataset = dataset.chunk({"time": -1, "band": -1, "y": layout.shard, "x": layout.shard})
        encoding = {
            "reflectance": {
                "chunks": (dates, bands, layout.chunk, layout.chunk),
                "shards": (dates, bands, layout.shard, layout.shard),
                "compressors": [BloscCodec(cname="zstd", clevel=CODEC_LEVEL, shuffle="shuffle")],
                "fill_value": -32768,
            },
            "valid": {
                "chunks": (dates, layout.chunk, layout.chunk),
                "shards": (dates, layout.shard, layout.shard),
                "compressors": [BloscCodec(cname="zstd", clevel=CODEC_LEVEL, shuffle="bitshuffle")],
            },
        }
        written = dataset.to_zarr(
            options.out, zarr_format=3, encoding=encoding, compute=False, consolidated=False
        )
        tasks = len(dict(written.__dask_graph__()))
        written.compute()
    return {"tasks": tasks, "windows": 0}


def check_equal(folder: Path, names: list[str]) -> None:
    """Stop unless all contenders wrote the same pixels."""
    import zarr

    from stcln_geo.cube.store import open_season

    season = open_season(folder / f"{names[0]}.zarr")
    for name in names[1:]:
        group = zarr.open_group(folder / f"{name}.zarr", mode="r")
        for array, ours in (("reflectance", season.reflectance), ("valid", season.valid)):
            for top in range(0, season.shape_yx[0], 512):
                rows = slice(top, top + 512)
                theirs = group[array][..., rows, :]
                mine = ours[..., rows, :]
                if array == "reflectance":
                    both = (theirs != -32768).all(axis=1) & (mine != -32768).all(axis=1)
                    differs = (theirs != mine).any(axis=1) & both
                else:
                    differs = theirs != mine
                if differs.mean() > 1e-3:
                    raise SystemExit(
                        f"{name} and {names[0]} differ in {array}: {differs.mean():.2%}"
                    )


def report(figures: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    ours = [figures[OURS], figures[AGAIN]]
    slower = max(told["seconds"] for told in ours)
    larger = max(told["memory"] for told in ours)
    best = min((name for name in figures if name not in (OURS, AGAIN)),
               key=lambda name: figures[name]["seconds"])  # fmt: skip
    print(f"{options.size} px, {options.dates} dates, {options.workers} workers")
    print(f"{'contender':16} {'seconds':>8} {'GB':>6} {'tasks':>7}")
    for name, told in figures.items():
        print(f"{name:16} {told['seconds']:8.1f} {told['memory'] / 1e9:6.2f} {told['tasks']:7.0f}")
    print(
        f"Against {best}, by the worse of our two: {figures[best]['seconds'] / slower:.2f} x as "
        f"fast, {larger / figures[best]['memory']:.2f} x its memory."
    )


if __name__ == "__main__":
    main()
