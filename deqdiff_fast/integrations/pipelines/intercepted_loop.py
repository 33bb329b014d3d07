"""One call of a pipeline, in which the pipeline's own code runs its loop over a chain that is solved in parallel.

The loop's first step says what the chain is: the proxies record how the pipeline calls its networks and its scheduler,
the chain is solved, and the remaining steps hand out the solved states, so that callbacks, progress bar, interruption
and decoding are the pipeline's. In place of predictions and scaled inputs the loop is given fixed random numbers: what
it makes of them must be what we make of them. Where the loop goes on in another way (guidance ends, another network for
low noise), the rest is solved anew. The scheduler itself is stepped along, and where a callback changes anything that
the chain depends on, it takes over. What cannot be solved in parallel at all is left to the pipeline's own loop.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import DeqDiffError
from ...schedule.from_diffusers import check_scheduler
from ...schedule.probe import next_state
from .calls import Call
from .change_monitor import ChangeMonitor, has_callbacks, numbers
from .components import Component
from .custom_parts import custom_parts, needs_serial
from .fingerprint import Fingerprint
from .first_step import bring_back, is_state, is_tiled
from .outputs import StepOutputs
from .overwriting import Noising
from .placement import locate
from .problem import check_chain
from .proxies import DenoiserProxy, scheduler_proxy
from .recording import check_call, differs, first_problem, next_model, read_step, steps_otherwise
from .refusals import Unknown, goes_on, not_parallel, refuses_unknown, way_back
from .row_check import own_output, row_fault
from .serial_steps import with_serial_steps
from .solved_chain import SolvedChain

_LOG = logging.getLogger("deqdiff_fast")


class InterceptedLoop:
    """The state machine behind the proxies of one pipeline call."""

    def __init__(
        self, pipe: Any, components: dict[str, Component], options: dict[str, Any], arguments: dict[str, Any]
    ) -> None:
        self.pipe, self.kind, self.options, self.arguments = pipe, type(pipe), options, arguments
        self.modules = torch.nn.ModuleList([component.module for component in components.values()])
        self.scheduler = vars(pipe)["scheduler"]
        self.chain: SolvedChain | None = None
        self.last = torch.empty(0)  # the scheduler's last state where it steps serially
        self.calls: list[Call] = []  # those of the current step
        self.outputs = StepOutputs()
        self.scaled: tuple[Tensor, Tensor] | None = None  # of the current step: before and after scaling
        self.marker: Tensor | None = None  # what the loop was given in the place of its first scaled input
        self.index, self.serial, self.taken_over_at = 0, False, 0
        self.fresh: Any = None  # the scheduler before the first step
        self.timestep: Any = None  # of that step, where it is known before a network is called
        self.before: Fingerprint | None = None  # of networks with parts of a user's own, before the first call
        self.hints: list[float] = []
        self.noising: Noising | None = None  # since the last step
        parts: dict[str, Any] = {
            name: DenoiserProxy(component.module, _denoise=partial(self.denoise, component))
            for name, component in components.items()
        }
        parts["scheduler"] = scheduler_proxy(self.scheduler, self.step, self.scale, self.noised)
        self.proxies = parts  # what to put in the place of the pipeline's components
        self.monitor = ChangeMonitor(pipe, parts, self.modules, self.scheduler, has_callbacks(arguments))
        if reason := needs_serial(self.modules, self.scheduler, arguments):
            self._refuse(reason)
        else:
            check_scheduler(self.scheduler)
        self.custom = [] if self.serial else custom_parts(self.modules)

    @refuses_unknown
    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """In place of the scheduler's `scale_model_input`: random numbers in the first step, to see where they go."""
        if not self.serial and self.chain is not None:
            change = self.monitor.changed() if self._same_latents(sample) else "other latents"
            if change:
                self._take_over(change)
        self._before_steps(timestep)
        scaled: Tensor = self.scheduler.scale_model_input(sample, timestep)
        if self.serial:
            return scaled
        if self.chain is None and self.scaled is not None and not torch.equal(self.scaled[0], sample):
            raise Unknown("scales its model's input")
        self.scaled = sample, scaled
        if self.chain is not None:
            return scaled
        own = torch.Generator("cpu").manual_seed(0)
        self.marker = torch.randn(sample.shape, generator=own, device="cpu").to(sample.device, sample.dtype)
        return self.marker

    def noised(self, name: str, args: tuple[Any, ...], result: Tensor) -> None:
        """After the scheduler's `add_noise` or `scale_noise`."""
        self.noising = Noising(name, args, result)

    @refuses_unknown
    def denoise(self, component: Component, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of a network."""
        if self.serial:
            return component.module(*args, **kwargs)
        self._before_steps()
        call = Call.record(component, args, kwargs, self.outputs.links)
        if self.chain is None:
            check_call(call, self.scheduler, self.timestep, self.kind)
        if self.chain is not None and self.chain.ended(call, self.index):
            self.chain, self.index, self.fresh = None, 0, None
            self._before_steps()
        if self.chain is not None and not self.calls and (change := self._change(call)):
            self._take_over(change, call.x, call.extra)
            return component.module(*args, **kwargs)
        self.calls.append(call)
        if self.marker is not None and self.scaled is not None:
            bring_back(call, self.marker, self.scaled[1])
        output = self.outputs.next(call)
        if output is None:
            raise Unknown(f"takes something else than rows from its {component.name}")
        return output

    @refuses_unknown
    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the scheduler's `step`."""
        if not self.serial and self.chain is not None and not self.calls:
            self._take_over("another model", model_output)
        if self.serial:
            return self._step_serially(model_output, timestep, sample, *args, **kwargs)
        if args or not isinstance(sample, Tensor) or not isinstance(model_output, Tensor):
            raise Unknown("passes arguments to its scheduler")
        form = {"return_dict": kwargs.pop("return_dict")} if "return_dict" in kwargs else {}
        sample, own = self._follow(model_output, timestep, sample, kwargs)
        if own is not None:
            return self._step_serially(own, timestep, sample, **form, **kwargs)
        assert self.chain is not None
        result = self.chain.advance(self.index, timestep, sample, kwargs | form)
        self.index += 1
        self.calls, self.scaled, self.marker, self.noising = [], None, None, None
        self.outputs = StepOutputs(self.index, (self.outputs.given, model_output))
        self.hints = numbers(self.pipe, self.arguments)
        self.monitor.remember(self.chain.problem, self.index)
        return result

    def finish(self) -> None:
        """After the pipeline's call: what the scheduler did itself belongs to the solution, too."""
        if self.serial and self.index:
            halves = self.chain.problem.halves if self.chain is not None else None
            solution = self.chain.solution if self.chain is not None else None
            self.pipe.last_solution = with_serial_steps(solution, self.last, halves, self.index - self.taken_over_at)

    def _before_steps(self, timestep: Any = None) -> None:
        if self.chain is not None and self.chain.interrupted:
            raise DeqDiffError(goes_on(self.pipe, self.index - 1))
        if self.fresh is None:
            self.fresh, self.timestep = copy.deepcopy(self.scheduler), timestep
            if not self.serial:
                check_chain(self.fresh, timestep, vars(self.pipe).get("_num_timesteps"))
            if self.custom and not self.serial:
                self.before = Fingerprint(*self.modules, only=self.modules)

    def _follow(
        self, guided: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """What this step is made of, solved where it is not yet: the sample that is really stepped, and the real output
        where the loop is to go on serially."""
        hints = numbers(self.pipe, self.arguments)
        if self.chain is None:
            first, combination = read_step(self.calls, self.outputs, self.scaled, self.marker, sample, guided, hints)
            first.timestep, first.output, first.step_kwargs = timestep, guided, kwargs
            first.count = vars(self.pipe).get("_num_timesteps")
            problem = first_problem(self.fresh, first, combination, self.outputs, self.kind)
            if self.before is not None:
                fault = row_fault(problem, self.outputs, self.modules, self.before, self.custom)
                self.before = None
                if fault:
                    self._refuse(fault)
                    return first.sample, torch.cat([own_output(problem, self.outputs)] * problem.halves)
            sample, self.chain = first.sample, self._solved_chain(problem)
            whole = all(call.placement is None or call.placement.rest is None for call in self.calls)
            if self.arguments.get("mask_image") is not None and whole and not self.chain.changes:
                self.chain.changes.add(1)  # it will write over a part of what it is given
        else:
            step = self.calls, self.outputs, self._source(), guided, hints
            problem = self.chain.problem
            stepped = self._source() if problem.first.step_scaled else self.chain.states[self.index]
            change = "another step" if steps_otherwise(problem, stepped, sample, timestep, kwargs, self.index) else ""
            if differs(problem, *step, self.hints, self.index):
                problem = next_model(problem, *step, self.index, self.kind)
                if self.chain.change(problem, self.index):
                    change = "another model in every step"
            if change:
                self._take_over(change, within=True)
                return sample, torch.cat([own_output(problem, self.outputs)] * problem.halves)
        self.chain.solve_from(self.index)
        return sample, None

    def _solved_chain(self, problem: Any) -> SolvedChain:
        """Its first part not solved yet; a method so that it can be recorded only."""
        monitored = problem.start.device.type == "cpu" or self.monitor.active
        return SolvedChain(self.pipe, self.scheduler, problem, self.options, self.kind, monitored)

    def _change(self, call: Call) -> str:
        """What a callback has changed, or the loop where it cannot be solved anew, seen at the first call of a step."""
        assert self.chain is not None
        problem, solved = self.chain.problem, self.chain.problem.model.calls[0]
        if self.index >= len(problem.timesteps):
            return "more timesteps"
        source = self._source()
        assert solved.placement is not None
        known = solved.placement.holds(call.x, source) or (self.scaled is None and self._same_latents(call.x))
        strict = self.monitor.active or self.chain.overwriting is not None
        if not known and (strict or locate(call.x, source) is None):
            return "other latents"
        if self.monitor.active:
            if numbers(self.pipe, self.arguments) != self.hints:
                return "other guidance"
            if call.component is solved.component and not solved.same_extra(call):
                return "other conditions"
        return self.monitor.changed() if self.scaled is None else ""

    def _same_latents(self, sample: Tensor) -> bool:
        """Whether the loop goes on with the state that it was given, or writes over a part of every state."""
        chain = self.chain
        assert chain is not None
        own = sample[: len(chain.problem.start)]
        same = is_state(sample, chain.states[min(self.index, len(chain.states) - 1)])
        return same or (is_tiled(sample, own) and chain.overwrite(own, self.index, self.noising))

    def _source(self) -> Tensor:
        """(B, *shape), what the inputs of this step are made of."""
        assert self.chain is not None
        state = self.chain.states[self.index]
        return state if self.scaled is None else self.scaled[1][: len(state)]

    def _take_over(self, change: str, *values: Any, within: bool = False) -> None:
        """Leave the rest to the scheduler, which is where the loop is; values: what the loop goes on with."""
        if self.calls and not within:
            raise Unknown(f"changes its model's inputs within a step ({change})")
        if self.outputs.reused(*values):
            raise Unknown("uses its model's outputs once more in a later step")
        _LOG.info("step %d comes with %s than were solved for; the chain goes on serially", self.index, change)
        self.serial, self.taken_over_at = True, self.index

    def _refuse(self, reason: str) -> None:
        """Nothing can be solved in parallel."""
        sentence = not_parallel(self.pipe, reason)
        if self.options.get("on_failure", "serial") == "raise":
            raise DeqDiffError(f"{sentence}; {way_back(self.pipe)}")
        _LOG.warning("%s; its loop is left as it is", sentence)
        self.serial = True

    def _step_serially(self, *args: Any, **kwargs: Any) -> Any:
        result = self.scheduler.step(*args, **kwargs)
        self.last = next_state(result)
        self.index += 1
        return result
