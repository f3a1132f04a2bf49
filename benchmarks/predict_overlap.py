"""Map a region end to end, and run its network alone on the same windows, in turns.

End to end is `predict_region` as a user calls it: plan, read, network, merge, compress, assemble,
check, pictures and report; without the seam audit, which labels windows a second time. Alone is
the network's forward pass on the same windows, already in memory as the network takes them, with as
many windows side by side. Both get credit for the labelled pixels, each counted once, times the
dates of the season. Printed: the medians, their ratio, and what the run's record says of reading,
network, writing and idle time.

With --scaling, instead: one worker on one core against two on two, of a run cut into equal shards.

    python benchmarks/predict_overlap.py --preset base --side 288 --dates 4 --rounds 5
    python benchmarks/predict_overlap.py --scaling --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _measure import load, measure_process
from _region import save_network, simulate_block, tile_cube

BATCH = 64
"""Windows per batch on a GPU, as in predict."""
PAD = 8


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = parse(arguments)
    if options.map is not None:
        print(json.dumps(map_on_cores(options)))
        return {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        block = simulate_block(folder, dates=options.dates)
        options.network = save_network(
            folder / "network.safetensors", block, preset=options.preset, window=options.window,
            halo=options.halo,
        )  # fmt: skip
        options.cube = tile_cube(folder / "cube.zarr", block, side=options.side)
        compare = compare_workers if options.scaling else compare_alone
        return compare(folder, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("tiny", "base", "large"), default="base")
    parser.add_argument("--side", type=int, default=288, help="of the region, px")
    parser.add_argument("--dates", type=int, default=4)
    parser.add_argument("--window", type=int, default=32, help="px")
    parser.add_argument("--halo", type=int, default=4, help="px")
    parser.add_argument("--shard-size", type=int, default=None, help="px; --scaling: an eighth")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="the median of each counts")
    parser.add_argument("--scaling", action="store_true", help="two workers against one")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the data")
    parser.add_argument("--map", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cores", help=argparse.SUPPRESS)
    parser.add_argument("--cube", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--network", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def compare_alone(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    run, _ = predict(folder / "first", options)  # also loads, compiles and warms what is first used
    alone = Alone(folder / "first", run)
    alone.run()
    whole, single, cpu, runs = [], [], [], []
    for index in range(options.rounds):
        seconds, own = timed(alone.run)
        single.append(seconds)
        out = folder / str(index)
        run, (taken, used) = predict(out, options)
        shutil.rmtree(out)
        whole.append(taken)
        cpu.append(own / used)
        runs.append(run)
    px_dates = run["owned_pixels"] * options.dates
    rates = {
        name: px_dates / statistics.median(values)
        for name, values in (("end to end", whole), ("network alone", single))
    }
    share = statistics.median(one / all_ for one, all_ in zip(single, whole, strict=True))
    device, precision = run["devices"][0], run["precisions"][0]
    print(
        f"{options.preset} in {precision} on {device}, {alone.threads} threads; {options.side} x "
        f"{options.side} px, {options.dates} dates, windows of {options.window} px with a halo of "
        f"{options.halo} px; {options.rounds} rounds, load {load():.1f}"
    )
    for name, rate in rates.items():
        print(f"{name:14} {rate:12,.0f} px-dates/s, each labelled pixel counted once")
    print(f"End to end / alone: {100 * share:.1f} % (median of the rounds)", end="")
    if device == "cpu":
        print(f"; by processor time {100 * statistics.median(cpu):.1f} %", end="")
    print(".")
    parts = {
        name: statistics.median(one["seconds"]["shards"][name] for one in runs)
        for name in ("total", "device", "read", "wait", "write", "idle")
    }
    print(
        "Of the time on shards: "
        + ", ".join(f"{name} {100 * parts[name] / parts['total']:.1f} %" for name in parts)
        + f"; after them, assembling: {statistics.median(after(one) for one in runs):.2f} s"
    )
    return {"share": share, "idle": parts["idle"] / parts["total"]}


def after(run: dict[str, Any]) -> float:
    return float(run["seconds"]["assemble"])


def predict(out: Path, options: argparse.Namespace) -> tuple[dict[str, Any], tuple[float, float]]:
    """Return the run's record, and the seconds and processor seconds that it took."""
    from stcln_geo.predict import PredictSpec, predict_region

    spec = PredictSpec(
        seam_audit=0, min_clear=1, shard_size=options.shard_size, precision=options.precision,
        device=options.device,
    )  # fmt: skip
    taken = timed(lambda: predict_region(options.cube, options.network, out, spec=spec))
    return json.loads((out / "run.json").read_text()), taken


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


class Alone:
    """A finished run's windows in memory, as tensors on the device, and its network."""

    def __init__(self, out: Path, run: dict[str, Any]) -> None:
        import torch

        from stcln_geo.execution import available_cores
        from stcln_geo.predict.windows import open_job

        job = open_job(str(out.resolve()), run["run"])
        self.network = job.network()
        self.device = torch.device(self.network.device)
        self.threads = available_cores()
        samples = windows_of(job, out)
        size, pad = (1, 1) if self.device.type == "cpu" else (BATCH, PAD)
        by_length: dict[int, list[Any]] = defaultdict(list)
        for sample in samples:
            by_length[-(-len(sample.dates) // pad) * pad].append(sample)
        self.batches = [
            self._batch(group[first : first + size], length)
            for length, group in by_length.items()
            for first in range(0, len(group), size)
        ]

    def _batch(self, samples: Sequence[Any], length: int) -> tuple[Any, Any, Any]:
        import torch

        shape = (len(samples), length, *samples[0].reflectance.shape[1:])
        images = np.zeros(shape, dtype=np.float32)
        valid = np.zeros((*shape[:2], *shape[3:]), dtype=bool)
        days = np.zeros(shape[:2], dtype=np.int64)
        for place, sample in enumerate(samples):
            count = len(sample.dates)
            valid[place, :count] = sample.valid[sample.dates]
            values = sample.reflectance[sample.dates] * np.float32(1e-4)
            images[place, :count] = np.where(valid[place, :count, None], values, 0)
            days[place, :count] = sample.days[sample.dates]
        return tuple(torch.from_numpy(one).to(self.device) for one in (images, days, valid))

    def run(self) -> None:
        """Run the network on every window, and wait for the last."""
        import torch

        from stcln_geo.model.device import autocast_for

        def forward(batch: tuple[Any, Any, Any]) -> None:
            with torch.inference_mode(), autocast_for(self.network.precision, self.device.type):
                self.network.module(*batch)

        if self.device.type == "cpu":
            torch.set_num_threads(1)
            with ThreadPoolExecutor(
                self.threads, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                list(pool.map(forward, self.batches))
            return
        for batch in self.batches:
            forward(batch)
        torch.cuda.synchronize()


def windows_of(job: Any, out: Path) -> list[Any]:
    """Return what the network sees in a run, window by window."""
    from stcln_geo.grid import Window
    from stcln_geo.predict.forward import Answer
    from stcln_geo.predict.stitch import pieces_of
    from stcln_geo.predict.windows import Tally, run_windows

    class Recorder:
        device = "cpu"
        samples: list[Any] = []  # noqa: RUF012

        def label(self, samples: Sequence[Any], *_: Any, **__: Any) -> Iterator[Answer]:
            self.samples += samples
            for _ in samples:
                yield Answer(layers={}, probability=None, embedding=None, seconds=0.0)

    recorder = Recorder()
    for path in sorted((out / "shards").glob("*.json")):
        shard = Window(*json.loads(path.read_text())["shard"])
        pieces = pieces_of(shard, job.lattice, job.inside(shard))
        for _ in run_windows(job, recorder, pieces, job.recipe, threads=1, tally=Tally()):
            pass
    return recorder.samples


def compare_workers(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < 2:
        print("not measured: two cores are needed, and a system that can tie processes to them")
        return {}
    taken: dict[int, list[float]] = {1: [], 2: []}
    for index in range(options.rounds):
        for workers in taken:
            out = folder / f"{index}-{workers}"
            measured = measure_process([
                __file__, "--map", out, "--cube", options.cube, "--network", options.network,
                "--cores", ",".join(map(str, cores[:workers])), "--precision", options.precision,
                "--shard-size", str(options.shard_size or max(options.side // 8, 1)),
            ])  # fmt: skip
            taken[workers].append(measured.told["label"])
            shutil.rmtree(out)
    one, two = (statistics.median(values) for values in taken.values())
    print(
        f"{options.preset}, {options.side} x {options.side} px, {options.dates} dates, "
        f"{measured.told['shards']} shards, {options.rounds} rounds, load {load():.1f}: two "
        f"workers on two cores label {one / two:.2f} x as fast as one on one, their start included "
        f"({one:.1f} s and {two:.1f} s)."
    )
    return {"speedup": one / two}


def map_on_cores(options: argparse.Namespace) -> dict[str, Any]:
    """Map with one worker of one thread for each core, all of the run tied to these cores."""
    from stcln_geo.execution import Execution
    from stcln_geo.predict import PredictSpec, predict_region

    cores = {int(core) for core in options.cores.split(",")}
    os.sched_setaffinity(0, cores)
    predict_region(
        options.cube, options.network, options.map,
        spec=PredictSpec(
            seam_audit=0, min_clear=1, shard_size=options.shard_size,
            precision=options.precision, device="cpu",
        ),
        execution=Execution(workers=len(cores)),
    )  # fmt: skip
    run = json.loads((options.map / "run.json").read_text())
    return {"label": run["seconds"]["label"], "shards": run["shards"]}


if __name__ == "__main__":
    main()
