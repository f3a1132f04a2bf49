"""The model card of a run: what the weights are, how they came about, how good they are.

Made of what the run directory holds, and made anew after each evaluation.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..legend import Legend
from ..model.checkpoint import read_metadata
from ..storage import public_name
from .provenance import public_cubes
from .run_directory import RunDirectory, write_text

__all__ = ["describe_model", "write_model_card"]

_USE = {
    "classifier": (
        "Maps of the crop types of the legend, from Sentinel-2 series of the bands below, with "
        "`stcln-geo predict`.",
        "Trained on the regions and seasons below only: elsewhere, evaluate on fields of that "
        "place and season first (`stcln-geo evaluate`). Classes outside the legend are given one "
        "of its names. A pixel without a clear date has no class. Confidence says how "
        "often a class is right only where it was calibrated, and only for such fields.",
    ),
    "pretrainer": (
        "A start for `stcln-geo finetune --init` on few labelled fields. It names no classes.",
        "Learnt from the regions and seasons below only, without labels. A low error of "
        "reconstruction is no promise of a good map.",
    ),
}


def describe_model(run: RunDirectory) -> dict[str, Any]:
    """Return the model card as plain JSON values."""
    info = read_metadata(run.path)
    told = run.summary()
    environment = run.environment()
    best = next((record for record in run.records() if record["step"] == told.get("best_step")), {})
    figures = []
    monitored = {
        name.removeprefix("validation_"): value
        for name, value in best.items()
        # Errors per band and month, whose names have a slash, are in errors.csv.
        if name.startswith("validation_") and "/" not in name and value is not None
    }
    if monitored:
        counted = told.get("splits", {}).get("validation", {})
        chips = told.get("validation_windows", told.get("validation_chips"))
        figures.append({"split": "validation", **counted, "chips": chips, "values": monitored})
    for path in sorted(run.path.glob("evaluation-*/metrics.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        names = ("overall_accuracy", "macro_f1", "macro_miou")
        # Not in evaluations of earlier versions.
        error = found.get("calibration", {}).get("expected_calibration_error")
        forest = found.get("baseline") or {}
        figures.append(
            {
                "split": found["split"],
                "cube": public_name(found["cube"]),
                "season": found["season"],
                "dates": found.get("dates"),
                "fields": found["fields"],
                "pixels": found["pixels"],
                "values": {
                    **{name: found[name] for name in names if found.get(name) is not None},
                    **({} if error is None else {"expected_calibration_error": error}),
                    **{f"random_forest_{name}": forest[name] for name in names if name in forest},
                },
                "note": found["note"],
            }
        )
    use, limits = _USE["classifier" if info.kind == "classifier" else "pretrainer"]
    return {
        "kind": info.kind,
        "checkpoint": f"checkpoints/{info.path.name}",
        "sha256": info.sha256,
        "parameters": info.parameters,
        "network": info.config.to_dict(),
        "bands": list(info.bands),
        "legend": _names(info.legend),
        "ignored_classes": _names(info.ignored),
        "temperature": info.temperature,
        "calibration": told.get("calibration"),
        "chip": info.chip,
        "halo": info.halo,
        "season_start": info.season_start,
        "trained_days": info.trained_days,
        "data": public_cubes(environment.get("cubes", [])),
        "splits": told.get("splits"),
        "training": {
            "kind": told["kind"],
            "steps": told.get("steps"),
            "best_step": told.get("best_step"),
            "stopped_early": told.get("stopped_early"),
            "seconds": told.get("seconds"),
            "chips": told.get("chips"),
            "chips_per_step": told.get("global_batch"),
            "weights": "moving average"
            if (run.settled("optimiser") or {}).get("ema")
            else "as trained",
            "begun_from": info.provenance.get("init"),
            "masking": info.provenance.get("masking"),
            "device": environment.get("device"),
            "precision": environment.get("precision"),
            "packages": {"stcln_geo": environment.get("stcln_geo"), **environment["packages"]},
            "notes": told.get("notes", []),
        },
        "figures": figures,
        "figures_hold_for": told.get("transductive"),
        "intended_use": use,
        "limits": limits,
    }


def _names(legend: str | None) -> list[str] | None:
    return None if legend is None else list(Legend.from_json(legend).names)


def write_model_card(run: RunDirectory) -> None:
    """Write model_card.json and model_card.md into a run directory."""
    card = describe_model(run)
    write_text(run.path / "model_card.json", json.dumps(card, indent=1) + "\n")
    write_text(run.path / "model_card.md", _to_markdown(card, run.path.resolve().name))


def _to_markdown(card: dict[str, Any], name: str) -> str:
    training = card["training"]
    begun = training["begun_from"]
    network = card["network"]
    lines = [
        f"# {_plain(name)}",
        "",
        f"STCLN {card['kind']}, {card['parameters']:,} parameters, `{card['checkpoint']}` "
        f"(sha256 `{card['sha256'][:16]}`).",
        "",
        "## Use",
        "",
        card["intended_use"],
        "",
        f"**Limits.** {card['limits']}",
        "",
        "## Input and output",
        "",
        f"- bands, in this order: {', '.join(card['bands'])}",
        f"- windows of {card['chip']} px with a halo of {card['halo']} px",
        f"- days counted from {card['season_start']}; trained on days {card['trained_days'][0]} to "
        f"{card['trained_days'][1]}",
    ]
    if card["legend"]:
        lines.append(f"- classes: {_listed(card['legend'])}")
        if card["ignored_classes"]:
            lines.append(f"- ignored, never an output: {_listed(card['ignored_classes'])}")
        lines.append("- land without a label is no class: nothing was learnt from it")
        lines.append(_calibration_row(card))
    lines += [
        "",
        "## Data",
        "",
        "| cube | season | dates | CRS | fingerprint |",
        "|---|---|---|---|---|",
        *(
            f"| {_plain(cube['cube'])}{_sites(cube)} | {cube['season']} | {cube['dates']} | "
            f"{_crs(cube)} | `{cube['fingerprint'][:16]}` |"
            for cube in card["data"]
        ),
    ]
    if card["splits"]:
        lines += ["", "| split | fields | pixels |", "|---|---|---|"]
        lines += [
            f"| {split.replace('_', ', ')} | {count['fields']} | {count['pixels']} |"
            for split, count in card["splits"].items()
            if count["fields"]
        ]
    lines += [
        "",
        "## Figures",
        "",
        "| split | counted over | figures |",
        "|---|---|---|",
        *(_figure_row(figure) for figure in card["figures"]),
    ]
    if not card["figures"]:
        lines.append("| none | - | - |")
    if card["figures_hold_for"]:
        lines += ["", card["figures_hold_for"]]
    lines += [
        "",
        "## Training",
        "",
        f"- {training['kind']}: {training['steps']} steps of {training['chips_per_step']} chips, "
        f"of {training['chips']}; these weights are those of step {training['best_step']}, "
        f"{training['weights']}",
        f"- network: {network['mode']} mode, positions as {network['positions']}, widths "
        f"{network['widths']}, {network['layers']} layers, {network['heads']} heads, dropout "
        f"{network['dropout']}",
        f"- begun from: {_say_begun(begun) if begun else 'random weights'}",
        *(_masking_line(training["masking"]) if training["masking"] else ()),
        f"- {training['device']}, {training['precision']}, {training['seconds']:.0f} s; "
        + ", ".join(f"{key} {value}" for key, value in training["packages"].items() if value),
        *(f"- {note}" for note in training["notes"]),
        "",
        "All options are in `config.toml`, the loss of each step in `steps.jsonl`.",
    ]
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    """Join names by commas, or by semicolons where one of them has a comma."""
    sign = "; " if any("," in name for name in names) else ", "
    return sign.join(map(_plain, names))


def _plain(text: str) -> str:
    """Write a name so that Markdown shows it as it is, in tables as well."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    # Underscores between letters are no emphasis, and file names are full of them.
    return re.sub(r"[\\`*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _say_begun(begun: dict[str, Any]) -> str:
    """Name the checkpoint begun from; those of earlier versions tell less of it."""
    told = [begun["kind"], f"sha256 `{begun['sha256'][:16]}`"]
    if "positions" in begun:
        told += [f"{begun['mode']} mode", f"positions as {begun['positions']}", begun["source"]]
    return f"{_plain(begun['path'])} ({', '.join(told)})"


def _masking_line(masking: dict[str, Any]) -> tuple[str]:
    told = ", ".join(f"{key} {value}" for key, value in masking.items() if value != {})
    return (f"- hidden: {told}",)


def _calibration_row(card: dict[str, Any]) -> str:
    found = card["calibration"]
    if card["temperature"] is None or found is None:
        return "- confidence is not calibrated"
    return (
        f"- confidence is calibrated by the temperature {card['temperature']:.3f}, fitted on the "
        f"{found['pixels']} pixels of the validation fields: expected calibration error there "
        f"{found['error_before']:.4f} before, {found['error_after']:.4f} after"
    )


def _sites(cube: dict[str, Any]) -> str:
    """Say how many sites a stack has; nothing of a cube."""
    return f", {cube['sites']} sites" if cube.get("kind") == "stack" else ""


def _crs(cube: dict[str, Any]) -> str:
    systems = cube["crs"]
    return ", ".join(systems) if isinstance(systems, list) else str(systems)


def _figure_row(figure: dict[str, Any]) -> str:
    values = ", ".join(
        f"{name} {value:.4f}" for name, value in figure["values"].items() if value is not None
    )
    counts = [f"{figure[key]} {key}" for key in ("fields", "pixels", "chips") if figure.get(key)]
    place = f" of {_plain(figure['cube'])}, {figure['season']}" if "cube" in figure else ""
    place += f", {figure['dates']}" if figure.get("dates") else ""
    return f"| {figure['split']}{place} | {', '.join(counts)} | {values} |"
