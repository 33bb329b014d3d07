"""A draft makes the chain between the rounds: a cheap stand-in for the model, corrected by what the model has said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ddim_update, ddim_update_bytes
from .base import Bounds, Chain, Lease, Plan, Size, forget_rows
from .secants import Secants

WILD = 1e6  # what a draft says beyond this, or NaN, is not believed


@dataclass
class DraftedMemory:
    z: Tensor  # (H + 1, T, B, D) states at which the model was called, a ring over rounds
    rest: Tensor  # (H + 1, T, B, D) what it said there beyond the draft
    filled: Tensor  # (T, B) int32: how many of the last rounds can be used
    made: Tensor  # (T, B, D) what the draft says at the states, if `known`
    now: Tensor  # (T, B, D) predictions along the new chain
    plain: Tensor  # (T + 1, B, D) the plain step
    sq_diff: Tensor  # (T, B) of the new chain against the old
    known: bool = False
    rounds: int = 0


@dataclass(frozen=True)
class Drafted:
    """X <- the chain of x -> E + M(x) - M(X) + S (x - X), made one step after the other by a draft M of the model.

    E: what the model said at X. M: `DEQSampler(draft=...)`, anything that says roughly what the model says and costs
    little. S: the Jacobian of E - M along the secants of the last `history` rounds (0 to 7). With M(x) = c x, a linear
    draft, this is `QuasiNewton`. The fixed point is the serial chain whatever M is, and at least one more timestep is
    exact after every round; how many rounds it takes depends on how well the Jacobian of M is the model's. The first
    guess is the chain of the draft alone. Cf. deferred correction and Parareal (Lions, Maday, Turinici 2001), where the
    cheap propagator is a coarser step of the same model, and draft models in speculative decoding (Leviathan et al.
    2023, arXiv 2211.17192).

    coarse, ridge, floor, safety, freeze, strict: as for `QuasiNewton`. reach: a solve may also end at steps of up to
    `reach` times the tolerance, where they shrink so fast from round to round that what is left to go is below the
    tolerance (Aitken); 0 for never. The draft is called T times one after the other
    in every round, on the rows that are not final, which counts in `Stats.draft_evals` and not as rounds.
    """

    history: int = 3
    ridge: float = 1e-6
    floor: float = 1e-5
    max_rounds: int | None = None
    tol: float | None = None
    safety: float = 0.7
    reach: float = 3.0
    freeze: float = 0.01
    strict: float | None = 0.01
    coarse: tuple[int, ...] = (8, 32)
    guess: str = "draft"

    def __post_init__(self) -> None:
        if isinstance(self.history, bool) or not isinstance(self.history, int) or not 0 <= self.history <= 7:
            raise ValueError(f"history: expected an int from 0 to 7, got {self.history!r}")
        if not (self.ridge > 0 and self.floor >= 0):
            raise ValueError(f"ridge, floor: expected ridge > 0 and floor >= 0, got {self.ridge!r}, {self.floor!r}")
        if not isinstance(self.coarse, tuple) or not all(type(n) is int and n >= 1 for n in self.coarse):
            raise ValueError(f"coarse: expected a tuple of ints >= 1, got {self.coarse!r}")
        if self.max_rounds is not None and not self.max_rounds >= 1:
            raise ValueError(f"max_rounds: expected an int >= 1 or None, got {self.max_rounds!r}")

    @property
    def name(self) -> str:
        return "draft"

    @property
    def period(self) -> int:
        return self.history + 1

    def plan(self, plan: Plan, size: Size) -> None:
        rows = (size.num_steps, size.batch, size.numel)
        for name in ("z", "rest"):
            plan.add(f"drafted.{name}", (self.history + 1, *rows), size.dtype)
        for name in ("made", "now"):
            plan.add(f"drafted.{name}", rows, size.dtype)
        plan.add("drafted.plain", (rows[0] + 1, *rows[1:]), size.dtype)
        plan.add("drafted.sq_diff", rows[:2], size.accumulator)
        plan.add("drafted.filled", rows[:2], torch.int32)

    def scratch(self, size: Size) -> int:
        found: int = ddim_update_bytes(
            size.num_steps, size.batch, size.numel, size.dtype, size.device, size.backend
        )  # fmt: skip
        return found

    def start(self, lease: Lease) -> DraftedMemory:
        names = ("z", "rest", "filled", "made", "now", "plain", "sq_diff")
        memory = DraftedMemory(**{name: lease[f"drafted.{name}"] for name in names})  # type: ignore[arg-type]
        memory.filled.zero_(), memory.sq_diff.zero_()
        return memory

    def guessed(self, chain: Chain, memory: DraftedMemory) -> None:
        """The states and predictions are those of the draft's chain."""
        memory.made.copy_(chain.predictions)
        memory.known = on_host(chain)

    def foretold(self, chain: Chain, memory: DraftedMemory) -> Tensor:
        """(T, B, D): what the draft says at the states as they are."""
        assert chain.draft is not None
        if not memory.known:
            states = chain.states[:-1]
            memory.made.copy_(heard(chain.draft.rows(states), chain.slope[:, None], states))
        memory.known = on_host(chain)
        return memory.made

    def step(self, chain: Chain, memory: DraftedMemory, round: int) -> None:
        first, last = span(chain)
        made, column = self.foretold(chain, memory), round % (self.history + 1)
        memory.z[column, first:last].copy_(chain.states[first:last])
        torch.sub(chain.predictions[first:last], made[first:last], out=memory.rest[column, first:last])
        memory.plain.copy_(chain.states)
        ddim_update(
            memory.plain, chain.predictions, chain.state_coef, chain.model_coef, chain.lo, chain.hi, chain.sq_diff,
            chain.sq_norm, chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
        usable = min(self.history, memory.rounds) if on_host(chain) else self.history
        older = [(column - k) % (self.history + 1) for k in range(1, usable + 1)]
        secants = Secants(memory.z, memory.rest, memory.filled, column, older, first, last, self.ridge, self.floor)
        lags = chain.state_coef.shape[1]
        memory.now[max(first - lags, 0) : first].copy_(chain.predictions[max(first - lags, 0) : first])
        step = torch.arange(chain.num_steps, device=chain.lo.device)[:, None]
        active = (step >= chain.lo) & (step < chain.hi)
        for i in range(first, last):
            self._advance(chain, memory, i, active[i], secants)
        torch.maximum(chain.sq_diff, memory.sq_diff, out=chain.sq_diff)
        memory.filled.copy_(torch.where(active, memory.filled.clamp_max(self.history) + 1, memory.filled))
        memory.rounds += 1

    def _advance(self, chain: Chain, memory: DraftedMemory, i: int, active: Tensor, secants: Secants) -> None:
        """Step i of the new chain, of the samples that are active there."""
        assert chain.draft is not None
        state = chain.states[i]
        made = heard(chain.draft.row(i, state), chain.slope[i], state)
        change = made - memory.made[i]
        change += secants(i, state)
        change.masked_fill_(~active[:, None], 0)
        torch.add(chain.predictions[i], change, out=memory.now[i])
        memory.made[i].copy_(made)
        advance(chain, memory.now, i, active, memory.sq_diff)

    def step_partly(self, chain: Chain, memory: DraftedMemory, round: int, evaluated: Tensor) -> None:
        """`step`, where only rows evaluated: (T,) bool hold what the model said.

        What was interpolated is no end of a secant: iterates are soon so close to each other that what is wrong with it
        would be most of the difference.
        """
        memory.filled.masked_fill_(~evaluated[:, None], 0)
        self.step(chain, memory, round)
        memory.filled.masked_fill_(~evaluated[:, None], 0)

    def settle(self, chain: Chain, memory: DraftedMemory, round: int, old: Bounds, new: Bounds) -> None:
        """The states come from the last evaluation already."""

    def enter(self, chain: Chain, memory: DraftedMemory, old: Bounds, new: Bounds) -> None:
        forget_rows(memory.filled, old, new)
        memory.known = False


def heard(said: Tensor, slope: Tensor, states: Tensor) -> Tensor:
    """What a draft says, and where that cannot be used what is right for unit Gaussian data."""
    return torch.where(said.abs() < WILD, said, slope * states)


def on_host(chain: Chain) -> bool:
    """Whether work may depend on what is known; on a device every round is to be the same work, to be recorded."""
    return chain.states.device.type == "cpu"


def span(chain: Chain) -> tuple[int, int]:
    """The timesteps that are being solved, as far as the host may know them without waiting."""
    if not on_host(chain):
        return 0, chain.num_steps
    bounds = [(a, b) for a, b in zip(chain.lo.tolist(), chain.hi.tolist()) if a < b]
    return (min(a for a, _ in bounds), max(b for _, b in bounds)) if bounds else (0, 0)


def advance(chain: Chain, predictions: Tensor, i: int, active: Tensor, sq_diff: Tensor) -> None:
    """State i + 1 of the samples active: (B,) bool there, from predictions: (T, B, D)."""
    lo = torch.full_like(chain.lo, i)
    ddim_update(
        chain.states, predictions, chain.state_coef, chain.model_coef, lo, lo + active.to(lo.dtype), sq_diff,
        chain.sq_norm, chain.drift, workspace=chain.scratch, backend=chain.backend,
    )  # fmt: skip


def draft_chain(chain: Chain, old: Bounds, new: Bounds) -> None:
    """States old[b] < i <= new[b] <- the chain of the draft alone."""
    assert chain.draft is not None
    device = chain.lo.device
    lo, hi = (torch.as_tensor(bounds, device=device) for bounds in (old, new))
    known = isinstance(old, list) and isinstance(new, list)
    first, last = (min(old), max(new)) if known else (0, chain.num_steps)
    step = torch.arange(chain.num_steps, device=device)[:, None]
    active = (step >= lo) & (step < hi)
    for i in range(first, last):
        said = heard(chain.draft.row(i, chain.states[i]), chain.slope[i], chain.states[i])
        torch.where(active[i][:, None], said, chain.predictions[i], out=chain.predictions[i])
        advance(chain, chain.predictions, i, active[i], chain.sq_diff)
