"""Solver memory: one slab per solve, planned before the first round and reused by later solves."""

from __future__ import annotations

from .plan import MemoryPlan
from .pool import Lease, SolverMemory, default_memory

__all__ = ["Lease", "MemoryPlan", "SolverMemory", "default_memory"]
