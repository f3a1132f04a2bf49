"""Train on chips with the published network and with ours, taking turns.

A step is forward, cross-entropy, backward and Adam, with dropout. The published network runs
eagerly in float32 (benchmarks/_published.py), with the weights of ours; ours in `reference` and in
`geo` mode, each in float32, and under bfloat16 autocast where the hardware has it; on a GPU forward
and backward also as a CUDA graph; with --compiled also as the commands run them with compile=true,
the minutes of compiling left out. On a CPU all of them keep freed memory for the next step, as the
commands do; --usual-memory leaves it to the C library, as a script of one's own would. Before they
are timed, the published network and ours in `reference` mode must give one loss without dropout,
and equal gradients. Printed as in forward.py, and on a GPU the peak memory of a step (of a graph,
only what lies outside of it).

    python benchmarks/train_step.py
    python benchmarks/train_step.py --dates 30 --side 32 --batch 1 --compiled
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from _graphs import Graph
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
from torch import Tensor, nn

from stcln_geo.model import Stcln
from stcln_geo.model.device import autocast_for
from stcln_geo.model.reference import our_name
from stcln_geo.train.compiled import CompiledNetwork
from stcln_geo.train.memory import memory_kept


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--compiled", action="store_true", help="ours by torch.compile, too")
    parser.add_argument("--usual-memory", action="store_true", help="leave it to the C library")
    parser.set_defaults(dates=[12, 30], side=[32], batch=[1, 4], seconds=60)
    options = parser.parse_args(arguments)
    device = start(options)
    published, reference, geo = networks(options.preset, device)
    with nullcontext() if options.usual_memory else memory_kept(device):
        for index, chips in enumerate(shapes(options, device)):
            if index == 0:
                check_gradients(published, reference, chips)
            compare(published, reference, geo, chips, options, device)


def compare(
    published: nn.Module,
    reference: nn.Module,
    geo: Stcln,
    chips: Chips,
    options: argparse.Namespace,
    device: str,
) -> None:
    """Time the steps on chips of one shape, and print what came out."""
    contenders = {"published float32": step(published, chips, None, "float32")}
    for precision in options.precision:
        contenders[f"reference {precision}"] = step(reference, chips, None, precision)
        contenders[f"geo {precision}"] = step(geo, chips, (chips.valid,), precision)
        if device == "cuda":
            contenders[f"geo-graph {precision}"] = step(
                geo, chips, (chips.valid,), precision, wrap=Graph
            )
        if options.compiled:
            contenders[f"geo-compiled {precision}"] = step(
                geo, chips, (chips.valid,), precision, wrap=compiled
            )
    peaks = peak_memory(contenders, device)
    rates = MatrixRates(geo, chips, options)
    times = medians({**contenders, **rates.turns()}, options, device)
    # Of a product, the backward pass makes two.
    operations = 3 * forward_operations(geo.config, chips)
    print(f"\n{chips.label}   {rates}", flush=True)
    for name in contenders:
        speed = times["published float32"] / times[name]
        share = operations / times[name] / rates.median(name.split()[1])
        memory = f"   peak {peaks[name] / 1e9:.2f} GB" if peaks else ""
        print(f"  {name:20} {speed:5.2f} x   {share:4.0%} of the matrix rate{memory}")


def step(
    network: nn.Module,
    chips: Chips,
    extra: tuple[Tensor, ...] | None,
    precision: str,
    *,
    wrap: Callable[[nn.Module], Callable[..., Tensor]] = lambda network: network,
) -> Callable[[], None]:
    """Make a step of a copy of a network, with an optimiser of its own."""
    network = copy.deepcopy(network).train()
    call = wrap(network)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)

    def run() -> None:
        with autocast_for(precision, chips.images.device.type):
            logits = call(chips.images, chips.days, *(extra or ()))
        nn.functional.cross_entropy(logits.float(), chips.labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def compiled(network: nn.Module) -> CompiledNetwork:
    """Compile a network as training does."""
    return CompiledNetwork(network, fills_up=True)


def check_gradients(published: nn.Module, reference: nn.Module, chips: Chips) -> None:
    """Compare loss and gradients in training on a corner of a chip, in float64, without dropout.

    In float32 the gradients of the first layers, sums over all pixels and dates, differ by their
    rounding; the published positions are float32 in any case.
    """
    images = chips.images[:1, :5, :, :9, :9].double()
    gradients: list[dict[str, Tensor]] = []
    losses = []
    for network in (published, reference):
        network = copy.deepcopy(network).double().train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        logits = network(images, chips.days[:1, :5])
        loss = nn.functional.cross_entropy(logits, chips.labels[:1, :9, :9])
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: weight.grad for name, weight in network.named_parameters()})
    check_same(losses[0], losses[1], "losses")
    for name, theirs in gradients[0].items():
        mine = gradients[1][our_name(name, "classifier") or ""].flatten()
        largest = theirs.abs().max().clamp(min=1e-9)
        check_same(theirs.flatten() / largest, mine / largest, f"gradients of {name}, scaled,")


def peak_memory(contenders: dict[str, Callable[[], None]], device: str) -> dict[str, int]:
    """Run each once, and on a GPU once more: return the peak of each there (bytes)."""
    peaks: dict[str, int] = {}
    for name, run in contenders.items():
        run()
        if device != "cuda":
            continue
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks[name] = torch.cuda.max_memory_allocated()
    return peaks


if __name__ == "__main__":
    main()
