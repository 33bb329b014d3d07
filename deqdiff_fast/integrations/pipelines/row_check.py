"""Whether denoisers with parts of a user's own may be called on many timesteps at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._types import unwrap_output
from .fingerprint import Fingerprint
from .outputs import StepOutputs
from .problem import DenoisingProblem

_LEVELS = 6  # timesteps at which one batch is compared with calls of their own
_TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3}  # relative: above what another batch size does to rounding
_HALF = 2e-2  # that of the other dtypes


def row_fault(
    problem: DenoisingProblem, outputs: StepOutputs, modules: nn.ModuleList, before: Fingerprint, parts: list[str]
) -> str:
    """What forbids it, empty if nothing does.

    The first calls are the loop's own, so that what counts calls has counted right if the loop goes on serially.

    Args:
        outputs: of the first step, of which the real ones are asked for.
        modules, before: the networks, and their fingerprint before any call.
        parts: names of those that are not known.
    """
    named = ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
    output = own_output(problem, outputs)
    if Fingerprint(*modules, only=modules) != before:
        return f"{named}: it keeps something from one call to the next"
    try:
        worst = _difference(problem, output)
    except Exception as error:
        return f"{named}: a call on several timesteps at once fails ({type(error).__name__}: {error})"
    if not worst <= _TOLERANCE.get(output.dtype, _HALF):
        return (
            f"{named}: a call on several timesteps at once differs from separate ones by {worst:.1e} (relative); its "
            "rows are not independent, or it reads one timestep for all of them"
        )
    return ""


def own_output(problem: DenoisingProblem, outputs: StepOutputs) -> Tensor:
    """What the loop itself would give to its scheduler in the step of `outputs`: (B, *shape)."""
    parts: list[Tensor] = []
    for number, call in enumerate(problem.model.calls):
        real = outputs.real(number)
        if not call.component.auxiliary:
            assert call.placement is not None
            parts += call.placement.parts(unwrap_output(real), problem.start.shape[1:])
    return problem.model.combination(parts)


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
