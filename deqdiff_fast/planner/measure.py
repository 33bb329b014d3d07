"""What a batched call of a model costs here, measured with the model itself and shared by all that use it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.batched import BatchedModel
from ..model.padding import out_of_memory
from .cost_curve import Curve
from .round_model import average

LEAP = 2.0  # one measurement moves a known figure at most by this factor: a machine hiccups

Clock = Callable[[], float]
IN_THREAD = 0.9  # of its time, spent in this thread, by a step that leaves nothing to others


class Costs:
    """Seconds of a model call by its rows, and of a step of the serial chain by its batch.

    Thread safe: a dict is replaced, never changed.

    Attributes:
        clock: seconds. That of the thread, which other processes do not disturb, where the model does all its work in
            it, see `choose_clock`.
    """

    def __init__(self) -> None:
        self.clock: Clock = time.perf_counter
        self._calls: dict[int, float] = {}
        self._steps: dict[int, float] = {}
        self._few: frozenset[int] = frozenset()  # batches of which a step is known by a few
        self._whole: frozenset[int] = frozenset()  # and those of which it is by whole chains

    def curve(self) -> Curve | None:
        """The cost of a model call; None where nothing was measured."""
        return Curve(self._calls) if self._calls else None

    def step(self, batch: int) -> float | None:
        """Seconds of one serial step of `batch` samples, None where it was never measured."""
        return self._steps.get(batch)

    def set_call(self, rows: int, seconds: float) -> None:
        """A call of that many rows takes so long; infinite, where it ran out of memory, tells nothing."""
        if math.isfinite(seconds):
            self._calls = self._calls | {rows: seconds}

    def choose_clock(self, device: torch.device, wall: list[float], thread: list[float]) -> bool:
        """Whether to go by the thread's processor time, given what both clocks said of the same steps.

        It is the time of a machine that does nothing else, where nothing is left to other threads, devices or hosts.
        """
        alone = device.type == "cpu" and torch.get_num_threads() == 1 and sys.platform != "win32"  # too coarse there
        if alone and any(own >= IN_THREAD * whole > 0 for own, whole in zip(thread, wall)):
            self.clock = time.thread_time
        return self.clock is time.thread_time

    def set_step(self, batch: int, seconds: float, few: bool = False) -> None:
        """Serial steps take so long each; few: by so few of them that what solves take cannot be held against it."""
        self._steps = self._steps | {batch: seconds}
        self._few = self._few | {batch} if few else self._few - {batch}
        self._whole = self._whole - {batch}

    def is_of_few(self, batch: int) -> bool:
        """Whether what is known of a step is by a few of them only."""
        return batch in self._few

    def learn_step(self, batch: int, seconds: float, compared: bool = False) -> None:
        """Steps of a whole chain took so long each. Where they have become slower or faster, so has everything else.

        Where the figure so far was of part of a chain, this is a better one and no news of the machine. A few steps
        that were faster than those of a chain are: a busy one disturbs them less. But not where solves were `compared`
        with them, for these were disturbed as well.
        """
        old = self._steps.get(batch, seconds)
        bounded = min(max(seconds, old / LEAP), old * LEAP)
        news = batch in self._whole or (batch in self._few and bounded > old and not compared)
        new = average(old, bounded) if batch in self._whole else bounded
        self.set_step(batch, new)
        self._whole = self._whole | {batch}
        if old > 0 and news:
            self._calls = {n: s * new / old for n, s in self._calls.items()}


def time_call(system: BatchedModel, noise: Tensor, rows: int, clock: Clock = time.perf_counter) -> float:
    """Seconds of one model call on that many rows: the noise, at the first timesteps. Counts as evaluations.

    Infinite where the model runs out of memory on them; `system.learned` has it.
    """
    row = torch.arange(rows, device=noise.device)
    sample, step = row % system.batch, (row // system.batch) % system.num_steps
    states = noise.detach().flatten(1)[sample].to(system.dtype)
    kwargs = system.expand_kwargs(sample)
    synchronize(noise.device)
    start = clock()
    try:
        with torch.no_grad():
            system.predict(states, step, kwargs)
        synchronize(noise.device)
    except RuntimeError as error:
        if rows == 1 or not out_of_memory(error):
            raise
    else:
        return clock() - start
    system.learned["max_batch"] = rows // 2
    if noise.device.type == "cuda":
        torch.cuda.empty_cache()
    return math.inf


def measure(
    system: BatchedModel, noise: Tensor, rows: int, *, repeats: int, budget: float, clock: Clock = time.perf_counter
) -> float:
    """Least seconds of a call, which prepares, and up to `repeats` more; one more once `budget` seconds are spent.

    The least, since a call that was disturbed would rule out all larger ones; solves that are tried put it right.
    """
    taken = [time_call(system, noise, rows, clock)]
    while taken[-1] < math.inf and len(taken) <= repeats and (len(taken) == 1 or sum(taken) < budget):
        taken.append(time_call(system, noise, rows, clock))
    return min(taken)


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of a device."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)
