"""What several processes sample that hold a share of the states each is what one samples alone."""

from __future__ import annotations

import pytest
from rank_launch import CheckedFile

CHECKS = CheckedFile("shared_states_checks.py")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("check", CHECKS.names)
def test_on_all_ranks(check: str, size: int) -> None:
    CHECKS.passes(check, size)
