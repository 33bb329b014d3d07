"""What goes wrong on one of several processes is raised on all of them, and the next solve is right."""

from __future__ import annotations

import pytest
from rank_launch import CheckedFile

CHECKS = CheckedFile("fault_checks.py")


@pytest.mark.parametrize("check", CHECKS.names)
def test_on_all_ranks(check: str) -> None:
    CHECKS.passes(check, 3)
