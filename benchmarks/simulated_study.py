"""Few labels and early season on simulated regions: the study of study/simulated.toml.

The regions are simulated, their cubes built and labelled, and `stcln-geo experiment` is run on
them: few-labels and early-season. All of it follows from the file, whose parameters and seeds are
committed before a run. Stop it whenever you like, and run the same command again: what is done is
kept, and so the study can be made in pieces.

    python benchmarks/simulated_study.py OUT --only data --workers 16
    python benchmarks/simulated_study.py OUT --only few-labels --device cuda --jobs 4
    python benchmarks/simulated_study.py OUT --only early-season --device cuda --jobs 4
    python benchmarks/simulated_study.py OUT --dry-run

Without --only, everything is done one after the other. OUT/few-labels and OUT/early-season hold
tables, plots and reports.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shutil
import sys
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

STUDY = Path(__file__).resolve().parent / "study" / "simulated.toml"
EXPERIMENTS = ("few-labels", "early-season")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for cubes, runs and tables")
    parser.add_argument("--study", type=Path, default=STUDY, help="the file of the study")
    parser.add_argument("--only", choices=("data", *EXPERIMENTS), help="do no more than this")
    parser.add_argument("--workers", type=int, default=1, help="regions at once, for the cubes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, help="instead of the study's")
    parser.add_argument("--set", action="append", default=[], dest="assignments",
                        metavar="PART.KEY=VALUE", help="as of stcln-geo experiment, after the "
                        "study's: for trials; the report lists it")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what the experiments take")
    options = parser.parse_args(arguments)
    study = read_study(options.study)

    if options.only in (None, "data"):
        make_data(study, options.out, workers=options.workers)
    for name in EXPERIMENTS:
        if options.only in (None, name):
            code = run_experiment(name, study, options)
            if code:
                sys.exit(code)


def read_study(path: Path) -> dict[str, Any]:
    """Read a file, whose tables change or add keys of those of the file that it extends."""
    study = tomllib.loads(path.read_text(encoding="utf-8"))
    if "extends" not in study:
        return study
    made = read_study(path.parent / study.pop("extends"))
    for key, value in study.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    return made


def files_of(path: Path) -> list[Path]:
    """Return a study's file, and those that it extends."""
    further = tomllib.loads(path.read_text(encoding="utf-8")).get("extends")
    return [path, *(files_of(path.parent / further) if further else ())]


def make_data(study: dict[str, Any], out: Path, *, workers: int) -> None:
    """Simulate the regions and build their cubes, several at once; whole ones are kept."""
    begun = time.perf_counter()
    tasks = [(study["simulator"], region, study["split"], out) for region in study["regions"]]
    if workers <= 1:
        for task in tasks:
            print(make_region(*task))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
            for done in as_completed([pool.submit(make_region, *task) for task in tasks]):
                print(done.result(), flush=True)
    print(f"data: {time.perf_counter() - begun:.0f} s")


def make_region(
    common: dict[str, Any], region: dict[str, Any], split: dict[str, Any], out: Path
) -> str:
    """Simulate one region, build its cube, and label and split it where it has labels."""
    from stcln_geo.catalog import load_catalog
    from stcln_geo.cube.build import build_cube
    from stcln_geo.cube.labels import burn_labels
    from stcln_geo.cube.plan import CubeSpec, plan_cube
    from stcln_geo.cube.search import search_items
    from stcln_geo.data.split_labels import SplitSpec, split_labels
    from stcln_geo.legend import Legend
    from stcln_geo.simulate import SimulationSpec, simulate_archive

    own = {key: value for key, value in region.items() if key not in ("name", "labelled")}
    spec = SimulationSpec(**{**common, **own})
    name, season = region["name"], region.get("labelled")
    cube, done = out / "cubes" / f"{name}.zarr", out / "cubes" / f".{name}.done"
    if done.is_file() and done.read_text(encoding="utf-8") == repr((spec, season, split)):
        return f"{name}: {cube} is there"
    archive = simulate_archive(out / "archives" / name, spec)
    items = search_items(load_catalog(str(archive.catalog)))
    build_cube(plan_cube(items, spec=CubeSpec(), window=spec.window), cube)
    told = f"{name}: {cube}, {spec.width} x {spec.height} px, {spec.seasons} seasons"
    if season is not None:
        # Of a single season the column has no year.
        column = f"crop_code_{season[:4]}" if spec.seasons > 1 else "crop_code"
        burn_labels(
            cube, archive.parcels, column=column, season=season,
            legend=Legend.read(archive.legend),
        )  # fmt: skip
        report = split_labels(
            cube,
            SplitSpec(
                by=split["by"], block_pixels=split["block"], test=split["test"],
                validation=split["validation"], seed=split["seed"],
            ),
            season=season,
        )  # fmt: skip
        told = "\n".join([told, *(f"  {line}" for line in report.lines())])
    done.write_text(repr((spec, season, split)), encoding="utf-8")
    return told


def run_experiment(name: str, study: dict[str, Any], options: argparse.Namespace) -> int:
    """Run one experiment on the cubes of the study, as the command line does."""
    from stcln_geo.cli.main import invoke

    cubes = options.out / "cubes"
    labelled = [region for region in study["regions"] if region.get("labelled")]
    seasons = {region["labelled"] for region in labelled}
    if len(seasons) != 1:
        sys.exit(f"the labelled seasons must be one: {sorted(seasons)}")
    common, own = study["experiment"], study[name]
    words: list[object] = ["experiment", name, "--season", *seasons]
    for region in labelled:
        words += ["--data", cubes / f"{region['name']}.zarr"]
    for region in study["regions"]:
        words += ["--pretrain-data", cubes / f"{region['name']}.zarr"]
    for key in ("fields", "months"):
        if key in own:
            words += [f"--{key}", ",".join(map(str, own[key]))]
    for text in [*common["set"], *own.get("set", ()), *options.assignments]:
        words += ["--set", text]
    words += [
        "--preset", common["preset"], "--seeds", options.seeds or common["seeds"],
        "--device", options.device, "--jobs", options.jobs,
        "--out", options.out / name,
    ]  # fmt: skip
    if options.dry_run:
        words.append("--dry-run")
    else:
        take_over_pretraining(name, study, options.out)
    words = [str(word) for word in words]
    print("$ stcln-geo", *words, flush=True)
    code = invoke(words)
    if not code and not options.dry_run:
        tell_of_the_study(options.out / name / "report.md", study, options)
    return code


def take_over_pretraining(name: str, study: dict[str, Any], out: Path) -> None:
    """Begin with the pre-training of another experiment that pre-trains in the same way."""
    target = out / name / "pretraining"
    for other in EXPERIMENTS:
        source = out / other / "pretraining"
        alike = all(
            text.startswith("finetune.")
            for key in (name, other)
            for text in study[key].get("set", ())
        )
        if other != name and alike and source.is_dir() and not target.exists():
            part = target.with_name("pretraining.part")
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(source, part, ignore=shutil.ignore_patterns("*.lock"))
            part.rename(target)
            print(f"{name}: takes over the pre-training of {other}", flush=True)


def tell_of_the_study(report: Path, study: dict[str, Any], options: argparse.Namespace) -> None:
    """Add to a report, which is written anew each time, what the data were simulated by."""
    files = files_of(options.study)
    names = " and ".join(
        f"`{path.name}` (sha256 `{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}`)"
        for path in files
    )
    changes = [f"- {name}: {text}" for name, text in study.get("changes", {}).items()]
    differing = [f"- {text}, on the command line" for text in options.assignments]
    if options.seeds not in (None, study["experiment"]["seeds"]):
        differing.append(f"- {options.seeds} seeds, on the command line")
    lines = [
        "## The study",
        "",
        f"The data are simulated. All parameters and seeds are those of {names}, committed "
        "before the first run. Changed since, or for this run:",
        "",
        *(changes + differing or ["- nothing"]),
        "",
    ]
    for path in files:
        lines += ["```toml", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    with report.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines))


if __name__ == "__main__":
    main()
