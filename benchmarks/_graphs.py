"""Passes of a network as CUDA graphs: all that a batch makes a GPU do, started as one.

For small batches a GPU waits for the hundreds of operations of a pass to be named one by one. A
graph names them once. Here to measure what a GPU does when it need not wait: one network, one shape
of a batch. The commands do not use graphs: with a second shape a replay read memory that was
not its own, which is not understood yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 3


class Graph:
    """Run a network by a graph that is made at the first call, with or without gradients.

    Weights may change in place between two passes. What a pass returns is valid until the next.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._run: Callable[..., Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the network on tensors of a GPU whose shapes never change."""
        if self._run is None:
            # Casts of weights that are kept from before would not be repeated.
            with torch.autocast(
                "cuda",
                torch.get_autocast_dtype("cuda"),
                enabled=torch.is_autocast_enabled("cuda"),
                cache_enabled=False,
            ):
                make = with_gradients if torch.is_grad_enabled() else without_gradients
                self._run = make(self.network, inputs)
        return self._run(*inputs)


class Call(nn.Module):
    """The network once more: a capture replaces the method `forward`, of this module only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        made: Tensor = self.network(*inputs)
        return made


def with_gradients(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    made: Callable[..., Tensor] = torch.cuda.make_graphed_callables(
        Call(network).train(network.training),
        tuple(tensor.clone() for tensor in inputs),
        num_warmup_iters=WARM_UP,
        allow_unused_input=True,
    )
    return made


def without_gradients(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    held = tuple(tensor.clone() for tensor in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            network(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made: Tensor = network(*held)

    def run(*given: Tensor) -> Tensor:
        for tensor, new in zip(held, given, strict=True):
            tensor.copy_(new)
        graph.replay()
        return made

    return run
