"""Pipelines of diffusers, and a command, on several processes."""

from __future__ import annotations

import pytest
from rank_launch import CheckedFile

CHECKS = CheckedFile("pipeline_checks.py")


@pytest.mark.parametrize("check", CHECKS.names)
def test_on_all_ranks(check: str) -> None:
    CHECKS.passes(check, 2)
