"""From the recorded calls of a step to the model that they are calls of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._types import unwrap_output
from .calls import Call, same_value
from .combination import Combination, find_combination
from .first_step import FirstStep, is_state, is_tiled, place, read_first_step
from .guided_model import GuidedModel
from .outputs import StepOutputs
from .problem import DenoisingProblem, first_timestep
from .refusals import Unknown
from .timestep_rule import find_rule, put_last


def first_problem(
    scheduler: Any, first: FirstStep, combination: Combination, outputs: StepOutputs, kind: type
) -> DenoisingProblem:
    """The problem of a loop that is at its first step; scheduler: as it was before. Raises Unknown, and as `build`."""
    check_calls(first.calls, outputs)
    problem = DenoisingProblem.build(scheduler, first, combination)
    problem.check_first_step()
    find_rules(first.calls, problem, 0, kind)
    return problem


def read_step(
    calls: list[Call],
    outputs: StepOutputs,
    scaled: tuple[Tensor, Tensor] | None,
    marker: Tensor | None,
    sample: Tensor,
    guided: Tensor,
    hints: list[float],
) -> tuple[FirstStep, Combination]:
    """What the first step is made of: `sample` and `guided` are what the loop gives to its scheduler. Raises Unknown.

    Some pipelines step both halves of guidance, which stay equal.
    """
    real = scaled[0] if scaled is not None and marker is not None and is_tiled(marker, sample) else sample
    doubled = len(sample) > 1 and is_tiled(real, real[: len(sample) // 2])
    placed = False
    for halves in (1, 2) if doubled else (1,):
        first = read_first_step(calls, scaled, marker, sample, halves)
        if first is None:
            continue
        placed, own = True, guided[: len(guided) // halves]
        found = find_combination(output_parts(calls, outputs, first.start), own, hints)
        if found is not None and is_tiled(guided, own):
            return first, found
    raise Unknown("combines its model's outputs" if placed else "prepares its model's input")


def differs(
    problem: DenoisingProblem, calls: list[Call], outputs: StepOutputs, source: Tensor, guided: Tensor,
    hints: list[float], before: list[float], index: int,
) -> bool:  # fmt: skip
    """Whether the calls of step `index` are others than those that were solved for, or are made something else of.

    Args:
        source: (B, *shape), what the inputs of that step are made of.
        hints, before: the numbers that the pipeline keeps now, and after the last step.
    """
    if len(calls) != len(problem.model.calls):
        return True
    for call, solved in zip(calls, problem.model.calls):
        assert solved.placement is not None
        alike = call.component is solved.component and solved.same_extra(call)
        if not (alike and solved.placement.holds(call.x, source) and fits(solved, call, problem, index)):
            return True
    own = guided[: len(guided) // problem.halves]
    parts = output_parts(problem.model.calls, outputs, problem.start)
    return not (is_tiled(guided, own) and problem.model.combination.still(parts, own, hints, before))


def steps_otherwise(
    problem: DenoisingProblem, expected: Tensor, sample: Tensor, timestep: Any, kwargs: dict[str, Any], index: int
) -> bool:
    """Whether the loop gives something else to its scheduler in step `index` than was solved for, its model's output
    aside. expected: (B, *shape), what it is to step."""
    first = problem.first.step_kwargs
    alike = kwargs.keys() == first.keys() and all(same_value(first[name], kwargs[name]) for name in kwargs)
    kind = problem.model.calls[0].x.dtype  # some pipelines round what they are given to this, and step that
    whole = len(sample) == problem.halves * len(expected) and is_state(sample, expected, kind)
    return not (alike and whole and float(timestep) == float(problem.timesteps[index]))


def next_model(
    problem: DenoisingProblem, calls: list[Call], outputs: StepOutputs, source: Tensor, guided: Tensor,
    hints: list[float], index: int, kind: type,
) -> DenoisingProblem:  # fmt: skip
    """The same problem with the model that the loop has from step `index` on; source: (B, *shape), what its inputs are
    made of there. Raises Unknown."""
    for call in calls:
        if not place(call, source):
            raise Unknown("prepares its model's input")
    check_calls(calls, outputs)
    own = guided[: len(guided) // problem.halves]
    found = find_combination(output_parts(calls, outputs, problem.start), own, hints)
    if found is None or not is_tiled(guided, own):
        raise Unknown("combines its model's outputs")
    find_rules(calls, problem, index, kind)
    for call, solved in zip(calls, problem.model.calls):
        if call.component is solved.component and not fits(solved, call, problem, index):
            assert call.rule is not None
            assert solved.rule is not None
            if call.rule.fits(solved.timestep, torch.as_tensor(problem.timesteps[0])):
                put_last(solved.rule, kind)
    return replace(problem, model=GuidedModel(calls, found, len(problem.start)))


def output_parts(calls: list[Call], outputs: StepOutputs, start: Tensor) -> list[Tensor]:
    """What the loop was given for its denoisers' outputs, one (B, *shape) for each copy of the samples."""
    parts: list[Tensor] = []
    for call, given in zip(calls, outputs.given):
        if not call.component.auxiliary:
            assert call.placement is not None
            parts += call.placement.parts(unwrap_output(given), start.shape[1:])
    return parts


def fits(solved: Call, call: Call, problem: DenoisingProblem, index: int) -> bool:
    """Whether a call of step `index` is given the timestep that the one that was solved for has there."""
    assert solved.rule is not None
    return solved.rule.fits(call.timestep, torch.as_tensor(problem.timesteps[index]))


def find_rules(calls: list[Call], problem: DenoisingProblem, index: int, kind: type) -> None:
    """Write into the calls of step `index` how the scheduler's timestep becomes theirs. Raises Unknown."""
    t = torch.as_tensor(problem.timesteps[index])
    for call in calls:
        call.rule = find_rule(call.timestep, t, problem.scheduler, call.component.module, kind)
        if call.rule is None:
            raise Unknown("passes timesteps to its model")


def check_call(call: Call, scheduler: Any, timestep: Any, kind: type) -> None:
    """What can be said of a call of the first step before its network is called, as `find_rules` and `check_calls` say
    it later. timestep: of the step, None where that is not known yet."""
    likely = first_timestep(scheduler) if timestep is None else torch.as_tensor(timestep)
    module = call.component.module
    if all(find_rule(call.timestep, t, scheduler, module, kind) is None for t in (likely, *scheduler.timesteps)):
        raise Unknown("passes timesteps to its model")
    if fault := call.fault():
        raise ValueError(fault)


def check_calls(calls: list[Call], outputs: StepOutputs) -> None:
    """Raises Unknown or ValueError for calls that cannot be repeated for other rows."""
    if not any(not call.component.auxiliary for call in calls):
        raise Unknown("calls its model")
    if outputs.unused():
        raise Unknown("uses the outputs of its ControlNet")
    for call in calls:
        if fault := call.fault():
            raise ValueError(fault)
