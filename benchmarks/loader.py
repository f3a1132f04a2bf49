"""Measure how fast chips come from a cube, beside a ceiling and beside the usual way.

One run, in turns, medians: our stream from a cube in the recommended layout; ready chips in an npy
file, mapped into memory (the ceiling: nothing to decode); and ``isel(...).values`` of an xarray
dataset in a DataLoader (the usual way). All give the same chips, in batches, in random order. Then
the readers of single chunks against one another; the share of a training step that is spent
waiting for data (--steps); and the memory over an archive far larger than what is allowed
(--sites), which shares its shards between sites, so that it takes little disk.

    python benchmarks/loader.py --side 512 --dates 30 --rounds 5
    python benchmarks/loader.py --rounds 0 --steps 3 --step-batch 2
    python benchmarks/loader.py --rounds 0 --sites 3000 --memory 0.5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _measure import measure_process

BANDS = (
    "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22",
)  # fmt: skip
SEASON = "2018-09-01"
SITE = 128
"""Side of a site of the archive (pixels)."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.archive is not None:
        print(json.dumps(walk(options.archive, options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        if options.rounds or options.steps:
            cube = make_cube(folder / "cube.zarr", options)
        if options.rounds:
            compare_loaders(cube, folder / "chips", options)
            compare_readers(cube, options)
        if options.steps:
            measure_wait(cube, options)
        if options.sites:
            measure_memory(make_archive(folder / "sites.zarr", options), options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="pixels of the cube")
    parser.add_argument("--dates", type=int, default=30)
    parser.add_argument("--chip", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="threads, or processes of the usual")
    parser.add_argument("--rounds", type=int, default=5, help="0 leaves the comparison out")
    parser.add_argument("--steps", type=int, default=0, help="training steps of 'base'")
    parser.add_argument("--step-batch", type=int, default=2)
    parser.add_argument("--sites", type=int, default=0, help="sites of the archive")
    parser.add_argument("--memory", type=float, default=0.5, help="GB of chips, over the archive")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the data")
    parser.add_argument("--archive", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def pixels(generator: np.random.Generator, dates: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return fields of a few crops with sensor noise, and clouds in squares of 32 px."""
    fields = generator.integers(0, 6, (side // 8 + 1,) * 2).repeat(8, 0).repeat(8, 1)[:side, :side]
    curves = generator.normal(2500, 900, (6, dates, len(BANDS)))
    values = curves[fields].transpose(2, 3, 0, 1)
    values = values + generator.normal(0, 60, values.shape)
    clear = generator.random((dates, side // 32 + 1, side // 32 + 1)) > 0.4
    valid = clear.repeat(32, 1).repeat(32, 2)[:, :side, :side]
    return values.astype(np.int16), valid


def make_cube(path: Path, options: argparse.Namespace) -> Path:
    from shapely.geometry import box

    from stcln_geo.cube.store import create_season, finish_season, shards_of, write_shard
    from stcln_geo.grid import Window, geobox_from_window

    generator = np.random.default_rng(0)
    geobox = geobox_from_window(
        Window(0, 0, options.side, options.side), crs="EPSG:32631", resolution=10
    )
    season = create_season(
        path, SEASON, geobox=geobox, bands=BANDS, aoi=box(*geobox.boundingbox.bbox),
        time=np.datetime64(SEASON) + np.arange(options.dates) * (360 // options.dates),
    )  # fmt: skip
    reflectance, valid = pixels(generator, options.dates, options.side)
    for window in shards_of(season):
        write_shard(
            season, window,
            reflectance=reflectance[:, :, window.rows, window.cols],
            valid=valid[:, window.rows, window.cols],
        )  # fmt: skip
    finish_season(path, SEASON)
    return path


def timed(batches: Iterator[Any], chips: int) -> float:
    """Return chips a second of what yields batches, after the first."""
    next(batches)
    begun, done = time.perf_counter(), 0
    for batch in batches:
        done += len(batch)
    assert done == chips, (done, chips)
    return done / (time.perf_counter() - begun)


def compare_loaders(cube: Path, ready: Path, options: argparse.Namespace) -> None:
    import torch

    from stcln_geo.cube.store import open_season
    from stcln_geo.data.batch import Augmentation
    from stcln_geo.data.chips import ChipDataset, plan_chips
    from stcln_geo.data.stream import TrainingStream

    season = open_season(cube)
    dataset = ChipDataset([season], plan_chips(season, chip=options.chip), bands=BANDS)
    total = int(dataset.bytes_per_unit.sum())
    steps = max(dataset.chips // options.batch - 1, 1)
    plain = Augmentation(dihedral=False)

    def ours(seed: int) -> float:
        # Two thirds of the chips: they never all fit, so that each epoch reads all.
        stream = TrainingStream(
            dataset, batch_size=options.batch, seed=seed, memory=total * 2 // 3,
            threads=options.workers, augmentation=plain,
        )  # fmt: skip
        try:
            return timed(stream.batches(0, steps + 1), steps * options.batch)
        finally:
            stream.close()

    values, valid = write_ready(dataset, ready, options)

    def mapped(seed: int) -> float:
        order = np.random.default_rng(seed).permutation(len(values))

        def batches() -> Iterator[torch.Tensor]:
            for step in range(steps + 1):
                places = order[step * options.batch : (step + 1) * options.batch]
                batch = torch.from_numpy(values[places])
                torch.from_numpy(valid[places])
                yield batch

        return timed(batches(), (len(order[: (steps + 1) * options.batch]) - options.batch))

    usual_loaders = {
        workers: torch.utils.data.DataLoader(
            UsualChips(cube / SEASON, options.chip), batch_size=options.batch, shuffle=True,
            drop_last=True, num_workers=workers, persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
            collate_fn=stack,
        )
        for workers in (0, options.workers)
    }  # fmt: skip

    def usual(workers: int) -> Callable[[int], float]:
        def run(seed: int) -> float:
            torch.manual_seed(seed)
            batches = iter(usual_loaders[workers])
            first = next(batches)
            begun, done = time.perf_counter(), 0
            for batch in batches:
                done += len(batch)
            assert len(first) == options.batch
            return done / (time.perf_counter() - begun)

        return run

    contenders = {
        "ours": ours,
        "npy of ready chips, mapped": mapped,
        "xarray in a DataLoader, no worker": usual(0),
        f"xarray in a DataLoader, {options.workers} processes": usual(options.workers),
    }
    rates = in_turns(contenders, options.rounds)
    print(
        f"{dataset.chips} chips of {options.dates} x {len(BANDS)} x {options.chip} x "
        f"{options.chip}, chunks of {season.layout.chunk} px in shards of "
        f"{season.layout.shard} px, batches of {options.batch}, {options.workers} threads"
    )
    for name, rate in rates.items():
        print(f"{name:40} {rate:8.1f} chips/s   ours: {rates['ours'] / rate:6.2f} x")


class UsualChips:
    """What is usually written: a dataset over a lazy array, one ``isel`` a chip."""

    def __init__(self, path: Path, chip: int) -> None:
        import xarray as xr

        self.data = xr.open_zarr(path, chunks=None, consolidated=False)
        self.chip = chip
        self.across = self.data.sizes["x"] // chip

    def __len__(self) -> int:
        return self.across * (self.data.sizes["y"] // self.chip)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        row, col = (place * self.chip for place in divmod(index, self.across))
        square = self.data.isel(y=slice(row, row + self.chip), x=slice(col, col + self.chip))
        return square.reflectance.values, square.valid.values


def stack(chips: list[tuple[np.ndarray, np.ndarray]]) -> Any:
    import torch

    torch.from_numpy(np.stack([valid for _, valid in chips]))
    return torch.from_numpy(np.stack([values for values, _ in chips]))


def write_ready(
    dataset: Any, folder: Path, options: argparse.Namespace
) -> tuple[np.ndarray, np.ndarray]:
    """Write all chips into two files as they are, and map these."""
    folder.mkdir()
    shape = (dataset.chips, options.dates, len(BANDS), options.chip, options.chip)
    make = np.lib.format.open_memmap
    values = make(folder / "values.npy", "w+", np.int16, shape)
    valid = make(folder / "valid.npy", "w+", bool, (*shape[:2], *shape[3:]))
    number = 0
    for unit in range(len(dataset.units)):
        for chip in dataset.read(unit):
            values[number, : len(chip.days)] = chip.reflectance
            valid[number, : len(chip.days)] = chip.valid
            number += 1
    values.flush()
    valid.flush()
    del values, valid
    return np.load(folder / "values.npy", mmap_mode="r"), np.load(
        folder / "valid.npy", mmap_mode="r"
    )


def in_turns(contenders: dict[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    """Return the median of each, measured in turns after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            rate = run(turn)
            if turn:
                found[name].append(rate)
    return {name: statistics.median(rates) for name, rates in found.items()}


def compare_readers(cube: Path, options: argparse.Namespace) -> None:
    """Read single chunks at random by each engine, in one thread."""
    import zarr

    from stcln_geo.data.blocks import ShardReader, ZarrReader

    place = cube / SEASON / "reflectance"
    array = zarr.open_array(place, mode="r")
    own = ShardReader.open(array, place)
    assert own is not None
    readers: dict[str, Callable[[tuple[slice, ...]], np.ndarray]] = {
        "ShardReader": own.read,
        "zarr": ZarrReader(array, place).read,
    }
    try:
        import tensorstore

        opened = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(place)}}, open=True
        ).result()
        readers["tensorstore"] = lambda selection: opened[selection].read().result()
    except ImportError:
        print("tensorstore: not measured, it is not installed")
    chunk, across = array.chunks[-1], array.shape[-1] // array.chunks[-1]
    count = min(across * across, 40)

    def reads(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable[[int], float]:
        def run(seed: int) -> float:
            generator = np.random.default_rng(seed)
            begun = time.process_time()
            for _ in range(count):
                row, col = (int(place) * chunk for place in generator.integers(0, across, 2))
                read((slice(0, array.shape[0]), slice(0, array.shape[1]),
                      slice(row, row + chunk), slice(col, col + chunk)))  # fmt: skip
            return (time.process_time() - begun) / count * 1e3

        return run

    found = in_turns({name: reads(read) for name, read in readers.items()}, options.rounds)
    for name, cost in found.items():
        print(
            f"a chunk by {name:12} {cost:6.2f} ms of processor time, "
            f"{cost / found['ShardReader']:.2f} x ShardReader"
        )


def measure_wait(cube: Path, options: argparse.Namespace) -> None:
    """Train a few steps of the preset 'base' and see how long they wait for batches."""
    from stcln_geo.train.config import PretrainConfig
    from stcln_geo.train.pretrain import pretrain

    config = PretrainConfig.model_validate(
        {
            "steps": options.steps + 1, "batch_size": options.step_batch,
            "model": {"preset": "base"}, "data": {"chip": options.chip, "memory_gb": 0.5},
            "masking": {"gate": False}, "validation": {"chips": 0},
        }
    )  # fmt: skip
    run = cube.parent / "run"
    pretrain([cube], run, config, workers=options.workers)
    told = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    print(
        f"waiting for data: {100 * told['data_wait']:.2f} % of {options.steps + 1} steps of 'base' "
        f"with {options.step_batch} chips, from a cold start"
    )


def make_archive(path: Path, options: argparse.Namespace) -> Path:
    """Write a stack of many sites whose shards are links to the first: little to keep."""
    from stcln_geo.cube.stack import StackLayout
    from stcln_geo.cube.stack_store import create_stack, finish_stack, write_sites

    sites, per_shard = options.sites, 4
    sites -= sites % per_shard
    time_ = np.datetime64(SEASON) + np.arange(options.dates) * (360 // options.dates)
    made = create_stack(
        path, SEASON, site_id=[f"s{site}" for site in range(sites)], crs=["EPSG:32631"] * sites,
        transform=np.tile([10.0, 0, 5e5, 0, -10, 5e6], (sites, 1)), shape_yx=(SITE, SITE),
        time=np.tile(time_, (sites, 1)), bands=BANDS,
        layout=StackLayout(chunk=64, sites=per_shard),
    )  # fmt: skip
    parts = [pixels(np.random.default_rng(n), options.dates, SITE) for n in range(per_shard)]
    write_sites(
        made, 0,
        reflectance=np.stack([values for values, _ in parts]),
        valid=np.stack([valid for _, valid in parts]),
    )  # fmt: skip
    finish_stack(path, SEASON)
    for name in ("reflectance", "valid", "coverage"):
        folder = path / SEASON / name / "c"
        files = [file.relative_to(folder / "0") for file in (folder / "0").rglob("*")]
        for shard in range(1, sites // per_shard):
            for file in files:
                source, target = folder / "0" / file, folder / str(shard) / file
                if source.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copy2(source, target)
    return path


def measure_memory(archive: Path, options: argparse.Namespace) -> None:
    measured = measure_process(
        [
            __file__, "--archive", archive, "--memory", str(options.memory),
            "--chip", str(options.chip), "--workers", str(options.workers),
            "--batch", str(options.batch),
        ]
    )  # fmt: skip
    told = measured.told
    print(
        f"{options.sites} sites of {SITE} px, {told['raw'] / 1e9:.1f} GB of pixels, "
        f"{told['chips']} chips planned in {told['plan_seconds']:.2f} s, "
        f"{options.memory:g} GB for chips"
    )
    told_grown = ", ".join(f"{value / 1e9:.2f}" for value in told["grown"])
    print(f"memory above the start, at each eighth of the epoch: {told_grown} GB")
    print(
        f"peak of the process: {measured.memory / 1e9:.2f} GB, {told['start'] / 1e9:.2f} at start"
    )


def walk(archive: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Stream one epoch of an archive; tell how the memory grew."""
    import psutil

    from stcln_geo.train.config import PretrainConfig
    from stcln_geo.train.loading import plan_loading

    process = psutil.Process()
    config = PretrainConfig.model_validate(
        {"data": {"chip": options.chip, "memory_gb": options.memory}}
    )
    begun = time.perf_counter()
    loading = plan_loading([archive], config)
    planned = time.perf_counter() - begun
    stream, _ = loading.streams(batch_size=options.batch, workers=options.workers)
    start = process.memory_info().rss
    steps = loading.dataset.chips // options.batch
    marks = {steps * part // 8 for part in range(1, 9)}
    grown = []
    for step, _ in enumerate(stream.batches(0, steps), 1):
        if step in marks:
            grown.append(process.memory_info().rss - start)
    stream.close()
    source = loading.corpus.sources[0]
    return {
        "raw": source.sites * int(source.dates.max()) * SITE * SITE * (2 * len(BANDS) + 1),
        "chips": loading.dataset.chips,
        "plan_seconds": planned,
        "start": start,
        "grown": grown,
    }


if __name__ == "__main__":
    main()
