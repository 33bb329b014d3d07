"""One round of the paper's solver as its authors formulate it in torch: what the fused kernels are held against.

Pokle, Geng, Kolter 2022, arXiv 2210.12867, eq. 8 and 9 and their code's structure, written anew: the chain as a
cumulative sum over time, whole history tensors, the complete Gram matrix by a batched product in every round, a
bordered (m + 1) x (m + 1) system for each (timestep, sample) row, one residual norm over everything. What their loop
computes twice, or throws away (the term with weight 1 - beta = 0), is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Scan = Callable[..., Tensor]


@dataclass
class Chain:
    """x_{i+1} = state_coef[i] x_i + model_coef[i] e_i, and the same in closed form, as the authors compute it:
    x_{i+1} = prefix[i] (x_0 + sum_{j <= i} gain[j] e_j).
    """

    prefix: Tensor  # (T, 1, 1)
    gain: Tensor  # (T, 1, 1)
    state_coef: list[float]
    model_coef: list[float]

    @classmethod
    def of(cls, state_coef: Tensor, model_coef: Tensor, dtype: torch.dtype) -> Chain:
        """state_coef, model_coef: (T, 1), the tables of the kernels."""
        a, b = state_coef[:, 0].double(), model_coef[:, 0].double()
        prefix = a.cumprod(0)
        column = (slice(None), None, None)
        return cls(prefix[column].to(dtype), (b / prefix)[column].to(dtype), a.tolist(), b.tolist())


def scan_cumsum(chain: Chain, noise: Tensor, predictions: Tensor) -> Tensor:
    """(T, B, D): states 1..T after one Picard round; noise (B, D), predictions (T, B, D)."""
    return chain.prefix * (noise + (chain.gain * predictions).cumsum(0))


def scan_loop(chain: Chain, noise: Tensor, predictions: Tensor) -> Tensor:
    """The same as a loop over time: on a CPU quicker than torch's cumsum over the first dimension."""
    states, last = torch.empty_like(predictions), noise
    for i, (a, b) in enumerate(zip(chain.state_coef, chain.model_coef, strict=True)):
        last = torch.mul(last, a, out=states[i]).add_(predictions[i], alpha=b)
    return states


def ddim_update(scan: Scan, chain: Chain, states: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    """One Picard round in place, states (T + 1, B, D). Returns the squared norms (T, B) of change and result."""
    new = scan(chain, states[0], predictions)
    change, size = (new - states[1:]).square().sum(-1), new.square().sum(-1)
    states[1:] = new
    return change, size


@dataclass
class History:
    """What the solver remembers, one row for each (timestep, sample): R = T B rows of M columns."""

    x: Tensor  # (R, M, D)
    f: Tensor  # (R, M, D)
    bordered: Tensor  # (R, M + 1, M + 1)
    right: Tensor  # (R, M + 1, 1)
    ridge: Tensor  # (M, M)

    @classmethod
    def of(cls, states: Tensor, history: int, ridge: float) -> History:
        """states: (T + 1, B, D), of which 1..T become column 0."""
        rows, size = (states.shape[0] - 1) * states.shape[1], states.shape[2]
        x, f = states.new_zeros(rows, history, size), states.new_zeros(rows, history, size)
        x[:, 0] = states[1:].flatten(0, 1)
        bordered = states.new_zeros(rows, history + 1, history + 1)
        bordered[:, 0, 1:] = bordered[:, 1:, 0] = 1
        right = states.new_zeros(rows, history + 1, 1)
        right[:, 0] = 1
        return cls(x, f, bordered, right, ridge * torch.eye(history, dtype=states.dtype, device=states.device))


def anderson_round(
    scan: Scan, chain: Chain, noise: Tensor, predictions: Tensor, past: History, now: int, after: int, n: int
) -> tuple[Tensor, Tensor]:
    """Scan into column `now` of f, residual, Gram of n columns, bordered solve, mixture into column `after` of x."""
    x, f, bordered = past.x, past.f, past.bordered
    f[:, now] = scan(chain, noise, predictions).flatten(0, 1)
    residual, size = (f[:, now] - x[:, now]).norm(), f[:, now].norm()
    g = f[:, :n] - x[:, :n]
    bordered[:, 1 : n + 1, 1 : n + 1] = torch.bmm(g, g.transpose(1, 2)) + past.ridge[:n, :n]
    alpha = torch.linalg.solve(bordered[:, : n + 1, : n + 1], past.right[:, : n + 1])[:, 1:, 0]
    x[:, after] = torch.einsum("rm,rmd->rd", alpha, f[:, :n])
    return residual, size


class Anderson:
    """The solver's loop without the model: `step` after `step`."""

    def __init__(self, chain: Chain, states: Tensor, history: int, ridge: float) -> None:
        self.chain, self.noise, self.history = chain, states[0].clone(), history
        self.past = History.of(states, history, ridge)
        self.round = 0

    def step(
        self, predictions: Tensor, scan: Scan = scan_cumsum, compute: Callable[..., tuple[Tensor, Tensor]] | None = None
    ) -> tuple[float, float]:
        """One round from the predictions at `states()`; returns the absolute and the relative residual.

        compute: `anderson_round`, or a compiled form of it.
        """
        now, n = self.round % self.history, min(self.round + 1, self.history)
        residual, size = (compute or anderson_round)(
            scan, self.chain, self.noise, predictions, self.past, now, (now + 1) % self.history, n
        )
        self.round += 1
        absolute = residual.item()
        return absolute, absolute / (1e-5 + size.item())

    def states(self) -> Tensor:
        """(R, D): the states at which the model is evaluated next."""
        return self.past.x[:, self.round % self.history]
