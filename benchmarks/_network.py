"""What the benchmarks of the network share: contenders, chips, clocks and the matrix rate."""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _published import Published, published_like
from torch import Tensor, nn

from stcln_geo.model import Stcln, StclnConfig
from stcln_geo.model.layers import MaskedBatchNorm2d

BANDS = tuple("abcdefghij")
CLASSES = 20
LARGEST_DIFFERENCE = 1e-4
SMALL_ROWS, LARGE_ROWS = 1024, 12_288
"""Rows of a product that a CPU's cache holds, and more than it holds."""


@dataclass(frozen=True, kw_only=True)
class Chips:
    """A batch; three of ten observations are not usable, where a mode knows of it."""

    images: Tensor
    days: Tensor
    valid: Tensor
    labels: Tensor

    @property
    def label(self) -> str:
        """Name the shape."""
        batch, dates, _, side, _ = self.images.shape
        return f"T={dates:<3} {side} px  batch {batch}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both benchmarks; the defaults end within about ten minutes."""
    parser.add_argument("--dates", type=int, nargs="+", default=[12, 30, 61])
    parser.add_argument("--side", type=int, nargs="+", default=[32, 48], help="pixels of a chip")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3, help="at least, for each shape")
    parser.add_argument("--seconds", type=float, default=40, help="for each shape, if it lasts")
    parser.add_argument("--threads", type=int, default=None, help="of torch, on a CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: this process's time, for one thread on a machine that others use",
    )  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--preset", default="base", help="tiny is for trying the script")
    parser.add_argument(
        "--precision", choices=["float32", "bf16"], nargs="+", default=None,
        help="of ours; default: bf16 too where the hardware has it",
    )  # fmt: skip


def start(options: argparse.Namespace) -> str:
    """Set threads and say where this runs; return the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    if device == "cuda":
        # Torch lets convolutions round float32 to TF32 unless told.
        torch.backends.cudnn.allow_tf32 = False
        print(f"device: {torch.cuda.get_device_name()}")
    else:
        print("GPU: not measured: " + ("device cpu was asked for" if cuda else "no CUDA device"))
        kind = "AMX" if amx else f"no AMX, {'avx512_bf16' if bf16 else 'no bfloat16'}"
        if options.precision is None and not (amx or bf16):
            print("bf16: not measured: this CPU has no instructions for it")
            options.precision = ["float32"]
        print(f"device: CPU ({kind}), {torch.get_num_threads()} threads, load {load:.1f}")
    options.precision = options.precision or ["float32", "bf16"]
    print(f"torch {torch.__version__}, medians of contenders that take turns, {options.clock} time")
    return device


def shapes(options: argparse.Namespace, device: str) -> list[Chips]:
    """Make the batches, smallest first."""
    generator = torch.Generator().manual_seed(1)
    made = []
    sizes = itertools.product(options.batch, options.side, options.dates)
    for batch, side, dates in sorted(sizes, key=lambda size: size[0] * size[1] ** 2 * size[2]):
        shape = (batch, dates, side, side)
        chips = Chips(
            images=torch.rand(batch, dates, len(BANDS), side, side, generator=generator),
            days=(6 * torch.arange(dates)).expand(batch, -1),
            valid=torch.rand(shape, generator=generator) > 0.3,
            labels=torch.randint(CLASSES, (batch, side, side), generator=generator),
        )
        made.append(
            Chips(**{name: getattr(chips, name).to(device) for name in chips.__annotations__})
        )
    return made


def networks(preset: str, device: str) -> tuple[Published, Stcln, Stcln]:
    """Make the published network and ours in both modes, with the same weights."""
    torch.manual_seed(0)
    reference = Stcln(StclnConfig.preset(preset, bands=BANDS, classes=CLASSES, mode="reference"))
    geo = Stcln(StclnConfig.preset(preset, bands=BANDS, classes=CLASSES))
    with torch.no_grad():
        reference.attention.gate.fill_(0.5)
        for module in reference.modules():
            if isinstance(module, MaskedBatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    geo.load_state_dict(reference.state_dict())
    published = published_like(reference)
    return published.to(device).eval(), reference.to(device).eval(), geo.to(device).eval()


def check_same(one: Tensor, other: Tensor, what: str) -> None:
    """End the script where two contenders do not do the same."""
    apart = (one - other).abs().max().item()
    if not apart <= LARGEST_DIFFERENCE:
        raise SystemExit(f"{what} are {apart:.2e} apart: the contenders are not the same network.")


def medians(
    contenders: Mapping[str, Callable[[], object]], options: argparse.Namespace, device: str
) -> dict[str, float]:
    """Let contenders take turns; return the median seconds of each. Each has run once before."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    begun = time.perf_counter()
    for turn in itertools.count():
        spent = time.perf_counter() - begun > options.seconds
        if turn >= 3 * options.rounds or (turn >= options.rounds and spent):
            break
        for name, run in contenders.items():
            taken[name].append(seconds(run, device, clock=options.clock))
    return {name: statistics.median(times) for name, times in taken.items()}


def seconds(run: Callable[[], object], device: str, *, clock: str) -> float:
    """Return the seconds of one run."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    begun = read()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return read() - begun


class MatrixRates:
    """The rate of the network's own products in each precision, measured between the turns."""

    def __init__(self, network: Stcln, chips: Chips, options: argparse.Namespace) -> None:
        dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
        self.found: dict[str, list[float]] = {name: [] for name in options.precision}
        self.found.setdefault("float32", [])
        self.probes = {
            name: matrix_rate(network.config, chips, dtypes[name], clock=options.clock)
            for name in self.found
        }

    def turns(self) -> dict[str, Callable[[], object]]:
        """Give contenders that measure the rates."""
        return {
            f"rate {name}": lambda name=name: self.found[name].append(self.probes[name]())
            for name in self.found
        }

    def median(self, precision: str) -> float:
        """Return the operations a second (median)."""
        return statistics.median(self.found[precision])

    def __str__(self) -> str:
        single = self.median("float32")
        others = [
            f", {name} {self.median(name) / single:.1f} times that"
            for name in self.found
            if name != "float32"
        ]
        return f"matrix rate: float32 {single / 1e9:.0f} Gflop/s{''.join(others)}"


def forward_operations(config: StclnConfig, chips: Chips) -> float:
    """Count multiplications and additions of a forward pass; norms and softmax left out."""
    batch, dates, _, height, width = chips.images.shape
    return count_operations(config, batch=batch, dates=dates, pixels=height * width)


def count_operations(
    config: StclnConfig, *, batch: int, dates: int, pixels: int, projections: int = 2
) -> float:
    """Count as `forward_operations`; published are 2 `projections`, of queries and of keys."""
    bands, (first, dim) = len(config.bands), config.widths
    convolutions = 9 * (bands * first + first * first + first * dim + dim * dim)
    layer = 4 * dim * dim + 2 * dim * config.feedforward + 2 * dates * dim
    one = pixels * dates * (convolutions + config.layers * layer)
    # Queries and keys, logits, weighted sum, values, classes.
    space = pixels * (projections * dates * dim * dim + pixels * (dates + 1) * dim + dim * dim)
    return 2.0 * batch * (one + space + pixels * dim * config.classes)


def matrix_rate(
    config: StclnConfig, chips: Chips, dtype: torch.dtype, *, clock: str
) -> Callable[[], float]:
    """Prepare the products of the network's own shapes alone; a call gives operations a second.

    The 3 x 3 convolution of some dates and the linear maps of a transformer layer, on as many rows
    as stay in a CPU's cache and on all rows of the chips: the better of the two.
    """
    device, dim = chips.images.device, config.dim
    rows = chips.images[:, :, 0].numel()
    if device.type == "cpu":
        rows = min(rows, LARGE_ROWS)
    frames = torch.rand(max(rows // 1024, 8), dim, 32, 32, device=device).to(dtype)
    frames = frames.contiguous(memory_format=torch.channels_last)
    kernel = torch.rand(dim, dim, 3, 3, device=device).to(dtype)
    sides = [(dim, 3 * dim), (dim, dim), (dim, config.feedforward), (config.feedforward, dim)]
    maps = [nn.Linear(*side, device=device, dtype=dtype) for side in sides]

    def products(count: int) -> float:
        inputs = [torch.rand(count, side[0], device=device).to(dtype) for side in sides]
        repeats = max(1, rows // count)

        def multiply() -> None:
            with torch.inference_mode():
                F.conv2d(frames, kernel, padding=1)
                for linear, x in zip(maps, inputs, strict=True):
                    for _ in range(repeats):
                        linear(x)

        operations = 2.0 * frames.numel() * dim * 9
        operations += repeats * sum(2.0 * count * a * b for a, b in sides)
        return operations / seconds(multiply, device.type, clock=clock)

    return lambda: max(products(min(rows, SMALL_ROWS)), products(rows))
