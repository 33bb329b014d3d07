"""A process that leaves a solve, hangs or dies: the others say which, and nobody waits for longer than the timeout."""

from __future__ import annotations

import pytest
from rank_launch import CheckedFile

CHECKS = CheckedFile("lost_checks.py")


@pytest.mark.parametrize("check", CHECKS.names)
def test_on_all_ranks(check: str) -> None:
    CHECKS.passes(check, 3, gone=[2] if "dies" in check else [])
