"""Fine-tune on few dates and few fields: from pre-training on many dates, and from scratch.

A simulated region has two seasons. A network is pre-trained, without labels, on all dates of the
first. Then it is fine-tuned on a few dates of the second, and so is one of random weights: with the
same fields, steps and options, once a seed. Both are judged on the same test fields. A seed draws
the training fields, the first weights and the order of chips, so the interval (Student's, of the
paired differences) is about these, for this one region and this one pre-training.

    python benchmarks/few_dates.py
    python benchmarks/few_dates.py --size 400x400 --seeds 10 --pretrain-steps 2000 --steps 300
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="200x200", help="of the region (pixels)")
    parser.add_argument("--dates", type=int, default=30, help="of each season")
    parser.add_argument("--few", type=int, default=12, help="dates that are fine-tuned on")
    parser.add_argument("--fields", type=int, default=3, help="training fields of each class")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--pretrain-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--chip", type=int, default=16)
    parser.add_argument("--min-fields", type=int, default=8, help="rarer classes are left out")
    parser.add_argument("--scratch", type=Path, help="folder for what is written meanwhile")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="few-dates-", dir=options.scratch))
    try:
        compare(options, folder)
    finally:
        shutil.rmtree(folder)


def compare(options: argparse.Namespace, folder: Path) -> None:
    from stcln_geo import evaluate_run, finetune, pretrain
    from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config

    begun = time.perf_counter()
    many, few = make_cubes(options, folder)
    describe(few, options)
    shared = {"model.preset": options.preset, "data.chip": options.chip, "batch_size": 8}
    recipe = load_config(PretrainConfig, overrides={**shared, "steps": options.pretrain_steps})
    start = pretrain([many], folder / "pretrained", recipe)
    print(f"pre-training: {start.steps} steps on {options.dates} dates of the season before")

    found: dict[str, list[float]] = {"from pre-training": [], "from scratch": []}
    for seed in range(options.seeds):
        for name, scores in found.items():
            pretrained = name == "from pre-training"
            # The preset is named to both: the learning rate follows from it.
            own: dict[str, Any] = {
                **shared,
                "init": str(start.path) if pretrained else None,
                "steps": options.steps,
                "validation.every": max(options.steps // 4, 1),
                "seed": seed,
                "labels.fields_per_class": options.fields,
            }
            run = folder / f"{'pretrained' if pretrained else 'scratch'}-{seed}"
            finetune(few, run, load_config(FinetuneConfig, overrides=own))
            scores.append(evaluate_run(run, few).metrics.macro_miou)
        print(f"seed {seed}: " + ", ".join(f"{name} {found[name][-1]:.4f}" for name in found))
    tell(found)
    print(f"{time.perf_counter() - begun:.0f} s in all")


def make_cubes(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Build the season before with all dates, and a few dates of the next one with labels."""
    from stcln_geo.catalog import load_catalog
    from stcln_geo.cube.build import build_cube
    from stcln_geo.cube.dataset import open_cube, write_cube
    from stcln_geo.cube.labels import burn_labels
    from stcln_geo.cube.plan import CubeSpec, plan_cube
    from stcln_geo.cube.search import search_items
    from stcln_geo.cube.store import open_season, write_split
    from stcln_geo.data.split import check_labelled, split_fields
    from stcln_geo.legend import Legend
    from stcln_geo.simulate import SimulationSpec, simulate_archive

    width, height = map(int, options.size.split("x"))
    spec = SimulationSpec(width=width, height=height, dates=options.dates, seasons=2)
    made = simulate_archive(folder / "archive", spec)
    items = search_items(load_catalog(str(made.catalog)))
    both = build_cube(
        plan_cube(items, spec=CubeSpec(), window=spec.window), folder / "both.zarr"
    ).path
    first, second = (f"{spec.start_year + season}-09-01" for season in range(2))
    write_cube(open_cube(both, first), folder / "many.zarr")

    season = open_cube(both, second)
    kept = np.linspace(0, season.sizes["time"] - 1, options.few).round().astype(int)
    write_cube(season.isel(time=kept), folder / "few.zarr")
    burn_labels(
        folder / "few.zarr", made.parcels, column=f"crop_code_{spec.start_year + 1}",
        legend=Legend.read(made.legend), min_fields=options.min_fields,
    )  # fmt: skip
    labelled = open_season(folder / "few.zarr", mode="r+")
    fields, _ = check_labelled(labelled)
    write_split(labelled, split_fields(fields))
    return folder / "many.zarr", folder / "few.zarr"


def describe(cube: Path, options: argparse.Namespace) -> None:
    from stcln_geo.cube.contract import SPLITS
    from stcln_geo.cube.store import open_season
    from stcln_geo.data.split import check_labelled

    season = open_season(cube)
    fields, legend = check_labelled(season)
    counts = {name: int((fields.split == code).sum()) for name, code in SPLITS.items()}
    print(
        f"simulated region of {options.size} px, {len(season.time)} dates, {len(season.bands)} "
        f"bands, {len(legend)} classes, {len(fields)} fields: {options.fields} a class to train "
        f"on, of {counts['train']}; {counts['validation']} validation, {counts['test']} test"
    )


def tell(found: dict[str, list[float]]) -> None:
    """Print means, and the mean difference with its interval."""
    from scipy.stats import t as student

    for name, scores in found.items():
        print(f"{name}: mean macro mIoU {np.mean(scores):.4f} on the test fields")
    differences = np.subtract(*found.values())
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        print(f"difference {mean:+.4f}, of one seed: no interval")
        return
    spread = float(differences.std(ddof=1)) / math.sqrt(count)
    half = float(student.ppf(0.975, count - 1)) * spread
    print(
        f"difference {mean:+.4f}, 95 % interval {mean - half:+.4f} to {mean + half:+.4f} "
        f"({count} seeds)"
    )


if __name__ == "__main__":
    main()
