"""Stand-ins for a pipeline's denoiser and scheduler that pass everything on except the calls of its loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .overwriting import NOISING


class Proxy:
    """Looks like `target` to `isinstance`, reads and writes its attributes, and may have some of its own."""

    def __init__(self, target: Any, **own: Any) -> None:
        object.__setattr__(self, "_target", target)
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._target)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_target"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._target, name)

    def __repr__(self) -> str:
        return repr(self._target)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._target, memo)


class DenoiserProxy(Proxy):
    """Its calls go to `denoise(args, kwargs)`."""

    _denoise: Callable[[tuple[Any, ...], dict[str, Any]], Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._denoise(args, kwargs)


def scheduler_proxy(
    scheduler: Any,
    step: Callable[..., Any],
    scale: Callable[[Tensor, Any], Tensor],
    noised: Callable[[str, tuple[Any, ...], Tensor], Any],
) -> Proxy:
    """Its `step` and `scale_model_input` are ours; pipelines look at the signature of the first. `noised` is told of
    calls of the methods that add noise: their names, arguments and results."""

    @functools.wraps(scheduler.step)
    def own_step(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    # where there is none: BriaPipeline looks at `type(scheduler)`, which is ours, and calls it
    scaling = scale if hasattr(scheduler, "scale_model_input") else lambda sample, *_: sample
    own: dict[str, Any] = {"step": own_step, "scale_model_input": scaling}

    def told(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(scheduler, name))
        def method(*args: Any, **kwargs: Any) -> Any:
            result = getattr(scheduler, name)(*args, **kwargs)
            if not kwargs:
                noised(name, args, result)
            return result

        return method

    own |= {name: told(name) for name in NOISING if hasattr(scheduler, name)}
    return Proxy(scheduler, **own)


@contextmanager
def installed(pipe: Any, parts: dict[str, Any]) -> Iterator[None]:
    """Put `parts` in the place of a pipeline's components, past its bookkeeping of components.

    They are taken out before the pipeline handles its offloading hooks, which are tied to the components themselves.
    """
    own, before = vars(pipe), {name: vars(pipe)[name] for name in parts}
    free = pipe.maybe_free_model_hooks

    def restore() -> None:
        own.update(before)
        own.pop("maybe_free_model_hooks", None)

    def leave() -> Any:
        restore()
        return free()

    own.update(parts)
    own["maybe_free_model_hooks"] = leave
    try:
        yield
    finally:
        restore()


class Output(dict[str, Tensor]):
    """What models and schedulers return: attributes, keys or positions."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the model's output has no {name!r}; it has {', '.join(self)}")
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]
