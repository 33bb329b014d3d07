"""The networks of the zoo: plain ones, of the kinds that people write for such data."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._data import NODE, NODES, SERIES


class Time(nn.Module):
    """(n, width) from timesteps (n,) in 0..1000: sines and cosines, and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rates", torch.exp(-math.log(1e4) * torch.arange(32) / 32))
        self.layers = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(self.rates.dtype)[:, None] * self.rates
        return self.layers(torch.cat([angle.sin(), angle.cos()], 1))


class Residual(nn.Module):
    """GroupNorm, SiLU and convolution, twice, the time between them."""

    def __init__(self, conv: Any, inner: int, outer: int, kernel: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, inner), nn.SiLU(), conv(inner, outer, kernel, padding=kernel // 2))
        self.time = nn.Linear(time, outer)
        self.second = nn.Sequential(nn.GroupNorm(4, outer), nn.SiLU(), conv(outer, outer, kernel, padding=kernel // 2))
        self.skip = nn.Identity() if inner == outer else conv(inner, outer, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x)
        h = self.second(h + self.time(time).view(len(x), -1, *[1] * (x.dim() - 2)))
        return self.skip(x) + h


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015, arXiv 1505.04597; as in DDPM, without attention) over one or two dimensions."""

    def __init__(self, dims: int, channels: int, widths: tuple[int, ...], kernel: int = 3) -> None:
        super().__init__()
        conv: Any = nn.Conv1d if dims == 1 else nn.Conv2d
        time = 4 * widths[0]
        self.time = Time(time)
        self.inlet = conv(channels, widths[0], kernel, padding=kernel // 2)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        for fine, coarse in pairwise(widths):
            self.down.append(Residual(conv, fine, fine, kernel, time))
            self.shrink.append(conv(fine, coarse, kernel, stride=2, padding=kernel // 2))
            self.grow.insert(0, conv(coarse, fine, kernel, padding=kernel // 2))
            self.up.insert(0, Residual(conv, 2 * fine, fine, kernel, time))
        self.middle = Residual(conv, widths[-1], widths[-1], kernel, time)
        last = conv(widths[0], channels, kernel, padding=kernel // 2)
        self.outlet = nn.Sequential(nn.GroupNorm(4, widths[0]), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, h, kept = self.time(t), self.inlet(x), []
        for block, shrink in zip(self.down, self.shrink):
            h = block(h, time)
            kept.append(h)
            h = shrink(h)
        h = self.middle(h, time)
        for grow, block in zip(self.grow, self.up):
            h = grow(functional.interpolate(h, scale_factor=2.0))
            h = block(torch.cat([h, kept.pop()], 1), time)
        out: Tensor = self.outlet(h)
        return out


class Block(nn.Module):
    """A transformer's block, modulated by the condition (adaLN; Peebles and Xie 2022, arXiv 2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight), nn.init.zeros_(self.modulate.bias)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (n, tokens, width); condition: (n, width); mask: (n, 1, 1, tokens), False for tokens not attended to."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulate(condition)[:, None].chunk(6, -1)
        parts = self.project(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + gate * self.merge(mixed.transpose(1, 2).flatten(2))
        return x + gate2 * self.layers(self.norm(x) * (1 + scale2) + shift2)


class DigitTransformer(nn.Module):
    """A class-conditional transformer over the 16 patches of a digit; label 10 stands for none."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.time, self.label = Time(width), nn.Embedding(11, width)
        self.inlet = nn.Conv2d(1, width, 2, stride=2)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """x: (n, 1, 8, 8); t: (n,); label: (n,) int64."""
        condition = self.time(t) + self.label(label)
        h = self.inlet(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            h = block(h, condition)
        return functional.fold(self.outlet(h).transpose(1, 2), (8, 8), 2, stride=2)


class Imputer(nn.Module):
    """eps of the entries of a series that are not given (CSDI; Tashiro et al. 2021, arXiv 2107.03502), by gated dilated
    convolutions (DiffWave, arXiv 2009.09761).

    What x has where entries are given is never read, and what comes out there was never trained.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        features, _ = SERIES
        self.time = Time(width)
        self.inlet = nn.Conv1d(3 * features, width, 1)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, padding=d, dilation=d) for d in (1, 2, 4, 8, 1, 2))
        self.mixed = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in self.gated)
        self.outlet = nn.Sequential(nn.Conv1d(width, width, 1), nn.SiLU(), nn.Conv1d(width, features, 1))

    def forward(self, x: Tensor, t: Tensor, observed: Tensor, mask: Tensor) -> Tensor:
        """x, observed, mask: (n, *SERIES), mask 1 for given entries; t: (n,)."""
        h = self.inlet(torch.cat([mask * observed, (1 - mask) * x, mask], 1))
        time, total = self.time(20 * t)[..., None], torch.zeros(())
        for gated, mixed in zip(self.gated, self.mixed):
            value, gate = gated(h + time).chunk(2, 1)
            onward, out = mixed(value.tanh() * gate.sigmoid()).chunk(2, 1)
            h, total = (h + onward) / math.sqrt(2), total + out
        out: Tensor = self.outlet(total / math.sqrt(len(self.gated)))
        return out


class GraphNet(nn.Module):
    """eps of a graph's nodes by attention among those that there are, in no order; 0 for padding, which is not read."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.time, self.size = Time(width), nn.Embedding(NODES + 1, width)
        self.inlet = nn.Linear(NODE, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NODE))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """x: (n, NODES, NODE); t: (n,); mask: (n, NODES), 1 for nodes, 0 for padding."""
        condition = self.time(t) + self.size(mask.sum(1).long())
        h = self.inlet(x * mask[..., None])
        for block in self.blocks:
            h = block(h, condition, mask.bool()[:, None, None])
        out: Tensor = self.outlet(h) * mask[..., None]
        return out
