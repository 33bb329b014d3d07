"""ParaDiGMS: Picard iteration on a window, with the paper's own step and the paper's own rule for what is final."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ddim_update, ddim_update_bytes
from ..loop.base import Chain, LeasedTensors, MemoryRequest, ProblemSize, Solver
from .settings import check_max_rounds


class ParadigmsMemory(NamedTuple):
    increments: Tensor  # (T, B, D) of the single steps, the model's part left out
    coef: Tensor  # (T, L) state_coef, less the state that an increment starts from
    sum_coef: Tensor  # (T, L) what a sum of increments is as a chain: the state before, as it is
    bound: Tensor  # (T, 1) D var


@dataclass(frozen=True)
class Paradigms(Solver):
    """Parallel sampling by Picard iteration (Shih et al. 2023, arXiv 2305.16317, algorithm 1), for comparison.

    As in the paper: every state starts as a copy of the noise; a round adds up the increments of the single steps, all
    taken at the old states (`Picard` takes the linear part at the new ones); a state is final when all before it are
    and it moved by at most |dx|^2 <= tol^2 D var, var the variance of the noise of its step in a DDPM chain over these
    timesteps; the window slides to the first state that is not, and what enters it is a copy of its last state. The
    sampler's `window=` is the paper's p.

    The paper's tol is 0.1: `Paradigms(tol=0.1)`. `converged` means that rule and no more then: of 64 samples of a
    Gaussian mixture 4 or 5 were further than 1e-2 from the serial chain's, up to 1.3 (another sample). So by default
    tol is the sampler's, 1e-2, as for every other solver.

    Not as in the diffusers pipeline of the paper's authors: each sample of a batch has a window of its own; var is that
    of the step into the state, not of the step after it; where var is 0, as in a last step into data without noise, the
    smallest other one stands in; and |x|^2 stands in for D var where it is smaller, so that a tolerance means something
    whatever the states' scale.

    Args:
        tol: the rule's own tolerance, used if the sampler is given none. Without it rows are held to a tenth of the
            sampler's tolerance, so that the sample is within it.
        max_rounds: see `DEQSampler`.

    Raises:
        ValueError: a tol that is not > 0, or max_rounds below 1.
    """

    tol: float | None = None
    max_rounds: int | None = None
    guess: str = field(default="copy", init=False)
    by_step: bool = field(default=True, init=False)
    safety: float = field(default=0.1, init=False)
    """The rule as it is where its tolerance was given; else a tenth: what rows are off by adds up along the chain, to
    3.6 times the tolerance on the bundled model."""
    freeze: float = field(default=0.1, init=False)

    def __post_init__(self) -> None:
        if self.tol is not None and not 0 < self.tol < float("inf"):
            raise ValueError(f"tol: expected a number > 0 or None, got {self.tol!r}")
        check_max_rounds(self.max_rounds)
        for name in ("safety", "freeze"):
            object.__setattr__(self, name, 1.0 if self.tol is not None else 0.1)

    @property
    def period(self) -> int:
        return 1

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        request.add("paradigms.increments", (size.num_steps, size.batch, size.numel), size.dtype)
        request.add("paradigms.coef", (size.num_steps, size.lags), size.dtype)
        request.add("paradigms.sum_coef", (size.num_steps, size.lags), size.accumulator)
        request.add("paradigms.bound", (size.num_steps, 1), size.accumulator)

    def scratch_bytes(self, size: ProblemSize) -> int:
        found: int = ddim_update_bytes(size.num_steps, size.batch, size.numel, size.dtype, size.device, size.backend)
        return found

    def start(self, tensors: LeasedTensors) -> ParadigmsMemory:
        memory = ParadigmsMemory(*(tensors[f"paradigms.{name}"] for name in ParadigmsMemory._fields))
        memory.sum_coef.zero_()
        memory.sum_coef[:, 0] = 1
        return memory

    def step(self, chain: Chain, memory: ParadigmsMemory, round: int) -> None:
        """X[i+1] <- X[i] + (F(X_old)[i+1] - X_old[i]), the model's part of the bracket added by the kernel."""
        increments, coef = memory.increments, memory.coef.copy_(chain.state_coef)[..., None, None]
        coef[:, 0].sub_(1)
        torch.mul(chain.states[:-1], coef[:, 0], out=increments)
        for lag in range(1, min(coef.shape[1], chain.num_steps)):
            increments[lag:].addcmul_(chain.states[: -1 - lag], coef[lag:, lag])
        if chain.drift is not None:
            increments.add_(chain.drift)
        ddim_update(
            chain.states, chain.predictions, memory.sum_coef, chain.model_coef, chain.lo, chain.hi, chain.sq_diff,
            chain.sq_norm, increments, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
        torch.mul(chain.step_variance, chain.states.shape[2], out=memory.bound)
        torch.minimum(chain.sq_norm, memory.bound, out=chain.sq_norm)
