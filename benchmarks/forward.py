"""Label chips with the published network and with ours, taking turns.

The published network runs eagerly in float32 (benchmarks/_published.py), with the weights of ours.
Ours runs in `reference` mode, which must give the same logits to 1e-4, and in `geo` mode, which
also leaves out observations that are not usable; each in float32, and in bfloat16 where the
hardware has it; on a GPU also as a CUDA graph. Printed: how many times as fast as the published
one, the share of the matrix rate that each reaches, measured at the network's own shapes between
the turns, and the peak memory of a chip of 128 x 128 px.

    python benchmarks/forward.py
    python benchmarks/forward.py --dates 30 --side 32 --batch 1 --no-memory
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from _graphs import Graph
from _measure import measure_process
from _network import (
    Chips,
    MatrixRates,
    add_options,
    check_same,
    forward_operations,
    medians,
    networks,
    shapes,
    start,
)

from stcln_geo.model import Stcln
from stcln_geo.model.device import autocast_for

ENOUGH = 0.5
"""Share of the matrix rate below which the published network would be no baseline."""
PATCH_BYTES = 3e9


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--no-memory", action="store_true", help="leave the 128 px chip out")
    parser.add_argument("--patch", choices=["float32", "bf16"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.patch is not None:
        print(json.dumps(label_patch(options)))
        return
    device = start(options)
    published, reference, geo = networks(options.preset, device)
    for chips in shapes(options, device):
        contenders = {
            "published float32": lambda chips=chips: published(chips.images, chips.days),
            "reference float32": ours(reference, chips, None, "float32"),
        }
        for precision in options.precision:
            contenders[f"reference {precision}"] = ours(reference, chips, None, precision)
            contenders[f"geo {precision}"] = ours(geo, chips, chips.valid, precision)
            if device == "cuda":
                graphs = Graph(geo)
                contenders[f"geo-graph {precision}"] = ours(graphs, chips, chips.valid, precision)
        with torch.inference_mode():
            compare(contenders, chips, geo, options, device)
    if not options.no_memory:
        for precision in options.precision:
            report_patch(precision, device, options)


def ours(
    network: Callable[..., torch.Tensor],
    chips: Chips,
    valid: torch.Tensor | None,
    precision: str,
) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with autocast_for(precision, chips.images.device.type):
            logits: torch.Tensor = network(chips.images, chips.days, valid)
        return logits

    return run


def compare(
    contenders: dict[str, Callable[[], Any]],
    chips: Chips,
    network: Stcln,
    options: argparse.Namespace,
    device: str,
) -> None:
    made = {name: run() for name, run in contenders.items()}
    theirs, agreement = made["published float32"], ""
    check_same(theirs, made["reference float32"], "logits")
    if "reference bf16" in made:
        labels = made["reference bf16"].argmax(1)
        agreeing = (labels == theirs.argmax(1)).float().mean().item()
        agreement = f"; bf16 and float32 agree in {agreeing:.1%} of the labels"

    rates = MatrixRates(network, chips, options)
    times = medians({**contenders, **rates.turns()}, options, device)
    operations = forward_operations(network.config, chips)
    print(f"\n{chips.label}   {rates}{agreement}", flush=True)
    for name in contenders:
        share = operations / times[name] / rates.median(name.split()[1])
        speed = times["published float32"] / times[name]
        print(f"  {name:20} {speed:5.2f} x   {share:4.0%} of the matrix rate")
        if name.startswith("published") and share < ENOUGH:
            print("  NOT A BASELINE: the published network reaches less than half of the rate")


def label_patch(options: argparse.Namespace) -> dict[str, Any]:
    """Label one chip of 128 px and 61 dates in this process."""
    options.batch, options.side, options.dates = [1], [128], [61]
    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    _, _, geo = networks(options.preset, device)
    (chips,) = shapes(options, device)
    with torch.inference_mode():
        ours(geo, chips, chips.valid, options.patch)()
    return {"cuda": torch.cuda.max_memory_allocated() if device == "cuda" else None}


def report_patch(precision: str, device: str, options: argparse.Namespace) -> None:
    measured = measure_process([
        __file__, "--patch", precision, "--device", device, "--preset", options.preset
    ])  # fmt: skip
    memory = measured.told["cuda"] or measured.memory
    verdict = "" if memory < PATCH_BYTES else "   MORE than 3 GB"
    print(f"128 x 128 px, 61 dates, geo {precision}: peak {memory / 1e9:.2f} GB{verdict}")


if __name__ == "__main__":
    main()
