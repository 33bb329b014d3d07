"""Loops that write over a part of every state: inpainting with a model that knows nothing of masks.

After step i such a loop puts the noised picture y_{i+1} where the mask says so (Lugmayr et al. 2022, arXiv 2201.09865,
equation 8). There the states are known beforehand, and the model's output does not count: it is replaced by the one
from which the scheduler's own recursion makes y_{i+1}, so that the chain stays a chain.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._devices import float64
from ..._types import FrozenNoise
from ...schedule import Schedule

NOISING = {"add_noise": 2, "scale_noise": 1}  # methods of schedulers: which argument is the timestep


@dataclass
class Noising:
    """One call of a scheduler's `add_noise` or `scale_noise`."""

    name: str
    args: tuple[Any, ...]
    result: Tensor


@dataclass
class Overwriting:
    """mask: (B, *shape), true where the state stays; pictures: (T + 1, B, *shape), what is put elsewhere."""

    mask: Tensor
    pictures: Tensor

    def write(self, states: Tensor, first: int) -> None:
        """Over states first ... T of a chain, in place; exactly as the loop does."""
        states[first:] = torch.where(self.mask, states[first:], self.pictures[first:])


@dataclass
class FixedOutputs:
    """Outputs where the model's do not count: outputs (n, B, *shape) for the n timesteps, which all differ."""

    mask: Tensor
    timesteps: Tensor
    outputs: Tensor

    def put(self, output: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """Into a model's output (n, *shape) at the timesteps t: (n,)."""
        table = self.timesteps.to(t.device, t.dtype)
        at = (t[:, None] == table).int().argmax(1)
        return torch.where(self.mask[rows], output, self.outputs[at, rows].to(output.dtype))


def find_overwriting(
    sample: Tensor, state: Tensor, index: int, noising: Noising | None, scheduler: Any, timesteps: Tensor
) -> Overwriting | None:
    """What has made `sample` of the `state` before step `index`, each (B, *shape); None: something else.

    Args:
        noising: the last call of that kind since the state was handed out.
        timesteps: (T,), those of the loop.
    """
    place = NOISING.get(noising.name, 0) if noising is not None else 0
    if noising is None or len(noising.args) <= place or not isinstance(noising.args[0], Tensor):
        return None
    own = copy.deepcopy(scheduler)
    pictures = []
    for k in range(len(timesteps) + 1):
        if k == len(timesteps):
            picture = noising.args[0]
        else:
            if getattr(own, "_step_index", None) is not None:
                own._step_index = own._step_index - index + k if k == 0 else own._step_index + 1
            args = list(noising.args)
            args[place] = torch.as_tensor(timesteps[k]).reshape(1).to(torch.as_tensor(args[place]).device)
            picture = getattr(own, noising.name)(*args)
        if picture.shape[1:] != state.shape[1:] or len(picture) not in (1, len(state)):
            return None
        pictures.append(picture.to(state.dtype).expand(state.shape))
    found = Overwriting(sample == state, torch.stack(pictures))
    if not bool(found.mask.any()) or not torch.equal(torch.where(found.mask, state, found.pictures[index]), sample):
        return None
    return found


def can_be_fixed(schedule: Schedule) -> bool:
    """Whether the recursion can be solved for an output, and the timestep says which one it is."""
    own = schedule.model_coef[:, 0].abs()
    return schedule.clip is None and len(set(schedule.timesteps.tolist())) == len(own) and bool((own > 1e-9).all())


def fixed_outputs(
    schedule: Schedule, noise: FrozenNoise | None, overwriting: Overwriting, timesteps: Tensor, first: int
) -> FixedOutputs:
    """Those for a part of a chain that begins at step `first`."""
    steps, own = schedule.num_steps, schedule.model_coef[:, 0]
    pictures = float64(overwriting.pictures[first : first + steps + 1])
    drawn = iter(noise.draws) if noise is not None else iter(())
    assert schedule.draws is not None
    outputs: list[Tensor] = []
    for i in range(steps):
        rest = pictures[i + 1].clone()
        if bool(schedule.draws[i]) and noise is not None:
            rest -= float(schedule.noise_coef[i]) * float64(next(drawn))
        for lag in range(min(schedule.lags, i + 1)):
            rest -= float(schedule.state_coef[i, lag]) * pictures[i - lag]
            if lag:
                rest -= float(schedule.model_coef[i, lag]) * outputs[i - lag]
        outputs.append(rest / float(own[i]))
    return FixedOutputs(overwriting.mask, timesteps, torch.stack(outputs).to(overwriting.pictures))
