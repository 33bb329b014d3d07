"""The states of a pipeline's chain, solved a part at a time where its model is not the same all along."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...sampler import DEQSampler
from ...schedule.probe import next_state
from ...solution import RoundInfo, Solution
from .calls import Call
from .chain_part import chain_part
from .guided_model import GuidedModel
from .lockstep import Lockstep
from .overwriting import Noising, Overwriting, can_be_fixed, find_overwriting, fixed_outputs
from .problem import DenoisingProblem
from .random_state import RandomState
from .recording import fits
from .refusals import Unknown

_BY_SIZE = "makes of its model's outputs what depends on their size, or on the step,"
_MOST_PARTS = 4  # of a chain that are solved, each with another model; the rest is made serially
# of networks, by the kind and length of chains: the steps at which an earlier one had another model
_CHANGES: WeakKeyDictionary[Any, dict[Any, set[int]]] = WeakKeyDictionary()


class SolvedChain:
    """problem: of the part that was solved last; states: (T + 1, B, *shape), known up to `known`."""

    def __init__(
        self, pipe: Any, scheduler: Any, problem: DenoisingProblem, options: dict[str, Any], kind: type, monitored: bool
    ) -> None:
        self.pipe, self.problem, self.options = pipe, problem, options
        # on a GPU a callback costs a wait every round: it is worth that only where someone may interrupt
        self.monitored = monitored
        random = RandomState(problem.generator, problem.start.device)
        self.noises = problem.noises()
        random.restore()  # the scheduler draws them once more while it is stepped along
        start, steps = problem.start, len(problem.timesteps)
        self.states = start.new_empty((steps + 1, *start.shape))
        self.states[0] = start
        self.known = 0
        self.solution: Solution | None = None
        self.interrupted = False  # while a part was solved: there is no next step
        self.overwriting: Overwriting | None = None
        self.lockstep = Lockstep(scheduler, problem, self.states, self.noises)
        self.changed_at: list[int] = []  # the steps from which on the loop had another model
        self.before: Any = None  # what it made of outputs before the last of these
        self.changes = _CHANGES.setdefault(problem.model.base_model, {}).setdefault((kind, steps), set())

    def change(self, problem: DenoisingProblem, index: int) -> bool:
        """Another model from step `index` on. Returns whether there are too many of them; raises Unknown where the loop
        does one thing to large outputs and another to small ones, as which they are given in turns, or where what it
        has done in the last step for the first time was made of these outputs."""
        again, now, last = index - 1 in self.changed_at, problem.model.combination, self.problem.model.combination
        found_last = now != last and not last.certain and index - 1 in (0, *self.changed_at)
        calls, solved = ([len(call.x) for call in each.model.calls] for each in (problem, self.problem))
        if found_last or (again and now == self.before and calls == solved):
            raise Unknown(_BY_SIZE)
        self.before = last
        self.problem = self.lockstep.problem = problem
        self.changed_at.append(index)
        self.changes.add(index)
        self.known = index
        return again or len(self.changed_at) >= _MOST_PARTS

    def overwrite(self, sample: Tensor, index: int, noising: Noising | None) -> bool:
        """Whether the loop writes over a part of every state, as it has done before step `index`; then the rest is
        solved anew. sample: (B, *shape), what it goes on with."""
        if self.overwriting is not None or index < 1 or index >= len(self.problem.timesteps):
            return False
        state = self.states[index]
        sample = sample.to(state.dtype)
        if sample.shape != state.shape or not can_be_fixed(self.problem.schedule):
            return False
        self.overwriting = find_overwriting(
            sample, state, index, noising, self.lockstep.scheduler, self.problem.timesteps
        )
        if self.overwriting is None:
            return False
        self.states[index] = sample
        self.changes.add(index)
        self.known = index
        return True

    def ended(self, call: Call, index: int) -> bool:
        """Whether a call after the last step begins another loop: some pipelines have one for each picture."""
        first = self.problem.model.calls[0]
        same = index >= len(self.problem.timesteps) and call.component is first.component
        return same and fits(first, call, self.problem, 0)

    def advance(self, index: int, timestep: Any, sample: Tensor, step_kwargs: dict[str, Any]) -> Any:
        """Step `index` of the scheduler: what that returns, with the solved state as the next one. Where the loop is
        expected to write over that, it is what the scheduler makes of the model's own output: it may as well not."""
        result = self.lockstep.advance(timestep, sample, step_kwargs)
        after, state = next_state(result), self.states[index + 1]
        if index in self.lockstep.known and self.overwriting is not None:
            state = torch.where(self.overwriting.mask, state, after[: len(state)].to(state.dtype))
        state = torch.cat([state] * self.problem.halves).to(torch.promote_types(state.dtype, after.dtype))
        if isinstance(result, tuple):
            return (state, *result[1:])
        result.prev_sample = state
        return result

    def _interrupting(self) -> bool:
        return bool(getattr(self.pipe, "_interrupt", False))

    def _write_over(self, index: int, stop: int, solution: Solution) -> None:
        """Over the states after step `index`, as the loop is expected to; their outputs then say nothing of the model's
        own, which the scheduler is to remember."""
        assert self.overwriting is not None
        self.overwriting.write(self.states, index + 1)
        batch = len(self.states[0])
        most = max(batch, min(solution.stats.window * batch, self.options.get("max_batch") or math.inf))
        outputs = self.problem.outputs(self.states[index:stop], index, int(most))
        solution.stats.model_evals += len(outputs) * batch
        solution.stats.model_calls += math.ceil(len(outputs) / (int(most) // batch))
        self.lockstep.known = dict(enumerate(outputs, index))
        solution.sample = self.states[stop]

    def solve_from(self, index: int) -> None:
        """The states after step `index`, where they are not known."""
        if index < self.known:
            return
        problem, total = self.problem, len(self.problem.timesteps)
        found, new = problem.model.combination, index in (0, *self.changed_at)
        if new and index == total - 1 and not (found.certain or 0 < found.rescale <= 1):  # nothing will confirm it
            raise Unknown(_BY_SIZE)
        stop = min((k for k in self.changes if k > index), default=total)
        schedule, frozen = problem.schedule, problem.frozen(self.noises)
        if (index, stop) != (0, total):
            batch = len(problem.start)
            own = [None if noise is None else noise[:batch] for noise in self.noises]
            schedule, frozen = chain_part(schedule, index, stop, self.states, self.lockstep.outputs, own)
        if self.overwriting is not None:
            times = problem.timesteps[index:stop]
            fixed = fixed_outputs(schedule, frozen, self.overwriting, times, index)
            model = problem.model
            problem = replace(problem, model=GuidedModel(model.calls, model.combination, model.batch, fixed))
        front = [0]
        ignored = self._interrupting()  # a loop that comes here all the same does not look at it

        def on_round(info: RoundInfo) -> bool:
            front[0] = int(info.front.min())
            return self._interrupting() and not ignored

        solution = DEQSampler(problem.model, schedule, **self.options).sample(
            self.states[index], problem.rows(), frozen, on_round if self.monitored else None, return_trajectory=True
        )
        assert solution.trajectory is not None
        self.states[index : stop + 1] = solution.trajectory
        solution.trajectory = None
        if solution.stats.stop_reason == "callback":  # interrupted: the pipeline goes on with what is final by now
            self.states[index + 1] = self.states[index + front[0]]
            self.lockstep.known = {}
            self.interrupted = True
        elif self.overwriting is not None:
            self._write_over(index, stop, solution)
        self.known = stop
        self.solution = solution if self.solution is None else _together(self.solution, solution)
        self.pipe.last_solution = self.solution
        self.pipe.last_recording.append(f"steps {index} to {stop - 1}: {problem.model}")


def _together(before: Solution, after: Solution) -> Solution:
    """One solution of two parts of a chain, the second one after the first."""
    stats, earlier = after.stats, before.stats
    stats.rounds += earlier.rounds
    stats.model_evals += earlier.model_evals
    stats.model_calls += earlier.model_calls
    stats.wall_seconds += earlier.wall_seconds
    stats.finished_serially += earlier.finished_serially
    stats.error_estimate = torch.maximum(stats.error_estimate, earlier.error_estimate.to(stats.error_estimate))
    after.converged = after.converged & before.converged.to(after.converged.device)
    return after
