"""Fixtures of the inversions' tests."""

from __future__ import annotations

import pytest
import torch
from descent_cases import Bend

import deqdiff_fast as dq


@pytest.fixture
def images(ddim, noise):
    """(schedule, noise, images): images that the chain makes, so that the noise is known."""

    def make(steps=8, batch=3, eta=0.0, seed=0, model=None, **kwargs):
        schedule, start = ddim(steps, eta=eta), noise(batch, (2, 4, 4), seed)
        draws = torch.Generator().manual_seed(5) if eta else None
        image = dq.DEQSampler(model or Bend(), schedule).serial(start, kwargs or None, draws).sample
        return schedule, start, image

    return make
