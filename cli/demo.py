"""``stcln-geo demo``: the whole path, by the same commands a user would type."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import console, say

if TYPE_CHECKING:
    from ..report.html import Stage

# Small enough for two cores: chips of 24 px cost a third of 32 px in the spatial attention.
_CHIP = "24"
_SIZE = "301x203"
_TRAINING = ["--preset", "tiny", "--batch-size", "4", "--chip", _CHIP, "--max-dates", "16"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with catalog.json and parcels.gpkg to use. Default: simulate a region."
        ),
    ] = None,
    column: Annotated[
        str, typer.Option(help="Column of parcels.gpkg that holds the crop.")
    ] = "crop_code",
    fields_per_class: Annotated[
        int | None, typer.Option(help="Labelled fields per class. Default: 5; all with --data.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH", help="Size of the simulated region in pixels. Default: 301x203."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of pre-training.")] = 400,
    finetune_steps: Annotated[
        int, typer.Option(min=1, help="Steps of each of the two fine-tunings.")
    ] = 200,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and run none.")
    ] = False,
) -> None:
    """Run the whole path and end with one page to look at.

    Simulates a region (or takes --data), builds the cube, burns and splits the labels,
    pre-trains, fine-tunes on few labelled fields with and without the pre-training, scores both
    on held-out fields, maps the region, and writes OUT/report.html. Each step is the command it
    prints; run again, the demo continues where it stopped.
    """
    from ..errors import InputError, MissingFileError
    from .simulate import parse_size

    if data is not None and size is not None:
        raise InputError(
            f"Cannot use --size {size} with --data {data}: it is the size of a region to simulate. "
            "Leave one of them out."
        )
    size = size or _SIZE
    parse_size(size)
    if data is not None and not (data / "parcels.gpkg").is_file():
        raise MissingFileError(
            f"Cannot run the demo on {data}: there is no parcels.gpkg in it. The folder must hold "
            "a static STAC catalog (catalog.json) and the parcels with their crops."
        )
    story = _Story(dry_run=dry_run)
    archive = out / "archive" if data is None else data
    cube = out / "cube.zarr"
    if data is None:
        story.run(
            "Simulate",
            ["simulate", archive, "--size", size, "--dates", "24", "--seed", "0"],
            note=f"24 dates, {size} px",
        )
    story.run(
        "Build the cube",
        ["cube", "build", "--catalog", archive, "--window", _CHIP, cube],
        note="from STAC items to Zarr",
    )
    season = [] if dry_run else ["--season", _fullest_season(cube)]
    legend = ["--legend", archive / "legend.csv"] if (archive / "legend.csv").is_file() else []
    story.run(
        "Burn the labels",
        ["labels", "burn", cube, archive / "parcels.gpkg", "--column", column, *legend, *season],
    )
    story.run("Split by field", ["labels", "split", cube, "--by", "field", *season])
    if fields_per_class is None and data is None:
        fields_per_class = 5
    few = [] if fields_per_class is None else ["--fields-per-class", fields_per_class]
    pretrained, better, plain = out / "pretrain", out / "finetune", out / "finetune-scratch"
    story.run(
        "Pre-train",
        ["pretrain", cube, "--out", pretrained, *_TRAINING, "--steps", steps, *season],
        note=f"{steps} steps, no label seen",
    )
    tuning = [*few, *_TRAINING, "--steps", finetune_steps]
    tuning += ["--set", f"validation.every={max(finetune_steps // 5, 1)}", *season]
    story.run(
        "Fine-tune",
        ["finetune", cube, "--out", better, "--init", pretrained, *tuning],
        note=f"{finetune_steps} steps, from the pre-training",
    )
    story.run(
        "Fine-tune from scratch",
        ["finetune", cube, "--out", plain, *tuning],
        note=f"{finetune_steps} steps",
    )
    story.run("Evaluate", ["evaluate", better, cube, *season], note="held-out fields")
    story.run("Evaluate from scratch", ["evaluate", plain, cube, *season], note="held-out fields")
    product = out / "map"
    story.run(
        "Map the region",
        ["predict", cube, "--checkpoint", better, "--out", product, *season],
        note="wall to wall, into COGs",
    )
    if dry_run:
        return

    from .. import __version__
    from ..report.demo import DemoRun, write_report

    page = write_report(
        DemoRun(
            out=out,
            cube=cube,
            season=str(season[1]),
            pretrained=pretrained,
            with_pretraining=better,
            from_scratch=plain,
            product=product,
            simulated=data is None,
            stages=tuple(story.stages),
            commands=tuple(story.commands),
            made=f"{time.strftime('%Y-%m-%d')}, stcln-geo {__version__}",
        )
    )
    say("")
    say(f"Look at {page}")


@dataclass
class _Story:
    """Runs commands in this process, says them first, and remembers how long they took."""

    dry_run: bool
    stages: list[Stage] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def run(self, name: str, arguments: list[object], *, note: str = "") -> None:
        """Run one command; leave the demo with its exit code if it fails."""
        from ..report.html import Stage
        from .main import invoke

        words = [str(argument) for argument in arguments]
        line = " ".join(["stcln-geo", *words])
        self.commands.append(line)
        console().print(f"\n$ {line}", style="bold", markup=False)
        if self.dry_run:
            return
        started = time.monotonic()
        code = invoke(words)
        if code:
            raise typer.Exit(code)
        self.stages.append(Stage(name=name, seconds=time.monotonic() - started, note=note))


def _fullest_season(cube: Path) -> str:
    """Return the season with the most dates."""
    from ..cube.store import list_seasons, open_season

    return max(list_seasons(cube), key=lambda name: len(open_season(cube, name).time))
