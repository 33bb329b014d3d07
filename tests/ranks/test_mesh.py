"""A mesh of two dimensions: timesteps over the one, a model that is itself spread out over the other."""

from __future__ import annotations

import pytest
from rank_launch import CheckedFile

CHECKS = CheckedFile("mesh_checks.py")


@pytest.mark.parametrize("check", CHECKS.names)
def test_on_four_ranks(check: str) -> None:
    CHECKS.passes(check, 4)
