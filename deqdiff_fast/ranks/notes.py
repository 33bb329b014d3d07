"""What ranks leave for each other in the group's store where an exchange cannot be made any more."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from torch import distributed as dist

PATIENCE = 10.0  # seconds that a rank waits for the others to say that they are still there
_PRESENT = "is waiting"


class Notes:
    """Of one group. Where its store cannot be reached, nobody has left any.

    Args:
        rank, size: of the process in the group.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.rank, self.size, self._store = rank, size, None
        with suppress(Exception):  # torch has no public way to it
            store: Any = dist.distributed_c10d
            self._store = store.PrefixStore(f"deqdiff_fast/{group.group_name}", store._get_default_store())

    def leave(self, reason: str) -> None:
        """Say that this rank takes part in no exchange any more, and why."""
        with suppress(Exception):
            if self._store is not None:
                self._store.set(f"{self.rank}", reason)
                self._store.set("any", reason)

    def any(self) -> bool:
        """Whether a rank has left a note."""
        with suppress(Exception):
            return self._store is not None and bool(self._store.check(["any"]))
        return False

    def collect(self) -> tuple[dict[int, str], list[int]]:
        """Say that this rank is there, and wait until all but one are known of, but not for long.

        Returns:
            The reasons of those that have left by themselves, and the ranks of which nothing is known.
        """
        self.leave(_PRESENT)
        until = time.monotonic() + (PATIENCE if self._store is not None else 0.0)
        while True:
            known = self._read()
            left = {rank: reason for rank, reason in known.items() if reason != _PRESENT}
            missing = [rank for rank in range(self.size) if rank not in known]
            if left or len(missing) <= 1 or time.monotonic() > until:
                return left, missing
            time.sleep(0.02)

    def _read(self) -> dict[int, str]:
        found = {self.rank: _PRESENT}
        with suppress(Exception):
            for rank in range(self.size):
                if self._store is not None and self._store.check([f"{rank}"]):
                    found[rank] = self._store.get(f"{rank}").decode()
        return found
