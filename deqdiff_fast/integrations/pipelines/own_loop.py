"""`parallel_loop(scheduler, model)`: a user's own loop over a diffusers scheduler, solved in parallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...sampler import DEQSampler
from ...schedule import Schedule
from .components import component_of
from .intercepted_loop import InterceptedLoop
from .proxies import Proxy


class OwnLoop:
    """What is known of the loop: last_solution, as that of a parallel pipeline, and last_recording."""

    def __init__(self) -> None:
        self.last_solution: Any = None
        self.last_recording: list[str] = []
        self._interrupt = False


@contextmanager
def parallel_loop(scheduler: Any, model: nn.Module, **options: Any) -> Iterator[OwnLoop]:
    """Solve a denoising loop in code of your own in parallel: one `for` loop over the timesteps within the block.

    The loop is left as it is. Its first step is recorded (how it calls the model, guidance, what it gives to
    `scheduler.step`), then the whole chain is solved, and the remaining steps hand out the solved states. What the loop
    does otherwise than in its first step is noticed, as in a pipeline, and solved anew or made serially. Nothing is
    differentiated within the block. The model's outputs are random numbers there, for the scheduler only: take previews
    from `step(...).pred_original_sample`.

    ```python
    scheduler.set_timesteps(50)
    with dq.integrations.diffusers.parallel_loop(scheduler, unet, tol=1e-3) as loop:
        for t in scheduler.timesteps:
            noise = unet(scheduler.scale_model_input(x, t), t, encoder_hidden_states=text).sample
            x = scheduler.step(noise, t, x).prev_sample
    print(loop.last_solution.stats)
    ```

    Args:
        scheduler: with its timesteps set.
        model: the network that the loop calls; a `timestep` argument of its `forward`, or the second one, is the time.
        **options: those of `DEQSampler`.

    Returns:
        The block's `OwnLoop`.

    Raises:
        TypeError: no scheduler, no network, or an unknown option. In the loop: ValueError, NotAffineError and
            DeqDiffError as a parallel pipeline raises them.
    """
    DEQSampler(lambda x, t: x, Schedule.ddim([0.9, 0.5], [1, 0]), **options)
    for needed in ("step", "timesteps"):
        if not hasattr(scheduler, needed):
            raise TypeError(f"scheduler: expected a diffusers scheduler, got {type(scheduler).__name__}")
    component = component_of("model", _shadow(model), any_names=True) if isinstance(model, nn.Module) else None
    if component is None:
        raise TypeError(f"model: expected a module whose forward takes (x, t, ...), got {type(model).__name__}")
    own = OwnLoop()
    vars(own).update(scheduler=_shadow(scheduler), model=component.module)
    loop = InterceptedLoop(own, {"model": component}, options, {"callback": True})  # anything may happen in between
    proxies = loop.proxies
    vars(own).update(proxies)
    kinds = type(scheduler), type(model)
    scheduler.__class__ = _redirected(kinds[0], proxies["scheduler"], _methods(proxies["scheduler"]))
    model.__class__ = _redirected(kinds[1], proxies["model"], ("__call__",))
    try:
        with torch.no_grad():
            yield own
    finally:
        scheduler.__class__, model.__class__ = kinds
    loop.finish()


def _shadow(value: Any) -> Any:
    """The same object without our class: its attributes are those of `value`, not a copy."""
    twin = object.__new__(type(value))
    object.__setattr__(twin, "__dict__", value.__dict__)
    return twin


def _methods(proxy: Proxy) -> tuple[str, ...]:
    return tuple(name for name in vars(proxy) if not name.startswith("_"))


def _redirected(kind: type, proxy: Any, names: tuple[str, ...]) -> type:
    """A class whose methods of these names are the proxy's."""

    def method(name: str) -> Any:
        return lambda self, *args, **kwargs: getattr(proxy, name)(*args, **kwargs)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **{name: method(name) for name in names}})
