"""Build ever larger parts of one archive and see what must not grow.

Every build reads its assets over HTTP from a server that counts the requests, in a process of its
own whose memory, with that of its workers, is sampled. Printed for each: tasks against blocks,
peak memory against the memory given, and requests per COG block that lies under the cube (a
block is 1024 px of the file, as in the public archives), at 10 m and at 20 m. The side of a block
is set here, so that larger cubes have more blocks of the same size.

With --whole, instead: one cube over all of an archive, in blocks as a build makes them. Where the
archive is small, its files have few COG blocks, and headers weigh more than anywhere else.

    python benchmarks/cube_scale.py --blocks 1 4 16 --side 1024 --dates 12 --memory 1.5GB
    python benchmarks/cube_scale.py --blocks 1 4 --side 2048 --dates 12 --memory 1.5GB
    python benchmarks/cube_scale.py --whole 4096 --dates 4 --memory 2GB
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from _measure import RangeServer, count_tasks, measure_process, range_server

EDGE = 470
"""Pixels of 10 m between the archive's edge and the cube's: no block of the cube then begins
where a block of a file does."""
SNAP = 10
"""Pixels by which a cube may grow, as its corners lie on a grid of 60 m."""
FINE = {"B02", "B03", "B04", "B08"}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    if options.cube is not None:
        print(json.dumps(build(options)))
        return []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        archive = options.archive or simulate(folder / "archive", options)
        sizes = [0] if options.whole else [pixels_of(blocks, options) for blocks in options.blocks]
        rows = [measure(pixels, archive, folder, options) for pixels in sizes]
    report(rows, options)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 16], help="squares of n")
    parser.add_argument("--side", type=int, default=1024, help="pixels of a block")
    parser.add_argument("--whole", type=int, metavar="PX", help="side of an archive to build whole")
    parser.add_argument("--dates", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="3GB", help="budget of all workers together")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the data")
    parser.add_argument("--archive", type=Path, default=None, help="a simulated archive to use")
    parser.add_argument("--cube", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--catalog", help=argparse.SUPPRESS)
    parser.add_argument("--pixels", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def simulate(archive: Path, options: argparse.Namespace) -> Path:
    from stcln_geo.execution import Execution
    from stcln_geo.simulate import SimulationSpec, simulate_archive

    side = options.whole or pixels_of(max(options.blocks), options) + 2 * EDGE
    spec = SimulationSpec(width=side, height=side, dates=options.dates)
    simulate_archive(archive, spec, execution=Execution(workers=options.workers))
    return archive


def pixels_of(blocks: int, options: argparse.Namespace) -> int:
    side = math.isqrt(blocks)
    if side * side != blocks:
        raise SystemExit(f"--blocks {blocks}: a square of blocks has 1, 4, 9, 16 ... of them.")
    return side * options.side


def measure(
    pixels: int, archive: Path, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Build a square of at most some pixels, or all of the archive for 0, and count."""
    cube = folder / f"cube-{pixels}.zarr"
    with range_server(archive) as server:
        measured = measure_process([
            __file__, "--cube", cube, "--catalog", f"{server.url}/catalog.json",
            "--pixels", str(pixels), "--workers", str(options.workers),
            "--memory", options.memory, "--side", str(options.side),
        ])  # fmt: skip
        bounds = measured.told["bounds"]
        return {
            **measured.told, "seconds": measured.seconds, "memory": measured.memory,
            "fine": per_block(server, archive, bounds, fine=True),
            "coarse": per_block(server, archive, bounds, fine=False),
        }  # fmt: skip


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Build what `measure` asks for, in the archive's middle; tell what the scheduler saw."""
    from stcln_geo.catalog import load_catalog
    from stcln_geo.cli._common import parse_memory
    from stcln_geo.cube import cost
    from stcln_geo.cube.build import build_cube
    from stcln_geo.cube.cost import plan_blocks
    from stcln_geo.cube.plan import plan_cube
    from stcln_geo.cube.search import search_items
    from stcln_geo.execution import Execution

    snapshot = search_items(load_catalog(options.catalog))
    made = plan_cube(snapshot)
    memory = parse_memory(options.memory)
    if options.pixels:
        made = plan_cube(snapshot, middle(made, options.pixels))
        cost.WIDEST_BLOCK, cost._TASKS_PER_WORKER = options.side, 0
    blocks = [
        block
        for season in made.seasons
        for block in plan_blocks(made, season, memory=memory, workers=options.workers)
    ]
    side = max(max(block.shape_yx) for block in blocks)
    expected = min(options.side, max(made.window.shape_yx))
    if options.pixels and side != expected:
        raise SystemExit(f"--memory {options.memory} gives blocks of {side} px, not {expected}.")

    with count_tasks() as counted:
        built = build_cube(
            made, options.cube, execution=Execution(workers=options.workers), memory=memory
        )
    height, width = made.window.shape_yx
    return {
        "pixels": f"{width} x {height}", "planned": len(blocks), "side": side,
        "tasks": counted.total(),
        "dates": built.dates, "windows": built.windows_read, "bounds": made.geobox.boundingbox.bbox,
        "cube_bytes": height * width * built.dates * (2 * len(made.bands) + 2),
    }  # fmt: skip


def middle(whole: Any, pixels: int) -> Any:
    """Return the square of whole windows in an archive that is at most some pixels wide."""
    from shapely.geometry import box

    from stcln_geo.grid import Window
    from stcln_geo.region import Region

    lattice = whole.spec.lattice
    cores = (pixels - 2 * lattice.halo - SNAP) // lattice.stride
    row, col = (
        math.ceil((start + EDGE) / lattice.stride) * lattice.stride
        for start in (whole.window.row, whole.window.col)
    )
    side = cores * lattice.stride
    square = Window(row, col, side, side)
    metres = whole.spec.resolution
    # A metre inside, so that rounding cannot add a row of windows.
    geometry = box(
        square.col * metres + 1, -(square.row + side) * metres + 1,
        (square.col + side) * metres - 1, -square.row * metres - 1,
    )  # fmt: skip
    return Region.from_projected(geometry, str(whole.crs), source="the middle of the archive")


def per_block(server: RangeServer, archive: Path, bounds: list[float], *, fine: bool) -> float:
    """Return requests per COG block under the cube, over some of the assets."""
    import rasterio

    requests = touched = 0
    for path, count in server.requests.items():
        if not path.endswith(".tif") or (Path(path).stem in FINE) != fine:
            continue
        with rasterio.open(archive / path) as source:
            height, width = source.block_shapes[0]
            left, bottom, right, top = bounds
            first_row, first_col = source.index(left, top, op=math.floor)
            last_row, last_col = source.index(right, bottom, op=math.ceil)
            rows = (min(last_row, source.height) - 1) // height - max(first_row, 0) // height + 1
            cols = (min(last_col, source.width) - 1) // width - max(first_col, 0) // width + 1
        requests += count
        touched += rows * cols
    return requests / touched


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(
        f"{options.workers} workers, {options.memory} of memory, blocks of at most "
        f"{max(row['side'] for row in rows)} px, {rows[0]['dates']} dates"
    )
    print(
        f"{'blocks':>6} {'tasks':>6} {'pixels':>12} {'seconds':>8} {'peak GB':>8} {'MB/s':>6} "
        f"{'requests per COG block: 10 m':>29} {'20 m':>5}"
    )
    for row in rows:
        print(
            f"{row['planned']:6} {row['tasks']:6} {row['pixels']:>12} {row['seconds']:8.1f} "
            f"{row['memory'] / 1e9:8.2f} {row['cube_bytes'] / 1e6 / row['seconds']:6.0f} "
            f"{row['fine']:29.2f} {row['coarse']:5.2f}"
        )


if __name__ == "__main__":
    main()
