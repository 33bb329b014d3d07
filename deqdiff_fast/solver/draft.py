"""A draft makes the chain between the rounds: a cheap stand-in for the model, corrected by what the model has said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import draft_scan_bytes, draft_secants, draft_secants_bytes
from ..loop.base import Bounds, Chain, Lease, Plan, Size, bounds_tensor
from ..loop.coarse_grids import interpolation
from .anchors import Anchors
from .draft_rollout import DraftedMemory, heard, sweep
from .settings import are_intervals, check_settings

SWEEP = 25  # timesteps at which a draft is asked in a round ...
LEAP, NOISY_LEAP = 16, 4  # ... if those are at most so far apart, on a chain that adds noise in the second case


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

    coarse, ridge, floor, safety, freeze, strict: as for `QuasiNewton`. coarse_long, coarse_noisy: the grids of chains
    of 256 timesteps and more, that add noise in the second case; none if `coarse` is (). reach: a solve may also end at
    steps of up to `reach` times the tolerance, where they shrink so fast from round to round that what is left to go is
    below the tolerance (Aitken); 0 for never.

    stride: the draft is asked at every `stride`-th timestep and at the last ones (see `anchors`), one after the other
    in every round, as far as they are not final; None: about 25 times in a round, or at every 16th timestep of a longer
    chain, every fourth if it adds noise. That counts in `Stats.draft_evals` and not as rounds. Secants are kept for
    these timesteps.
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
    coarse_long: tuple[int, ...] = (8, 32, 64)
    coarse_noisy: tuple[int, ...] = (16, 64, 256, 256)
    stride: int | None = None
    guess: str = "draft"

    def __post_init__(self) -> None:
        check_settings(self.history, self.ridge, self.floor, self.coarse, self.max_rounds)
        for name in ("coarse_long", "coarse_noisy"):
            if not are_intervals(getattr(self, name)):
                raise ValueError(f"{name}: expected a tuple of ints >= 1, got {getattr(self, name)!r}")
        if self.stride is not None and (type(self.stride) is not int or self.stride < 1):
            raise ValueError(f"stride: expected an int >= 1 or None, got {self.stride!r}")
        if not self.reach >= 0:
            raise ValueError(f"reach: expected a number >= 0, got {self.reach!r}")

    @property
    def name(self) -> str:
        return "draft"

    @property
    def period(self) -> int:
        return self.history + 1

    def anchors(self, steps: int, noisy: bool) -> Anchors:
        """The timesteps at which the draft is asked; noisy: the chain adds noise."""
        return Anchors(steps, self.stride or min(max(steps // SWEEP, 1), NOISY_LEAP if noisy else LEAP))

    def _anchors(self, chain: Chain) -> Anchors:
        return self.anchors(chain.num_steps, chain.drift is not None)

    def plan(self, plan: Plan, size: Size) -> None:
        rows, count = (size.num_steps, size.batch, size.numel), self.anchors(size.num_steps, size.noisy).count
        wide = torch.float64 if size.dtype == torch.float64 else torch.float32
        for name in ("z", "rest"):
            plan.add(f"drafted.{name}", (self.history + 1, count, *rows[1:]), size.dtype)
        plan.add("drafted.filled", (count, size.batch), torch.int32)
        plan.add("drafted.weights", (count, size.batch, self.history, self.history), torch.float64)
        plan.add("drafted.made", (count, *rows[1:]), size.dtype)
        plan.add("drafted.turn", (2, *rows[1:]), size.dtype)
        plan.add("drafted.at", (count,), torch.int64)
        plan.add("drafted.shares", (rows[0], 2), size.accumulator)
        plan.add("drafted.between", (rows[0], count), size.dtype)
        plan.add("drafted.carry", (2, size.lags, *rows[1:]), wide)
        plan.add("drafted.now", rows, size.dtype)

    def scratch(self, size: Size) -> int:
        count = self.anchors(size.num_steps, size.noisy).count
        rest = (size.batch, size.numel, self.history, size.dtype, size.device, size.backend)
        found: int = max(draft_scan_bytes(size.num_steps, *rest), draft_secants_bytes(count, *rest))
        return found

    def start(self, lease: Lease) -> DraftedMemory:
        names = ("z", "rest", "filled", "weights", "made", "turn", "at", "shares", "between", "carry", "now")
        memory = DraftedMemory(**{name: lease[f"drafted.{name}"] for name in names})  # type: ignore[arg-type]
        memory.filled.zero_()
        return memory

    def init_constants(self, chain: Chain, memory: DraftedMemory) -> None:
        """Where the draft is asked, and what the other timesteps take from there."""
        anchors, weight = self._anchors(chain), chain.denoised_coef[:, 1]
        memory.at.copy_(anchors.at(weight.device))
        memory.shares.copy_(anchors.shares(weight))
        memory.between.copy_(interpolation(anchors.known(), anchors.steps, weight))

    def draft_predictions(self, chain: Chain, memory: DraftedMemory) -> Tensor:
        """(T, B, D): what the draft says at the states as they are; interpolated between the anchors."""
        self._ask(chain, memory)
        at, states = memory.at, chain.states[:-1]
        beyond = torch.addcmul(memory.made, chain.slope[at, None], states[at], value=-1)
        torch.mm(memory.between, beyond.flatten(1), out=memory.now.flatten(1))
        return memory.now.addcmul_(chain.slope[:, None], states)

    def snap_to_anchors(self, chain: Chain, wanted: list[int]) -> list[int]:
        """The timesteps nearest to those wanted at which the draft is asked as well."""
        known = self._anchors(chain).known()
        return sorted({min(known, key=lambda at: abs(at - step)) for step in wanted})

    def _ask(self, chain: Chain, memory: DraftedMemory) -> None:
        """`made` for the states as they are."""
        assert chain.draft is not None
        if not memory.known:
            states = chain.states[memory.at]
            memory.made.copy_(heard(chain.draft.rows(states, memory.at), chain.slope[memory.at, None], states))
        memory.known = True

    def chart(self, chain: Chain, memory: DraftedMemory, old: Bounds, new: Bounds) -> None:
        """States old[b] < i <= new[b] <- the chain of the draft alone, which goes on from what the model said last."""
        lo, hi = bounds_tensor(old, chain.lo), bounds_tensor(new, chain.lo)
        known = isinstance(old, list) and isinstance(new, list)
        first, last = (min(old), max(new)) if known else (0, chain.num_steps)
        anchors = self._anchors(chain)
        pieces = anchors.pieces(max(first - anchors.stride, 0), last)
        sweep(chain, memory, pieces, lo, hi, first, 0, charting=True)
        memory.known = on_host(chain) and known and max(old) == 0 and min(new) == chain.num_steps

    def step(self, chain: Chain, memory: DraftedMemory, round: int) -> None:
        self._ask(chain, memory)
        column = round % (self.history + 1)
        draft_secants(
            chain.states, chain.predictions, memory.made, memory.at, chain.lo, chain.hi, memory.z, memory.rest,
            memory.filled, memory.weights, column, self.ridge, self.floor, workspace=chain.scratch,
            backend=chain.backend,
        )  # fmt: skip
        first, last = span(chain)
        pieces = self._anchors(chain).pieces(first, last)
        sweep(chain, memory, pieces, chain.lo, chain.hi, first, column, charting=False)
        memory.known = on_host(chain)

    def step_interpolated(self, chain: Chain, memory: DraftedMemory, round: int, evaluated: Tensor) -> None:
        """`step`, where only rows evaluated: (T,) bool hold what the model said.

        What was interpolated is no end of a secant: iterates are soon so close to each other that what is wrong with it
        would be most of the difference.
        """
        missing = ~evaluated[memory.at, None]
        memory.filled.masked_fill_(missing, 0)
        self.step(chain, memory, round)
        memory.filled.masked_fill_(missing, 0)

    def settle(self, chain: Chain, memory: DraftedMemory, round: int, old: Bounds, new: Bounds) -> None:
        """The states come from the last evaluation already."""

    def enter(self, chain: Chain, memory: DraftedMemory, old: Bounds, new: Bounds) -> None:
        at, start, stop = memory.at[:, None], bounds_tensor(old, chain.lo), bounds_tensor(new, chain.lo)
        memory.filled.masked_fill_((at >= start) & (at < stop), 0)
        memory.known = False


def on_host(chain: Chain) -> bool:
    """Whether work may depend on what is known; on a device every round is to be the same work, to be recorded."""
    return chain.states.device.type == "cpu"


def span(chain: Chain) -> tuple[int, int]:
    """The timesteps that are being solved, as far as the host may know them without waiting."""
    if not on_host(chain):
        return 0, chain.num_steps
    bounds = [(a, b) for a, b in zip(chain.lo.tolist(), chain.hi.tolist()) if a < b]
    return (min(a for a, _ in bounds), max(b for _, b in bounds)) if bounds else (0, 0)
