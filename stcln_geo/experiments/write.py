"""Write what an experiment came to: tables, scores, plots and a report on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..report.arms import Dot, plot_dots, plot_levels
from ..train.config import to_toml
from ..train.run_directory import RunDirectory, write_text
from .design import Design
from .paper import paper_lines
from .scores import Score
from .settings import Settings
from .steps import Steps
from .table import Row, Table, by_seed, make_table, scores_csv, table_csv, table_markdown

__all__ = ["write_results"]

_AXIS = "macro mIoU on the test fields"


def write_results(
    design: Design, settings: Settings, steps: Steps, scores: Sequence[Score]
) -> Path:
    """Write all files into the experiment's folder and return the report's path."""
    out = settings.out
    table = make_table(design, scores)
    write_text(out / "scores.csv", scores_csv(scores))
    write_text(out / "table.csv", table_csv(table))
    parts = ["## Figures, strict reading\n", table_markdown(table, differences=False)]
    if table.differences:
        parts += ["\n## Differences, strict reading\n", table_markdown(table, differences=True)]
    if any(score.rule is not None for score in scores):
        published = make_table(design, scores, published=True)
        write_text(out / "table-published.csv", table_csv(published))
        parts += [f"\n## Figures, {published.reading} reading\n",
                  table_markdown(published, differences=False)]  # fmt: skip
        if published.differences:
            parts += [f"\n## Differences, {published.reading} reading\n",
                      table_markdown(published, differences=True)]  # fmt: skip
    tables = "".join(part if part.endswith("\n") else f"{part}\n" for part in _spaced(parts))
    write_text(out / "table.md", tables)
    pictures = _plot(design, table, scores, out)
    write_text(
        out / "report.md",
        "\n".join(
            [
                f"# {design.title}",
                "",
                *_about(design, settings, steps, scores),
                "",
                *(line for name in pictures for line in (f"![{design.title}]({name})", "")),
                tables,
                *paper_lines(design.name),
                *_recipes(steps),
                "",
            ]
        ),
    )
    return out / "report.md"


def _spaced(parts: Sequence[str]) -> list[str]:
    return [f"{part}\n" if part.lstrip("\n").startswith("##") else part for part in parts]


def _plot(design: Design, table: Table, scores: Sequence[Score], out: Path) -> list[str]:
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
            plot_dots(dots, out / "arms.png", x_label=_AXIS, title=design.title)
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
    summaries = {step.out: RunDirectory(step.out).summary() for step in steps.finetune}
    environment = RunDirectory(steps.finetune[0].out).environment()
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
        lines.append(
            f"| {step.data}{' (simulated)' if is_simulated(step.cube) else ''} | {step.season} | "
            + " | ".join(
                f"{splits[name]['fields']} fields, {splits[name]['pixels']} pixels"
                for name in ("train", "validation", "test")
            )
            + " |"
        )
    trained = {
        (step.data, step.arm): summaries[step.out].get("splits", {}).get("train_chosen", {})
        for step in steps.finetune
    }
    chosen: dict[str, list[str]] = {arm: [] for _, arm in trained}
    for (_, arm), count in trained.items():
        chosen[arm].append(str(count.get("fields")))
    lines += [
        "",
        *(
            f"- {arm.title}: trained on {' and '.join(dict.fromkeys(chosen[arm.name]))} fields"
            for arm in design.arms
        ),
        f"- {settings.seeds} seeds, from {settings.first_seed}: of fields chosen, first weights "
        "and order. A seed chooses the same fields in all arms with as many, and the test fields "
        "are always the same, so differences are paired by seed",
        *_say_pretraining(steps, settings),
        "- weights are chosen by all validation fields, whatever the number of training fields",
        *(f"- {note}" for note in design.notes),
        *(f"- {note}" for note in dict.fromkeys(score.note for score in scores)),
        "- strict reading: every labelled test pixel that was seen counts; macro figures are means "
        "over classes",
        "- intervals: 95 %, Student's t over seeds, of these data"
        + (" and of this pre-training" if steps.pretrain and settings.pretrain_seeds == 1 else "")
        + ". They do not tell how figures would differ in other regions",
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


def _say_pretraining(steps: Steps, settings: Settings) -> list[str]:
    if not steps.pretrain:
        return []
    shown = RunDirectory(steps.pretrain[0].out).environment().get("cubes", [])
    places = {(cube["cube"], cube["season"]) for cube in shown}
    return [
        "- pre-training, without labels, on the seasons of these cubes and stacks: "
        + ", ".join(f"{Path(cube).name} {season}" for cube, season in sorted(places))
        + f"; {len(steps.pretrain)} in all, {settings.pretrain_seeds} of each kind"
    ]


def _recipes(steps: Steps) -> list[str]:
    """Give the settled options of one run of each arm, as written beside it."""
    lines = ["## Options", "", "Of the first seed of each arm; each run's are in its config.toml."]
    seen: set[str] = set()
    runs: list[tuple[str, Any]] = [(f"{step.out.parent.name}", step) for step in steps.pretrain]
    runs += [(step.arm, step) for step in steps.finetune]
    for name, step in runs:
        kind = "pre-training" if step in steps.pretrain else "fine-tuning"
        if (key := f"{kind}, {name}") in seen:
            continue
        seen.add(key)
        file = step.out / "config.toml"
        text = file.read_text(encoding="utf-8") if file.is_file() else to_toml(step.config)
        lines += ["", f"### {key}", "", "```toml", text.rstrip(), "```"]
    return lines


def _one_each(steps: Steps) -> list[Any]:
    """Return the first step of each data set."""
    return list({step.data: step for step in reversed(steps.finetune)}.values())[::-1]


def is_simulated(cube: Path) -> bool:
    """Return True where a cube was built from what `stcln-geo simulate` writes."""
    from ..cube.snapshot import read_items
    from ..simulate.stac import COLLECTION

    snapshot = cube / "items.parquet"
    if not snapshot.is_file():
        return False
    items = read_items(snapshot)
    return any(item.get("collection") == COLLECTION for item in items)


def describe(table: Table) -> list[str]:
    """Say the macro mIoU of each row in a line; of several data sets, the mean over them."""
    figure = table.figures[0]
    lines = []
    for row in table.rows:
        found = row.estimates[figure]
        if found.mean is None or row.data != table.rows[0].data:
            continue
        span = "" if found.low is None else f", 95 % interval {found.low:.4f} to {found.high:.4f}"
        view = f", {row.view}" if row.view else ""
        lines.append(f"{row.what}{view}: {figure} {found.mean:.4f}{span}")
    return lines
