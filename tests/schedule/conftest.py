"""Fixtures of the schedules' tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def start() -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
