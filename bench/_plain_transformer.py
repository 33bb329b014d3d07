"""A plain vision transformer from noise to sample: what a GET of as many parameters is compared with.

Dosovitskiy et al. 2021 (arXiv 2010.11929) without a class token: patches, blocks that run once each, a linear layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deqdiff_fast.distillation import GET
from deqdiff_fast.distillation.get_blocks import InjectedBlock, grid_positions


class PlainTransformer(nn.Module):
    """(B, C, H, W) noises -> samples. The blocks are GET's injection blocks, with nothing injected."""

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.shape, self.patch = shape, patch
        self.rows, self.columns = shape[1] // patch, shape[2] // patch
        inner = shape[0] * patch * patch
        self.embed = nn.Linear(inner, width)
        self.register_buffer("positions", grid_positions(self.rows, self.columns, width), persistent=False)
        self.blocks = nn.ModuleList(InjectedBlock(width, heads, 4.0) for _ in range(depth))
        self.last_norm, self.last = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, inner)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.last.weight)

    @classmethod
    def as_large_as(cls, student: GET) -> PlainTransformer:
        """Of the student's width and patches, with as many blocks as come nearest to its number of parameters."""
        width, heads = student.size.width, student.size.heads
        wanted = sum(p.numel() for p in student.parameters())
        sizes = [_count(cls(student.shape, width, depth, heads, student.patch)) for depth in (1, 2)]
        depth = max(1, round(1 + (wanted - sizes[0]) / (sizes[1] - sizes[0])))
        return cls(student.shape, width, depth, heads, student.patch)

    def forward(self, noise: Tensor, condition: Tensor | None = None) -> Tensor:
        p = self.patch
        cut = noise.view(len(noise), self.shape[0], self.rows, p, self.columns, p).permute(0, 2, 4, 1, 3, 5)
        h = self.embed(cut.reshape(len(noise), self.rows * self.columns, -1)) + self.positions
        for block in self.blocks:
            h = block(h, None)
        patches = self.last(self.last_norm(h)).to(noise.dtype).view(len(h), self.rows, self.columns, -1, p, p)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(noise.shape)

    def save(self, path: Path, **facts: Any) -> None:
        torch.save({"weights": self.state_dict(), **facts}, path)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
