"""Write what an experiment came to: tables, scores, plots and a report on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..report.arms import Dot, plot_dots, plot_levels
from ..storage import Location
from ..train.config import to_toml
from ..train.run_copy import written_to
from ..train.run_directory import read_environment, read_summary, write_text
from .design import Design
from .paper import figure_lines, paper_lines
from .pool import add_up, average, pooled_design
from .scores import Score
from .settings import Settings
from .statistics import Estimate
from .steps import FinetuneStep, Steps
from .table import Row, Table, TableKind, by_seed, scores_csv, table_csv, table_markdown

__all__ = ["write_results"]

_AXIS = "macro mIoU on the test fields"
_POOLED_AXIS = "macro mIoU on the test fields of all folds"

_HEADINGS: dict[TableKind, str] = {
    "whole": "",
    "summed": " of all folds, confusion matrices added up",
    "averaged": " of all folds, mean over folds",
    "each": " of each fold",
}


def write_results(
    design: Design,
    settings: Settings,
    steps: Steps,
    scores: Sequence[Score],
    tables: Sequence[Table],
) -> Location:
    """Write all files into the experiment's folder or prefix; return where the report is."""
    with written_to(settings.out) as out:
        return settings.out / _write(design, settings, steps, scores, tables, out)


def _write(
    design: Design,
    settings: Settings,
    steps: Steps,
    scores: Sequence[Score],
    tables: Sequence[Table],
    out: Path,
) -> str:
    """Write all files into a folder; return the report's name."""
    write_text(out / "scores.csv", scores_csv(scores))
    parts = []
    for table in tables:
        write_text(out / table.file, table_csv(table))
        told = f"{_HEADINGS[table.kind]}, {table.reading} reading"
        parts.append(f"## Figures{told}\n\n{table_markdown(table, differences=False)}")
        if table.differences:
            parts.append(f"## Differences{told}\n\n{table_markdown(table, differences=True)}")
    text = "\n".join(parts)
    write_text(out / "table.md", text)
    pictures = _plot_all(design, tables, scores, out)
    protocol = design.views[0].protocol
    write_text(
        out / "report.md",
        "\n".join(
            [
                f"# {design.title}",
                "",
                *_about(design, settings, steps, scores),
                "",
                *(line for name in pictures for line in (f"![{design.title}]({name})", "")),
                text,
                *(paper_lines(design.name) if protocol is None else figure_lines(protocol)),
                *_recipes(steps),
                "",
            ]
        ),
    )
    return "report.md"


def _plot_all(
    design: Design, tables: Sequence[Table], scores: Sequence[Score], out: Path
) -> list[str]:
    """Draw the strict reading: of folds first all of them, then each; return the files' names."""
    strict = [table for table in tables if table.reading == "strict"]
    first = strict[0]
    if first.kind == "whole":
        return _plot(design, first, scores, out)
    pooled = add_up(scores) if first.kind == "summed" else average(scores)
    made = _plot(pooled_design(design), first, pooled, out, x_label=_POOLED_AXIS)
    arms = [arm.name for arm in design.arms]
    each = [
        replace(dot, hue=arms.index(row.arm)) for row in strict[-1].rows
        if not row.difference and row.data == first.rows[0].data
        and (dot := _dot(row, scores, label=f"{row.view}, {row.what}")) is not None
    ]  # fmt: skip
    if each:
        plot_dots(each, out / "folds.png", x_label=_AXIS, title=f"{design.title}: each fold")
        made.append("folds.png")
    return made


def _plot(
    design: Design, table: Table, scores: Sequence[Score], out: Path, *, x_label: str = _AXIS
) -> list[str]:
    """Draw the arms, and the differences; return the files' names."""
    data = table.rows[0].data
    means = [row for row in table.rows if row.data == data and not row.difference]
    made = []
    curves: dict[str, list[Dot]] = {}
    if design.along == "views":
        for row in means:
            if (dot := _dot(row, scores, label=row.view)) is not None:
                curves.setdefault(row.what, []).append(dot)
    elif any(design.arm(row.arm).level is not None for row in means):
        for row in means:
            arm = design.arm(row.arm)
            dot = _dot(row, scores, label="" if arm.level is None else f"{arm.level:g}",
                       place=arm.level)  # fmt: skip
            if dot is not None and arm.level is not None:
                curves.setdefault(arm.curve or arm.title, []).append(dot)
    if curves and max(len(curve) for curve in curves.values()) > 1:
        plot_levels(curves, out / "curve.png", x_label=design.axis, y_label=_AXIS,
                    title=design.title)  # fmt: skip
        made.append("curve.png")
    if design.along == "arms":
        several = len({row.view for row in means}) > 1
        dots = [
            dot for row in means
            if (dot := _dot(row, scores,
                            label=f"{row.what}, {row.view}" if several else row.what)) is not None
        ]  # fmt: skip
        if dots:
            plot_dots(dots, out / "arms.png", x_label=x_label, title=design.title)
            made.append("arms.png")
    differences = [
        Dot(label=row.what, mean=found.mean, low=found.low, high=found.high)
        for row in table.differences
        if row.data == data and (found := row.estimates["macro_miou"]).mean is not None
    ]
    if differences:
        plot_dots(differences, out / "differences.png", zero=True,
                  x_label="difference of macro mIoU, with 95 % interval",
                  title=f"{design.title}: differences")  # fmt: skip
        made.append("differences.png")
    return made


def _dot(
    row: Row, scores: Sequence[Score], *, label: str, place: float | None = None
) -> Dot | None:
    found = row.estimates["macro_miou"]
    if found.mean is None:
        return None
    values = by_seed(scores, row.arm, row.view_name)
    return Dot(
        label=label, mean=found.mean, low=found.low, high=found.high,
        values=tuple(values.values()), place=place,
    )  # fmt: skip


def _about(design: Design, settings: Settings, steps: Steps, scores: Sequence[Score]) -> list[str]:
    """Say what was done, on what data, and how to read the figures."""
    summaries = {step.out: read_summary(step.out) for step in steps.finetune}
    environment = read_environment(steps.finetune[0].out)
    lines = [design.question, ""]
    simulated = [is_simulated(step.cube) for step in _one_each(steps)]
    if all(simulated):
        lines += ["**The data are simulated: the figures are no evidence about real fields.**", ""]
    elif any(simulated):
        lines += ["**Some of the data are simulated: figures of these are no evidence about real "
                  "fields.**", ""]  # fmt: skip
    lines += ["| data | season | training, at most | validation | test |",
              "|---|---|---|---|---|"]  # fmt: skip
    for step in _one_each(steps):
        splits = summaries[step.out].get("splits", {})
        also = f", {step.views[0].title}" if len(design.parts) > 1 else ""
        lines.append(
            f"| {step.data}{' (simulated)' if is_simulated(step.cube) else ''}{also} | "
            f"{step.season} | "
            + " | ".join(
                f"{splits[name]['fields']} fields, {splits[name]['pixels']} pixels"
                for name in ("train", "validation", "test")
            )
            + " |"
        )
    trained = {
        (step.data, step.views[0].name, step.arm): summaries[step.out]
        .get("splits", {})
        .get("train_chosen", {})
        for step in steps.finetune
    }
    chosen: dict[str, list[str]] = {arm: [] for _, _, arm in trained}
    for (_, _, arm), count in trained.items():
        chosen[arm].append(str(count.get("fields")))
    lines += [
        "",
        *(
            f"- {arm.title}: trained on "
            f"{' and '.join(dict.fromkeys(chosen[arm.forest_of or arm.name]))} fields"
            for arm in design.arms
        ),
        f"- {len(settings.run_seeds)} seeds ({', '.join(map(str, settings.run_seeds))}): of fields "
        "chosen, first weights and order. A seed chooses the same fields in all arms with as many, "
        f"and the test fields {'of a fold ' if steps.pooling != 'none' else ''}are always the "
        "same, so differences are paired by seed",
        *_say_pooling(steps),
        *_say_pretraining(steps, settings),
        "- weights are chosen by all validation fields, whatever the number of training fields",
        *(f"- {note}" for note in (*steps.notes, *design.notes)),
        *(f"- source of the protocol: {source}" for source in _sources(design)),
        *(f"- {note}" for note in dict.fromkeys(score.note for score in scores)),
        "- strict reading: every labelled test pixel that was seen counts; macro figures are means "
        "over classes",
        say_intervals(settings.run_seeds, settings.pretrain_seeds if steps.pretrain else None),
        f"- stcln-geo {__version__}, {environment.get('device')}, {environment.get('precision')}, "
        f"Python {environment.get('python')}, "
        + ", ".join(f"{name} {value}" for name, value in environment["packages"].items() if value),
    ]
    unseen = {
        view.name: max(score.unseen for score in scores if score.view == view.name)
        for view in design.views
    }
    if any(unseen.values()):
        told = ", ".join(
            f"{design.view(name).title} {count}" for name, count in unseen.items() if count
        )
        lines.append(f"- test pixels that were not seen and do not count, at most: {told}")
    return lines


def say_intervals(seeds: Sequence[int], pretrainings: int | None) -> str:
    """Say what the intervals hold for.

    Parameters
    ----------
    pretrainings
        Pre-trainings that the runs take in turn; None where there is none.
    """
    of_what, shared = "of these data", ""
    if pretrainings == 1:
        of_what += " and of this pre-training"
    elif pretrainings is not None and pretrainings < len(seeds):
        shared = (
            f". The {len(seeds)} runs of a pre-trained arm share {pretrainings} pre-trainings, so "
            "that they are not independent: intervals of such arms, and of differences with them, "
            "are likely too narrow. Give as many --pretrain-seeds as --seeds for intervals that "
            "hold for pre-training too"
        )
    return (
        f"- intervals: 95 %, Student's t over seeds, {of_what}. They do not tell how figures would "
        f"differ in other regions{shared}"
    )


def _sources(design: Design) -> tuple[str, ...]:
    protocol = design.views[0].protocol
    return () if protocol is None else protocol.sources


def _say_pooling(steps: Steps) -> list[str]:
    """Say how folds come together."""
    if steps.pooling == "none":
        return []
    summed = (
        "- confusion matrices added up: of each seed those of all folds become one matrix, and "
        "figures are derived from it. The authors of PASTIS score so"
    )
    if steps.pooling == "mean":
        summed = (
            "- confusion matrices are not added up: test parts of rounds overlap, so that pixels "
            "would count twice, or rounds have other classes"
        )
    return [
        summed,
        "- mean over folds: of each seed the mean of the folds' figures. Sd over folds is between "
        "folds, each with its mean over seeds; there is no interval over folds, as their training "
        "parts overlap",
    ]


def _say_pretraining(steps: Steps, settings: Settings) -> list[str]:
    if not steps.pretrain:
        return []
    shown = read_environment(steps.pretrain[0].out).get("cubes", [])
    places = {(cube["cube"], cube["season"]) for cube in shown}
    kinds = dict.fromkeys(step.out.parent.name for step in steps.pretrain)
    chosen = [f"sites of pre-training by round: {', '.join(kinds)}"] if len(kinds) > 1 else []
    return [
        "- pre-training, without labels, on the seasons of these cubes and stacks: "
        + ", ".join(f"{Path(cube).name} {season}" for cube, season in sorted(places))
        + f"; {len(steps.pretrain)} in all, {settings.pretrain_seeds} of each kind",
        *(f"- {told}" for told in chosen if steps.finetune[0].protocol is not None),
    ]


def _recipes(steps: Steps) -> list[str]:
    """Give the settled options of one run of each arm, as written beside it."""
    lines = ["## Options", "", "Of the first seed of each arm; each run's are in its config.toml."]
    seen: set[str] = set()
    runs: list[tuple[str, Any]] = [(f"{step.out.parent.name}", step) for step in steps.pretrain]
    # Folds differ in what they are shown; variants of one another in their options too.
    named = steps.pooling == "none" and any(step.views[0].folder for step in steps.finetune)
    runs += [
        (f"{step.arm}, {step.views[0].title}" if named else step.arm, step)
        for step in steps.finetune
    ]
    for name, step in runs:
        kind = "pre-training" if step in steps.pretrain else "fine-tuning"
        if (key := f"{kind}, {name}") in seen:
            continue
        seen.add(key)
        file = step.out / "config.toml"
        text = file.read_text(encoding="utf-8") if file.is_file() else to_toml(step.config)
        lines += ["", f"### {key}", "", "```toml", text.rstrip(), "```"]
    return lines


def _one_each(steps: Steps) -> list[FinetuneStep]:
    """Return the first step of each data set, and of each round in it."""
    found = {(step.data, step.views[0].name): step for step in reversed(steps.finetune)}
    return list(found.values())[::-1]


def is_simulated(cube: Path) -> bool:
    """Return True where a cube was built from what `stcln-geo simulate` writes."""
    from ..cube.snapshot import read_items
    from ..simulate.stac import COLLECTION

    snapshot = cube / "items.parquet"
    if not snapshot.is_file():
        return False
    items = read_items(snapshot)
    return any(item.get("collection") == COLLECTION for item in items)


def describe(tables: Sequence[Table]) -> list[str]:
    """Say the macro mIoU of each row in a line; of several data sets, the mean over them."""
    lines = []
    for table in tables:
        figure = table.figures[0]
        if table.reading != "strict":
            continue
        for row in table.rows:
            found = row.estimates[figure]
            if found.mean is None or row.data != table.rows[0].data:
                continue
            if table.kind == "each" and row.difference:
                continue
            lines.append(f"{row.what}{_which(table, row)}: {figure} {found.mean:.4f}{_span(found)}")
    return lines


def _which(table: Table, row: Row) -> str:
    if table.kind == "summed":
        return ", all folds, confusion matrices added up"
    if table.kind == "averaged":
        return ", all folds, mean over folds"
    return f", {row.view}" if row.view else ""


def _span(found: Estimate) -> str:
    return "" if found.low is None else f", 95 % interval {found.low:.4f} to {found.high:.4f}"
