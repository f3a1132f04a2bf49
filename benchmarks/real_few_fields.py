"""Few labelled fields of real data: STCLN with and without pre-training, beside a random forest.

Two studies on the real data of ``../shared/data``. **flanders**: a cube of one season, three crops,
thirteen fields in three fixed parts; each part is tested on by models of the other two, and the
confusion matrices of the three are added up. **france**: pixel series in two regions far apart;
trained in one and tested in the other, both ways. Each seed draws the training fields, the first
weights and the order of chips; all contenders of a seed train on the same fields and are judged on
the same pixels. One pre-training a study sees all its pixels, those of test fields included, and a
cube of Belgium; it sees no label. No field is used to choose weights: the last ones are judged.

    python benchmarks/real_few_fields.py --out real-few-fields
    python benchmarks/real_few_fields.py --out real-few-fields --dry-run
    python benchmarks/real_few_fields.py --out small --preset tiny --steps 60 --pretrain-steps 200
    python benchmarks/real_few_fields.py --out real-few-fields --device cuda --jobs 12

Run again, it goes on where it stopped. With ``--prepare`` it writes the inputs and no more: then
the folder can be taken to a machine that has neither the data nor GDAL.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _few_fields_tables import SCORES, write_tables
from _real_data import BANDS, flanders_parts, france_parts, missing_data, prepare

ARMS = {
    "scratch": "STCLN from scratch",
    "pretrained": "STCLN after pre-training",
    "forest": "random forest, pixels",
    "forest-means": "random forest, field means",
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """How one of the data sets is trained on. Fixed before its test fields were first looked at."""

    parts: tuple[str, ...]
    """Cubes or stacks of the same pixels, each with a split of its own."""
    pooled: bool
    """True adds up the confusion matrices of the parts; False reports each."""
    fields: tuple[int, ...]
    """Training fields of each class, or all where there are fewer."""
    arms: tuple[str, ...]
    chip: int
    halo: int
    batch: int
    steps: int
    pretrain_batch: int
    pretrain_steps: int


STUDIES = {
    "flanders": Study(
        parts=flanders_parts(), pooled=True, fields=(1, 2), arms=tuple(ARMS),
        chip=16, halo=4, batch=4, steps=200, pretrain_batch=8, pretrain_steps=1000,
    ),
    "france": Study(
        parts=france_parts(), pooled=False, fields=(1, 3, 8),
        arms=("scratch", "pretrained", "forest"),
        chip=4, halo=0, batch=16, steps=200, pretrain_batch=64, pretrain_steps=1000,
    ),
}  # fmt: skip

MASKINGS = {
    "published": {
        "masking.strategy": "space-time", "masking.mask_ratio": 0.4, "masking.gate": True,
    },
    "dates": {"masking.strategy": "time", "masking.mask_ratio": 0.5, "masking.gate": False},
}  # fmt: skip
"""What pre-training hides: the tables were made as published, `dates` is the default since."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model, trained and judged."""

    study: str
    part: str
    fields: int
    arm: str
    seed: int

    def file(self, out: Path) -> Path:
        """Return where its confusion matrix is kept."""
        place = out / "runs" / self.part / f"fields-{self.fields}" / self.arm
        return place / f"seed-{self.seed}.json"

    def __str__(self) -> str:
        """Name it."""
        return f"{self.part}, {self.fields} a class, {self.arm}, seed {self.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    from stcln_geo.errors import StclnGeoError

    options = parse(arguments)
    studies = choose_studies(options)
    try:
        run_all(options, studies)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except StclnGeoError as error:
        sys.exit(str(error))


def run_all(options: argparse.Namespace, studies: dict[str, Study]) -> None:
    runs = [run for name in options.studies for run in list_runs(name, studies[name], options)]
    todo = [run for run in runs if not run.file(options.out).is_file()]
    check_recipe(options, studies)
    if options.dry_run:
        describe(options, studies, runs, todo)
        return
    for name in options.studies:
        make_inputs(options, name)
    if options.prepare:
        return
    write_json(options.out / "study.json", recipe(options, studies))
    carry_out(options, studies, todo)
    for path in write_tables(options.out, [(run, run.file(options.out)) for run in runs], studies):
        print(f"wrote {path}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for inputs, runs and tables")
    add("--data", type=Path, default=shared, help="folder of the real data (default: %(default)s)")
    add("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    add("--fields", type=int, nargs="+", help="training fields a class, in place of the study's")
    add("--seeds", type=int, default=5)
    add("--preset", default="base", choices=("tiny", "base", "large"))
    add("--steps", type=int, help="of fine-tuning, in place of the study's")
    add("--pretrain-steps", type=int, help="in place of the study's")
    add("--masking", default="published", choices=tuple(MASKINGS), help="what pre-training hides")
    add("--shift-days", type=int, default=0, help="data.shift_days of fine-tuning")
    add("--trees", type=int, default=500, help="of a forest")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--jobs", type=int, default=1, help="models at once, each in a process of its own")
    add("--prepare", action="store_true", help="write the inputs, and train nothing")
    add("--dry-run", action="store_true", help="tell what would be done, and write nothing")
    options = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "trees", "steps", "pretrain_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    if options.fields is not None and min(options.fields) < 1:
        parser.error(f"--fields {min(options.fields)}: it must be 1 or more")
    return options


def choose_studies(options: argparse.Namespace) -> dict[str, Study]:
    """Return the studies with what the command line says otherwise."""
    given = {
        "fields": tuple(options.fields) if options.fields else None,
        "steps": options.steps,
        "pretrain_steps": options.pretrain_steps,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    return {name: dataclasses.replace(study, **changes) for name, study in STUDIES.items()}


def list_runs(name: str, study: Study, options: argparse.Namespace) -> Iterator[Run]:
    for part in study.parts:
        for fields in study.fields:
            for arm in study.arms:
                for seed in range(options.seeds):
                    yield Run(study=name, part=part, fields=fields, arm=arm, seed=seed)


def recipe(options: argparse.Namespace, studies: dict[str, Study]) -> dict[str, Any]:
    """Return what the figures of one folder must share; seeds and fields may be added."""
    from stcln_geo.model.device import choose_device

    kept = {
        name: {
            key: value
            for key, value in dataclasses.asdict(studies[name]).items()
            if key not in ("fields", "parts", "arms", "pooled")
        }
        for name in studies
    }
    device = choose_device(options.device)
    own = {"preset": options.preset, "trees": options.trees, "masking": options.masking}
    return {**own, "device": device, **kept}


def check_recipe(options: argparse.Namespace, studies: dict[str, Study]) -> None:
    """Refuse a folder that holds runs of another recipe."""
    file = options.out / "study.json"
    if options.prepare or not file.is_file():
        return
    found, wanted = json.loads(file.read_text()), recipe(options, studies)
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        sys.exit(
            f"Cannot go on in {options.out}: its runs differ from these options in "
            f"{', '.join(differing)} ({file} tells how). A folder holds runs of one recipe. "
            "Choose another --out."
        )


def make_inputs(options: argparse.Namespace, study: str) -> None:
    folder = options.out / "inputs" / study
    if folder.is_dir():
        return
    if absent := missing_data(options.data, study):
        sys.exit(
            f"Cannot prepare the inputs of {study}: {' and '.join(absent)} not in {options.data}. "
            "The real data are kept outside this repository. Name their folder with --data, or "
            "give an --out that already has the inputs."
        )
    print(f"preparing {folder}", flush=True)
    prepare(options.data, study, folder)


def describe(
    options: argparse.Namespace, studies: dict[str, Study], runs: list[Run], todo: list[Run]
) -> None:
    for name in options.studies:
        study, own = studies[name], [run for run in runs if run.study == name]
        there = "are there"
        if not (options.out / "inputs" / name).is_dir():
            absent = " and ".join(missing_data(options.data, name))
            there = f"lack {absent} in {options.data}" if absent else "are to be prepared"
        print(
            f"{name}: {len(study.parts)} splits, {', '.join(map(str, study.fields))} fields a "
            f"class, {len(study.arms)} contenders, {options.seeds} seeds: {len(own)} models, of "
            f"which {sum(run in todo for run in own)} remain; inputs {there}"
        )
        print(
            f"  preset {options.preset}: {study.pretrain_steps} steps of pre-training, once, with "
            f"{study.pretrain_batch} chips; {study.steps} steps a model with {study.batch} chips "
            f"of {study.chip} px; forests of {options.trees} trees"
        )


def carry_out(options: argparse.Namespace, studies: dict[str, Study], todo: list[Run]) -> None:
    """Pre-train once a study, then train and judge what is missing."""
    needed = dict.fromkeys(run.study for run in todo if run.arm == "pretrained")
    for said in call_all(
        options.jobs, pretrain_study, [(options, name, studies[name]) for name in needed]
    ):
        print(said, flush=True)
    begun = time.perf_counter()
    calls = [(options, studies[run.study], run) for run in todo]
    for done, said in enumerate(call_all(options.jobs, carry_out_run, calls), start=1):
        left = (time.perf_counter() - begun) / done * (len(todo) - done)
        print(f"{done}/{len(todo)} {said}; {left / 60:.1f} min left", flush=True)


def call_all(
    jobs: int, function: Callable[..., str], calls: Sequence[tuple[Any, ...]]
) -> Iterator[str]:
    """Call a function with each of the arguments: here, or by so many processes at once."""
    if jobs == 1:
        begin_worker()
        for arguments in calls:
            yield function(*arguments)
        return
    with ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker
    ) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def begin_worker() -> None:
    """Take one thread, so that the order of sums does not depend on the machine."""
    import torch

    torch.set_num_threads(1)


def training_options(options: argparse.Namespace, study: Study) -> dict[str, Any]:
    return {
        "model.preset": options.preset,
        "model.bands": BANDS,
        "data.chip": study.chip,
        "data.halo": study.halo,
    }


def pretrain_study(options: argparse.Namespace, name: str, study: Study) -> str:
    from stcln_geo import pretrain
    from stcln_geo.train.config import PretrainConfig, load_config

    overrides = {
        **training_options(options, study),
        "batch_size": study.pretrain_batch,
        "steps": study.pretrain_steps,
        **MASKINGS[options.masking],
    }
    inputs = options.out / "inputs" / name
    cubes = [inputs / f"{study.parts[0]}.zarr", inputs / "belgium.zarr"]
    result = pretrain(
        cubes, options.out / "pretrain" / name, load_config(PretrainConfig, overrides=overrides),
        device=options.device,
    )  # fmt: skip
    return f"pre-training of {name}: {result.steps} steps, {result.seconds:.0f} s"


def carry_out_run(options: argparse.Namespace, study: Study, run: Run) -> str:
    """Train and judge one model; keep its confusion matrix, and nothing else of it."""
    import numpy as np

    from stcln_geo.report.metrics import metrics_from_confusion

    begun = time.perf_counter()
    path = options.out / "inputs" / run.study / f"{run.part}.zarr"
    judge = forest if run.arm.startswith("forest") else network
    told = judge(options, study, run, path)
    seconds = time.perf_counter() - begun
    write_json(run.file(options.out), {**dataclasses.asdict(run), **told, "seconds": seconds})
    metrics = metrics_from_confusion(np.array(told["confusion"]))
    return f"{run}: {SCORES['macro_miou']} {metrics.macro_miou:.3f} ({seconds:.1f} s)"


def network(options: argparse.Namespace, study: Study, run: Run, path: Path) -> dict[str, Any]:
    from stcln_geo import evaluate_run, finetune
    from stcln_geo.train.config import FinetuneConfig, load_config

    pretrained = run.arm == "pretrained"
    overrides = {
        **training_options(options, study),
        "init": str(options.out / "pretrain" / run.study) if pretrained else None,
        "batch_size": study.batch,
        "steps": study.steps,
        "validation.every": study.steps,
        "seed": run.seed,
        "labels.fields_per_class": run.fields,
        "data.shift_days": options.shift_days,
    }
    folder = run.file(options.out).with_suffix("")
    config = load_config(FinetuneConfig, overrides=overrides)
    result = finetune(path, folder, config, device=options.device)
    metrics = evaluate_run(folder, path, device=options.device).metrics
    chosen = json.loads((folder / "run.json").read_text())["splits"]["train_chosen"]
    shutil.rmtree(folder)
    return {
        "confusion": metrics.confusion.tolist(),
        "trained": {"fields": chosen["fields"], "pixels": chosen["pixels"]},
        "steps": result.steps,
    }


def forest(options: argparse.Namespace, study: Study, run: Run, path: Path) -> dict[str, Any]:
    from _forest import judge_forest, read_series

    from stcln_geo.cube.contract import SPLITS
    from stcln_geo.data.source import open_source
    from stcln_geo.data.split import check_labelled, few_label_fields

    fields, _ = check_labelled(open_source(path))
    chosen = few_label_fields(fields, fields_per_class=run.fields, seed=run.seed)
    confusion = judge_forest(
        read_series(path), chosen, fields.split == SPLITS["test"],
        trees=options.trees, seed=run.seed, means=run.arm == "forest-means",
    )  # fmt: skip
    trained = {"fields": int(chosen.sum()), "pixels": int(fields.pixels[chosen].sum())}
    return {"confusion": confusion.tolist(), "trained": trained}


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole: a stop leaves the old file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.write_text(json.dumps(value, indent=1) + "\n")
    made.replace(path)


if __name__ == "__main__":
    main()
