"""``stcln-geo checkpoint``: import published weights; describe, join and export checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import progress_bar, say

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="A .safetensors file, a run directory, or a published .tar file."
    ),
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT.safetensors", help="The .safetensors file to write.")
]


@app.callback()
def checkpoint() -> None:
    """Import published weights; describe, join and export checkpoints."""


@app.command("import")
def import_published(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A published .tar file.")],
    out: Out,
    legend: Annotated[
        Path | None,
        typer.Option(help="Legend of the classes (.json or .csv), which published files lack."),
    ] = None,
) -> None:
    """Turn published STCLN weights into a checkpoint.

    Reads classifiers, bare encoders and pre-trained networks, as plain weights: nothing in the
    file is ever run. Bands and classes are told from the shapes. Entries that no result depends on
    are dropped and counted. The network keeps the published behaviour (reference mode): positions
    are 0, 1, 2, ..., and bands are normalised outside of it.
    """
    from ..errors import CheckpointError
    from ..model import load_model, read_metadata, save_checkpoint

    info = read_metadata(source)
    if not info.published:
        raise CheckpointError(
            f"Cannot import {info.path}: stcln-geo wrote it, and import takes published weights. "
            "Use it as it is, or copy it with `stcln-geo checkpoint export`."
        )
    save_checkpoint(
        out,
        load_model(source),
        legend=None if legend is None else _legend_json(legend, info.config.classes),
        provenance=dict(info.provenance),
    )
    say(
        f"{out}: {info.kind}, {info.parameters:,} parameters, {len(info.bands)} bands; "
        f"{len(info.dropped)} unused entries dropped"
    )


@app.command("info")
def info(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A .safetensors, .pt2 or .onnx file, a run directory, or a published .tar file.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a checkpoint is and holds.

    Network, bands, mean and deviation, legend, temperature, provenance and sha256.

    Of an exported .pt2 or .onnx file only the description is read; nothing in it is run.
    """
    import json

    from ..model import read_metadata

    told = read_metadata(path, programs=True)
    legend = None if told.legend is None else json.loads(told.legend)
    facts = {
        "path": str(told.path),
        "format": "published" if told.published else told.format,
        "kind": told.kind,
        "members": told.members,
        "parameters": told.parameters,
        "config": told.config.to_dict(),
        "mean": list(told.mean),
        "std": list(told.std),
        "legend": legend,
        "ignored": None if told.ignored is None else json.loads(told.ignored),
        "silent": list(told.silent),
        "temperature": told.temperature,
        "chip": told.chip,
        "halo": told.halo,
        "trained_days": told.trained_days,
        "season_start": told.season_start,
        "published": told.published,
        "dropped": list(told.dropped),
        "provenance": dict(told.provenance),
        "sha256": told.sha256,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    config = told.config
    say(f"{told.path}")
    together = f", an ensemble of {told.members}" if told.members > 1 else ""
    say(
        f"  {told.kind}{' (published)' if told.published else ''}{together}, "
        f"{told.parameters:,} parameters"
    )
    if told.format != "safetensors":
        say(
            f"  {told.format} program: images (B, T, {len(told.bands)}, H, W) float32, days (B, T) "
            f"int64, valid (B, T, H, W) bool -> logits (B, {config.classes}, H, W) float32"
        )
    say(f"  {config.mode} mode, positions: {config.positions}, {config.classes} classes")
    say(
        f"  widths {config.widths[0]} and {config.widths[1]}, {config.layers} layers, "
        f"{config.heads} heads, feed-forward {config.feedforward}"
    )
    for band, mean, std in zip(config.bands, told.mean, told.std, strict=True):
        say(f"  {band:<10} mean {mean:.4f}  std {std:.4f}")
    if legend is not None:
        say(f"  classes: {', '.join(row['name'] for row in legend)}")
        silent = [row["name"] for row in legend if row["value"] in told.silent]
        if silent:
            say(f"  never learnt: {', '.join(silent)}")
    if told.ignored is not None:
        ignored = ", ".join(row["name"] for row in json.loads(told.ignored))
        say(f"  ignored in training: {ignored}")
    for name in ("temperature", "chip", "halo", "trained_days", "season_start"):
        if facts[name] is not None:
            say(f"  {name}: {facts[name]}")
    if told.dropped:
        say(f"  {len(told.dropped)} entries that no result depends on are left out")
    for name, value in told.provenance.items():
        for one in value if isinstance(value, list) else [value]:
            shown = one
            if isinstance(one, dict):
                shown = ", ".join(f"{key} {what}" for key, what in one.items())
            say(f"  {name}: {shown}")
    say(f"  sha256 {told.sha256}")


@app.command("export")
def export(
    source: Source,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The file to write: .safetensors, .pt2 or .onnx."),
    ],
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="safetensors, pt2 or onnx. Default: what the end of OUT says."
        ),
    ] = None,
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Write the encoder alone, for others to start from.")
    ] = False,
) -> None:
    """Copy the checkpoint of a run into one file to pass on.

    A .safetensors file holds the weights, for stcln-geo. A .pt2 file (torch.export) or .onnx file
    holds a program that gives the logits of images without stcln-geo, for any number of samples
    and dates and any size of image. Classifiers get a STAC item of the Machine Learning Model
    extension.
    """
    from ..model import export_checkpoint

    made = export_checkpoint(
        source,
        out,
        file_format=file_format,  # type: ignore[arg-type]  # refused by name if it is none
        encoder=encoder,
    )
    say(f"{out}: {made.info.kind} of {made.source.path}")
    if made.item is not None:
        say(f"{made.item}: STAC item")


@app.command("ensemble")
def ensemble(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Runs of `finetune`, checkpoints, or a folder of --seeds."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="OUT.safetensors", help="The .safetensors file to write.")
    ],
) -> None:
    """Join fine-tuned networks into one that gives their mean.

    Networks of one recipe that began from other random numbers err in different places. The mean of
    their probabilities decides; where they disagree it is less sure than right, which `checkpoint
    calibrate` mends. `predict` and `evaluate` take the file as any checkpoint. Labelling takes as
    many times as long as there are networks.
    """
    from ..model import join_checkpoints
    from ..train.over_seeds import finished_runs_of

    chosen = [run for source in sources for run in finished_runs_of(source)]
    info = join_checkpoints(chosen, out)
    say(f"{out}: {info.members} networks of {info.parameters // info.members:,} parameters each")
    for member in info.provenance["members"]:
        seed = "" if member["seed"] is None else f", seed {member['seed']}"
        say(f"  {member['path']}{seed}")


@app.command("calibrate")
def calibrate(
    path: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="An ensemble or an exported checkpoint.")
    ],
    cube: Annotated[
        Path, typer.Argument(metavar="CUBE", help="A cube or stack with labels and a split.")
    ],
    season: Annotated[
        str | None, typer.Option(help="Season, by its first day. Default: the only one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(help="Threads that read.")] = 2,
) -> None:
    """Fit the temperature on the validation fields of a cube.

    It is written into the file. Confidence then comes closer to the share of pixels that are right;
    classes stay as they are. Runs of `finetune` do this by themselves.
    """
    from ..train.recalibrate import calibrate_checkpoint

    with progress_bar("calibrate") as progress:
        fitted = calibrate_checkpoint(
            path,
            cube,
            season=season,
            device=device,  # type: ignore[arg-type]  # refused by name if it is none
            workers=workers,
            progress=progress,
        )
    say(
        f"{path}: temperature {fitted.temperature:.3f}; expected calibration error on "
        f"{fitted.pixels:,} validation pixels {fitted.error_before:.4f} before, "
        f"{fitted.error_after:.4f} with it"
    )


def _legend_json(path: Path, classes: int) -> str:
    from ..errors import LabelError
    from ..legend import Legend

    legend = Legend.read(path)
    if len(legend) != classes:
        raise LabelError(
            f"Cannot attach the legend {path}: it has {len(legend)} classes, and the network "
            f"{classes}. They must agree. List one class for each of the network's outputs, "
            "in their order."
        )
    return legend.to_json()
