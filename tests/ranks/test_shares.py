"""Shares, digests and what is refused without any processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.ranks.digests import digest
from deqdiff_fast.ranks.group import _made
from deqdiff_fast.ranks.shares import HEADER, message_bytes, own_arguments, share_of


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
def test_shares_are_even_to_within_a_row_and_leave_nothing_out(size: int) -> None:
    for rows in (0, 1, 2, 9, 33, 100):
        shares = [share_of(rows, size, rank) for rank in range(size)]
        assert [start for start, _ in shares[1:]] == [stop for _, stop in shares[:-1]]
        assert (shares[0][0], shares[-1][1]) == (0, rows)
        counts = [stop - start for start, stop in shares]
        assert max(counts) - min(counts) <= 1
    assert [stop - start for start, stop in (share_of(9, 4, rank) for rank in range(4))] == [3, 2, 2, 2]


def test_bytes_of_a_message() -> None:
    assert message_bytes(9, 4, 12) == HEADER + 40  # three rows of twelve bytes, in words of eight
    assert message_bytes(1, 8, 4 * 64 * 64 * 2) == HEADER + 4 * 64 * 64 * 2


def test_what_has_a_row_for_each_is_cut_and_what_is_marked_is_not() -> None:
    rows, table = torch.arange(12).view(4, 3), torch.arange(4)
    given = {"c": rows, "deep": [rows, {"d": table}], "all": dq.shared(table), "names": ["a", "b", "c", "d"], "k": 4}
    own = own_arguments(given, 4, 1, 3)
    assert torch.equal(own["c"], rows[1:3])
    assert torch.equal(own["deep"][1]["d"], table[1:3])
    assert own["all"] is table
    assert (own["names"], own["k"]) == (["b", "c"], 4)


@dataclass
class Setting:
    value: Any


def test_digests_tell_values_apart() -> None:
    x = torch.randn(3, 4)
    different = [
        x, x.double(), x.view(4, 3), x + 1e-6, [x, x], {"a": x}, {"b": x}, 1, 1.0, True, None, "1", (), Setting(1),
        Setting(2), math.nan, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2),
    ]  # fmt: skip
    assert len({digest(value) for value in different}) == len(different)
    assert digest(x, [1, "a"]) == digest(x.clone(), [1, "a"])
    assert 0 <= digest(x) < 2**63
    code = "from deqdiff_fast.ranks.digests import digest; print(digest({'a': [1, 2.5, None, 'x']}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert int(told.stdout) == digest({"a": [1, 2.5, None, "x"]})


class Work:
    """An exchange that comes to its end just after the first look at it has."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.done = fault, False

    def wait(self, *timeout: Any) -> None:
        if not self.done:
            self.done = True
            raise RuntimeError("Operation timed out!")
        if self.fault:
            raise RuntimeError(self.fault)

    def is_completed(self) -> bool:
        return self.done


def test_an_exchange_made_as_a_look_at_it_ends_is_made() -> None:
    assert _made(Work())
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        _made(Work("Connection closed by peer"))


def test_a_group_without_processes_is_refused() -> None:
    schedule = dq.Schedule.ddim([0.9, 0.5], [1, 0])
    for make in (lambda: dq.sharded(lambda x, t: x), lambda: dq.DEQSampler(lambda x, t: x, schedule, group="world")):
        with pytest.raises(ValueError, match=r"group: expected processes for 'world'.*torchrun"):
            make()
    with pytest.raises(TypeError, match=r"group: expected a torch.distributed ProcessGroup"):
        dq.DEQInverter(lambda x, t: x, schedule, group=3)
    with pytest.raises(TypeError, match="model: expected a callable"):
        dq.sharded(3)  # type: ignore[arg-type]
