"""What several processes sample together is what one samples alone, with the shares and the bytes of the formulas."""

from __future__ import annotations

import pytest
from rank_launch import CheckedFile

TWO = CheckedFile("equality_checks.py", apart=True)
THREE = CheckedFile("equality_checks.py", "gradients", "inversions", "windows_and_calls_in_pieces")


@pytest.mark.parametrize("check", TWO.names)
def test_on_two_ranks(check: str) -> None:
    TWO.passes(check, 2)


@pytest.mark.parametrize("check", THREE.names)
def test_on_three_ranks(check: str) -> None:
    THREE.passes(check, 3)
