"""One solve from noise to sample: in parallel rounds, or as the plain chain."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .._types import Generators
from ..loop.host import iterate
from ..loop.task import DeviceWork, Lookahead, Progress, Task
from ..schedule.noise import freeze
from ..solution import Callback, Solution, Stats
from ..solver.picard import Picard
from .checked_timesteps import checked_timesteps
from .conclude import conclude, no_samples
from .dominant_entries import warn_of_dominant_entries
from .node_only import solve_on_nodes
from .node_solve import NodeSolve, begins_on_nodes
from .options import Options
from .plain_chain import PlainChain
from .progress import Reporter
from .row_check import check_rows, with_tolerance_in_reach
from .serial import finish_serially, non_finite
from .system import System
from .workspace import Workspace


class Monitor(Protocol):
    """Asked after every round, on nodes or not, in the reporter's place, whether to go on."""

    gave_up: bool
    """Whether it was the monitor that ended the rounds."""

    def start(self, system: System, report: Reporter | None) -> Callable[[int, Any, Tensor], object]:
        """What is called after every round of that system, which calls `report` as well."""
        ...

    def leaves_nodes(self) -> bool:
        """Asked where rounds on nodes have ended and others are to follow; True gives up."""
        ...


@dataclass
class Request:
    """What one call of `sample` or `serial` asks for."""

    noise: Tensor
    generator: Generators
    callback: Callback | None = None
    progress: bool = False
    init_trajectory: Tensor | None = None
    return_trajectory: bool = False
    init: Tensor | None = None  # a guess of the sample, (B, *shape)


@dataclass
class Head:
    """The first `front` steps of a chain, made already in a workspace of their own, which is released when taken."""

    work: Workspace
    front: int


def lookahead_policy(system: System, request: Request) -> Lookahead | None:
    """How far the host runs ahead of a CUDA device; not at all elsewhere, nor where somebody looks at every round."""
    looked_at = request.callback is not None or request.progress
    return Lookahead() if system.device.type == "cuda" and not looked_at else None


def solve_parallel(system: System, options: Options, request: Request) -> Solution:
    """All timesteps (or a window of them) at once, round after round. Raises what `DEQSampler.sample` raises."""
    started = time.perf_counter()
    stats = Stats(solver=options.solver.name, window=options.first_window)
    if system.batch == 0:
        return no_samples(request.noise, stats)
    return solve_rounds(system, options, request, stats, started)


def solve_rounds(
    system: System, options: Options, request: Request, stats: Stats, started: float, head: Head | None = None,
    monitor: Monitor | None = None,
) -> Solution:  # fmt: skip
    """By rounds over `stats.window` timesteps.

    Args:
        started: `time.perf_counter()` at the start. head: the first steps, where some were made already.
        monitor: asked after every round; where it gives up, the rest is made serially.
    """
    rows = check_rows(system, options, request.noise)
    nodes = begins_on_nodes(options, stats.window, request.init_trajectory is not None)
    options, in_reach = with_tolerance_in_reach(options, rows, request.noise.dtype, nodes)
    make = partial(solve_on_nodes, serially=solve_serially) if options.node_only else _rounds
    solution = make(system, options, request, stats, started, head, monitor)
    if rows.solves == 1:
        warn_of_dominant_entries(solution.sample, options.norm(request.noise))
    stats.check_evals += system.check_evals
    if not in_reach and not stats.finished_serially:
        solution.converged &= False
        stats.stop_reason = "rounding"
    return solution


def _rounds(
    system: System, options: Options, request: Request, stats: Stats, started: float, head: Head | None,
    monitor: Monitor | None,
) -> Solution:  # fmt: skip
    """`solve_rounds`, of a model whose rows are independent."""
    solver, limit, rule = options.solver, options.round_limit(), options.stopping_rule(request.noise.dtype)
    watched = request.callback is not None or request.progress
    lookahead = None if solver.makes_rounds else lookahead_policy(system, request)
    nodes, head = _begin_on_nodes(system, options, request, stats.window, head)
    warm = request.init_trajectory is not None or (request.init is not None and nodes is None and head is None)
    if nodes is not None and not watched:
        nodes.run(limit, None if monitor is None else monitor.start(system, None))
        if nodes.finished:
            return nodes.solution(stats, started)
    memory, backend = options.memory, options.backend
    open_workspace = lambda system: Workspace.open(system, solver, stats.window, memory, backend)  # noqa: E731
    settings = (solver, stats.window, rule, warm)
    with (
        torch.no_grad(),
        options.graph_cache.acquire(system, settings, open_workspace, lookahead is not None) as (work, replay, state),
        Reporter(work, rule.finish, limit, request.callback, request.progress) as report,
    ):
        if nodes is not None and watched:
            nodes.run(limit, report if monitor is None else monitor.start(system, report), work)
        device = DeviceWork(lookahead, work.system.pad_round, replay, state)
        _set_up(work, request, head, nodes, device)
        if warm and request.init is not None:
            work.guess_towards(request.init)
        over = nodes is not None and _is_over(nodes, monitor)
        task = Task(
            chain=work.chain, solver=solver, memory=work.memory, evaluate=work.evaluate, rebuild=work.rebuild,
            diagnose=lambda step, sample, at: non_finite(work, step, sample, at),
            report=report if monitor is None else monitor.start(work.system, report), rule=rule,
            max_rounds=0 if over else limit, start=0 if head is None else head.front,
            final=nodes.final if nodes is not None and nodes.usable else None,
            rounds_before=0 if nodes is None else nodes.rounds, warm=warm, device=device,
            doubted=_doubted(nodes, warm, system.batch),
        )  # fmt: skip
        outcome = iterate(task)
        work.system.model_evals -= outcome.padding
        _note_rounds(stats, outcome, nodes, task.start)
        gave_up = monitor is not None and monitor.gave_up
        stopped = not gave_up and (outcome.stopped or (nodes is not None and nodes.stopped))
        end = (stopped, stats, started, request.return_trajectory, options.on_failure, report, gave_up)
        solution = conclude(work, outcome.window.lo, *end)
    if work.system is not system:  # a cached one made the solve
        stats.model_evals += system.model_evals
        stats.model_calls += system.model_calls
        stats.draft_evals = 0 if system.draft is None else system.draft.evals
    return solution


def _begin_on_nodes(
    system: System, options: Options, request: Request, window: int, head: Head | None
) -> tuple[NodeSolve | None, Head | None]:
    """The rounds on nodes that a solve begins with, if it does, and what is left of a head, which they do not need."""
    if not begins_on_nodes(options, window, request.init_trajectory is not None):
        return None, head
    checked = checked_timesteps(options, request.noise, system.model_kwargs)
    if checked.skip_nodes():
        return None, head
    nodes = NodeSolve(system, options, request, None if head is None else head.work.chain, checked)
    if head is not None:
        head.work.lease.release()
    return nodes, None


def _is_over(nodes: NodeSolve, monitor: Monitor | None) -> bool:
    """Whether no rounds on all timesteps follow."""
    return nodes.finished or nodes.stopped or (monitor is not None and monitor.leaves_nodes())


def _doubted(nodes: NodeSolve | None, warm: bool, batch: int) -> list[bool] | None:
    """The samples that begin with a guess that may be near, and that nothing is known of: see `StoppingRule.hold`."""
    if nodes is not None:
        return nodes.doubted if nodes.usable else None
    return [True] * batch if warm else None


def _set_up(
    work: Workspace, request: Request, head: Head | None, nodes: NodeSolve | None, device: DeviceWork
) -> None:  # fmt: skip
    """The chain's first states: the noise, and a guess of what follows."""
    if nodes is not None and nodes.usable:
        nodes.fill(work)
    elif nodes is not None:
        nodes.restart(work, device.replay)
    elif head is None:
        work.begin(request.noise, request.generator)
        work.guess(request.init_trajectory, device.replay)
    else:
        work.resume(head.work, head.front)
        head.work.lease.release()


def _note_rounds(stats: Stats, outcome: Progress, nodes: NodeSolve | None, front: int) -> None:
    """What the loop did, into the statistics; `front` steps were made before it."""
    stats.rounds, stats.repairs = front + outcome.rounds, outcome.repairs
    trace = outcome.trace
    if trace:
        steps = torch.stack(trace).cpu().double()
        last = (steps > 0).long().cumsum(0).argmax(0)  # a sample that is done counts as 0 from there on
        stats.error_estimate = steps.gather(0, last[None])[0]
    if nodes is not None:
        trace = nodes.note(stats, bool(outcome.trace)) + trace
    stats.residual_trace = torch.stack([step.cpu().double() for step in trace]) if trace else stats.residual_trace


def solve_serially(system: System, options: Options, request: Request) -> Solution:
    """The plain chain, one model call after the other. Raises what `DEQSampler.serial` raises."""
    started = time.perf_counter()
    noise = request.noise
    stats = Stats(solver="serial", window=1, stop_reason="serial")
    if noise.shape[0] == 0:
        return no_samples(noise, stats)
    with torch.no_grad():
        chain = plain_chain(system, request)
        if chain is not None:
            solution = chain.advance(system.num_steps) and plain_solution(chain, stats, started)
            if solution:
                return solution
            request = replace(request, generator=chain.frozen)
            system.model_evals = system.model_calls = 0
        work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
        with work.lease, Reporter(work, 0.0, system.num_steps, request.callback, request.progress) as report:
            work.begin(noise, request.generator)
            front = [0] * noise.shape[0]
            stats.finished_serially, stopped = finish_serially(work, front, 0, report)
            stats.rounds = stats.finished_serially
            return conclude(work, front, stopped, stats, started, request.return_trajectory, options.on_failure, report)


def plain_chain(system: System, request: Request, keep: bool = False) -> PlainChain | None:
    """The chain of a request at which nobody looks on its way, and all of whose samples fit into one call."""
    looked_at = request.callback is not None or request.progress or request.return_trajectory or system.padded
    if looked_at or system.batch > (system.max_batch or system.batch):
        return None
    noise = request.noise
    frozen = freeze(system.schedule, tuple(noise.shape), request.generator, noise.dtype, noise.device)
    return PlainChain(system, noise, frozen, keep)


def plain_solution(chain: PlainChain, stats: Stats, started: float) -> Solution | None:
    """What a whole chain has come to; None where that is NaN or Inf."""
    system, sample = chain.system, chain.sample()
    if sample is None:
        return None
    stats.rounds = stats.finished_serially = system.num_steps
    stats.error_estimate = torch.zeros(system.batch, dtype=torch.float64)
    stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
    stats.wall_seconds = time.perf_counter() - started
    return Solution(sample, torch.ones(system.batch, dtype=torch.bool), stats)
