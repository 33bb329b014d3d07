"""A forked child computes, whatever other threads of its parent were doing, and finalizers may run at any time."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast import _locks
from deqdiff_fast.memory import MemoryPlan

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def ends_well(child, seconds=20.0):
    """Whether that function returns in a forked process, which is ended where it hangs."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


@needs_fork
def test_a_child_computes_though_a_thread_held_every_lock(mixture, ddim, noise):
    """With objects of its parent and with new ones."""
    model, schedule, memory = mixture(), ddim(5), dq.SolverMemory()
    sampler, inverter = dq.DEQSampler(model, schedule, memory=memory), dq.DEQInverter(model, schedule, "auto")
    sampler.sample(noise(1)), inverter.invert(noise(1))
    held, go = threading.Event(), threading.Event()

    def hold():
        for lock in list(_locks._LOCKS):
            lock.__enter__()
        held.set()
        go.wait()
        for lock in list(_locks._LOCKS):
            lock.__exit__()

    def child():
        torch.set_num_threads(1)
        sampler.sample(noise(1)), inverter.invert(noise(1)), memory.stats()
        dq.DEQSampler(model, ddim(5)).sample(noise(1))

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    fine = ends_well(child)
    go.set()
    thread.join()
    assert fine


@needs_fork
def test_a_lock_that_the_forking_thread_holds_is_still_its_own():
    lock = _locks.Lock()
    with lock:
        assert ends_well(lambda: lock.__exit__(), 5)

    def takes_it_twice():
        with lock, lock:
            pass

    assert ends_well(takes_it_twice, 5)


def test_no_lock_is_another_kind():
    """What is not made by `_locks.Lock` is not made anew in a child."""
    for path in Path(dq.__file__).parent.rglob("*.py"):
        assert path.name == "_locks.py" or not re.search(r"threading\.R?Lock", path.read_text(encoding="utf-8")), path


def test_a_copy_of_a_lock_is_another_lock():
    lock = _locks.Lock()
    for other in (copy.copy(lock), copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
        assert other is not lock
        with lock:
            thread = threading.Thread(target=lambda held=other: held.__enter__(), daemon=True)
            thread.start()
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_lease_may_be_collected_while_its_pool_is_counting(device):
    """At the allocations that `stats` makes under its lock."""
    memory = dq.SolverMemory()

    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself, cycle.lease = cycle, memory.lease(MemoryPlan().add("x", (4,), torch.float32), device)
    collected = []

    def collect(frame, event, argument):
        if event == "c_call" and getattr(argument, "__name__", "") == "stats":
            collected.append(gc.collect())

    gc.disable()
    del cycle
    run = threading.Thread(target=lambda: (sys.setprofile(collect), memory.stats(), sys.setprofile(None)), daemon=True)
    try:
        run.start()
        run.join(10)
    finally:
        gc.enable()
    assert not run.is_alive()
    assert collected
    assert memory.stats()["active"] == memory.stats()["device_bytes"] == 0


def test_a_finalizer_may_sample_while_a_schedule_is_cached(mixture, ddim, noise):
    """A finalizer of the user's, in the thread that is inside the library: here within its cache of tables."""
    from deqdiff_fast.schedule import cache

    sampler = dq.DEQSampler(mixture(), ddim(5), solver="picard")

    def inside():
        with cache._lock:
            sampler.sample(noise(1))

    run = threading.Thread(target=inside, daemon=True)
    run.start()
    run.join(10)
    assert not run.is_alive()
