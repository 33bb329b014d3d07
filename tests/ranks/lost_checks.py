"""Run by the processes of test_lost.py: a rank that leaves, hangs or dies, each in a group of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from problems import Denoiser, noise, schedule
from rank_launch import run_checks
from torch import Tensor
from torch import distributed as dist

import deqdiff_fast as dq

TIMEOUT = 4.0  # of a group
LAST = 2


@dataclass(frozen=True)
class Leaving(dq.Picard):
    """On one rank, interrupted in the solver's own work."""

    def step(self, chain: Any, memory: Any, round: int) -> Any:
        if round == 3 and dist.get_rank() == LAST:
            raise KeyboardInterrupt
        return super().step(chain, memory, round)


class Stopping(Denoiser):
    """On the last rank, something happens in the sixth call."""

    def __init__(self, event: Callable[[], None]) -> None:
        super().__init__()
        self.event, self.calls = event, 0
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 6 and dist.get_rank() == LAST:
            self.event()
        return super().forward(x, t)


def in_a_group_of_its_own(model: Any, solver: Any = "picard") -> tuple[BaseException | None, float, dq.DEQSampler]:
    """(what a solve ended with, after how many seconds, the sampler)."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    sampler, started = dq.DEQSampler(model, schedule(), solver=solver, group=group), time.monotonic()
    try:
        sampler.sample(noise(2))
    except BaseException as error:
        return error, time.monotonic() - started, sampler
    return None, time.monotonic() - started, sampler


def a_rank_that_is_interrupted_in_its_solver_ends_all() -> None:
    error, seconds, sampler = in_a_group_of_its_own(Denoiser().requires_grad_(False), Leaving())
    assert isinstance(error, KeyboardInterrupt), error
    if dist.get_rank() != LAST:
        assert f"rank {LAST} has left" in str(error), error
    assert seconds < TIMEOUT + 2
    with pytest.raises(dq.RankError, match="cannot be used any more"):
        sampler.sample(noise(2))
    dist.barrier()


def a_rank_that_hangs_is_named_within_the_timeout() -> None:
    error, seconds, _ = in_a_group_of_its_own(Stopping(lambda: time.sleep(2.25 * TIMEOUT)))
    assert isinstance(error, dq.RankError), error
    if dist.get_rank() != LAST:
        assert (error.rank, f"rank {LAST} has died or hangs" in str(error)) == (LAST, True), error
        assert TIMEOUT - 1 < seconds < 2 * TIMEOUT
    dist.barrier()


def a_rank_that_dies_is_named_at_once() -> None:
    error, seconds, _ = in_a_group_of_its_own(Stopping(lambda: os._exit(7)))
    assert isinstance(error, dq.RankError), error
    assert (error.rank, f"rank {LAST} has died or hangs" in str(error)) == (LAST, True), error
    assert seconds < TIMEOUT + 2


CHECKS = (
    a_rank_that_is_interrupted_in_its_solver_ends_all, a_rank_that_hangs_is_named_within_the_timeout,
    a_rank_that_dies_is_named_at_once,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
    os._exit(0)  # one of the processes is gone: nothing to take leave of
