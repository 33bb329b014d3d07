"""Which components of a pipeline its loop calls at a timestep: those whose `forward` takes one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

# tensors that belong to no sample, however many rows they have: a recording of one batch cannot show that
SHARED = frozenset({"txt_ids", "img_ids", "image_rotary_emb", "rotary_embedding"})
_TIME = "timestep"


@dataclass(frozen=True, eq=False)
class Component:
    """A network of a pipeline, with the names of the arguments of its `forward`."""

    name: str
    module: Any
    names: tuple[str, ...]
    auxiliary: bool
    """Whether its outputs are further inputs of a denoiser, as those of a ControlNet."""


def denoisers(pipe: Any) -> dict[str, Component]:
    """Those of a pipeline, by name. Raises TypeError where there are none, or no scheduler that makes steps."""
    found = {}
    parts = vars(pipe) if hasattr(pipe, "__dict__") else {}
    for name, module in parts.items():
        names = _arguments(module) if isinstance(module, nn.Module) else ()
        if _TIME in names:
            found[name] = Component(name, module, names, "controlnet_cond" in names)
    if not hasattr(parts.get("scheduler"), "step") or all(part.auxiliary for part in found.values()):
        raise TypeError(
            "pipe: expected a diffusers pipeline with a scheduler and a network whose forward takes a timestep, got "
            f"{type(pipe).__name__}; for another model use DEQSampler(model, "
            "Schedule.from_diffusers(pipe.scheduler, steps)) in a loop of your own"
        )
    return found


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Of the nearest class whose `forward` names a timestep: a user's own may pass everything on."""
    module = getattr(module, "_orig_mod", module)  # compiled
    for kind in type(module).__mro__:
        names = tuple(inspect.signature(vars(kind)["forward"]).parameters)[1:] if "forward" in vars(kind) else ()
        if _TIME in names:
            return names
    return ()
