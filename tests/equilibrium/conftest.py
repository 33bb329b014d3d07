"""Three implicit layers, each with an input that it is injected with: an MLP, a convolution, an attention block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class MLP(nn.Module):
    shape = (24,)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(z) + x.repeat(1, 2)[:, :32]))


class Convolution(nn.Module):
    shape = (4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        nn.init.constant_(self.norm.weight, 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x + 0.6 * self.conv(z)))


class Attention(nn.Module):
    shape = (5, 16)

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(z + x)).view(len(z), 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return 0.3 * z + self.out(mixed.transpose(1, 2).reshape(z.shape)) + x


LAYERS = {"mlp": MLP, "convolution": Convolution, "attention": Attention}


@pytest.fixture(params=LAYERS)
def layer(request):
    """(module, x): x is (4, *module.shape)."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = LAYERS[request.param]()
        return module, torch.randn(4, *module.shape)
