"""From the first step of a pipeline's loop to what the loop is about to compute."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._types import FrozenNoise
from ...sampler import DEQSampler
from ...schedule import Schedule
from ...schedule.from_diffusers import scheduler_fields
from ...schedule.noise import freeze
from ...schedule.probe import StepRange, chain_timesteps, step_accepts
from .calls import Call, GuidedModel
from .families import Family, Guidance

_CACHE_SIZE = 16
_CACHE: OrderedDict[Any, Schedule] = OrderedDict()


@dataclass
class DenoisingProblem:
    """What a pipeline's loop computes: a model along a schedule from a start."""

    model: GuidedModel
    schedule: Schedule
    start: Tensor  # (B, *shape)
    halves: int  # how often the start occurs in the sample that the pipeline steps
    timesteps: Tensor  # (T,), the scheduler's own
    step_kwargs: dict[str, Any]  # what the pipeline passes to `step`, except `return_dict`

    @classmethod
    def build(
        cls, denoiser: Any, scheduler: Any, family: Family, calls: list[Call], guidance: Guidance,
        timestep: Any, sample: Tensor, step_kwargs: dict[str, Any], count: int | None,
    ) -> DenoisingProblem:  # fmt: skip
        """The problem of a loop that is at its first step, after the calls of its denoiser.

        Args:
            timestep, sample, step_kwargs: of the call of the scheduler's `step`.
            count: number of steps of the loop, None for all that are left.

        Raises:
            ValueError, NotAffineError: it is none that can be solved in parallel.
        """
        halves = 2 if family.doubled and guidance.scale > 1 else 1
        start = sample[: len(sample) // halves]
        step_range = _step_range(scheduler, timestep, count)
        options = {k: v for k, v in step_kwargs.items() if k in step_accepts(scheduler)}
        schedule = _schedule(scheduler, step_range, options)
        model = GuidedModel(denoiser, family, calls, guidance, len(start))
        return cls(model, schedule, start, halves, scheduler.timesteps[step_range.start : step_range.stop], step_kwargs)

    @property
    def generator(self) -> Any:
        """What the pipeline passes to `step`; a list of one draws for all samples, as in diffusers."""
        given = self.step_kwargs.get("generator")
        return given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given

    def noise(self) -> FrozenNoise | None:
        """Drawn as the scheduler would: for all that it steps, of which only the first half counts."""
        start = self.start
        whole = (len(start) * self.halves, *start.shape[1:])
        frozen = freeze(self.schedule, whole, self.generator, start.dtype, start.device)
        return None if frozen is None else FrozenNoise(frozen.draws[:, : len(start)])

    def sampler(self, options: dict[str, Any]) -> DEQSampler:
        """That of the model along the schedule."""
        return DEQSampler(self.model, self.schedule, **options)

    def rows(self) -> dict[str, Tensor]:
        """model_kwargs of the sampler."""
        return {"rows": torch.arange(len(self.start), device=self.start.device)}

    def outputs(self, states: Tensor, rows: int) -> list[Tensor]:
        """The guided prediction at each of the states (n, B, *shape), n <= T; at most `rows` rows in a call."""
        steps, batch = states.shape[:2]
        step, sample = (k.flatten() for k in torch.meshgrid(torch.arange(steps), torch.arange(batch), indexing="ij"))
        scale = self.schedule.input_scale.to(states.device, states.dtype).view(-1, *[1] * (states.dim() - 2))
        times, flat = self.timesteps.to(states.device), states.flatten(0, 1)
        found = []
        for k in range(0, len(flat), rows):
            i, b = (index[k : k + rows].to(states.device) for index in (step, sample))
            found.append(self.model(flat[k : k + rows] * scale[i], times[i], b))
        return list(torch.cat(found).view_as(states)) if found else []


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


def _schedule(scheduler: Any, step_range: StepRange, options: dict[str, Any]) -> Schedule:
    """The probed schedule; the last few are cached, since a pipeline is usually called with the same settings again."""
    state = [(name, _frozen(value)) for name, value in sorted(vars(scheduler).items()) if name != "_internal_dict"]
    key = (type(scheduler), tuple(state), repr(scheduler.config), step_range, repr(sorted(options.items())))
    if key not in _CACHE:
        _CACHE[key] = Schedule(**scheduler_fields(scheduler, None, step_range=step_range, **options))
        while len(_CACHE) > _CACHE_SIZE:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), bytes(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return repr(value)
