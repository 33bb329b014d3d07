"""Random models of several families, whose rows depend on nothing but themselves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import torch
from chains import Chain
from torch import Tensor, nn

FAMILIES = ("gaussian", "wide", "sharp", "low", "mlp", "fourier", "conv", "nearest", "experts", "labels")

Model = Callable[..., Tensor]


def as_prediction(chain: Chain, flat: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """What the model of this chain says where the clean sample is `clean`, both (n, D)."""
    signal, sigma = (level[:, None] for level in chain.levels(t))
    eps = (flat - signal * clean) / sigma
    if chain.prediction == "epsilon":
        return eps
    if chain.prediction == "sample":
        return clean
    return signal * eps - sigma * clean if chain.prediction == "v_prediction" else eps - clean


class Mixture:
    """The exact posterior mean of a mixture of Gaussians with diagonal covariances, computed in float64."""

    def __init__(self, chain: Chain, size: int, points: int, deviation: float, draw: torch.Generator) -> None:
        self.chain, self.hard = chain, False
        self.means = torch.randn(points, size, generator=draw, dtype=torch.float64) * 0.7
        shape = torch.rand(points, size, generator=draw, dtype=torch.float64)
        self.variance = deviation**2 * (0.3 + 1.4 * shape)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        flat = x.double().flatten(1)
        signal, sigma = (level[:, None, None] for level in self.chain.levels(t))
        total = signal.square() * self.variance + sigma.square()
        offset = flat[:, None] - signal * self.means
        score = -0.5 * (offset.square() / total + total.log()).sum(-1)
        if label is not None:
            score = score + 4.0 * nn.functional.one_hot(label, len(self.means))
        share = nn.functional.one_hot(score.argmax(1), len(self.means)).double() if self.hard else score.softmax(1)
        clean = (share[..., None] * (self.means + signal * self.variance / total * offset)).sum(1)
        return as_prediction(self.chain, flat, clean, t).view_as(x).to(x.dtype)


class Experts:
    """Two mixtures, one for the noisy and one for the clean part of the chain: a jump in time."""

    def __init__(self, first: Mixture, second: Mixture, at: float) -> None:
        self.first, self.second, self.at = first, second, at

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        early = (t.double() >= self.at).view(-1, *[1] * (x.dim() - 1))
        return torch.where(early, self.first(x, t), self.second(x, t))


class Network(nn.Module):
    """A random network beside the answer for unit Gaussian data."""

    def __init__(self, chain: Chain, body: nn.Module, scale: float, waves: int) -> None:
        super().__init__()
        self.chain, self.body, self.scale, self.waves = chain, body, scale, waves

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        signal, sigma = self.chain.levels(t)
        flat = x.double().flatten(1)
        gain = (signal / (signal.square() + sigma.square()))[:, None]
        linear = as_prediction(self.chain, flat, gain * flat, t).view_as(x)
        kind = next(self.body.parameters()).dtype
        level = (signal / (signal + sigma)).to(kind)  # 0 to 1 along the chain
        times = [level] if not self.waves else [(2**k * math.pi * level).sin() for k in range(self.waves)]
        norm = (signal.square() + sigma.square()).rsqrt().view(-1, *[1] * (x.dim() - 1))
        return (linear + self.scale * self.body((x * norm).to(kind), torch.stack(times, 1))).to(x.dtype)


class Dense(nn.Module):
    def __init__(self, size: int, width: int, times: int, gain: float, draw: torch.Generator) -> None:
        super().__init__()
        sizes = [size + times, width, width, size]
        weights = [torch.randn(b, a, generator=draw) * gain / math.sqrt(a) for a, b in pairwise(sizes)]
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        h = torch.cat([x.flatten(1), times], 1)
        for weight in list(self.weights)[:-1]:
            h = torch.tanh(h @ weight.T)
        return (h @ self.weights[-1].T).view_as(x)


class Convolutions(nn.Module):
    def __init__(self, channels: int, width: int, times: int, gain: float, draw: torch.Generator) -> None:
        super().__init__()
        sizes = [channels, width, width, channels]
        weights = [torch.randn(b, a, 3, 3, generator=draw) * gain / math.sqrt(9 * a) for a, b in pairwise(sizes)]
        self.weights = nn.ParameterList([*weights, torch.randn(width, times, generator=draw)])

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        first, second, last, shift = self.weights
        h = nn.functional.silu(nn.functional.conv2d(x, first, padding=1) + (times @ shift.T)[..., None, None])
        return nn.functional.conv2d(nn.functional.silu(nn.functional.conv2d(h, second, padding=1)), last, padding=1)


def random_shape(draw: random.Random, family: str) -> tuple[int, ...]:
    if family == "low":
        return draw.choice(((1,), (2,), (3,), (1, 1, 1)))
    if family == "conv":
        return draw.choice(((1, 8, 8), (3, 8, 8), (4, 5, 7)))
    return draw.choice(((8,), (17,), (64,), (3, 8, 8), (1, 6, 6), (5, 9), (2, 33), (2, 3, 4, 4)))


def random_model(draw: random.Random, family: str, chain: Chain, shape: tuple[int, ...], dtype: torch.dtype) -> Model:
    """A model of that family for samples of that shape."""
    size, seeded = math.prod(shape), torch.Generator().manual_seed(draw.getrandbits(40))
    if family in ("mlp", "fourier", "conv"):
        waves = draw.randint(2, 5) if family == "fourier" else 0
        gain, width = draw.uniform(0.5, 2.0), draw.choice((8, 32))
        if family == "conv":
            body: nn.Module = Convolutions(shape[0], width, max(waves, 1), gain, seeded)
        else:
            body = Dense(size, width, max(waves, 1), gain, seeded)
        body = body.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return Network(chain, body, draw.uniform(0.1, 1.0), waves).requires_grad_(False).eval()
    points = 1 if family == "gaussian" else draw.randint(2, 8)
    wide = {"gaussian": (0.05, 1.5), "wide": (0.3, 1.0), "low": (0.02, 0.5)}.get(family, (0.02, 0.3))
    deviation = math.exp(draw.uniform(*map(math.log, wide)))
    model = Mixture(chain, size, points, deviation, seeded)
    model.hard = family == "nearest"
    if family == "experts":
        times = chain.schedule.timesteps
        last = draw.randrange(len(times))  # of the first model, with room for rounding
        at = float(times[last : last + 2].double().mean()) if last + 1 < len(times) else float(times[last]) / 2
        return Experts(model, Mixture(chain, size, points, deviation, seeded), at)
    return model
