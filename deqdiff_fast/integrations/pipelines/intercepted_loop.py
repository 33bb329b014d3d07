"""One call of a pipeline, in which the pipeline's own code runs its loop over a chain that is solved in parallel.

The loop's first step says what the chain is: the proxies record how the pipeline calls its model and its scheduler, the
chain is solved, and the remaining steps hand out the solved states, so that callbacks, progress bar, interruption and
decoding are the pipeline's. In place of predictions and scaled inputs the loop is given fixed random numbers: what it
makes of them must be what we make of them. The scheduler itself is stepped along, and where a callback changes anything
that the chain depends on, it takes over. What cannot be solved in parallel at all is left to the pipeline's own loop.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor

from ...errors import DeqDiffError
from ...schedule.probe import next_state
from ...solution import RoundInfo, Solution, Stats
from .calls import Call
from .change_monitor import ChangeMonitor, has_callbacks
from .custom_parts import custom_parts, needs_serial
from .families import Family
from .first_step import is_tiled, read_first_step
from .lockstep import Lockstep
from .problem import DenoisingProblem
from .proxies import DenoiserProxy, Output, scheduler_proxy
from .random_state import RandomState
from .row_check import row_fault

_LOG = logging.getLogger("deqdiff_fast")
_PROBE_TOLERANCE = 8  # in units of the dtype's rounding: the same operations on the same numbers
_SCALED = -1  # the number of the probe that stands for a scaled input


class InterceptedLoop:
    """The state machine behind the proxies of one pipeline call."""

    def __init__(self, pipe: Any, family: Family, options: dict[str, Any], arguments: dict[str, Any]) -> None:
        self.pipe, self.family, self.options, self.arguments = pipe, family, options, arguments
        self.denoiser, self.scheduler = vars(pipe)[family.denoiser], vars(pipe)["scheduler"]
        self.problem: DenoisingProblem | None = None
        self.solution: Solution | None = None
        self.states = torch.empty(0)  # (T + 1, B, *shape); the scheduler's last one where it steps serially
        self.calls: list[Call] = []  # those of the current step
        self.scaled: tuple[Tensor, Tensor] | None = None  # of the current step: before and after scaling
        self.probes: dict[int, Tensor] = {}
        self.index, self.serial, self.taken_over_at = 0, False, 0
        self.fresh: Any = None  # the scheduler before the first step
        self.lockstep: Lockstep | None = None
        parts = {
            family.denoiser: DenoiserProxy(self.denoiser, _denoise=self.denoise),
            "scheduler": scheduler_proxy(self.scheduler, self.step, self.scale),
        }
        self.monitor = ChangeMonitor(pipe, parts, self.denoiser, self.scheduler, has_callbacks(arguments))
        if reason := needs_serial(self.denoiser, self.scheduler):
            self._refuse(reason)

    def proxies(self) -> dict[str, Any]:
        """What to put in the place of the pipeline's components."""
        return self.monitor.parts

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """In place of the scheduler's `scale_model_input`: random numbers in the first step, to see where they go."""
        if not self.serial and self.problem is not None:
            state = self.states[min(self.index, len(self.states) - 1)]
            if not is_tiled(sample, state):
                self._take_over("other latents")
            elif change := self.monitor.changed():
                self._take_over(change)
        self._before_steps()
        scaled: Tensor = self.scheduler.scale_model_input(sample, timestep)
        if self.serial:
            return scaled
        if self.problem is None and self.scaled is not None and not torch.equal(self.scaled[0], sample):
            raise self._unknown("scales its model's input")
        self.scaled = sample, scaled
        return scaled if self.problem is not None else self._probe(sample.shape, sample, _SCALED)

    def denoise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the model."""
        if self.serial:
            return self.denoiser(*args, **kwargs)
        self._before_steps()
        call = Call.record(self.family, args, kwargs)
        if self.problem is not None and (change := self._change(call)):
            self._take_over(change)
            return self.denoiser(*args, **kwargs)
        number = len(self.calls)
        self.calls.append(call)
        shape = (call.x.shape[0], self.family.channels(self.denoiser, call.x), *call.x.shape[2:])
        probe = self._probe(shape, call.x, number)
        return Output(sample=probe) if call.extra.get("return_dict", True) else (probe,)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the scheduler's `step`."""
        if not self.serial and self.problem is not None and not self.calls:
            self._take_over("another model")
        if self.serial:
            return self._step_serially(model_output, timestep, sample, *args, **kwargs)
        if args:
            raise self._unknown("passes arguments to its scheduler")
        as_dict = kwargs.pop("return_dict", True)
        if self.problem is None:
            sample = self._begin(model_output, timestep, sample, kwargs)
        assert self.problem is not None
        self._check_guidance(model_output)
        if self.solution is None:
            fault, output = row_fault(self.denoiser, self.problem, custom_parts(self.denoiser))
            if fault:
                self._refuse(fault)
                return self._step_serially(output, timestep, sample, return_dict=as_dict, **kwargs)
            self.solution = self._solve()
        assert self.lockstep is not None
        self.lockstep.advance(timestep, sample, kwargs)
        self.index += 1
        self.calls, self.scaled = [], None
        self.monitor.remember(self.problem, self.index)
        state = torch.cat([self.states[self.index]] * self.problem.halves)
        return Output(prev_sample=state) if as_dict else (state,)

    def finish(self) -> None:
        """After the pipeline's call: what the scheduler did itself belongs to the solution, too."""
        if not self.serial or not self.index:
            return
        guidance = self.family.guidance(self.pipe, self.arguments)
        doubled = self.family.doubled and guidance.scale > 1
        sample = self.states[: len(self.states) // 2] if doubled else self.states
        if self.solution is None:
            stats = Stats(solver="serial", window=1, stop_reason="serial")
            stats.error_estimate = torch.zeros(len(sample), dtype=torch.float64, device="cpu")
            self.solution = Solution(sample, torch.ones(len(sample), dtype=torch.bool, device="cpu"), stats)
            self.pipe.last_solution = self.solution
        stats, steps = self.solution.stats, self.index - self.taken_over_at
        stats.finished_serially += steps
        stats.model_evals += steps * len(sample)
        stats.model_calls += steps
        if steps:
            self.solution.sample = sample

    def _before_steps(self) -> None:
        if self.fresh is None:
            self.fresh = copy.deepcopy(self.scheduler)

    def _begin(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """From what was recorded in the first step to the problem; returns the sample that is really stepped."""
        guidance = self.family.guidance(self.pipe, self.arguments)
        halves = 2 if self.family.doubled and guidance.scale > 1 else 1
        first = read_first_step(self.calls, self.scaled, self.probes.get(_SCALED), sample, halves)
        if first is None:
            raise self._unknown("prepares its model's input")
        first.timestep, first.output, first.step_kwargs = timestep, output, kwargs
        first.count = vars(self.pipe).get("_num_timesteps")
        self.problem = DenoisingProblem.build(self.denoiser, self.fresh, self.family, guidance, first)
        if not all(self._on_time(call) for call in self.calls):
            raise self._unknown("passes timesteps to its model")
        return first.sample

    def _solve(self) -> Solution:
        problem = self.problem
        assert problem is not None
        random = RandomState(problem.generator, problem.start.device)
        noises = problem.noises()
        random.restore()  # the scheduler draws them once more while it is stepped along
        front = [0]

        def on_round(info: RoundInfo) -> bool:
            front[0] = int(info.front.min())
            return bool(getattr(self.pipe, "_interrupt", False))

        # on a GPU a callback costs a wait every round: it is worth that only where someone may interrupt
        monitored = problem.start.device.type == "cpu" or self.monitor.active
        solution = problem.sampler(self.options).sample(
            problem.start, problem.rows(), problem.frozen(noises), on_round if monitored else None,
            return_trajectory=True,
        )  # fmt: skip
        assert solution.trajectory is not None
        self.states, solution.trajectory = solution.trajectory, None
        if solution.stats.stop_reason == "callback":  # interrupted: the pipeline goes on with what is final by now
            self.states[1] = self.states[front[0]]
        self.lockstep = Lockstep(self.scheduler, problem, self.states, noises)
        self.pipe.last_solution = solution
        return solution

    def _probe(self, shape: tuple[int, ...], like: Tensor, number: int) -> Tensor:
        if number not in self.probes:
            own = torch.Generator("cpu").manual_seed(number - _SCALED)
            drawn = torch.randn(shape, generator=own, device="cpu")
            self.probes[number] = drawn.to(like.device, like.dtype)
        return self.probes[number]

    def _check_guidance(self, guided: Tensor) -> None:
        """What the pipeline computes from the probes must be what our guidance computes from them."""
        problem = self.problem
        assert problem is not None
        parts: list[Tensor] = []
        for number, call in enumerate(self.calls):
            parts += problem.model.parts(self.probes[number], problem.model.copies(call), problem.start.shape[1])
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
        if call.x.shape != solved.x.shape or self.family.guidance(self.pipe, self.arguments) != problem.model.guidance:
            return "other guidance"
        if not is_tiled(call.x, self.states[self.index] if self.scaled is None else self.scaled[1]):
            return "other latents"
        if not solved.same_extra(call):
            return "other conditions"
        if not self._on_time(call):
            return "another timestep"
        return self.monitor.changed() if number == 0 and self.scaled is None else ""

    def _on_time(self, call: Call) -> bool:
        assert self.problem is not None
        expected = self.family.model_timestep(self.problem.timesteps[self.index], call.x)
        return bool((torch.as_tensor(call.timestep, device=expected.device) == expected).all())

    def _take_over(self, change: str) -> None:
        """Leave the rest to the scheduler, which is where the loop is."""
        if self.calls:
            raise self._unknown(f"changes its model's inputs within a step ({change})")
        _LOG.info("step %d comes with %s than were solved for; the chain goes on serially", self.index, change)
        self.serial, self.taken_over_at = True, self.index

    def _refuse(self, reason: str) -> None:
        """Nothing can be solved in parallel."""
        sentence = f"{type(self.pipe).__name__} cannot be solved in parallel: {reason}"
        if self.options.get("on_failure", "serial") == "raise":
            raise DeqDiffError(f"{sentence}; restore(pipe) gives back the plain pipeline")
        _LOG.warning("%s; its loop is left as it is", sentence)
        self.serial = True

    def _step_serially(self, *args: Any, **kwargs: Any) -> Any:
        result = self.scheduler.step(*args, **kwargs)
        self.states = next_state(result)
        self.index += 1
        return result

    def _unknown(self, what: str) -> DeqDiffError:
        import diffusers

        return DeqDiffError(
            f"{type(self.pipe).__name__} of diffusers {diffusers.__version__} {what} in a way that deqdiff_fast does "
            "not know, so its chain cannot be solved in parallel; restore(pipe) gives back the plain pipeline"
        )
