"""The networks of the zoo and how each is trained, with nothing about solvers in mind."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from .._problems import ABAR
from . import _data, _nets
from ._train import Batch, Recipe, interpolated, noised

LABELS, NO_LABEL = 10, 10

# CSDI's: square roots of the betas evenly spaced, 50 steps, all of which are taken.
QUADRATIC = (1 - torch.linspace(1e-4**0.5, 0.5**0.5, 50, dtype=torch.float64).square()).cumprod(0)
# EDM's "polynomial_2" (Hoogeboom et al. 2022, arXiv 2203.17003), as molecules are sampled with.
POLYNOMIAL = (1 - 2e-5) * (1 - (torch.arange(1, 1001, dtype=torch.float64) / 1000).square()).square() + 1e-5

_digits = cache(_data.digits)


def _pick(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    images, labels = _digits()
    chosen = torch.randint(0, len(images), (count,), generator=draw)
    return images[chosen], labels[chosen]


def _digit(count: int, draw: torch.Generator) -> Batch:
    return noised(_pick(count, draw)[0], ABAR, draw)


def _labelled_digit(count: int, draw: torch.Generator) -> Batch:
    images, labels = _pick(count, draw)
    dropped = torch.rand(count, generator=draw) < 0.1
    batch = interpolated(images, draw)
    batch.kwargs = {"label": torch.where(dropped, NO_LABEL, labels)}
    return batch


def _signal(count: int, draw: torch.Generator) -> Batch:
    return noised(_data.signals(count, draw), ABAR, draw)


def _series(count: int, draw: torch.Generator) -> Batch:
    clean, mask = _data.series(count, draw), _data.given(count, draw)
    batch = noised(clean, QUADRATIC, draw)
    batch.kwargs, batch.weight = {"observed": mask * clean, "mask": mask}, 1 - mask
    return batch


def _graph(count: int, draw: torch.Generator) -> Batch:
    mask = _data.node_counts(count, draw)
    batch = noised(_data.graphs(mask, draw), POLYNOMIAL, draw)
    batch.kwargs, batch.weight = {"mask": mask}, mask[..., None].expand_as(batch.target)
    return batch


RECIPES = {
    "digits": Recipe(partial(_nets.UNet, 2, 1, (24, 48)), _digit, steps=2000),
    "guided": Recipe(_nets.DigitTransformer, _labelled_digit, steps=2000),
    "signal": Recipe(partial(_nets.UNet, 1, 2, (16, 32, 48), 5), _signal, steps=1000),
    "imputation": Recipe(_nets.Imputer, _series, steps=1000),
    "graph": Recipe(_nets.GraphNet, _graph, steps=1500),
}
