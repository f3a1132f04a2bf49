"""Map ever larger regions, and see what must not grow.

Two dense squares and one with little content, by the `tiny` network with random weights. Their
cubes repeat one simulated block of 512 x 512 px; in the third, most storage shards do not exist.
Each map is made in a process of its own, which is the client and the scheduler, by Dask workers
that it starts; the resident memory of all of them is sampled. Printed for each: tasks against
shards, the peak of the largest worker against the memory given, the peak of the client, and the
size of the class map.

    python benchmarks/predict_scale.py --dense 1000 6000 --sparse 20000 --workers 2 --memory 1GB
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _measure import count_tasks, load, measure_process
from _region import SHARD, Block, save_network, simulate_block, tile_cube


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    if options.map is not None:
        print(json.dumps(predict(options)))
        return []
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        block = simulate_block(folder, dates=options.dates)
        save_network(
            folder / "network.safetensors", block, preset="tiny", window=options.window,
            halo=options.halo,
        )  # fmt: skip
        for kind, side in [*(("dense", one) for one in options.dense), ("sparse", options.sparse)]:
            if side:
                rows.append(measure(kind, side, folder, block, options))
                print_row(rows[-1], options, first=len(rows) == 1)
    report(rows, options)
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=int, nargs="*", default=[1000, 6000], help="sides, px")
    parser.add_argument("--sparse", type=int, default=20_000, help="side, px; 0 leaves it out")
    parser.add_argument(
        "--every", type=int, default=16, help="of a sparse cube, one storage shard in EVERY^2"
    )
    parser.add_argument("--dates", type=int, default=3)
    parser.add_argument("--window", type=int, default=16, help="side of the windows, px")
    parser.add_argument("--halo", type=int, default=0, help="px")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="1GB", help="what each worker may use")
    parser.add_argument(
        "--shard-size", type=int, default=512,
        help="of the dense regions, px: equal, and so small that each worker has several in the "
        "smallest, as it reads the next while it labels one; the sparse: usual",
    )  # fmt: skip
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the data")
    parser.add_argument("--map", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cube", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--network", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(
    kind: str, side: int, folder: Path, block: Block, options: argparse.Namespace
) -> dict[str, Any]:
    cube = folder / f"{kind}-{side}.zarr"
    filled = None
    if kind == "sparse":
        places = range(0, -(-side // SHARD), options.every)
        filled = [(row, col) for row in places for col in places]
    tile_cube(cube, block, side=side, filled=filled)
    check_contract(cube)
    out = folder / f"{kind}-{side}"
    size = options.shard_size if kind == "dense" else 0
    measured = measure_process([
        __file__, "--map", out, "--cube", cube, "--network", folder / "network.safetensors",
        "--workers", str(options.workers), "--memory", options.memory, "--shard-size", str(size),
    ])  # fmt: skip
    row = {
        "kind": kind, "side": side, **measured.told, "seconds": measured.seconds,
        "worker": measured.largest_child, "client": measured.own, "load": load(),
    }  # fmt: skip
    shutil.rmtree(cube)
    shutil.rmtree(out)
    return row


def check_contract(cube: Path) -> None:
    """Stop where the cube made here is none."""
    from stcln_geo import open_cube, validate_cube

    errors, _ = validate_cube(open_cube(cube, mask_and_scale=False))
    if errors:
        raise SystemExit(f"{cube} breaks the contract: {' '.join(errors)}")


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """Map a cube as the command line would; tell what the scheduler saw and what came out."""
    from stcln_geo.cli._common import parse_memory
    from stcln_geo.execution import Execution
    from stcln_geo.predict import PredictSpec, predict_region

    spec = PredictSpec(
        memory=parse_memory(options.memory), shard_size=options.shard_size or None, min_clear=1
    )
    with count_tasks() as counted:
        product = predict_region(
            options.cube, options.network, options.map, spec=spec,
            execution=Execution(workers=options.workers),
        )  # fmt: skip
    run = json.loads((product.out / "run.json").read_text())
    return {
        "shards": run["shards"], "shard_size": run["spec"]["shard_size"],
        "tasks": counted["shard"], "labelled": product.pixels,
        "cog_bytes": product.classes.stat().st_size,
        "label": run["seconds"]["label"], "assemble": run["seconds"]["assemble"],
    }  # fmt: skip


def print_row(row: dict[str, Any], options: argparse.Namespace, *, first: bool) -> None:
    if first:
        print(
            f"{options.workers} workers of {options.memory}, {options.dates} dates, windows of "
            f"{options.window} px with a halo of {options.halo} px"
        )
        print(
            f"{'region':>22} {'shards':>6} {'tasks':>6} {'labelled px':>12} {'worker GB':>9} "
            f"{'client GB':>9} {'label s':>8} {'assemble s':>10} {'COG MB':>7} {'load':>5}"
        )
    print(
        f"{row['kind'] + ' ' + str(row['side']) + ' x ' + str(row['side']):>22} {row['shards']:6} "
        f"{row['tasks']:6} {row['labelled']:12,} {row['worker'] / 1e9:9.3f} "
        f"{row['client'] / 1e9:9.3f} {row['label']:8.1f} {row['assemble']:10.1f} "
        f"{row['cog_bytes'] / 1e6:7.2f} {row['load']:5.1f}",
        flush=True,
    )


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    from stcln_geo.cli._common import parse_memory

    given = parse_memory(options.memory)
    held = all(row["worker"] <= given for row in rows)
    print(f"Largest worker within {options.memory}: {'yes' if held else 'NO'}.")
    dense = [row for row in rows if row["kind"] == "dense"]
    if len(dense) > 1:
        growth = dense[-1]["worker"] / dense[0]["worker"] - 1
        print(f"Growth from the first dense region to the last: {100 * growth:+.1f} %.")
    equal = all(row["tasks"] == row["shards"] for row in rows)
    print(f"Tasks = shards: {'yes' if equal else 'NO'}.")


if __name__ == "__main__":
    main()
