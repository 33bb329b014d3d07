"""Anderson acceleration of the plain step, with three ways to share the mixing weights along the chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import anderson_step, anderson_step_bytes
from ..loop.base import Bounds, Chain, LeasedTensors, MemoryRequest, ProblemSize, Solver
from ..loop.rows import clear_rows, move_rows
from .settings import check_history_dtype, check_max_rounds, history_dtype

Scope = Literal["timestep", "trajectory", "triangular"]


class AndersonMemory(NamedTuple):
    f: Tensor  # (M, W, B, D) plain steps, a ring over rounds (M) and over timesteps (W)
    g: Tensor  # (M, W, B, D) their residuals F - X
    gram: Tensor  # (W, B, M, M)
    filled: Tensor  # (W, B) int32


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson mixing, G = F - X: alpha minimises |G alpha|^2 + ridge with sum alpha = 1, then X <- F alpha.

    The timestep next to the known state always takes the plain step.

    Args:
        history: iterates kept, 1 to 8.
        scope: one alpha per (timestep, sample), "timestep" (Pokle et al. 2022, arXiv 2210.12867, eq. 9); per
            trajectory, "trajectory"; or per prefix of the trajectory, "triangular" (Tang et al. 2024, arXiv
            2402.09970).
        ridge: relative to the Gram's own diagonal, or absolute if `relative_ridge=False`.
        damping: weight of the plain steps against the old iterates, 1 for plain steps only.
        stale: a kept iterate whose squared residual is more than this many times the newest one's is left out.
        max_rounds: rounds before giving up, None for T.
        guess: "gaussian" or "copy", see `Solver`.
        safety, freeze: see `Solver`; small, because mixing can make residuals small before errors are.
        tol: residual at which a timestep is final if the sampler is given no tolerance of its own.
        label: the name in results.
        history_dtype: what the residuals G are stored in (None: as the states); bfloat16 halves their memory and
            traffic. The plain steps F stay as wide as the states: what is mixed are their differences, which a narrow
            dtype would lose.

    Raises:
        ValueError: a bad setting, by its name.
    """

    history: int = 5
    scope: Scope = "triangular"
    ridge: float = 1e-6
    damping: float = 1.0
    relative_ridge: bool = True
    stale: float = 1e6
    max_rounds: int | None = None
    guess: str = "gaussian"
    safety: float = 0.1
    freeze: float = 0.003
    tol: float | None = None
    label: str = ""
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.history, int) and 1 <= self.history <= 8):
            raise ValueError(f"history: expected an int from 1 to 8, got {self.history!r}")
        if self.scope not in ("timestep", "trajectory", "triangular"):
            raise ValueError(f"scope: expected 'timestep', 'trajectory' or 'triangular', got {self.scope!r}")
        if not self.ridge >= 0:
            raise ValueError(f"ridge: expected a number >= 0, got {self.ridge!r}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping: expected a number in (0, 1], got {self.damping!r}")
        if not self.stale >= 1:
            raise ValueError(f"stale: expected a number >= 1, got {self.stale!r}")
        if self.guess not in ("gaussian", "copy"):
            raise ValueError(f"guess: expected 'gaussian' or 'copy', got {self.guess!r}")
        check_history_dtype(self.history_dtype)
        check_max_rounds(self.max_rounds)

    @property
    def name(self) -> str:
        return self.label or f"anderson-{self.scope}"

    @property
    def period(self) -> int:
        return self.history

    @classmethod
    def deq_ddim(cls) -> Anderson:
        """The paper's own setting: per timestep, history 5, absolute ridge 1e-3, noise in every state, 15 rounds."""
        return cls(
            scope="timestep", history=5, ridge=1e-3, relative_ridge=False, stale=float("inf"), guess="copy",
            max_rounds=15, tol=1e-3, label="deq-ddim",
        )  # fmt: skip

    @classmethod
    def parataa(cls) -> Anderson:
        """ParaTAA (Tang et al. 2024, arXiv 2402.09970, and its code TZW1998/ParaTAA-Diffusion), for comparison.

        As there: triangular weights; 3 iterates kept (2 to 5 are recommended); copies of the noise to start from, and
        of the window's last state for what enters; the plain step for the unconverged state nearest the noise, the
        safeguard by which every round makes one more state exact. The order k of the nonlinear equations is the whole
        window, its largest value. Not as there: the ridge, which is 1e-3 on the weights of differences there, so that
        small residuals lead to the plain step; on weights of sum 1, as here, they would lead to the mean of old
        iterates, so it is relative and small. And the stopping rule, which is the sampler's: solvers are compared at
        one `tol`.
        """
        return cls(scope="triangular", history=3, guess="copy", label="parataa")

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        m, w, b = self.history, size.window, size.batch
        request.add("anderson.f", (m, w, b, size.numel), size.dtype)
        request.add("anderson.g", (m, w, b, size.numel), history_dtype(self.history_dtype, size))
        request.add("anderson.gram", (w, b, m, m), size.accumulator)
        request.add("anderson.filled", (w, b), torch.int32)

    def scratch_bytes(self, size: ProblemSize) -> int:
        found: int = anderson_step_bytes(
            size.num_steps, size.batch, size.numel, self.history, size.dtype, history_dtype(self.history_dtype, size),
            size.device, size.backend,
        )  # fmt: skip
        return found

    def start(self, tensors: LeasedTensors) -> AndersonMemory:
        memory = AndersonMemory(*(tensors[f"anderson.{name}"] for name in AndersonMemory._fields))
        memory.filled.zero_()
        return memory

    def step(self, chain: Chain, memory: AndersonMemory, round: int) -> None:
        anderson_step(
            chain.states, chain.predictions, chain.state_coef, chain.model_coef, chain.lo, chain.hi,
            chain.sq_diff, chain.sq_norm, memory.f, memory.g, memory.gram, memory.filled, round % self.history,
            scope=self.scope, ridge=self.ridge, relative_ridge=self.relative_ridge, damping=self.damping,
            stale=self.stale, drift=chain.drift, workspace=chain.scratch,
            backend=chain.backend,
        )  # fmt: skip

    def settle(self, chain: Chain, memory: AndersonMemory, round: int, old: Bounds, new: Bounds) -> None:
        move_rows(chain.states[1:], memory.f[round % self.history], old, new, chain.backend)

    def enter(self, chain: Chain, memory: AndersonMemory, old: Bounds, new: Bounds) -> None:
        clear_rows(memory.filled, old, new)
