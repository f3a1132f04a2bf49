"""Transformer layers without gradients: weights made ready once a pass, nothing written twice.

The same mathematics as `TransformerLayer` in evaluation, from the same weights. What differs is how
often memory is touched: weights are cast and laid out for the matrix unit once, not at every block
of sequences; the ReLU happens while a product is still in registers; residuals are added in place.
Nothing outlives the pass, so weights may change between two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .device import product_dtype
from .layers import FullLayerNorm, TransformerLayer


class PreparedLinear:
    """A linear map, with a ReLU if wanted, ready for many products in one dtype."""

    def __init__(
        self, weight: Tensor, bias: Tensor, *, dtype: torch.dtype, relu: bool = False
    ) -> None:
        self.weight = weight.detach().to(dtype)
        self.bias = bias.detach().to(dtype)
        self.relu = relu
        self.packed = _pack(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.packed is not None:
            made: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.packed, self.bias, "relu" if self.relu else "none", [], ""
            )
            return made
        if self.relu and x.device.type == "cuda" and hasattr(torch, "_addmm_activation"):
            # The ReLU at the end of the product, as torch's own transformer has it.
            rows = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t())
            return rows.view(*x.shape[:-1], -1)
        made = F.linear(x, self.weight, self.bias)
        return made.relu_() if self.relu else made


def _pack(weight: Tensor) -> Tensor | None:
    """Lay a weight out for oneDNN, as torch's own compiler does; None where there is no such way.

    The operators are not documented, hence the look whether they are there. Against plain
    products they gain a tenth in bfloat16 and a fifth or more in float32.
    """
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(
        torch.ops.mkldnn, "_reorder_linear_weight"
    )
    usable = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not (known and usable and weight.dtype in (torch.float32, torch.bfloat16)):
        return None
    if weight.dtype == torch.bfloat16 and not _packs_bfloat16():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _packs_bfloat16() -> bool:
    """Return True where oneDNN takes bfloat16 at all: CPUs without AVX-512 are refused."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


class PreparedLayer:
    """One transformer layer in evaluation."""

    def __init__(self, layer: TransformerLayer, dtype: torch.dtype, workspace: Workspace) -> None:
        attention = layer.attention
        self.dtype = dtype
        self.heads = attention.heads
        self.workspace = workspace
        self.norms: tuple[FullLayerNorm, FullLayerNorm] = (
            layer.attention_norm,
            layer.feedforward_norm,
        )
        on_cpu = attention.projection.weight.device.type == "cpu"
        self.plain = on_cpu and dtype in (torch.float32, torch.bfloat16)
        self.projection = _prepare(attention.projection, dtype)
        self.output = _prepare(attention.output, dtype)
        self.expand = _prepare(layer.expand, dtype, relu=True)
        self.contract = _prepare(layer.contract, dtype)

    def __call__(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Map (S, T, D) to (S, T, D), `x` being overwritten; `keys` as in `SelfAttention`."""
        mixed = self.output(self._attend(self.projection(x.to(self.dtype)), keys))
        x = self.norms[0](x.add_(mixed))
        changed = self.contract(self.expand(x.to(self.dtype)))
        normalised: Tensor = self.norms[1](x.add_(changed))
        return normalised

    def in_kernels(
        self, x: Tensor, low: Tensor, keys: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run on a GPU; as `TransformerLayer.in_kernels`, `x` and `low` being overwritten."""
        mixed = self.output(fused.attend(self.projection(low), self.heads, keys, 0.0))
        x, low = fused.add_norm(x, mixed, self.norms[0], 0.0, low=low)
        changed = self.contract(self.expand(low))
        return fused.add_norm(x, changed, self.norms[1], 0.0, low=low, valid=valid)

    def _attend(self, projected: Tensor, keys: Tensor | None) -> Tensor:
        sequences, dates, width = projected.shape
        parts = projected.view(sequences, dates, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts  # each (S, heads, T, D/heads)
        if self.plain:
            mixed = _plain_attention((query, key, value), keys, self.workspace)
        else:
            mask = None if keys is None else keys[:, None, None, :]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(sequences, dates, width // 3)


class Workspace:
    """Memory for the softmax of one pass, used again from block to block.

    A fresh tensor of a megabyte costs more in page faults than the softmax itself.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def softmax(self, logits: Tensor, bias: Tensor, *, scale: float) -> Tensor:
        """Take the softmax of scale * logits + bias, of (S, T, T) and (S, 1, T), in float32.

        Given in the logits' dtype, and to be used before the next call; logits are overwritten.
        """
        if not self._held or self._held[0].shape != logits.shape:
            self._held = [logits.new_empty(logits.shape, dtype=torch.float32) for _ in range(2)]
        biased, weights = self._held
        torch.add(bias, logits, alpha=scale, out=biased)
        torch.softmax(biased, -1, out=weights)
        return weights if logits.dtype == weights.dtype else logits.copy_(weights)


def _plain_attention(
    parts: tuple[Tensor, Tensor, Tensor], keys: Tensor | None, workspace: Workspace
) -> Tensor:
    """Attend by two products and a softmax; parts are (S, heads, T, d).

    The fused kernel for CPUs takes longer for such short sequences, most of all in bfloat16.
    """
    sequences, heads, dates, width = parts[0].shape
    query, key, value = (part.flatten(0, 1) for part in parts)
    bias = torch.zeros(1, 1, 1, dtype=torch.float32)
    if keys is not None:
        bias = torch.zeros(keys.shape, dtype=torch.float32).masked_fill_(~keys, -torch.inf)
        bias = bias.repeat_interleave(heads, 0)[:, None]  # (S, T) -> (S * heads, 1, T)
    logits = torch.bmm(query, key.transpose(1, 2))
    weights = workspace.softmax(logits, bias, scale=1 / math.sqrt(width))
    return torch.bmm(weights, value).view(sequences, heads, dates, -1)


def _prepare(linear: nn.Linear, dtype: torch.dtype, *, relu: bool = False) -> PreparedLinear:
    return PreparedLinear(linear.weight, linear.bias, dtype=dtype, relu=relu)


def prepare_layers(layers: Iterable[nn.Module], x: Tensor) -> list[PreparedLayer]:
    """Make transformer layers ready for a pass over features like `x`."""
    dtype, workspace = product_dtype(x), Workspace()
    with torch.autocast(device_type=x.device.type, enabled=False):
        return [
            PreparedLayer(layer, dtype, workspace)
            for layer in layers
            if isinstance(layer, TransformerLayer)
        ]
