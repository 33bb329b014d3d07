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
    time: str
    auxiliary: bool
    """Whether its outputs are further inputs of a denoiser, as those of a ControlNet."""


def denoisers(pipe: Any) -> dict[str, Component]:
    """Those of a pipeline, by name. Raises TypeError where there are none, or no scheduler that makes steps."""
    found = {}
    parts = vars(pipe) if hasattr(pipe, "__dict__") else {}
    for name, module in parts.items():
        part = component_of(name, module) if isinstance(module, nn.Module) else None
        if part is not None:
            found[name] = part
    if not hasattr(parts.get("scheduler"), "step") or all(part.auxiliary for part in found.values()):
        raise TypeError(
            "pipe: expected a diffusers pipeline with a scheduler and a network whose forward takes a timestep, got "
            f"{type(pipe).__name__}; for another model use DEQSampler(model, "
            "Schedule.from_diffusers(pipe.scheduler, steps)) in a loop of your own"
        )
    return found


def component_of(name: str, module: nn.Module, any_names: bool = False) -> Component | None:
    """None where its `forward` takes no timestep; any_names: the second argument is one, whatever its name.

    The nearest class counts whose `forward` names a timestep: a user's own may pass everything on.
    """
    plain = getattr(module, "_orig_mod", module)  # compiled
    forwards = [vars(kind)["forward"] for kind in type(plain).__mro__ if "forward" in vars(kind)]
    found = [tuple(inspect.signature(forward).parameters)[1:] for forward in forwards]
    for names in found:
        if _TIME in names:
            return Component(name, module, names, _TIME, "controlnet_cond" in names)
    if any_names and found and len(found[0]) > 1 and type(plain).forward is not nn.Module.forward:
        return Component(name, module, found[0], found[0][1], False)
    return None
