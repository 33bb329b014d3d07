"""A draft makes the chain between the rounds: a cheap stand-in for the model, corrected by what the model predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import draft_scan_bytes, draft_secants, draft_secants_bytes
from ..loop.base import Bounds, Chain, LeasedTensors, MemoryRequest, ProblemSize, Solver
from ..loop.coarse_grids import interpolation, usable_grids
from ..loop.rows import bounds_tensor
from .anchors import Anchors
from .draft_rollout import DraftMemory, make_pass, sanitized
from .settings import are_intervals, check_secant_settings

PER_ROUND = 25  # timesteps at which a draft is asked in a round ...
MAX_STRIDE, MAX_STRIDE_NOISY = 16, 4  # ... if those are at most so far apart; noisy: the chain adds noise
LONG = 256  # timesteps of a long chain


@dataclass(frozen=True)
class Drafted(Solver):
    """X <- the chain of x -> E + M(x) - M(X) + S (x - X), made one step after the other by a draft M of the model.

    E is the model's prediction at X; M, `DEQSampler(draft=...)`, anything that predicts roughly what the model does and
    costs little; S the Jacobian of E - M along the secants of the last rounds. With M(x) = c x, a linear draft, this is
    `QuasiNewton`. The fixed point is the serial chain whatever M is, and at least one more timestep is exact after
    every round; how many rounds it takes depends on how well the Jacobian of M is the model's. The first guess is the
    chain of the draft alone. Cf. deferred correction and Parareal (Lions, Maday, Turinici 2001), where the cheap
    propagator is a coarser step of the same model, and draft models in speculative decoding (Leviathan et al. 2023,
    arXiv 2211.17192).

    Args:
        history: rounds whose secants are kept, 0 to 7.
        coarse, ridge, floor: as for `QuasiNewton`.
        max_rounds, tol, safety, freeze, strict, guess: see `Solver`.
        coarse_long, coarse_noisy: the grids of chains of 256 timesteps and more, that add noise in the second case;
            none if `coarse` is ().
        reach: a solve may also end at steps of up to `reach` times the tolerance, where they shrink so fast from round
            to round that what is left to go is below the tolerance (Aitken); 0 for never.
        stride: the draft is asked at every `stride`-th timestep and at the last ones (see `anchors`), one after the
            other in every round, as far as they are not final; None: about 25 times in a round, or at every 16th
            timestep of a longer chain, every fourth if it adds noise. That counts in `Stats.draft_evals` and not as
            rounds. Secants are kept for these timesteps.

    Raises:
        ValueError: a bad setting, by its name.
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
    needs_draft = True

    def __post_init__(self) -> None:
        check_secant_settings(self.history, self.ridge, self.floor, self.coarse, self.max_rounds)
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

    def coarse_grids(self, steps: int, window: int, stochastic: bool) -> tuple[int, ...]:
        """A long chain, for which further grids cost little, has grids of its own, several where it adds noise too:
        what a draft leaves of a prediction follows the noise less."""
        if window < steps or not self.coarse:
            return ()
        if steps < LONG:
            return usable_grids(self.coarse, steps, smooth=not stochastic, fit=True)
        return usable_grids(self.coarse_noisy if stochastic else self.coarse_long, steps, smooth=True, fit=True)

    def without_coarse_grids(self) -> Drafted:
        return replace(self, coarse=())

    def anchors(self, steps: int, noisy: bool) -> Anchors:
        """The timesteps at which the draft is asked; noisy: the chain adds noise."""
        most = MAX_STRIDE_NOISY if noisy else MAX_STRIDE
        return Anchors(steps, self.stride or min(max(steps // PER_ROUND, 1), most))

    def _anchors(self, chain: Chain) -> Anchors:
        return self.anchors(chain.num_steps, chain.drift is not None)

    def draft_calls(self, steps: int, stochastic: bool) -> int:
        return self.anchors(steps, stochastic).count

    def plan_memory(self, request: MemoryRequest, size: ProblemSize) -> None:
        rows, count = (size.num_steps, size.batch, size.numel), self.anchors(size.num_steps, size.noisy).count
        wide = torch.float64 if size.dtype == torch.float64 else torch.float32
        for name in ("z", "remainder"):
            request.add(f"draft.{name}", (self.history + 1, count, *rows[1:]), size.dtype)
        request.add("draft.filled", (count, size.batch), torch.int32)
        request.add("draft.secant_weights", (count, size.batch, self.history, self.history), torch.float64)
        request.add("draft.draft_cache", (count, *rows[1:]), size.dtype)
        request.add("draft.correction", (2, *rows[1:]), size.dtype)
        request.add("draft.anchor_rows", (count,), torch.int64)
        request.add("draft.weights", (rows[0], 2), size.accumulator)
        request.add("draft.interpolation", (rows[0], count), size.dtype)
        request.add("draft.carry", (2, size.lags, *rows[1:]), wide)
        request.add("draft.predictions", rows, size.dtype)

    def scratch_bytes(self, size: ProblemSize) -> int:
        count = self.anchors(size.num_steps, size.noisy).count
        rest = (size.batch, size.numel, self.history, size.dtype, size.device, size.backend)
        found: int = max(draft_scan_bytes(size.num_steps, *rest), draft_secants_bytes(count, *rest))
        return found

    def start(self, tensors: LeasedTensors) -> DraftMemory:
        names = [name for name in DraftMemory.__dataclass_fields__ if name != "cache_valid"]
        memory = DraftMemory(**{name: tensors[f"draft.{name}"] for name in names})  # type: ignore[arg-type]
        memory.filled.zero_()
        return memory

    def init_constants(self, chain: Chain, memory: DraftMemory) -> None:
        """Where the draft is asked, and what the other timesteps take from there."""
        anchors, q = self._anchors(chain), chain.denoised_coef[:, 1]
        memory.anchor_rows.copy_(anchors.rows(q.device))
        memory.weights.copy_(anchors.weights(q))
        memory.interpolation.copy_(interpolation(anchors.known(), anchors.steps, q))

    def draft_predictions(self, chain: Chain, memory: DraftMemory) -> Tensor:
        """(T, B, D): what the draft predicts at the states as they are; interpolated between the anchors."""
        self._ask(chain, memory)
        at, states = memory.anchor_rows, chain.states[:-1]
        beyond = torch.addcmul(memory.draft_cache, chain.slope[at, None], states[at], value=-1)
        torch.mm(memory.interpolation, beyond.flatten(1), out=memory.predictions.flatten(1))
        return memory.predictions.addcmul_(chain.slope[:, None], states)

    def snap_to_anchors(self, chain: Chain, wanted: list[int]) -> list[int]:
        """The timesteps nearest to those wanted at which the draft is asked as well."""
        known = self._anchors(chain).known()
        return sorted({min(known, key=lambda at: abs(at - step)) for step in wanted})

    def _ask(self, chain: Chain, memory: DraftMemory) -> None:
        """`draft_cache` for the states as they are."""
        assert chain.draft is not None
        if not memory.cache_valid:
            at, states = memory.anchor_rows, chain.states[memory.anchor_rows]
            memory.draft_cache.copy_(sanitized(chain.draft.rows(states, at), chain.slope[at, None], states))
        memory.cache_valid = True

    def rollout(self, chain: Chain, memory: DraftMemory, old: Bounds, new: Bounds) -> None:
        """States old[b] < i <= new[b] <- the chain of the draft alone, which goes on from the last prediction."""
        lo, hi = bounds_tensor(old, chain.lo), bounds_tensor(new, chain.lo)
        known = isinstance(old, list) and isinstance(new, list)
        first, last = (min(old), max(new)) if known else (0, chain.num_steps)
        anchors = self._anchors(chain)
        segments = anchors.segments(max(first - anchors.stride, 0), last)
        make_pass(chain, memory, segments, lo, hi, first, 0, rollout=True)
        memory.cache_valid = on_host(chain) and known and max(old) == 0 and min(new) == chain.num_steps

    def step(self, chain: Chain, memory: DraftMemory, round: int) -> None:
        self._ask(chain, memory)
        column = round % (self.history + 1)
        draft_secants(
            chain.states, chain.predictions, memory.draft_cache, memory.anchor_rows, chain.lo, chain.hi, memory.z,
            memory.remainder, memory.filled, memory.secant_weights, column, self.ridge, self.floor,
            workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
        first, last = active_span(chain)
        segments = self._anchors(chain).segments(first, last)
        make_pass(chain, memory, segments, chain.lo, chain.hi, first, column, rollout=False)
        memory.cache_valid = on_host(chain)

    def step_interpolated(self, chain: Chain, memory: DraftMemory, round: int, evaluated: Tensor) -> None:
        """`step`, where only rows evaluated: (T,) bool hold the model's predictions.

        What was interpolated is no end of a secant: iterates are soon so close to each other that what is wrong with it
        would be most of the difference.
        """
        missing = ~evaluated[memory.anchor_rows, None]
        memory.filled.masked_fill_(missing, 0)
        self.step(chain, memory, round)
        memory.filled.masked_fill_(missing, 0)

    def enter(self, chain: Chain, memory: DraftMemory, old: Bounds, new: Bounds) -> None:
        at, start, stop = memory.anchor_rows[:, None], bounds_tensor(old, chain.lo), bounds_tensor(new, chain.lo)
        memory.filled.masked_fill_((at >= start) & (at < stop), 0)
        memory.cache_valid = False


def on_host(chain: Chain) -> bool:
    """Whether work may depend on what is known; on a device every round is to be the same work, to be recorded."""
    return chain.states.device.type == "cpu"


def active_span(chain: Chain) -> tuple[int, int]:
    """The timesteps that are being solved, as far as the host may know them without waiting."""
    if not on_host(chain):
        return 0, chain.num_steps
    bounds = [(a, b) for a, b in zip(chain.lo.tolist(), chain.hi.tolist()) if a < b]
    return (min(a for a, _ in bounds), max(b for _, b in bounds)) if bounds else (0, 0)
