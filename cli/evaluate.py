"""``stcln-geo evaluate``: score a network on held-out fields, or a map on points or parcels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ._common import check_baseline, given_options, progress_bar, say, say_next

_DEFAULT = "score"
_OF_RUNS = ("split", "season", "protocol", "baseline", "device", "workers")
_OF_MAPS = (
    "reference", "column", "layer", "legend", "match", "rename", "other", "neighbourhood",
    "inner_buffer", "strata", "strata_column", "design", "confidence_level", "out",
)  # fmt: skip


class _DefaultGroup(TyperGroup):
    """A group that scores, unless its first word names another command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of what is not a command."""
        return super().parse_args(ctx, self._named(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of these words."""
        return super().resolve_command(ctx, self._named(args))

    def _named(self, args: list[str]) -> list[str]:
        if not args or args[0] in self.commands or args[0] in ("-h", "--help"):
            return args
        return [_DEFAULT, *args]


app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help=(
        "Score a network on held-out fields, or a map on points or parcels.\n\n"
        "`stcln-geo evaluate RUN CUBE` and `stcln-geo evaluate MAP REFERENCE` score; the word "
        "`score` may be left out. `stcln-geo evaluate design MAP` chooses the points to visit."
    ),
)


@app.command(name=_DEFAULT)
def score(
    context: typer.Context,
    subject: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_MAP",
            help="Run directory, folder of seeds or checkpoint; or a map: a product's folder or "
            "a GeoTIFF of classes.",
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Argument(
            metavar="CUBE_OR_REFERENCE",
            help="A cube or stack with labels and a split; for a map, points or parcels.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Run: test, validation or train.")] = "test",
    season: Annotated[
        str | None, typer.Option(help="Run: season, by its first day. Default: the only one.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run: judge by a protocol's windows and published rule of counting too.",
        ),
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            metavar="none|forest",
            help="Run: compare with a random forest on the same training fields.",
        ),
    ] = "none",
    device: Annotated[str, typer.Option(help="Run: auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(help="Run: threads that read.")] = 2,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Map: points or parcels; the same as the second argument."
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Map: column with the class on the ground. Default: reference."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Map: layer of a file with several. Default: the first.")
    ] = None,
    legend: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Map: value,name,color of a GeoTIFF without a legend."),
    ] = None,
    match: Annotated[
        str, typer.Option(help="Map: what the column holds: auto, value, name or code.")
    ] = "auto",
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="VALUE=CLASS", help="Map: read a value as a class. Repeatable."),
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VALUE",
            help="Map: value of land that is none of the map's classes; the map is wrong there. "
            "Repeatable.",
        ),
    ] = None,
    neighbourhood: Annotated[
        str, typer.Option(help="Map: at points, the pixel or the majority of 3x3.")
    ] = "pixel",
    inner_buffer: Annotated[
        float, typer.Option(metavar="M", help="Map: metres taken off the parcels' borders.")
    ] = 0.0,
    strata: Annotated[
        str,
        typer.Option(
            help="Map: map (its classes), none (simple random sample), or auto: the design file, "
            "else map for points and none for parcels."
        ),
    ] = "auto",
    strata_column: Annotated[
        str | None, typer.Option(help="Map: column with the stratum, as the design file names it.")
    ] = None,
    design: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Map: design file. Default: REFERENCE.design.json if it exists."
        ),
    ] = None,
    confidence_level: Annotated[
        float, typer.Option(help="Map: of the confidence intervals.")
    ] = 0.95,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Map: folder of the report. Default: beside the map."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and count; write nothing.")
    ] = False,
) -> None:
    """Score a network on the fields of a split, or a map.

    A network is scored on the windows of prediction; only the pixels of the split count. Writes
    RUN/evaluation-SPLIT/ with metrics.json, confusion.csv and confusion.png. --baseline forest
    says whether a simple method does as well (pip install 'stcln-geo[forest]').

    A map is scored on points or parcels, with standard errors and confidence intervals, and the
    area of each class is estimated (Olofsson et al. 2014). Writes MAP/accuracy/ with report.html,
    accuracy.json, confusion.csv and pictures.
    """
    from ..errors import InputError
    from ..maps.classmap import is_class_map

    if json_file is not None and json_file.is_dir():
        raise InputError(
            f"Cannot write the figures to --json {json_file}: it is a folder, and they are one "
            f"file. Name it, for example {json_file / 'figures.json'}."
        )
    if reference is not None and against is not None:
        raise InputError(
            f"Cannot score {subject} on two files ({against} and {reference}): a map has one "
            "reference. Give it as the second argument or with --reference."
        )
    if reference is None and not is_class_map(subject):
        if against is None:
            raise InputError(
                f"Cannot score {subject}: it is no map, and a network needs a cube to be scored "
                "on. Write `stcln-geo evaluate RUN CUBE`, or `stcln-geo evaluate MAP REFERENCE`."
            )
        _check_use(context, _OF_MAPS, f"the network {subject}: it is of maps")
        check_baseline(baseline)
        _score_run(
            subject, against, forest=baseline == "forest", split=split, season=season,
            json_file=json_file, device=device, workers=workers, dry_run=dry_run,
            protocol=protocol,
        )  # fmt: skip
        return
    _check_use(context, _OF_RUNS, f"the map {subject}: it is of networks")
    from ..report.accuracy import AccuracySpec

    spec = AccuracySpec(
        layer=layer,
        match=match,  # type: ignore[arg-type]  # checked where it is used
        rename=_pairs(rename, "--rename"),
        other=tuple(other or ()),
        neighbourhood=neighbourhood,  # type: ignore[arg-type]
        inner_buffer=inner_buffer,
        strata=strata,  # type: ignore[arg-type]
        strata_column=strata_column,
        design=design,
        confidence_level=confidence_level,
    )
    known = reference or against
    if known is None:
        raise InputError(
            f"Cannot score the map {subject}: nothing to compare it with was given. Name points or "
            "parcels with --reference; `stcln-geo evaluate design` chooses points to visit."
        )
    _score_map(
        subject, known, column=column, legend=legend, spec=spec, out=out, json_file=json_file,
        dry_run=dry_run,
    )  # fmt: skip


@app.command(name="design")
def design_sample(
    class_map: Annotated[
        Path, typer.Argument(metavar="MAP", help="A product's folder, or a GeoTIFF of classes.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Points to write: .gpkg, .parquet or .geoparquet.")
    ],
    count: Annotated[int | None, typer.Option(metavar="N", help="Points in all.")] = None,
    target_error: Annotated[
        float | None,
        typer.Option(
            metavar="E",
            help="Instead of --count: standard error wanted of the overall accuracy, as 0.01.",
        ),
    ] = None,
    expected: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CLASS=]U", help="User's accuracy expected; default 0.8. Repeatable."
        ),
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="proportional (to area), equal, or neyman.")
    ] = "proportional",
    minimum: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Points of each class at least. Default: 50, or half an equal share if less.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other points.")] = 0,
    legend: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="value,name,color of a GeoTIFF without a legend."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many points where; write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file of points, filled in or not.")
    ] = False,
) -> None:
    """Choose the points to visit: a stratified random sample of a map.

    The classes of the map are the strata. Fill in the column `reference` of the points, in QGIS
    for example, with names or codes of the map's classes, then run `stcln-geo evaluate MAP FILE`.
    The design is kept beside the points, so that they get the right weights.
    """
    from ..maps.classmap import open_class_map
    from ..report.design import SampleSpec, design_path, plan_sample, write_sample

    spec = SampleSpec(
        count=count,
        target_error=target_error,
        expected=_expected(expected),
        allocation=allocation,  # type: ignore[arg-type]  # checked where it is used
        minimum=minimum,
        seed=seed,
    )
    plan = plan_sample(open_class_map(class_map, legend=legend), spec)
    for line in plan.lines():
        say(line)
    if dry_run:
        say("Nothing was written (--dry-run).")
        return
    write_sample(plan, out, overwrite=overwrite)
    say(f"{out}: {int(plan.points.sum())} points; {design_path(out)}: their design")
    named = () if legend is None else ("--legend", legend)
    say_next("evaluate", class_map, out, *named, first="fill in the column reference, then ")


def _score_map(
    class_map: Path,
    reference: Path,
    *,
    column: str | None,
    legend: Path | None,
    spec: Any,
    out: Path | None,
    json_file: Path | None,
    dry_run: bool,
) -> None:
    from ..cube.store import write_json
    from ..report.accuracy import evaluate_map, write_accuracy
    from ..report.beside import ACCURACY_FOLDER

    accuracy = evaluate_map(class_map, reference, column=column, legend=legend, spec=spec)
    for line in accuracy.lines():
        say(line)
    if dry_run:
        say("Nothing was written (--dry-run).")
        return
    beside = class_map if class_map.is_dir() else class_map.with_suffix("")
    named = Path(f"{beside}-{ACCURACY_FOLDER}")
    folder = out or (beside / ACCURACY_FOLDER if class_map.is_dir() else named)
    say(f"Report: {write_accuracy(accuracy, folder)}")
    if json_file is not None:
        write_json(json_file, accuracy.to_json())


def _check_use(context: typer.Context, names: tuple[str, ...], subject: str) -> None:
    """Refuse options that say nothing about what is scored."""
    from ..errors import InputError

    given = given_options(context, names)
    if given:
        raise InputError(
            f"Cannot use {', '.join(given)} to score {subject}. Leave it out; --help says which "
            "option is of which."
        )


def _score_run(
    run: Path,
    cube: Path,
    *,
    forest: bool,
    split: str,
    season: str | None,
    json_file: Path | None,
    device: str,
    workers: int,
    dry_run: bool,
    protocol: str | None,
) -> None:
    import json

    from ..storage import location
    from ..train.evaluate import Evaluation, evaluate_run, plan_evaluation
    from ..train.over_seeds import evaluate_seeds, runs_of
    from ..train.protocol import load_protocol
    from ..train.run_directory import write_text

    options: dict[str, Any] = {"season": season, "split": split}
    if protocol is not None:
        options["protocol"] = load_protocol(protocol)
    where = location(run)
    runs = runs_of(where)
    if dry_run:
        for one in runs:
            for line in plan_evaluation(one, cube, **options).lines():
                say(line)
        return
    options |= {"device": device, "workers": workers, "forest": forest}
    several = runs != [where]

    def say_short(evaluation: Evaluation) -> None:
        figures = evaluation.figures()
        shown = ", ".join(f"{name} {_figure(value)}" for name, value in figures.items())
        say(f"{evaluation.checkpoint.parent.parent.name}: {shown}")

    with progress_bar("evaluate") as progress:
        if several:
            told = evaluate_seeds(where, cube, progress=progress, on_result=say_short, **options)
        else:
            evaluation = evaluate_run(where, cube, progress=progress, **options)
            told = evaluation.to_json()
    if several:
        for name in (
            "overall_accuracy",
            "macro_miou",
            "macro_f1",
            "kappa",
            "expected_calibration_error",
        ):
            figure = told[name]
            say(f"{name}: mean {_figure(figure['mean'])}, sd {_figure(figure['deviation'])}")
        for group, said in (("forest", "random forest"), ("network_less_forest", "difference")):
            for name, figure in told.get(group, {}).items():
                mean, deviation = _figure(figure["mean"]), _figure(figure["deviation"])
                say(f"{said}, {name}: mean {mean}, sd {deviation}")
        for name, figure in told.get("published", {}).items():
            if name != "rule":
                mean, deviation = _figure(figure["mean"]), _figure(figure["deviation"])
                say(f"by the published rule, {name}: mean {mean}, sd {deviation}")
        say(told["note"])
        if len(told["runs"]) > 1:
            out = Path("ensemble.safetensors")
            out = where / out if isinstance(where, Path) else out
            say_next("checkpoint", "ensemble", where, "--out", out)
    else:
        for line in evaluation.lines():
            say(line)
    if json_file is not None:
        write_text(json_file, json.dumps(told, indent=1) + "\n")


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Read repeated ``OLD=NEW``."""
    from ..errors import InputError

    pairs = {}
    for text in texts or []:
        old, equals, new = text.rpartition("=")
        if not equals or not old or not new:
            raise InputError(
                f"Cannot read {option} {text!r}: it must be two texts with = between. Write for "
                f"example {option} 'corn=Maize'."
            )
        pairs[old.strip()] = new.strip()
    return pairs


def _expected(texts: list[str] | None) -> dict[str, float]:
    """Read repeated ``0.8`` or ``Maize=0.8``; the empty name stands for all others."""
    from ..errors import InputError

    found = {}
    for text in texts or []:
        name, _, value = text.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise InputError(
                f"Cannot read --expected {text!r}: {value!r} is not a number. Write --expected 0.8 "
                "for all classes, or --expected 'Maize=0.9' for one."
            ) from error
    return found


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
