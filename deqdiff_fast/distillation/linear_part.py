"""What of a draft is not learned: the spectrum, mean and size of the samples, and how wide its layers may be."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.draft import Draft
from ..model.draft_layers import block_of
from ..schedule import SpectralSlope

WIDTH = {0: 128, 1: 48, 2: 48, 3: 32}  # by the number of axes of the convolutions, 0 for a perceptron
NARROWEST, CHEAP = 16, 1 / 8  # a row of a draft should cost at most that part of the model's
SMALL_MEAN = 0.05  # of what a mean is after shrinking, below which it is none
ROWS, REPEATS = 16, 3  # of a call that is timed


LinearPart = tuple[SpectralSlope, Tensor | None, float]


def linear_part(samples: Tensor) -> LinearPart:
    """Spectrum about the mean, mean (None where it is nothing but chance) and root mean square of samples (n, C, ...).

    The mean is shrunk by what the mean of so few samples would be by chance (James and Stein 1961)."""
    x = samples.detach().cpu().double()
    mean, variance = x.mean(0), float(x.var(0).mean())
    size = float(mean.square().mean())
    factor = max(1 - variance / len(x) / size, 0.0) if size > 0 else 0.0
    scale = max(variance, 1e-12) ** 0.5
    small = factor * size**0.5 < SMALL_MEAN * scale
    return SpectralSlope.fit(samples), None if small else (factor * mean).float(), scale


def choose_width(make: Callable[[int], Draft], shape: tuple[int, ...], row_seconds: float) -> Draft:
    """The draft of that width, halved as long as a row costs too much beside one of the model.

    row_seconds: of the model, 0 where nobody knows.
    """
    width = WIDTH[len(block_of(shape))]
    while True:
        draft = make(width)
        if row_seconds <= 0 or width <= NARROWEST or _row_seconds(draft) <= CHEAP * row_seconds:
            return draft
        width //= 2


def _row_seconds(draft: Draft) -> float:
    x = torch.zeros(ROWS, *draft.shape, device=draft.get_buffer("times").device)
    t = draft.get_buffer("times")[:1].expand(ROWS)
    pooled = {
        c.where: x.new_zeros(ROWS, *([c.size] if c.kind != "label" else [])).to(
            torch.int64 if c.kind == "label" else x.dtype
        )
        for c in draft.conditions
        if c.kind != "map"
    }
    taken = []
    with torch.no_grad():
        for _ in range(REPEATS):
            started = time.perf_counter()
            float(draft.predict(x, t, pooled).sum())
            taken.append(time.perf_counter() - started)
    return min(taken) / ROWS
