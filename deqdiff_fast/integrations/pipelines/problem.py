"""From the first step of a pipeline's loop to what the loop is about to compute."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..._devices import float64, with_torch_defaults
from ..._types import FrozenNoise
from ...errors import NotAffineError
from ...schedule import Schedule
from ...schedule.from_diffusers import scheduler_fields
from ...schedule.probe import Probing, StepRange, chain_timesteps, next_state, step_accepts
from .combination import Combination
from .draws import record_draws
from .first_step import FirstStep
from .guided_model import GuidedModel
from .refusals import Unknown

_CACHE_SIZE = 16
_CACHE: OrderedDict[Any, Schedule] = OrderedDict()


@dataclass
class DenoisingProblem:
    """What a pipeline's loop computes: a model along a schedule from a start."""

    model: GuidedModel
    schedule: Schedule
    scheduler: Any  # as it was before the first step
    first: FirstStep
    timesteps: Tensor  # (T,), the scheduler's own

    @classmethod
    def build(cls, scheduler: Any, first: FirstStep, combination: Combination) -> DenoisingProblem:
        """The problem of a loop that is at its first step. Raises ValueError or NotAffineError where it is none that
        can be solved in parallel."""
        step_range = _step_range(scheduler, first.timestep, first.count)
        options = _own_options(scheduler, first.step_kwargs)
        step_range = step_range._replace(scaled=first.step_scaled)
        schedule = _schedule(scheduler, step_range, options, first.input_scaled)
        model = GuidedModel(first.calls, combination, len(first.start))
        return cls(model, schedule, scheduler, first, scheduler.timesteps[step_range.start : step_range.stop])

    def check_first_step(self) -> None:
        """Raises Unknown where that of the scheduler, given all that the loop gives it, is not that of the schedule,
        which was fitted without some of it: timesteps of tokens, say."""
        first, own, mode = self.first, copy.deepcopy(self.scheduler), Probing()
        for key in ("clip_sample", "clip_denoised"):
            if own.config.get(key):
                own.register_to_config(**{key: False})
        sample, output = float64(first.sample), float64(first.output)
        mode.noise = sample.new_zeros([1] * sample.dim())  # for all shapes: with a list of generators one a sample
        with torch.no_grad(), mode:
            if first.input_scaled:
                own.scale_model_input(sample, first.timestep)
            after = next_state(own.step(output.clone(), first.timestep, sample.clone(), **first.step_kwargs))
        a, b = float(self.schedule.state_coef[0, 0]), float(self.schedule.model_coef[0, 0])
        parts = torch.stack([a * float64(torch.cat([self.start] * self.halves)), b * output])
        if not (after - parts.sum(0)).norm() <= 1e-4 * after.norm() + 1e-6 * parts.norm():  # schedulers cast to float32
            raise Unknown(" with ".join(filter(None, ("steps its scheduler", ", ".join(first.step_kwargs)))))

    @property
    def start(self) -> Tensor:
        """(B, *shape)."""
        return self.first.start

    @property
    def halves(self) -> int:
        """How often the start occurs in the sample that the pipeline steps."""
        return len(self.first.sample) // len(self.first.start)

    @property
    def generator(self) -> Any:
        """What the pipeline passes to `step`; a list of one draws for all samples, as in diffusers."""
        given = self.first.step_kwargs.get("generator")
        return given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given

    def noises(self) -> list[Tensor | None]:
        """Drawn by the scheduler's own code for each step, for all that it steps; advances the generators."""
        first = self.first
        assert self.schedule.draws is not None
        draws = self.schedule.draws.tolist()
        if not any(draws):
            return [None] * len(draws)
        found = record_draws(
            self.scheduler, self.timesteps, first.sample, first.output, first.step_kwargs, first.input_scaled
        )
        if len(found) != sum(draws):
            raise NotAffineError(
                f"scheduler: {type(self.scheduler).__name__} draws noise in {len(found)} steps for this pipeline, and "
                f"in {sum(draws)} for random numbers"
            )
        drawn = iter(found)
        return [next(drawn) if draw else None for draw in draws]

    def frozen(self, noises: list[Tensor | None]) -> FrozenNoise | None:
        """The part of `noises` that counts, for a sampler; None for a chain without noise."""
        whole = [noise[: len(self.start)] for noise in noises if noise is not None]
        return FrozenNoise(torch.stack(whole)) if self.schedule.stochastic else None

    def rows(self) -> dict[str, Tensor]:
        """model_kwargs of the sampler."""
        return {"rows": torch.arange(len(self.start), device=self.start.device)}

    def output(self, states: Tensor, step: int) -> Tensor:
        """The guided prediction at one step for states (B, *shape) before scaling."""
        return self.outputs(states[None], step, len(states))[0]

    def outputs(self, states: Tensor, first: int, most: int) -> list[Tensor]:
        """The same for (n, B, *shape) at n steps from `first` on, at most so many rows at a time (but at least B)."""
        batch, each = states.shape[1], max(1, most // states.shape[1])
        found: list[Tensor] = []
        for k in range(0, len(states), each):
            part, steps = states[k : k + each], slice(first + k, first + min(k + each, len(states)))
            scales = self.schedule.input_scale[steps].to(part.device, part.dtype)
            x = (part * scales.view(-1, *[1] * (part.dim() - 1))).flatten(0, 1)
            rows = torch.arange(batch, device=part.device).repeat(len(part))
            output = self.model(x, self.timesteps[steps].to(part.device).repeat_interleave(batch), rows)
            found += list(output.reshape(part.shape))
        return found


def check_chain(scheduler: Any, timestep: Any, count: int | None) -> None:
    """Raises what `build` does over the scheduler of a loop that is at its first step.

    Args:
        timestep: of that step; None: that is not known yet.
        count: number of steps of the loop; None for all that are left.
    """
    if timestep is None:
        timestep = first_timestep(scheduler)
    _schedule(scheduler, _step_range(scheduler, timestep, count), {}, True)


def first_timestep(scheduler: Any) -> Tensor:
    """The one at which a loop begins that has said nothing else."""
    return chain_timesteps(scheduler)[getattr(scheduler, "begin_index", None) or 0]


def _own_options(scheduler: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a loop gives to `step` besides, without what is the default of it anyway."""
    defaults = inspect.signature(scheduler.step).parameters
    return {k: v for k, v in given.items() if k in step_accepts(scheduler) and repr(v) != repr(defaults[k].default)}


def _step_range(scheduler: Any, timestep: Any, count: int | None) -> StepRange:
    """Which steps of the scheduler's chain a loop of `count` steps makes that begins at `timestep`."""
    every, first = [float(t) for t in chain_timesteps(scheduler)], float(timestep)
    begin = getattr(scheduler, "begin_index", None)
    places = [k for k, t in enumerate(every) if t == first]
    if not places:
        raise ValueError(f"timestep: the pipeline begins at {first:g}, which is none of its scheduler's timesteps")
    if begin not in places:
        last = len(every) - count if count is not None else places[0]
        begin = last if last in places else places[0]
    return StepRange(begin, len(every) if count is None else min(begin + count, len(every)))


@with_torch_defaults
def _schedule(scheduler: Any, step_range: StepRange, options: dict[str, Any], input_scaled: bool) -> Schedule:
    """The probed schedule; the last few are cached, since a pipeline is usually called with the same settings again."""
    state = [(name, _frozen(value)) for name, value in sorted(vars(scheduler).items()) if name != "_internal_dict"]
    key = (
        type(scheduler),
        tuple(state),
        repr(scheduler.config),
        step_range,
        input_scaled,
        repr(sorted(options.items())),
    )
    if key not in _CACHE:
        if input_scaled:
            _CACHE[key] = Schedule(**scheduler_fields(scheduler, None, step_range=step_range, **options))
        else:
            whole = _schedule(scheduler, step_range, options, True)
            _CACHE[key] = replace(whole, input_scale=torch.ones_like(whole.input_scale))
        while len(_CACHE) > _CACHE_SIZE:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), bytes(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return repr(value)
