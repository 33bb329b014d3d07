"""Whether a denoiser with parts of a user's own may be called on many timesteps at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._types import unwrap_output
from .fingerprint import Fingerprint
from .problem import DenoisingProblem

_LEVELS = 6  # timesteps at which one batch is compared with calls of their own
_TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3}  # relative: above what another batch size does to rounding
_HALF = 2e-2  # that of the other dtypes


def row_fault(denoiser: Any, problem: DenoisingProblem, parts: list[str]) -> tuple[str, Tensor]:
    """What forbids it, empty if nothing does, and the loop's own output of its first step where that was asked for.

    The first calls are the loop's own, so that what counts calls has counted right if the loop goes on serially.

    Args:
        parts: names of those that are not known; without any nothing is called.
    """
    if not parts:
        return "", torch.empty(0)
    named = ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
    before = Fingerprint(denoiser, only=denoiser)
    own, outputs = problem.model, []
    for call in own.calls:
        args, kwargs = call.arrange(call.x, call.timestep, call.further, call.extra)
        outputs += own.parts(unwrap_output(denoiser(*args, **kwargs)), own.copies(call), problem.start.shape[1])
    output = own.guidance.combine(outputs)
    whole = torch.cat([output] * problem.halves)
    if Fingerprint(denoiser, only=denoiser) != before:
        return f"{named}: it keeps something from one call to the next", whole
    try:
        worst = _difference(problem, output)
    except Exception as error:
        return f"{named}: a call on several timesteps at once fails ({type(error).__name__}: {error})", whole
    if not worst <= _TOLERANCE.get(output.dtype, _HALF):
        return (
            f"{named}: a call on several timesteps at once differs from separate ones by {worst:.1e} (relative); its "
            "rows are not independent, or it reads one timestep for all of them"
        ), whole
    return "", whole


def _difference(problem: DenoisingProblem, output: Tensor) -> float:
    """The largest relative difference of a row of one batch; output: (B, *shape), of the first timestep."""
    batch, count = len(problem.start), len(problem.timesteps)
    steps = sorted({round(k * (count - 1) / (_LEVELS - 1)) for k in range(_LEVELS)})
    # other samples at every timestep: what is shared by a batch then differs
    starts = [problem.start, *(_other(problem.start, k) for k in range(1, len(steps)))]
    states = [start * float(problem.schedule.input_scale[i]) for start, i in zip(starts, steps)]
    single = torch.cat([output, *(problem.output(start, i) for start, i in zip(starts[1:], steps[1:]))])
    device = problem.start.device
    samples, times = torch.arange(batch, device=device), problem.timesteps.to(device)
    order = torch.cat([samples.flip(0) + k * batch for k in reversed(range(len(steps)))])
    rows, when = samples.repeat(len(steps))[order], times[steps].repeat_interleave(batch)[order]
    together = problem.model(torch.cat(states)[order], when, rows)
    apart = (together.flatten(1).float() - single[order].flatten(1).float()).norm(dim=1)
    return float((apart / single[order].flatten(1).float().norm(dim=1).clamp_min(1e-12)).max())


def _other(start: Tensor, number: int) -> Tensor:
    """Samples of about the same statistics: shifted along the last dimension, turned, more or less of them."""
    turned = torch.roll(start, number, -1).flip(1 if start.dim() > 2 else -1)
    return turned * (-1.0) ** number * (1 - 0.1 * number)
