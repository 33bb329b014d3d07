"""`parallelize(pipe)`: the same pipeline object, its loop solved in parallel."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from ...sampler import DEQSampler
from ...schedule import Schedule
from .components import denoisers
from .intercepted_loop import InterceptedLoop
from .proxies import installed

Pipe = TypeVar("Pipe")
_CLASSES: WeakKeyDictionary[type, type] = WeakKeyDictionary()  # of a pipeline class: ours, derived from it
_SETTINGS = "_deqdiff_options"
_DEPRECATED = ("callback", "callback_steps", "mask_feature")  # taken by pipelines in **kwargs


def parallelize(pipe: Pipe, **options: Any) -> Pipe:
    """Let a diffusers pipeline solve its denoising loop in parallel.

    Everything but the loop is the pipeline's own code; `callback_on_step_end` is called once for each timestep, in
    order, after the solve, with that timestep's latents, the scheduler stepped along. Where a callback changes the
    latents, the prompt, the guidance, the model, the scheduler or its generators, the remaining steps are made
    serially; what cannot be solved in parallel at all (caches, hooks that count calls) is left to the pipeline's own
    loop, with a warning in the log, or with on_failure="raise" refused. Setting `pipe._interrupt` ends a running
    solve after its round. `pipe.last_solution` is the `Solution` of the last call (without its trajectory), None
    before the first; `pipe.last_recording` says how its loop was understood.
    Calling it again replaces the options; `restore(pipe)` undoes it.

    Args:
        pipe: any whose loop is understood from its first step, with any scheduler that `Schedule.from_diffusers`
            takes: "Does it work with my pipeline?" in the documentation.
        **options: those of `DEQSampler` (solver, tol, max_rounds, window, on_failure, max_batch, group ...). A row
            of `max_batch` is one sample at one timestep, and is two rows of the model's call where guidance takes both
            halves at once.

    Returns:
        The same object.

    Raises:
        TypeError: no pipeline with a network that takes a timestep, or an unknown option.
        ValueError: a bad option. The pipeline's call raises it for arguments that it would ignore, NotAffineError for
            schedulers that are not, DeqDiffError where its loop does what is not understood: before a step is made.
    """
    denoisers(pipe)
    DEQSampler(lambda x, t: x, Schedule.ddim([0.9, 0.5], [1, 0]), **options)
    _leave(pipe)
    pipe.__class__ = _class_of(type(pipe))
    vars(pipe).update({_SETTINGS: options, "last_solution": None, "last_recording": []})
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Undo `parallelize`; a pipeline that is not parallel stays as it is.

    Returns:
        The same object.
    """
    _leave(pipe)
    for name in ("last_solution", "last_recording"):
        vars(pipe).pop(name, None)
    return pipe


def plain_class(pipe: Any) -> Any:
    """The class that a pipeline has without us."""
    return type(pipe).__mro__[1] if _SETTINGS in vars(pipe) else type(pipe)


def _leave(pipe: Any) -> None:
    pipe.__class__ = plain_class(pipe)
    vars(pipe).pop(_SETTINGS, None)


def _class_of(base: type) -> type:
    if base not in _CLASSES:
        _CLASSES[base] = _derived(base)
    return _CLASSES[base]


def _unpickled(base: type) -> Any:
    """An empty pipeline of our class: pickle finds the plain one by its name."""
    return object.__new__(_class_of(base))


def _derived(base: type) -> type:
    """A subclass under the same name, under which diffusers saves and converts pipelines."""
    plain: Any = base.__call__

    @functools.wraps(plain)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _SETTINGS not in vars(self):
            return plain(self, *args, **kwargs)
        components = denoisers(self)
        loop = InterceptedLoop(self, components, vars(self)[_SETTINGS], given_arguments(self, args, kwargs))
        vars(self).update({"last_solution": None, "last_recording": []})
        vars(self).pop("_num_timesteps", None)
        with installed(self, loop.proxies):
            result = plain(self, *args, **kwargs)
        loop.finish()
        return result

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (base,), dict(vars(self))

    own = {
        "__call__": call,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), own)


def given_arguments(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of a pipeline's call by name, with the defaults of what was not passed. Raises ValueError for what the
    pipeline would ignore."""
    signature = inspect.signature(plain_class(pipe).__call__)
    bound = signature.bind(pipe, *args, **kwargs)
    extra = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
    for name in bound.arguments.get(extra, {}):
        if name not in _DEPRECATED:
            raise ValueError(f"{name}: {type(pipe).__name__} has no such argument")
    bound.apply_defaults()
    given: dict[str, Any] = dict(list(bound.arguments.items())[1:])  # without self
    further: dict[str, Any] = given.pop(extra, {})
    return given | further
