"""The published networks in small, written from their description with the parts of torch alone.

Convolutions, batch norms and transformer layers are those of torch; positions are 0, 1, 2, ..., and
nothing is left out: frames that only fill up a batch are frames like others. Knows nothing of the
package but the names under which a network of ours keeps its weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BANDS, WIDTHS, HEADS, LAYERS, FEEDFORWARD = 10, (8, 32), 8, 2, 64


class PlainEncoder(nn.Module):
    """The published encoder, without its dead parts."""

    def __init__(self) -> None:
        super().__init__()
        narrow, wide = WIDTHS
        sizes = [(BANDS, narrow), (narrow, narrow), (narrow, wide), (wide, wide)]
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in sizes
        )
        self.norm = nn.GroupNorm(8, wide)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(wide, HEADS, FEEDFORWARD, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
        # What a name begins with in our network, and in this one.
        self.names: dict[str, str] = {}
        for number in range(4):
            ours = f"encoder.convolutions.blocks.{number}."
            self.names[f"{ours}convolution."] = f"convolutions.{number}.0."
            self.names[f"{ours}norm."] = f"convolutions.{number}.1."
        self.names["encoder.temporal.norm."] = "norm."
        for number in range(LAYERS):
            ours, theirs = f"encoder.temporal.layers.{number}.", f"layers.{number}."
            self.names[f"{ours}attention.projection."] = f"{theirs}self_attn.in_proj_"
            self.names[f"{ours}attention.output."] = f"{theirs}self_attn.out_proj."
            self.names[f"{ours}expand."] = f"{theirs}linear1."
            self.names[f"{ours}contract."] = f"{theirs}linear2."
            self.names[f"{ours}attention_norm."] = f"{theirs}norm1."
            self.names[f"{ours}feedforward_norm."] = f"{theirs}norm2."

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn (B, T, C, H, W) into features of time and of space, both (B, H*W, T, D)."""
        count, dates, _, height, width = x.shape
        maps = x.flatten(0, 1)
        for block in self.convolutions:
            maps = block(maps)
        wide = maps.shape[1]
        # (B*T, D, H, W) -> (B*H*W, T, D)
        maps = maps.view(count, dates, wide, height, width)
        series = maps.permute(0, 3, 4, 1, 2).reshape(-1, dates, wide)
        series = self.norm(series.transpose(1, 2)).transpose(1, 2)
        part = wide // HEADS
        place = torch.arange(part)
        angle = torch.arange(dates)[:, None] / 1000 ** (2 * (place // 2) / part)
        table = torch.where(place % 2 == 0, angle.sin(), angle.cos()).repeat(1, HEADS)
        series = series + table
        for layer in self.layers:
            series = layer(series)
        shape = (count, height * width, dates, wide)
        return series.view(shape), maps.permute(0, 3, 4, 1, 2).reshape(shape)

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Begin from the weights of a network of ours; its z-score is no part of the network."""
        own = self.state_dict()
        for name, tensor in state.items():
            if name in ("encoder.mean", "encoder.std"):
                continue
            prefix = next(one for one in self.names if name.startswith(one))
            theirs = self.names[prefix] + name.removeprefix(prefix)
            own[theirs] = tensor.reshape(own[theirs].shape).clone()
        self.load_state_dict(own)


class PlainClassifier(PlainEncoder):
    """The published classifier of 20 classes."""

    def __init__(self) -> None:
        super().__init__()
        wide = WIDTHS[1]
        self.query, self.key, self.value = (nn.Linear(wide, wide, bias=False) for _ in range(3))
        self.gate = nn.Parameter(torch.zeros(1))
        self.out = nn.Linear(wide, 20)
        self.names |= {f"attention.{part}.": f"{part}." for part in ("query", "key", "value")}
        self.names |= {"attention.gate": "gate", "classifier.": "out."}

    def forward(self, x: Tensor) -> Tensor:
        """Turn (B, T, C, H, W) into logits (B, 20, H, W)."""
        series, spatial = self.encode(x)
        query, key = self.query(series).flatten(2), self.key(spatial).flatten(2)
        affinity = (query @ key.transpose(1, 2) / WIDTHS[1] ** 0.5).softmax(dim=-1)
        value = self.value(series.amax(dim=2))
        logits: Tensor = self.out(self.gate * (affinity @ value) + value)
        return logits.transpose(1, 2).reshape(len(x), 20, *x.shape[-2:])


class PlainPretrainer(PlainEncoder):
    """The published network of pre-training, without the second head that no loss is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1))
        self.linear = nn.Linear(WIDTHS[1], BANDS)
        self.names |= {"token": "token", "reconstruction.": "linear."}

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Fill in (B, T, C, H, W) where ``visible``, (B, T, 1, H, W), is 0 and not 1."""
        series, _ = self.encode(x * visible + self.token * (1 - visible))
        made: Tensor = self.linear(series)  # (B, H*W, T, C)
        return made.permute(0, 2, 3, 1).reshape(x.shape)
