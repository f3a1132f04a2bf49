"""Pre-train on a CPU with freed memory kept for the next step, and without, in turns.

Each run is a process of its own on the same simulated cube, with the same chips, dates and weights;
their losses must be equal. Printed are the seconds of the run, its start left out, and its peak
memory, of the runs that keep memory beside those that leave it to the C library (medians).

    python benchmarks/train_memory.py
    python benchmarks/train_memory.py --preset base --batch 2 --steps 8 --drop-dates 0
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path

from _measure import Measured, load, measure_process
from loader import make_cube

KEPT, USUAL = "kept", "usual"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.cube is not None:
        train(options)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        cube = make_cube(Path(scratch) / "cube.zarr", options)
        print(f"preset {options.preset}, {options.steps} steps of {options.batch} chips of "
              f"{options.dates} dates and {options.chip} px, load {load():.1f}")  # fmt: skip
        found: dict[str, list[Measured]] = {KEPT: [], USUAL: []}
        for _ in range(options.rounds):
            for name, runs in found.items():
                runs.append(measure_process([__file__, *repeated(options), "--cube", cube, name]))
    losses = {run.told["loss"] for runs in found.values() for run in runs}
    if len(losses) != 1:
        raise SystemExit(f"the runs ended with different losses: {sorted(losses)}")
    seconds, memory = (
        {name: statistics.median(of(run) for run in runs) for name, runs in found.items()}
        for of in (lambda run: run.told["seconds"], lambda run: run.memory)
    )
    print(
        f"kept: {seconds[USUAL] / seconds[KEPT]:.2f} x as fast, "
        f"peak {memory[KEPT] / 1e9:.2f} GB beside {memory[USUAL] / 1e9:.2f} GB "
        f"({memory[KEPT] / memory[USUAL]:.2f} x)"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--drop-dates", type=float, default=0.3, help="share, drawn anew each time")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", type=int, default=512, help="pixels of the cube")
    parser.add_argument("--dates", type=int, default=30)
    parser.add_argument("--chip", type=int, default=32)
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the data")
    parser.add_argument("--cube", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def repeated(options: argparse.Namespace) -> list[str]:
    """Give the options that a run needs."""
    names = ("preset", "steps", "batch", "drop_dates", "chip")
    return [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]


def train(options: argparse.Namespace) -> None:
    """Pre-train as the command does, and tell seconds and the last loss."""
    from stcln_geo.train import fit
    from stcln_geo.train.config import PretrainConfig, load_config
    from stcln_geo.train.pretrain import pretrain

    cube, memory = options.cube
    if memory == USUAL:
        fit.memory_kept = lambda device: nullcontext()
    recipe = load_config(
        PretrainConfig,
        overrides={
            "steps": options.steps, "batch_size": options.batch, "model.preset": options.preset,
            "data.chip": options.chip, "data.drop_dates": options.drop_dates, "seed": 0,
            "masking.gate": False, "validation.chips": 0,
        },
    )  # fmt: skip
    run = Path(tempfile.mkdtemp(dir=Path(cube).parent))
    try:
        pretrain([cube], run / "run", recipe, device="cpu")
        told = json.loads((run / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    finally:
        shutil.rmtree(run)
    print(json.dumps({"seconds": told["seconds"], "loss": told["train_loss"]}))


if __name__ == "__main__":
    main()
