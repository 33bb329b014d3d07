"""Solver memory: planning, leases, reuse, budget, poison; with and without the C++ extension."""

from __future__ import annotations

import gc

import pytest
import torch

from deqdiff_fast.errors import StaleLeaseError
from deqdiff_fast.memory import MemoryPlan, SolverMemory
from deqdiff_fast.memory import pool as module

KB = 1 << 10


def flat(nbytes: int) -> MemoryPlan:
    return MemoryPlan().add("x", (nbytes,), torch.uint8)


def test_layout_is_aligned_disjoint_and_in_order(arena):
    plan = MemoryPlan().add("a", (3, 5), torch.float32).add("b", (), torch.float64).add("none", (0, 7), torch.int32)
    plan.add("c", (257,), torch.bfloat16)
    offsets, total = plan.layout()
    assert offsets == {"a": 0, "b": 256, "none": 512, "c": 512}
    assert total == 512 + 768
    assert len(plan) == 4
    assert "a" in plan


def test_plan_refuses_what_it_cannot_name_or_size(arena):
    plan = MemoryPlan().add("a", (1,), torch.float32)
    with pytest.raises(ValueError, match="'a' is already in the plan"):
        plan.add("a", (2,), torch.float32)
    with pytest.raises(ValueError, match="sizes >= 0"):
        plan.add("b", (2, -1), torch.float32)
    with pytest.raises(ValueError, match="byte_budget"):
        SolverMemory(-1)
    with pytest.raises(OverflowError, match="'b' does not fit the address space"):
        plan.add("b", (1 << 63,), torch.uint8).layout()


def test_an_arena_refuses_sizes_that_no_memory_has(reusing):
    arena = reusing(0)
    before = arena.stats()
    for size in (2**64 - 1, 2**64 - 255, 2**64 - 256, 2**63, 2**62 + 1):
        with pytest.raises(MemoryError):
            arena.lease(size)
    assert arena.stats() == before


def test_tensors_have_their_shape_and_do_not_overlap(arena):
    entries = {
        "states": ((4, 2, 33), torch.float32),
        "gram": ((3, 2, 5, 5), torch.float64),
        "filled": ((3, 2), torch.int32),
        "half": ((7,), torch.bfloat16),
        "scalar": ((), torch.float64),
        "empty": ((0, 3), torch.float32),
    }
    plan = MemoryPlan()
    for name, (shape, dtype) in entries.items():
        plan.add(name, shape, dtype)
    lease = SolverMemory().lease(plan)
    for value, name in enumerate(entries):
        lease[name].fill_(value)
    for value, (name, (shape, dtype)) in enumerate(entries.items()):
        tensor = lease[name]
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 256 == 0
        assert bool((tensor == value).all())
    with pytest.raises(KeyError, match="'nothing' is not in the plan; it has 'states'"):
        lease["nothing"]


def test_an_empty_plan_can_be_leased(arena):
    with SolverMemory().lease(MemoryPlan()) as lease:
        assert "x" not in lease


def test_use_after_release_raises(arena):
    pool = SolverMemory()
    with pool.lease(flat(100)) as lease:
        assert not lease.released
        lease["x"].zero_()
    assert lease.released
    with pytest.raises(StaleLeaseError, match=rf"generation {lease.generation}\) was released; take a new one"):
        lease["x"]
    lease.release()
    assert pool.stats()["active"] == 0


def test_a_view_taken_before_release_stays_valid_and_unshared(arena):
    pool = SolverMemory()
    first = pool.lease(flat(64 * KB))
    view = first["x"][100:200]
    view.fill_(7)
    first.release()
    del first
    gc.collect()
    second = pool.lease(flat(64 * KB))
    second["x"].fill_(9)
    assert bool((view == 7).all())
    assert pool.stats()["reuses"] == 0
    address = view.data_ptr() - 100
    del view
    gc.collect()
    third = pool.lease(flat(64 * KB))
    third["x"].fill_(5)
    assert bool((second["x"] == 9).all())
    assert len({second.generation, third.generation}) == 2
    if arena is not None:  # which slabs are used again is torch's to say otherwise
        assert third["x"].data_ptr() == address
        assert pool.stats()["reuses"] == 1


def test_reuse_needs_a_fitting_slab(reusing):
    pool = SolverMemory()
    pool.lease(flat(64 * KB)).release()
    pool.lease(flat(64 * KB + 1)).release()  # too large for the first
    assert pool.stats()["reuses"] == 0
    pool.lease(flat(40 * KB)).release()  # takes the smaller one
    assert pool.stats()["reuses"] == 1
    pool.lease(flat(8 * KB)).release()  # would waste more than half of either
    stats = pool.stats()
    assert stats["reuses"] == 1
    assert stats["leases"] == 4
    assert stats["bytes"] == stats["idle_bytes"] == stats["high_water"] == (64 + 64 + 8) * KB + 256
    pool.trim()
    assert pool.stats()["bytes"] == 0
    assert pool.stats()["high_water"] == (64 + 64 + 8) * KB + 256


def test_idle_memory_above_the_budget_is_freed_oldest_first(reusing):
    pool = SolverMemory(byte_budget=100 * KB)
    leases = [pool.lease(flat(size * KB)) for size in (10, 40, 80)]
    assert pool.stats()["bytes"] == 130 * KB  # leases themselves are not limited
    for lease in leases[:2]:
        lease.release()
    assert pool.stats()["idle_bytes"] == 50 * KB
    leases[2].release()
    assert pool.stats()["idle_bytes"] == 80 * KB  # 10 went first, then 40
    SolverMemory(byte_budget=0).lease(flat(10)).release()
    none = SolverMemory(byte_budget=0)
    none.lease(flat(10)).release()
    assert none.stats()["bytes"] == 0


def test_torch_memory_is_counted_and_not_kept(monkeypatch):
    monkeypatch.setattr(module, "_arena_class", lambda: None)
    pool = SolverMemory()
    first, second = pool.lease(flat(64 * KB)), pool.lease(flat(KB + 1))
    counted = {"high_water": 65 * KB + 256, "leases": 2, "reuses": 0, "idle_bytes": 0}
    assert (counted | {"bytes": 65 * KB + 256, "active": 2}).items() <= pool.stats().items()
    first.release()
    first.release()
    assert (counted | {"bytes": KB + 256, "active": 1}).items() <= pool.stats().items()
    second.release()
    pool.trim()
    assert (counted | {"bytes": 0, "active": 0}).items() <= pool.stats().items()


def test_both_memories_have_the_same_counters(monkeypatch, reusing):
    with_arena = SolverMemory().stats()
    monkeypatch.setattr(module, "_arena_class", lambda: None)
    assert SolverMemory().stats() == with_arena


def test_poison_fills_new_and_released_memory_with_nan(arena):
    pool = SolverMemory(poison=True)
    plan = MemoryPlan().add("x", (1000,), torch.float32).add("y", (10,), torch.bfloat16)
    lease = pool.lease(plan)
    assert bool(lease["x"].isnan().all())
    assert bool(lease["y"].isnan().all())
    view = lease["x"]
    view.zero_()
    lease.release()
    assert bool(view.isnan().all())
    del view
    pool.set_poison(False)
    lease = pool.lease(plan)
    lease["x"].zero_()
    view = lease["x"]
    lease.release()
    assert bool((view == 0).all())
