"""One call of a pipeline, in which the pipeline's own code runs its loop over a chain that is solved in parallel.

The loop's first step says what the chain is: the proxies record how the pipeline calls its model and its scheduler, the
chain is solved, and the remaining steps hand out the solved states, so that callbacks, progress bar, interruption and
decoding are the pipeline's. In place of predictions the loop is given fixed random numbers: what it makes of them must
be what our guidance makes of them. Where a callback changes what was solved for, the scheduler itself takes over.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ...errors import DeqDiffError
from ...schedule.probe import next_state
from ...solution import RoundInfo, Solution
from .calls import Call
from .families import Family
from .problem import DenoisingProblem
from .proxies import DenoiserProxy, scheduler_proxy
from .random_state import RandomState

_LOG = logging.getLogger("deqdiff_fast")
_HISTORY_ROWS = 64
_PROBE_TOLERANCE = 8  # in units of the dtype's rounding: the same operations on the same numbers


class InterceptedLoop:
    """The state machine behind the proxies of one pipeline call."""

    def __init__(self, pipe: Any, family: Family, options: dict[str, Any], arguments: dict[str, Any]) -> None:
        self.pipe, self.family, self.options, self.arguments = pipe, family, options, arguments
        self.denoiser, self.scheduler = vars(pipe)[family.denoiser], vars(pipe)["scheduler"]
        self.problem: DenoisingProblem | None = None
        self.solution: Solution | None = None
        self.states = torch.empty(0)  # (T + 1, B, *shape)
        self.index = 0
        self.calls: list[Call] = []  # those of the current step
        self.scaled = self.serial = False
        self.probes: list[Tensor] = []
        self.taken_over_at = 0
        self.random = RandomState(None, torch.device("cpu"))

    def proxies(self) -> dict[str, Any]:
        """What to put in the place of the pipeline's components."""
        return {
            self.family.denoiser: DenoiserProxy(self.denoiser, _denoise=self.denoise),
            "scheduler": scheduler_proxy(self.scheduler, self.step, self.scale),
        }

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """In place of the scheduler's `scale_model_input`: the solver scales inputs itself."""
        if self.serial:
            scaled: Tensor = self.scheduler.scale_model_input(sample, timestep)
            return scaled
        self.scaled = True
        return sample

    def denoise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the model."""
        if self.serial:
            return self.denoiser(*args, **kwargs)
        call = Call.record(self.family, args, kwargs)
        if self.problem is not None and (change := self._change(call)):
            self._take_over(change)
            x = self.scheduler.scale_model_input(call.x, self._timestep()) if self.scaled else call.x
            return self.denoiser(**call.extra, **{self.family.inputs: x, "timestep": call.timestep})
        number = len(self.calls)
        self.calls.append(call)
        if number == len(self.probes):
            self.probes.append(self._probe(call.x, number))
        if call.extra.get("return_dict", True):
            return _Output(sample=self.probes[number])
        return (self.probes[number],)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """In place of the scheduler's `step`."""
        if self.serial:
            result = self.scheduler.step(model_output, timestep, sample, **kwargs)
            self.states = next_state(result)
            self.index += 1
            return result
        as_dict = kwargs.pop("return_dict", True)
        if self.problem is None:
            self._begin(timestep, sample, kwargs)
        assert self.problem is not None
        self._check_guidance(model_output)
        if self.solution is None:
            self.solution = self._solve()
        self.index += 1
        self.calls, self.scaled = [], False
        state = torch.cat([self.states[self.index]] * self.problem.halves)
        return _Output(prev_sample=state) if as_dict else (state,)

    def finish(self) -> None:
        """After the pipeline's call: what the scheduler did after it took over belongs to the solution, too."""
        if self.solution is not None and self.serial and self.problem is not None:
            steps = self.index - self.taken_over_at
            stats = self.solution.stats
            stats.finished_serially += steps
            stats.model_evals += steps * len(self.problem.start)
            stats.model_calls += steps
            if steps:
                self.solution.sample = self.states[: len(self.problem.start)]

    def _begin(self, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> None:
        guidance = self.family.guidance(self.pipe, self.arguments)
        count = vars(self.pipe).get("_num_timesteps")
        self.problem = problem = DenoisingProblem.build(
            self.denoiser, self.scheduler, self.family, self.calls, guidance, timestep, sample, kwargs, count
        )
        for call in self.calls:
            tiled = torch.cat([problem.start] * problem.model.copies(call))
            if not torch.equal(call.x, tiled) or not torch.equal(sample, torch.cat([problem.start] * problem.halves)):
                raise self._unknown("prepares its model's input")
            if not self._on_time(call):
                raise self._unknown("passes timesteps to its model")

    def _solve(self) -> Solution:
        problem = self.problem
        assert problem is not None
        assert problem.schedule.draws is not None
        drawn = bool(problem.schedule.draws.any())
        self.random = RandomState(problem.generator if drawn else None, problem.start.device)
        front = [0]

        def on_round(info: RoundInfo) -> bool:
            front[0] = int(info.front.min())
            return bool(getattr(self.pipe, "_interrupt", False))

        # on a GPU a callback costs a wait every round: it is worth that only where someone may interrupt
        monitored = problem.start.device.type == "cpu" or self.arguments.get("callback_on_step_end") is not None
        solution = problem.sampler(self.options).sample(
            problem.start, problem.rows(), problem.noise(), on_round if monitored else None, return_trajectory=True
        )
        assert solution.trajectory is not None
        self.states, solution.trajectory = solution.trajectory, None
        if solution.stats.stop_reason == "callback":  # interrupted: the pipeline goes on with what is final by now
            self.states[1] = self.states[front[0]]
        self.pipe.last_solution = solution
        return solution

    def _probe(self, x: Tensor, number: int) -> Tensor:
        shape = (x.shape[0], self.family.channels(self.denoiser, x), *x.shape[2:])
        own = torch.Generator().manual_seed(number)
        return torch.randn(shape, generator=own).to(x.device, x.dtype)

    def _check_guidance(self, guided: Tensor) -> None:
        """What the pipeline computes from the probes must be what our guidance computes from them."""
        problem = self.problem
        assert problem is not None
        parts: list[Tensor] = []
        for call, probe in zip(self.calls, self.probes):
            parts += problem.model.parts(probe, problem.model.copies(call), problem.start.shape[1])
        ours = torch.cat([problem.model.guidance.combine(parts)] * problem.halves)
        if ours.shape == guided.shape:
            apart, size = (ours - guided).float().norm(), ours.float().norm()
            if bool(apart <= _PROBE_TOLERANCE * torch.finfo(ours.dtype).eps * size):
                return
        raise self._unknown("combines its model's outputs")

    def _change(self, call: Call) -> str:
        """What differs between this call and what was solved for; empty if nothing does."""
        problem = self.problem
        assert problem is not None
        number = len(self.calls)
        if self.index >= len(problem.timesteps):
            return "more timesteps"
        if number >= len(problem.model.calls):
            return "another model call"
        solved = problem.model.calls[number]
        tiled = torch.cat([self.states[self.index]] * problem.model.copies(solved))
        if call.x.shape != tiled.shape or self.family.guidance(self.pipe, self.arguments) != problem.model.guidance:
            return "other guidance"
        if not torch.equal(call.x, tiled):
            return "other latents"
        if not solved.same_extra(call):
            return "other conditions"
        return "" if self._on_time(call) else "another timestep"

    def _on_time(self, call: Call) -> bool:
        expected = self.family.model_timestep(self._timestep(), call.x)
        return bool((torch.as_tensor(call.timestep, device=expected.device) == expected).all())

    def _timestep(self) -> Tensor:
        assert self.problem is not None
        timesteps = self.problem.timesteps if self.index < len(self.problem.timesteps) else self.scheduler.timesteps
        return timesteps[self.index]

    def _take_over(self, change: str) -> None:
        """Bring the scheduler to where the loop is, so that it can go on from states that are not the solved ones."""
        problem, solution = self.problem, self.solution
        assert problem is not None
        assert solution is not None
        if self.calls:
            raise self._unknown(f"changes its model's inputs within a step ({change})")
        _LOG.info("step %d comes with %s than were solved for; the chain goes on serially", self.index, change)
        self.random.restore()
        done = self.states[: self.index]
        outputs = list(torch.zeros_like(done))
        if problem.schedule.lags > 1:
            outputs = problem.outputs(done, self.options.get("max_batch") or _HISTORY_ROWS)
            solution.stats.model_evals += len(done) * len(problem.start)
        for output, t, state in zip(outputs, problem.timesteps, done):
            if self.scaled:
                self.scheduler.scale_model_input(state, t)
            both = [torch.cat([part] * problem.halves) for part in (output, state)]
            self.scheduler.step(both[0], t, both[1], **problem.step_kwargs)
        self.serial, self.taken_over_at = True, self.index

    def _unknown(self, what: str) -> DeqDiffError:
        import diffusers

        return DeqDiffError(
            f"{type(self.pipe).__name__} of diffusers {diffusers.__version__} {what} in a way that deqdiff_fast does "
            "not know, so its chain cannot be solved in parallel; restore(pipe) gives back the plain pipeline"
        )


class _Output(dict[str, Tensor]):
    """What models and schedulers return: attributes, keys or positions."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]
