"""How pairs are made the fastest: how many at a time, and whether by the plain chain or in rounds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from ..engine.plain_chain import PlainChain
from ..engine.solve import Request, plain_chain
from ..planner.free_memory import free_bytes
from .pair_solver import ASKED, ROUNDS, SERIAL, Method, PairSolver, in_format, same_answers

MOST_BATCH = 1024
BETTER = 0.98  # of the time of a row: from there on a larger batch was worth a try, and rounds are worth it
ALIKE = 1.005  # times the time of a row, which is no difference
WORSE_SIZES = 3  # doublings that are no better, after which no larger batch is tried
ROWS = 128  # that are timed at each size, in steps of the chain: the fastest of many short steps would be luck
PASSES = 3  # of which the fastest counts
MEASURING = 0.02  # part of all the work, for measuring
LEAST_SECONDS = 2.0  # for that, however little there is to do
ROUNDS_BATCH = 8  # samples of a solve in rounds, at least, where memory allows: the model is checked once a solve
COPIES = 32  # of the states at the nodes that a solve in rounds keeps, about
ROUGH_EVALUATIONS = 2.0  # of a sample of it, over T, before one was made

_log = logging.getLogger("deqdiff_fast")


@torch.no_grad()
def choose_method(
    solver: PairSolver, count: int, name: str, batch: int | None, channels_last: bool | None = None
) -> Method:
    """The method with the most pairs a second, by timing; `name` ("auto", "serial" or "rounds"), `batch` and
    `channels_last` as far as they are given. A given batch is in the usual memory format, if nothing is said."""
    if batch is not None:
        given = Method(SERIAL, batch, bool(channels_last))
        if name in (SERIAL, ROUNDS):
            return given if name == SERIAL else Method(ROUNDS, batch)
        costs = {given: serial_seconds(solver, given)}
    else:
        costs = row_costs(solver, count, memory_formats(solver) if channels_last is None else [channels_last])
    method = fastest(costs)
    steps = solver.schedule.num_steps
    serial = costs[method] * steps
    _log.info("pairs: plain chain, %d at a time, %.3g s a pair", method.batch, serial)
    if name == SERIAL:
        return method
    together = batch or rounds_batch(solver, method.batch)
    if name == ROUNDS:
        return Method(ROUNDS, together)
    spent = 2 * together * ROUGH_EVALUATIONS * serial  # the first solve prepares
    if len(solver.node_sizes) < 2 or spent > 2 * MEASURING * count * serial:
        return method
    seconds = rounds_seconds(solver, Method(ROUNDS, together), serial)
    _log.info("pairs: rounds, %d at a time, %.3g s a pair", together, seconds)
    return Method(ROUNDS, together) if seconds < BETTER * serial else method


def fastest(costs: dict[Method, float]) -> Method:
    """The smallest batch that is as good as the best, but for what does not matter."""
    least = min(costs.values())
    return min((method for method, cost in costs.items() if cost <= ALIKE * least), key=lambda method: method.batch)


def memory_formats(solver: PairSolver) -> list[bool]:
    """Of the model's inputs, `channels_last` or not: both, where the model says the same in both."""
    said = list[torch.Tensor]()
    with suppress(Exception):  # another shape, or views that such strides do not allow; faults in both, timing raises
        for last in (False, True):
            chain = begin_chain(solver, Method(SERIAL, ASKED, last), keep=True)
            if chain is not None and chain.advance(1):
                said.append(chain.outputs[0].double())
    alike = len(said) == 2 and (said[0] - said[1]).abs().max() <= same_answers(solver.dtype) * said[0].abs().max()
    return [False, True] if alike else [False]


def row_costs(solver: PairSolver, count: int, formats: list[bool]) -> dict[Method, float]:
    """Seconds of a row of a serial step, for powers of two up to where larger batches are no better."""
    costs, size, worse, began = dict[Method, float](), 1, 0, time.perf_counter()

    def allowed() -> bool:
        most = max(LEAST_SECONDS, MEASURING * count * solver.schedule.num_steps * min(costs.values()))
        return time.perf_counter() - began < most

    while size <= min(MOST_BATCH, max(count, 1)) and worse < WORSE_SIZES and (not costs or allowed()):
        found = {each: serial_seconds(solver, each) for each in (Method(SERIAL, size, last) for last in formats)}
        cost = min(found.values())
        worse = 0 if not costs or cost < BETTER * min(costs.values()) else worse + 1
        costs |= found
        if math.isinf(cost):  # too little memory
            break
        size *= 2
    for _ in range(PASSES - 1):  # other processes disturb some of them
        for method in sorted(costs, key=costs.__getitem__)[:4]:
            if allowed():
                costs[method] = min(costs[method], serial_seconds(solver, method))
    return costs


def begin_chain(solver: PairSolver, method: Method, keep: bool = False) -> PlainChain | None:
    """The plain chain of the first pairs."""
    numbers = range(method.batch)
    noise, streams = solver.noise(numbers)
    model, kwargs, _ = solver.conditions(numbers)
    system = solver.sampler(model, method).options.system(noise, kwargs, serial=True)
    return plain_chain(system, Request(in_format(noise, method), streams), keep)


def serial_seconds(solver: PairSolver, method: Method) -> float:
    """Of a row of a serial step; infinite where the device has no room for so many."""
    chain, steps = begin_chain(solver, method), solver.schedule.num_steps
    first = 1 if steps > 1 else 0  # prepares
    last = min(first + max(ROWS // method.batch, 1), steps)
    if chain is None or not chain.advance(first) or not chain.finite():
        return math.inf
    clock = clock_of(solver.device)
    began = clock()
    if not (chain.advance(last) and chain.finite()):
        return math.inf
    return (clock() - began) / (method.batch * (last - first))


def clock_of(device: torch.device) -> Callable[[], float]:
    """That of the thread, which other processes do not disturb, where it does all the work."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def rounds_batch(solver: PairSolver, serial: int) -> int:
    """Samples of a solve whose calls are as large as the best ones of the plain chain, or somewhat larger."""
    nodes = solver.node_sizes[-1]
    batch = max(-(-serial // nodes), min(ROUNDS_BATCH, serial))
    free, each = free_bytes(solver.device), COPIES * 4 * nodes * math.prod(solver.shape)
    return batch if free is None else max(min(batch, int(free / 4 / each)), 1)


def rounds_seconds(solver: PairSolver, method: Method, serial: float) -> float:
    """Of a sample that is solved in rounds; the first solve makes tables, and is the last where it is far too slow."""
    clock, seconds = clock_of(solver.device), math.inf
    for k in range(2):
        began = clock()
        solver.solve(range(method.batch), method)
        seconds = (clock() - began) / method.batch
        if k == 0 and seconds > 3 * serial:
            break
    return seconds
