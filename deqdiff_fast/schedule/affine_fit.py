"""Recover x_{i+1} = sum_l a_l x_{i-l} + b_l o_{i-l} + s z_i from a recorded chain, with as few terms as explain it.

Pure torch and unaware of any scheduler. A recorded chain is K independent elements (probe columns): random outputs and
noises go in, states come out. For every step the terms are found by least squares over half of the columns, and a step
is accepted only if it also explains the other half, element by element, to `tolerance` of the terms' own size. A step
that is not affine, or that looks back further than `max_lags`, is therefore noticed and never approximated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NotAffineError


@dataclass(frozen=True)
class Recursion:
    """state_coef, model_coef: (T, L); noise_coef: (T,); float64."""

    state_coef: Tensor
    model_coef: Tensor
    noise_coef: Tensor

    def replay(self, start: Tensor, outputs: Tensor, noises: Tensor) -> Tensor:
        """The states (T+1, K) that follow from start (K,), outputs (T, K) and noises (T, K)."""
        states = [start]
        for i in range(len(self.noise_coef)):
            x = self.noise_coef[i] * noises[i]
            for lag in range(min(self.state_coef.shape[1], i + 1)):
                x = x + self.state_coef[i, lag] * states[i - lag] + self.model_coef[i, lag] * outputs[i - lag]
            states.append(x)
        return torch.stack(states)


def fit(states: Tensor, outputs: Tensor, noises: Tensor, *, max_lags: int, tolerance: float) -> Recursion:
    """states (T+1, K), outputs (T, K), noises (T, K) with zero rows where none was drawn; float64.

    Raises NotAffineError naming the first step that no affine recursion of at most max_lags lags explains.
    """
    count = len(outputs)
    found = torch.zeros(count, 2 * max_lags + 1, dtype=torch.float64)
    open_steps = torch.arange(count)
    for lags in range(1, max_lags + 1):
        terms = _terms(states, outputs, noises, open_steps, lags)
        target = states[open_steps + 1]
        coef = _solve(terms, target)
        fits = _error(terms, target, coef) <= tolerance
        done = open_steps[fits]
        if len(done):
            found[done, : 2 * lags + 1] = _prune(terms[fits], target[fits], coef[fits], tolerance)
        open_steps = open_steps[~fits]
        if not len(open_steps):
            break
    else:
        first = int(open_steps[0])
        raise NotAffineError(f"step {first} of {count} is not an affine function of the last {max_lags} states, model "
                             "outputs and its own noise")  # fmt: skip
    pairs = found[:, 1:]
    used = (pairs != 0).any(0).nonzero()
    lags = int(used.max()) // 2 + 1 if len(used) else 1
    return Recursion(pairs[:, 0 : 2 * lags : 2].contiguous(), pairs[:, 1 : 2 * lags : 2].contiguous(), found[:, 0])


def _terms(states: Tensor, outputs: Tensor, noises: Tensor, steps: Tensor, lags: int) -> Tensor:
    """(n, 1 + 2 lags, K): z_i, x_i, o_i, x_{i-1}, o_{i-1}, ...; zero before the start of the chain."""
    parts = [noises[steps]]
    for lag in range(lags):
        exists = (steps >= lag).to(torch.float64)[:, None]
        back = (steps - lag).clamp_min(0)
        parts += [states[back] * exists, outputs[back] * exists]
    return torch.stack(parts, dim=1)


def _solve(terms: Tensor, target: Tensor) -> Tensor:
    """Least squares over the first half of the columns; exact zeros for terms that are zero. (n, m)."""
    half = terms.shape[2] // 2
    a = terms[:, :, :half]
    norm = a.norm(dim=2)
    scale = torch.where(norm > 0, 1 / norm, 0)
    # gelsd: terms can be collinear (x_i is itself a combination of older terms), which plain QR does not survive
    y: Tensor = torch.linalg.lstsq(
        (a * scale[:, :, None]).mT, target[:, :half, None], rcond=1e-13, driver="gelsd"
    ).solution[:, :, 0]
    return y * scale


def _error(terms: Tensor, target: Tensor, coef: Tensor) -> Tensor:
    """(n,): worst column's residual relative to the size of the terms that make it up (a backward error)."""
    sizes = (coef.abs()[:, :, None] * terms.abs()).sum(1) + target.abs()
    residual = (target - (coef[:, :, None] * terms).sum(1)).abs()
    return torch.where(sizes > 0, residual / sizes, 0).amax(1).nan_to_num(float("inf"))


def _prune(terms: Tensor, target: Tensor, coef: Tensor, tolerance: float) -> Tensor:
    """Drop every term without which the fit still holds, oldest first."""
    terms = terms.clone()
    for column in [*range(terms.shape[1] - 1, 0, -1), 0]:
        removed = terms[:, column].clone()
        terms[:, column] = 0
        smaller = _solve(terms, target)
        needed = _error(terms, target, smaller) > tolerance
        terms[needed, column] = removed[needed]
        coef = torch.where(needed[:, None], coef, smaller)
    return torch.where((terms != 0).any(2), coef, 0)
