"""Solver memory that threads, a forked child and other users share; with and without the C++ extension."""

from __future__ import annotations

import gc
import os
import sys
import threading

import pytest
import torch

from deqdiff_fast.errors import StaleLeaseError
from deqdiff_fast.memory import MemoryPlan, SolverMemory, default_memory
from deqdiff_fast.memory import pool as module

KB = 1 << 10


def flat(nbytes: int) -> MemoryPlan:
    return MemoryPlan().add("x", (nbytes,), torch.uint8)


def test_a_dropped_lease_returns_its_memory(arena):
    pool = SolverMemory()
    pool.lease(flat(4 * KB))["x"].zero_()
    gc.collect()
    assert pool.stats()["active"] == 0
    assert pool.stats()["idle_bytes"] == pool.stats()["bytes"] == (0 if arena is None else 4 * KB)


def test_threads_never_share_a_slab(arena):
    pool = SolverMemory(byte_budget=64 * KB)
    failures: list[str] = []
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        barrier.wait()
        for turn in range(60):
            with pool.lease(flat(4 * KB + 512 * ((seed + turn) % 5))) as lease:
                mark = (seed * 31 + turn) % 251
                lease["x"].fill_(mark)
                threading.Event().wait(0.0002)
                if not bool((lease["x"] == mark).all()):
                    failures.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = pool.stats()
    assert stats["active"] == 0
    assert stats["leases"] == 480
    assert (stats["reuses"] > 0) == (arena is not None)
    assert stats["idle_bytes"] == stats["bytes"] <= 64 * KB
    assert stats["high_water"] <= 8 * (4 * KB + 2048) + 64 * KB


def test_one_lease_released_by_many_threads(arena):
    pool = SolverMemory()
    for _ in range(50):
        lease = pool.lease(flat(KB))
        threads = [threading.Thread(target=lease.release) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del lease, threads
    stats = pool.stats()
    assert stats["active"] == 0
    assert stats["bytes"] == (0 if arena is None else KB)


def test_without_the_extension_torch_memory_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "deqdiff_fast._C", None)
    pool = SolverMemory()
    assert pool._arena is None
    assert pool.lease(flat(10))["x"].numel() == 10
    with pytest.raises(MemoryError, match="allocate"):
        pool.lease(flat(1 << 60))


def test_default_memory_is_one_pool(monkeypatch):
    assert default_memory() is default_memory()
    monkeypatch.setattr(module, "_default", None)
    monkeypatch.setenv("DEQDIFF_FAST_POISON", "1")
    assert bool(default_memory().lease(flat(10))["x"].eq(255).all())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own():
    parent = default_memory()
    pid = os.fork()
    if pid == 0:
        fine = default_memory() is not parent and default_memory().lease(flat(10))["x"].numel() == 10
        os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_leases_come_from_the_caching_allocator():
    pool = SolverMemory(poison=True)
    before = torch.cuda.memory_allocated()
    lease = pool.lease(MemoryPlan().add("x", (1 << 20,), torch.float32).add("y", (3,), torch.int32), "cuda")
    assert lease["x"].is_cuda
    assert lease["y"].data_ptr() % 256 == 0
    assert bool(lease["x"].isnan().all())
    assert torch.cuda.memory_allocated() - before >= 4 << 20
    assert pool.stats()["device_bytes"] == lease.nbytes
    lease.release()
    assert pool.stats()["device_bytes"] == 0
    assert pool.stats()["device_high_water"] == lease.nbytes
    assert torch.cuda.memory_allocated() == before
    with pytest.raises(StaleLeaseError):
        lease["x"]
