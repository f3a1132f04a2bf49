"""How fast a GPU labels: km2 and px-dates a second, and the share of its bf16 matrix rate.

What predict does with a batch of windows, digital numbers in and classes out, with the data on the
device already. Pixels count once, for the window whose core owns them. The floating-point
operations are counted from the sizes of a forward pass: products of matrices and convolutions.
They are compared with two rates measured on the same card: of large square matrices, and of the
network's own products (tokens by width). Without a CUDA device nothing is measured; `--device cpu`
runs the same steps, to see that they work.

    python benchmarks/predict_gpu.py --preset base --dates 30
    python benchmarks/predict_gpu.py --device cpu --preset tiny --dates 3 --window 16 --batch 2 \\
        --square 128 --tokens 256
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

BANDS = (
    "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22",
)  # fmt: skip
TILE = 11_000
"""Side of a tile of 110 km (pixels of 10 m)."""
PIXEL_KM2 = 1e-4
WARM_UP = 3


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = parse(arguments)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: no CUDA device")
        return {}
    device = torch.device(options.device)
    network = make_network(options)
    dtype = torch.bfloat16 if network.precision == "bf16" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}: {options.preset} in {network.precision}, {options.dates} dates, {len(BANDS)} "
        f"bands, windows of {options.window} px with a halo of {options.halo} px"
    )
    square = matrix_rate([(options.square,) * 3], dtype, device, options.rounds)
    own = matrix_rate(network_shapes(network, options), dtype, device, options.rounds)
    print(f"matrix rate: {square / 1e12:.3g} TFLOP/s of {options.square} x {options.square}, "
          f"{own / 1e12:.3g} TFLOP/s of the network's products")  # fmt: skip
    rows = []
    for batch in options.batch:
        row = measure(network, batch, options, device)
        if row is None:
            print(f"batch {batch:4}: too little memory")
            continue
        row |= {"of_square": row["flops"] / square, "of_own": row["flops"] / own}
        rows.append(row)
        print(
            f"batch {batch:4}: {row['km2']:.4g} km2/s, {row['px_dates']:,.0f} px-dates/s, "
            f"{row['flops'] / 1e12:.3g} TFLOP/s = {100 * row['of_square']:.1f} % of the square "
            f"rate, {100 * row['of_own']:.1f} % of the network's; a 110 km tile in "
            f"{row['tile']:.1f} s of device time"
        )
    return max(rows, key=lambda row: row["km2"]) if rows else {}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=("tiny", "base", "large"), default="base")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto")
    parser.add_argument("--dates", type=int, default=30)
    parser.add_argument("--window", type=int, default=32, help="px")
    parser.add_argument("--halo", type=int, default=4, help="px")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64, 128], help="windows")
    parser.add_argument("--rounds", type=int, default=5, help="the median counts")
    parser.add_argument("--launches", type=int, default=10, help="forward passes in a round")
    parser.add_argument("--square", type=int, default=8192, help="side of the square matrices")
    parser.add_argument("--tokens", type=int, default=2**19, help="rows of the network's products")
    return parser.parse_args(arguments)


def make_network(options: argparse.Namespace) -> Any:
    """Return a network with random weights as predict holds it."""
    import torch

    from stcln_geo.model.config import StclnConfig
    from stcln_geo.model.device import choose_precision
    from stcln_geo.model.stcln import Stcln
    from stcln_geo.predict.forward import Network

    torch.manual_seed(0)
    module = Stcln(StclnConfig.preset(options.preset, bands=BANDS, classes=20))
    module.encoder.set_normalisation([0.2] * len(BANDS), [0.1] * len(BANDS))
    with torch.no_grad():
        module.attention.gate.fill_(0.5)
    return Network(
        module, device=options.device,
        precision=choose_precision(options.precision, options.device, width=module.config.dim),
    )  # fmt: skip


def network_shapes(network: Any, options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Return the products of a transformer layer: rows, inner width, columns."""
    config = network.module.config
    dim, hidden = config.dim, config.feedforward
    return [
        (options.tokens, inner, columns)
        for inner, columns in ((dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim))
    ]


def matrix_rate(shapes: list[tuple[int, int, int]], dtype: Any, device: Any, rounds: int) -> float:
    """Return floating-point operations a second of products of matrices."""
    import torch

    operands = [
        (
            torch.randn(rows, inner, device=device, dtype=dtype),
            torch.randn(inner, columns, device=device, dtype=dtype),
        )
        for rows, inner, columns in shapes
    ]

    def multiply() -> None:
        for left, right in operands:
            torch.mm(left, right)

    operations = sum(2 * rows * inner * columns for rows, inner, columns in shapes)
    return operations / seconds_of(multiply, device, rounds=rounds, launches=10)


def measure(
    network: Any, batch: int, options: argparse.Namespace, device: Any
) -> dict[str, float] | None:
    """Return the speed at a batch size; None where the device has too little memory."""
    import torch
    from _network import count_operations

    from stcln_geo.predict.forward import Recipe

    generator = torch.Generator().manual_seed(1)
    shape = (batch, options.dates, len(BANDS), options.window, options.window)
    numbers = torch.randint(0, 6000, shape, generator=generator, dtype=torch.int16).to(device)
    days = torch.linspace(0, 360, options.dates).long().expand(batch, -1).to(device)
    valid = (torch.rand((*shape[:2], *shape[3:]), generator=generator) < 0.7).to(device)
    recipe = Recipe(layers=("classes", "confidence"))

    def label() -> Any:
        return network.start(numbers, days, valid, recipe)

    try:
        answers = label().answers()
        seconds = seconds_of(label, device, rounds=options.rounds, launches=options.launches)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    if len(answers) != batch or answers[0].layers["classes"].shape != shape[3:]:
        raise SystemExit("The network did not answer for each window.")
    stride = options.window - 2 * options.halo
    owned = batch * stride**2 / seconds
    operations = count_operations(
        network.module.config, batch=batch, dates=options.dates, pixels=options.window**2,
        projections=1,
    )  # fmt: skip
    return {
        "batch": batch,
        "km2": owned * PIXEL_KM2,
        "px_dates": owned * options.dates,
        "flops": operations / seconds,
        "tile": math.ceil(TILE / stride) ** 2 / batch * seconds,
    }


def seconds_of(work: Callable[[], Any], device: Any, *, rounds: int, launches: int) -> float:
    """Return the seconds of one call, the median of rounds of calls one behind the other."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(WARM_UP):
        work()
    wait()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(launches):
            work()
        wait()
        taken.append((time.perf_counter() - started) / launches)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
