"""The sentences with which a call is refused: what its loop does, and which of its options to look at."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import DeqDiffError

Method = TypeVar("Method", bound=Callable[..., Any])
_USUAL = ("num_inference_steps", "height", "width", "num_images_per_prompt", "max_sequence_length", "return_dict")


class Unknown(Exception):
    """What a loop does that is not known here, as the end of "the pipeline ..."."""


def not_parallel(pipe: Any, reason: str) -> str:
    """The beginning of a sentence over a loop that is known, and known to be none that can be solved in parallel."""
    return f"{_subject(pipe)[0]} cannot be solved in parallel: {reason}"


def way_back(pipe: Any) -> str:
    """Its end: what to do instead."""
    return _subject(pipe)[1]


def goes_on(pipe: Any, step: int) -> str:
    """That a loop makes another step where it was to end, and has been given a state of later on."""
    return (
        f"_interrupt: it ended the solve after step {step}, and ends the loop of a pipeline that looks at it; "
        f"{_subject(pipe)[0]} goes on. Leave its loop, or do not set _interrupt while it is solved"
    )


def refuses_unknown(method: Method) -> Method:
    """A method of a loop that raises DeqDiffError in the place of Unknown."""

    @functools.wraps(method)
    def own(loop: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(loop, *args, **kwargs)
        except Unknown as error:
            raise DeqDiffError(_sentence(loop.pipe, str(error), loop.arguments)) from error

    return own  # type: ignore[return-value]


def _sentence(pipe: Any, what: str, arguments: dict[str, Any]) -> str:
    import diffusers

    subject, instead = _subject(pipe)
    options = ", ".join(_options(pipe, arguments))
    return (
        f"{subject} of diffusers {diffusers.__version__} {what} in a way that deqdiff_fast does not know, so its chain "
        f"cannot be solved in parallel; {instead}" + (f". One of these may be the reason: {options}" if options else "")
    )


def _subject(pipe: Any) -> tuple[str, str]:
    import diffusers

    if isinstance(pipe, diffusers.DiffusionPipeline):
        return type(pipe).__name__, "restore(pipe) gives back the plain pipeline"
    return f"the loop over {pipe.scheduler.__class__.__name__}", "without parallel_loop it runs as it is"


def _options(pipe: Any, arguments: dict[str, Any]) -> list[str]:
    """Those that a call was given and that may change what a step does: numbers, switches, settings, callbacks."""
    if not callable(pipe):
        return []
    known = inspect.signature(type(pipe).__call__).parameters
    found = []
    for name, value in arguments.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        telling = callable(value) or all(isinstance(item, (bool, int, float, dict)) for item in items)
        if name not in _USUAL and telling and (name not in known or value != known[name].default):
            found.append(name)
    return found
