"""Train on the fields that `labels choose` names, and on as many drawn at random.

Each region is simulated, with fields that differ in calendar, growth and colour. A network is
pre-trained on it without labels. Of its training fields so many are chosen, once by their season
and once at random, and the network is fine-tuned on them, with the same steps, options and first
weights; both are judged on the same test fields. Classes that no chosen field has cannot be mapped
and count as 0. The interval (Student's, of the paired differences) is over regions and seeds; a
seed draws the random fields, begins the grouping elsewhere, and gives weights and order.

With ``--france FILE`` instead: the real pixel series of 500 samples, each a field, of ``FILE``
(``france_2023_dekads.geoparquet``), and a random forest in place of the network. Each seed draws a
third of the samples to test on.

    python benchmarks/choose_fields.py
    python benchmarks/choose_fields.py --regions 4 --seeds 3 --count 14 28
    python benchmarks/choose_fields.py --france ../shared/data/france_2023_dekads.geoparquet
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ARMS = ("random", "chosen")
SHARED = {"model.preset": "tiny", "data.chip": 24, "batch_size": 8}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, nargs="+", default=[14, 28], help="training fields")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--regions", type=int, default=3)
    parser.add_argument("--size", default="300x260", help="of a region (pixels)")
    parser.add_argument("--dates", type=int, default=16)
    parser.add_argument("--field-variation", type=float, default=1.5)
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--france", type=Path, help="file of pixel series: no region is simulated")
    parser.add_argument("--scratch", type=Path, help="folder for what is written meanwhile")
    options = parser.parse_args(arguments)
    found: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    rows = of_france(options) if options.france else of_regions(options)
    for where, count, arm, scores in rows:
        found.setdefault((arm, count), []).append(scores)
        print(
            f"{where}, {count} fields {arm}: macro mIoU {scores[0]:.3f}, accuracy {scores[1]:.3f}, "
            f"{scores[2]} classes seen",
            flush=True,
        )
    for count in options.count:
        tell(found, count)


def tell(found: dict[tuple[str, int], list[tuple[float, float, int]]], count: int) -> None:
    """Print means, and the mean differences with their intervals."""
    from scipy.stats import t as student

    pairs = np.array([found[arm, count] for arm in ARMS])
    print(f"{count} fields, {pairs.shape[1]} pairs:")
    for index, name in enumerate(("macro mIoU", "overall accuracy", "classes seen")):
        values = pairs[:, :, index]
        change = values[1] - values[0]
        half = math.nan
        if len(change) > 1:
            half = student.ppf(0.975, len(change) - 1) * change.std(ddof=1) / math.sqrt(len(change))
        print(
            f"  {name}: random {values[0].mean():.3f}, chosen {values[1].mean():.3f}, difference "
            f"{change.mean():+.3f} ({change.mean() - half:+.3f} to {change.mean() + half:+.3f})"
        )


def of_regions(
    options: argparse.Namespace,
) -> Iterator[tuple[str, int, str, tuple[float, float, int]]]:
    from stcln_geo import evaluate_run, finetune, pretrain
    from stcln_geo.cube.contract import SPLITS
    from stcln_geo.cube.store import open_season, write_split
    from stcln_geo.data.choice import choose_parcels, fill_gaps
    from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config

    for region in range(options.regions):
        folder = Path(tempfile.mkdtemp(prefix="choose-fields-", dir=options.scratch))
        try:
            cube, profiles = make_region(options, folder, seed=region)
            season = open_season(cube, mode="r+")
            split, code = season.fields.split.copy(), season.fields.code
            pool = np.flatnonzero((split == SPLITS["train"]) & np.isfinite(profiles).any(axis=1))
            recipe = {**SHARED, "steps": options.pretrain_steps}
            start = pretrain([cube], folder / "pre", load_config(PretrainConfig, overrides=recipe))
            for count in options.count:
                for seed in range(options.seeds):
                    rng = np.random.default_rng((region, seed, count))
                    picked = {
                        "random": rng.choice(pool, count, replace=False),
                        "chosen": pool[
                            choose_parcels(fill_gaps(profiles[pool]), count, seed=seed).chosen
                        ],
                    }
                    for arm, fields in picked.items():
                        own = np.where(split == SPLITS["train"], SPLITS["unused"], split)
                        own[fields] = SPLITS["train"]
                        write_split(season, own)
                        recipe = {
                            **SHARED, "init": str(start.path), "steps": options.steps,
                            "seed": seed, "validation.every": max(options.steps // 5, 1),
                        }  # fmt: skip
                        run = folder / f"{arm}-{count}-{seed}"
                        finetune(cube, run, load_config(FinetuneConfig, overrides=recipe))
                        judged = evaluate_run(run, cube).metrics
                        scores = judged.macro_miou, judged.overall_accuracy
                        seen = len(np.unique(code[fields]))
                        yield f"region {region}, seed {seed}", count, arm, (*scores, seen)
                        write_split(season, split)
        finally:
            shutil.rmtree(folder)


def make_region(options: argparse.Namespace, folder: Path, *, seed: int) -> tuple[Path, np.ndarray]:
    """Build a labelled cube; return it with the seasons of its fields, (F, D)."""
    import geopandas
    import rasterio.features

    from stcln_geo.catalog import load_catalog
    from stcln_geo.cube.build import build_cube
    from stcln_geo.cube.labels import burn_labels
    from stcln_geo.cube.plan import CubeSpec, plan_cube
    from stcln_geo.cube.search import search_items
    from stcln_geo.cube.store import open_season, write_split
    from stcln_geo.data.profiles import parcel_profiles
    from stcln_geo.data.split import check_labelled, split_fields
    from stcln_geo.legend import Legend
    from stcln_geo.simulate import SimulationSpec, simulate_archive

    width, height = map(int, options.size.split("x"))
    spec = SimulationSpec(
        width=width, height=height, dates=options.dates, seed=seed,
        field_variation=options.field_variation,
    )  # fmt: skip
    made = simulate_archive(folder / "archive", spec)
    items = search_items(load_catalog(str(made.catalog)))
    plan = plan_cube(items, spec=CubeSpec(), window=spec.window)
    cube = build_cube(plan, folder / "cube.zarr").path
    burn_labels(cube, made.parcels, column="crop_code", legend=Legend.read(made.legend))
    season = open_season(cube, mode="r+")
    fields, _ = check_labelled(season)
    write_split(season, split_fields(fields, validation=0.15, test=0.4))
    frame = geopandas.read_file(made.parcels).to_crs(str(season.geobox.crs))
    profiles = parcel_profiles(season, frame.geometry.to_numpy()).ndvi
    # Which polygon each field is: the one that burns where its number stands.
    order = rasterio.features.rasterize(
        zip(frame.geometry, range(1, len(frame) + 1), strict=True),
        out_shape=season.shape_yx, transform=season.geobox.affine, dtype="int32",
    )  # fmt: skip
    numbers = season.parcels[:]
    own = [int(order[numbers == number][0]) - 1 for number in fields.number]
    return cube, profiles[own]


def of_france(
    options: argparse.Namespace,
) -> Iterator[tuple[str, int, str, tuple[float, float, int]]]:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import jaccard_score

    from stcln_geo.data.choice import choose_parcels, fill_gaps

    values, ndvi, code = read_france(options.france)
    print(f"{len(code)} samples of {len(np.unique(code))} classes of at least 9 samples")
    for count in options.count:
        for seed in range(options.seeds):
            rng = np.random.default_rng((seed, count))
            test, pool = np.split(rng.permutation(len(code)), [len(code) // 3])
            picked = {
                "random": rng.choice(pool, count, replace=False),
                "chosen": pool[choose_parcels(fill_gaps(ndvi[pool]), count, seed=seed).chosen],
            }
            for arm, chosen in picked.items():
                forest = RandomForestClassifier(300, random_state=seed)
                told = forest.fit(values[chosen], code[chosen]).predict(values[test])
                miou = jaccard_score(
                    code[test], told, labels=np.unique(code), average="macro", zero_division=0
                )
                seen = len(np.unique(code[chosen]))
                accuracy = float((told == code[test]).mean())
                yield f"seed {seed}", count, arm, (float(miou), accuracy, seen)


def read_france(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return monthly means of bands (P, D * 9), the monthly NDVI (P, D), and the crops (P,)."""
    import pandas

    from stcln_geo.data.choice import fill_gaps

    bands = [f"S2-L2A-B{name}" for name in ("02", "03", "04", "05", "06", "07", "08", "11", "12")]
    columns: list[str] = ["sample_id", "timestamp", "ewoc_code", *bands]
    frame = pandas.read_parquet(path, columns=columns)
    day = (frame["timestamp"] - pandas.Timestamp("2022-09-01")).dt.days.to_numpy()
    frame, day = frame[(day >= 0) & (day < 390)], day[(day >= 0) & (day < 390)]
    sample, names = pandas.factorize(frame["sample_id"])
    sums, counts = np.zeros((2, len(names), 13, len(bands)))
    for index, band in enumerate(bands):
        numbers: Any = frame[band].to_numpy().astype(float)
        seen = (numbers > 0) & (numbers < 65535)
        at = sample[seen], day[seen] // 30, index
        np.add.at(sums, at, numbers[seen] / 1e4)
        np.add.at(counts, at, 1)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    red, nir = means[..., bands.index("S2-L2A-B04")], means[..., bands.index("S2-L2A-B08")]
    ndvi = (nir - red) / (nir + red)
    code = frame.groupby(sample)["ewoc_code"].first().to_numpy()
    kinds, size = np.unique(code, return_counts=True)
    kept = np.isin(code, kinds[size >= 9]) & np.isfinite(ndvi).any(axis=1)
    filled = np.stack([fill_gaps(means[kept, :, band]) for band in range(len(bands))], axis=2)
    return filled.reshape(int(kept.sum()), -1), ndvi[kept], code[kept]


if __name__ == "__main__":
    main()
