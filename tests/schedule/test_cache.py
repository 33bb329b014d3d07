"""What follows from a schedule is made once, and serves every kind of solve after it."""

from __future__ import annotations

import gc

import torch

import deqdiff_fast as dq
from deqdiff_fast.schedule import cache
from deqdiff_fast.schedule.cache import MOST, cached


def test_made_once_for_each_key(ddim):
    schedule, other, made = ddim(5), ddim(5), []

    def make():
        made.append(None)
        return torch.zeros(3)

    first = cached(schedule, "a", make)
    assert cached(schedule, "a", make) is first
    assert cached(schedule, "b", make) is not first
    assert cached(other, "a", make) is not first
    assert len(made) == 3
    for k in range(MOST + 1):
        cached(schedule, k, make)
    assert cached(schedule, "a", make) is not first, "the oldest has gone"


def test_gone_with_the_schedule(ddim):
    schedule = ddim(5)
    cached(schedule, "a", lambda: torch.zeros(3))
    before = len(cache._cached)
    del schedule
    gc.collect()
    assert len(cache._cached) < before


def test_a_solve_without_gradients_leaves_nothing_that_hinders_one_with_them(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(10), solver="quasi-newton")
    with torch.inference_mode():
        sampler.sample(noise(1))
    x = noise(1).requires_grad_()
    sampler.sample(x).sample.square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_batches_and_dtypes_are_told_apart(mixture, ddim, noise):
    model, schedule = mixture(), ddim(10)
    for batch in (1, 3, 2):
        for dtype in (torch.float32, torch.float64):
            start = noise(batch, dtype=dtype)
            sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", tol=1e-5)
            found, serial = sampler.sample(start).sample, sampler.serial(start).sample
            assert found.dtype == dtype
            assert float((found - serial).norm() / serial.norm()) < 1e-5


def test_nothing_is_cached_where_somebody_looks(ddim):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    schedule = ddim(5)
    with Looking():
        first = cached(schedule, "a", lambda: torch.zeros(3))
    assert cached(schedule, "a", lambda: torch.zeros(3)) is not first
