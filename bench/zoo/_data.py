"""What the models of the zoo are trained on: scikit-learn's digits, and data drawn on the spot."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIGNAL = (2, 128)  # channels, samples
SERIES = (8, 48)  # features, times
NODES, NODE = 12, 5  # most nodes of a graph; entries of a node: two coordinates and one of three kinds


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) in [-1, 1] and the labels (1797,), 0 to 9: the UCI handwritten digits. Raises ImportError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"the digits are those of scikit-learn, which cannot be imported ({error}): pip install scikit-learn, or "
            "name models that need none with --models"
        ) from error
    found = load_digits()
    return torch.as_tensor(found.images)[:, None].float() / 8 - 1, torch.as_tensor(found.target).long()


def signals(count: int, draw: torch.Generator) -> Tensor:
    """(count, *SIGNAL): up to five spikes of about one sample's width on a smooth background; the second channel
    records the same events later, weaker and with a tail."""
    channels, length = SIGNAL
    time = torch.arange(length)
    harmonic = torch.arange(1, 6)
    size = torch.randn(count, channels, 5, 2, generator=draw) / harmonic[:, None]
    wave = torch.stack([fn(2 * math.pi * harmonic[:, None] * time / length) for fn in (torch.sin, torch.cos)], 1)
    background = 0.4 * torch.einsum("nchp,hpt->nct", size, wave)
    place = torch.rand(count, 5, generator=draw) * (length - 16) + 4
    height = (1.5 + 2 * torch.rand(count, 5, generator=draw)) * (torch.rand(count, 5, generator=draw) < 0.6)
    width = 0.5 + 0.5 * torch.rand(count, 5, generator=draw)
    after = time - place[..., None]
    spike = torch.exp(-0.5 * (after / width[..., None]).square())
    late = (after - 5).clamp(min=0)
    tail = 0.7 * late * torch.exp(1 - late)
    events = torch.stack([spike, tail], 1)  # (count, channels, 5, length)
    return background + torch.einsum("nk,nckt->nct", height, events)


def series(count: int, draw: torch.Generator) -> Tensor:
    """(count, *SERIES): noisy mixtures of three oscillations and a trend, standard deviation about 1."""
    features, times = SERIES
    loading = torch.randn(features, 4, generator=torch.Generator().manual_seed(7)) / 1.6
    time = torch.arange(times) / times
    period = 1 + 5 * torch.rand(count, 3, 1, generator=draw)
    phase = torch.rand(count, 3, 1, generator=draw)
    factors = math.sqrt(2) * torch.sin(2 * math.pi * (period * time + phase))
    trend = torch.randn(count, 1, 1, generator=draw) * (2 * time - 1)
    noise = 0.1 * torch.randn(count, features, times, generator=draw)
    return torch.einsum("fk,nkt->nft", loading, torch.cat([factors, trend], 1)) + noise


def given(count: int, draw: torch.Generator) -> Tensor:
    """(count, *SERIES), 1 for entries of a series that are given: a random share of them, less one stretch of time."""
    features, times = SERIES
    share = 0.1 + 0.8 * torch.rand(count, 1, 1, generator=draw)
    scattered = torch.rand(count, features, times, generator=draw) < share
    start = torch.rand(count, 1, 1, generator=draw) * times
    time = torch.arange(times)
    stretch = (time >= start) & (time < start + 8)
    return (scattered & ~stretch).float()


def node_counts(count: int, draw: torch.Generator) -> Tensor:
    """(count, NODES), 1 for the nodes that a graph has: 5 to NODES of them, the first ones."""
    nodes = torch.randint(5, NODES + 1, (count, 1), generator=draw)
    return (torch.arange(NODES) < nodes).float()


def graphs(mask: Tensor, draw: torch.Generator) -> Tensor:
    """(count, NODES, NODE) for the nodes in `mask`: rings and zigzag chains in the plane with edges of one length, any
    orientation, centred, and nodes of three kinds that repeat along them; padding is 0."""
    count = len(mask)
    nodes = mask.sum(1, keepdim=True)
    step = torch.arange(NODES)
    ring = torch.rand(count, 1, generator=draw) < 0.5
    zigzag = 0.5 * (1 - 2.0 * (step % 2))
    angle = torch.where(ring, 2 * math.pi * step / nodes, zigzag + 0.0 * nodes)
    angle = angle + 2 * math.pi * torch.rand(count, 1, generator=draw)
    place = 0.6 * torch.stack([angle.cos(), angle.sin()], 2).cumsum(1)
    place = place + 0.02 * torch.randn(place.shape, generator=draw)
    place = place - (place * mask[..., None]).sum(1, keepdim=True) / nodes[..., None]
    first, stride = (torch.randint(0, high, (count, 1), generator=draw) for high in (3, 2))
    kind = torch.nn.functional.one_hot((first + stride * step) % 3, 3) - 1 / 3
    return torch.cat([place, kind], 2) * mask[..., None]
