"""Transformer blocks whose queries, keys and values take an injection, and positions on a grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InjectedAttention(nn.Module):
    """Multi-head attention with q, k, v = W z + u: what is injected is added before the heads meet."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, z: Tensor, injection: Tensor | None) -> Tensor:
        """z: (B, N, width); injection: (B, N or 1, 3 width)."""
        qkv = self.qkv(z)
        if injection is not None:
            qkv = qkv + injection
        batch, patches, width = z.shape
        q, k, v = qkv.view(batch, patches, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, patches, width))
        return found


class InjectedBlock(nn.Module):
    """z + attention(norm(z), u), then z + mlp(norm(z)): the block of GET (arXiv 2401.08639, sec. 4)."""

    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = InjectedAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, z: Tensor, injection: Tensor | None) -> Tensor:
        """(B, N, width); injection: (B, N or 1, 3 width), or None."""
        z = z + self.attention(self.attention_norm(z), injection)
        found: Tensor = z + self.mlp(self.mlp_norm(z))
        return found


def grid_positions(rows: int, columns: int, width: int) -> Tensor:
    """(1, rows * columns, width): sines and cosines of the row in one half and of the column in the other (Vaswani et
    al. 2017, arXiv 1706.03762, sec. 3.5)."""
    quarter = width // 4
    rates = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (y, x)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], 1).float()[None]
