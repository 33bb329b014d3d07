"""Fixtures of the planner's tests."""

from __future__ import annotations

import pytest
from planner_cases import Machine

import deqdiff_fast as dq


@pytest.fixture
def machine(mixture, ddim):
    """(machine, sampler) on which calls cost what the function says."""

    def make(cost, steps=50, **options):
        made = Machine(mixture(), cost)
        sampler = dq.DEQSampler(made, ddim(steps), **options)
        sampler.planner.clock = made.clock
        return made, sampler

    return make
