"""The published network in its plain form: eager, float32, nothing merged, cut or skipped.

Written from a description of the published system, to be measured against. What it wastes, it
wastes here too: attention returns its weights, averaged over the heads, and nobody reads them;
features are copied between the layouts of convolutions, normalisation and attention; queries and
keys of the spatiotemporal attention are both projected and both copied to (N, T*D); the N x N
affinities are held whole, with their softmax. What is in doubt is resolved in its favour:
positions are encoded once for a sample, and modules that are never called are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stcln_geo.model import Stcln, StclnConfig
from stcln_geo.model.reference import our_name


def double_convolution(channels_in: int, channels_out: int) -> nn.ModuleDict:
    """Two of: 3 x 3 convolution without bias, batch normalisation, ReLU."""
    layers: list[nn.Module] = []
    for first in (channels_in, channels_out):
        layers += [
            nn.Conv2d(first, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        ]
    return nn.ModuleDict({"double_conv": nn.Sequential(*layers)})


class PublishedLayer(nn.Module):
    """Post-norm transformer layer around `nn.MultiheadAttention`."""

    def __init__(self, config: StclnConfig) -> None:
        super().__init__()
        dim, share = config.dim, config.dropout
        self.self_attn = nn.MultiheadAttention(dim, config.heads, share, batch_first=True)
        self.linear1 = nn.Linear(dim, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(share)

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, T, D) to (S, T, D)."""
        mixed, _ = self.self_attn(x, x, x)
        x = self.norm1(x + self.dropout(mixed))
        hidden = self.linear2(self.dropout(torch.relu(self.linear1(x))))
        normalised: Tensor = self.norm2(x + self.dropout(hidden))
        return normalised


class PublishedTime(nn.Module):
    """Group normalisation, positions and the transformer layers."""

    def __init__(self, config: StclnConfig) -> None:
        super().__init__()
        self.config = config
        self.in_norm = nn.GroupNorm(config.heads, config.dim)
        self.layer_stack = nn.ModuleList([PublishedLayer(config) for _ in range(config.layers)])

    def forward(self, maps: Tensor, positions: Tensor) -> Tensor:
        """Map (B, T, D, H, W) with positions (B, T) to (B, H, W, T, D)."""
        batch, dates, dim, height, width = maps.shape
        series = maps.permute(0, 3, 4, 1, 2).contiguous().view(-1, dates, dim)
        normed = self.in_norm(series.permute(0, 2, 1)).permute(0, 2, 1)
        table = self._table(positions)[:, None].expand(-1, height * width, -1, -1)
        out = normed + table.reshape(-1, dates, dim)
        for layer in self.layer_stack:
            out = layer(out)
        return out.view(batch, height, width, dates, dim)

    def _table(self, positions: Tensor) -> Tensor:
        head = self.config.dim // self.config.heads
        place = torch.arange(head, device=positions.device)
        wavelength = self.config.position_base ** (2 * (place // 2).float() / head)
        angle = positions.float()[..., None] / wavelength
        table = torch.where(place % 2 == 0, angle.sin(), angle.cos())
        return torch.cat([table] * self.config.heads, -1)


class Published(nn.Module):
    """The published classifier; parameters under their published names."""

    def __init__(self, config: StclnConfig) -> None:
        super().__init__()
        first, second = config.widths
        self.utae = nn.ModuleDict({
            "inc": double_convolution(len(config.bands), first),
            "down1": nn.ModuleDict({
                "maxpool_conv": nn.Sequential(double_convolution(first, second))
            }),
            "temporal_encoder": PublishedTime(config),
        })  # fmt: skip
        self.conv1 = nn.Conv2d(second, second, 1, bias=False)
        self.conv2 = nn.Conv2d(second, second, 1, bias=False)
        self.conv3 = nn.Conv2d(second, second, 1, bias=False)
        self.l = nn.Parameter(torch.zeros(1))
        self.outlinear = nn.Linear(second, config.classes)

    def forward(self, images: Tensor, positions: Tensor) -> Tensor:
        """Classify normalised images (B, T, C, H, W): logits (B, K, H, W)."""
        batch, dates, _, height, width = images.shape
        frames = self.utae["inc"]["double_conv"](images.flatten(0, 1))
        frames = self.utae["down1"]["maxpool_conv"][0]["double_conv"](frames)
        maps = frames.view(batch, dates, -1, height, width)
        temporal = self.utae["temporal_encoder"](maps, positions)

        # (B, H, W, T, D) -> (B*T, D, H, W), for the 1 x 1 convolutions
        moved = temporal.permute(0, 3, 4, 1, 2).contiguous()
        query = self.conv1(moved.flatten(0, 1)).view(batch, -1, height * width)
        key = self.conv2(frames).view(batch, -1, height * width)
        logits = torch.bmm(query.permute(0, 2, 1), key) / math.sqrt(moved.shape[2])
        affinity = torch.softmax(logits, -1)  # (B, N, N)
        value = self.conv3(moved.max(1).values).flatten(2).permute(0, 2, 1)
        out = self.l * torch.bmm(affinity, value) + value
        classes: Tensor = self.outlinear(out)
        return classes.permute(0, 2, 1).reshape(batch, -1, height, width)


def published_like(ours: Stcln) -> Published:
    """Build the published network with our network's weights."""
    theirs = Published(ours.config)
    weights = ours.state_dict()
    state = {}
    for name, tensor in theirs.state_dict().items():
        mapped = our_name(name, "classifier")
        if mapped is None:
            raise ValueError(f"{name} has no counterpart")
        state[name] = weights[mapped].view_as(tensor)
    theirs.load_state_dict(state)
    return theirs
