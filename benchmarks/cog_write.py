"""Write the same map by copying compressed tiles, and with GDAL's COG driver, and compare.

Both get the same shards from memory, the same threads, codec and level. Ours writes a segment per
shard and assembles them; GDAL's way writes a GeoTIFF per shard, as 'predict' does for other shard
sizes, then runs the COG driver over a VRT of them. "finish" is what is left to do after the last
shard. Before a ratio is printed, the pixels are compared, and the overviews: they may differ where
two classes are equally frequent only. Each contender runs in a process of its own; its memory is
the peak of that process.

    python benchmarks/cog_write.py --size 16384x16384 --threads 2
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CONTENDERS = ("stcln-geo", "gdal")
CLASSES = 9
CRS = "EPSG:32631"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.contender:
        print(json.dumps(run_contender(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(options.rounds):
            for name in CONTENDERS:
                rounds[name].append(measure(name, folder, options))
        ties = check_equal(folder)
        sizes = {name: (folder / f"{name}.tif").stat().st_size for name in CONTENDERS}
    report(rounds, sizes, ties, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="16384x16384", help="pixels, WxH")
    parser.add_argument("--shard", type=int, default=4096, help="a multiple of 4096")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of each counts")
    parser.add_argument("--compression", choices=("zstd", "deflate"), default="zstd")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the files")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    command = [
        sys.executable, __file__, "--contender", name, "--folder", str(folder), "--size",
        options.size, "--shard", str(options.shard), "--threads", str(options.threads),
        "--compression", options.compression,
    ]  # fmt: skip
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{name} failed with exit code {finished.returncode}")
    told: dict[str, float] = json.loads(finished.stdout.strip().splitlines()[-1])
    return told


def shape_of(options: argparse.Namespace) -> tuple[int, int]:
    width, height = (int(side) for side in options.size.split("x"))
    return height, width


def shard_pixels(row: int, col: int, shape: tuple[int, int]) -> np.ndarray:
    """Return fields of about 30 px with noise, which depend on the place only."""
    generator = np.random.default_rng((row, col))
    small = (shape[0] // 30 + 1, shape[1] // 30 + 1)
    values = generator.integers(0, CLASSES, small, dtype=np.uint8).repeat(30, 0).repeat(30, 1)
    values = np.ascontiguousarray(values[: shape[0], : shape[1]])
    noise = generator.random(shape, dtype=np.float32) < 0.05
    values[noise] = generator.integers(0, CLASSES, int(noise.sum()), dtype=np.uint8)
    values[: shape[0] // 3, : shape[1] // 3] = 255
    return values


def shards(options: argparse.Namespace) -> Iterator[tuple]:
    from stcln_geo.grid import tiles

    for window in tiles(shape_of(options), options.shard):
        yield window, shard_pixels(window.row, window.col, window.shape_yx)


def run_contender(options: argparse.Namespace) -> dict[str, float]:
    import rasterio

    from stcln_geo.cog import Source, TileCodec, assemble_cog, write_cog, write_segment
    from stcln_geo.grid import Window, geobox_from_window
    from stcln_geo.legend import Legend

    legend = Legend.from_values([str(code) for code in range(CLASSES)])
    geobox = geobox_from_window(
        Window(-560_000, 50_000, *shape_of(options)), crs=CRS, resolution=10.0
    )
    codec = TileCodec(compression=options.compression)
    folder = options.folder / options.contender
    folder.mkdir(exist_ok=True)
    sources, worked = [], 0.0
    for window, values in shards(options):
        started = time.perf_counter()
        path = folder / f"{window.row}_{window.col}.tif"
        if options.contender == "stcln-geo":
            sources.append(
                write_segment(
                    values, path, window=window, resampling="mode", codec=codec,
                    threads=options.threads,
                )
            )  # fmt: skip
        else:
            with rasterio.open(
                path, "w", driver="GTiff", height=window.height, width=window.width, count=1,
                dtype="uint8", nodata=255, crs=CRS, transform=geobox.affine, tiled=True,
                compress="deflate", zlevel=1,
            ) as target:  # fmt: skip
                target.write(values, 1)
            sources.append(Source(path=path, window=window))
        worked += time.perf_counter() - started
    started = time.perf_counter()
    out = options.folder / f"{options.contender}.tif"
    common = {"geobox": geobox, "legend": legend, "threads": options.threads}
    if options.contender == "stcln-geo":
        assemble_cog(sources, out, codec=codec, **common)
    else:
        write_cog(sources, out, compression=options.compression, **common)
    finish = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {"shards": worked, "finish": finish, "memory": peak}


def check_equal(folder: Path) -> int | None:
    """Return the pixels of the first overview that differ; stop where a difference is no tie.

    None where a side is odd: GDAL stretches its overview pixels then, and they cannot be compared.
    """
    import rasterio
    from rasterio.windows import Window as Part

    ours, theirs = (rasterio.open(folder / f"{name}.tif") for name in CONTENDERS)
    with ours, theirs:
        if ours.overviews(1) != theirs.overviews(1):
            raise SystemExit(f"The overviews are {ours.overviews(1)} and {theirs.overviews(1)}")
        even = not any(side % 2 for side in ours.shape)
        first = [rasterio.open(one.name, OVERVIEW_LEVEL=0) for one in (ours, theirs) if even]
        differing = 0
        for row in range(0, ours.height, 1024):
            height = min(1024, ours.height - row)
            part = Part(0, row, ours.width, height)
            pixels, other = ours.read(1, window=part), theirs.read(1, window=part)
            if not np.array_equal(pixels, other):
                raise SystemExit(f"The pixels of rows {row} to {row + height} differ")
            if not first or not theirs.overviews(1):
                continue
            half = Part(0, row // 2, ours.width // 2, height // 2)
            mine, yours = (one.read(1, window=half) for one in first)
            below = [pixels[y::2, x::2] for y in (0, 1) for x in (0, 1)]
            votes = [
                sum((one == value).astype(np.uint8) for one in below) for value in (mine, yours)
            ]
            wrong = (mine != yours) & ((votes[0] != votes[1]) | (mine == 255) | (yours == 255))
            if wrong.any():
                raise SystemExit(f"{int(wrong.sum())} overview pixels differ that are no ties")
            differing += int((mine != yours).sum())
    return differing if even else None


def report(
    rounds: dict[str, list[dict[str, float]]],
    sizes: dict[str, int],
    ties: int | None,
    options: argparse.Namespace,
) -> None:
    best = {
        name: min(told, key=lambda one: one["shards"] + one["finish"])
        for name, told in rounds.items()
    }
    compared = "overviews not compared (odd side)"
    if ties is not None:
        compared = f"{ties:,} ties in the first overview"
    print(
        f"{options.size} px, shards of {options.shard} px, {options.compression}, "
        f"{options.threads} threads; equal pixels, {compared}"
    )
    print(
        f"{'contender':10} {'shards s':>9} {'finish s':>9} {'total s':>8} {'GB':>6} {'MB file':>8}"
    )
    for name, told in best.items():
        total = told["shards"] + told["finish"]
        print(
            f"{name:10} {told['shards']:9.2f} {told['finish']:9.2f} {total:8.2f} "
            f"{told['memory'] / 1e9:6.2f} {sizes[name] / 1e6:8.1f}"
        )
    ours, theirs = (best[name] for name in CONTENDERS)
    whole = (theirs["shards"] + theirs["finish"]) / (ours["shards"] + ours["finish"])
    print(
        f"Against gdal: {whole:.2f} x as fast in all, {theirs['finish'] / ours['finish']:.1f} x "
        f"after the last shard, {ours['memory'] / theirs['memory']:.2f} x its memory."
    )


if __name__ == "__main__":
    main()
