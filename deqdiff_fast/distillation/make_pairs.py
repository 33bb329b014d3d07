"""Making the pairs that a folder lacks, by one process or as one of many."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import PairsMismatchError
from .pair_folder import MANIFEST, Manifest, PairFolder, write_durably
from .pair_plan import choose_method
from .pair_solver import SERIAL, Method, PairSolver, same_answers
from .shard_file import pack_shard

LEAST_SHARD = 64  # pairs
LOOK_EVERY, PATIENT = 0.2, 3600.0  # seconds, for the manifest that another process is to write

_log = logging.getLogger("deqdiff_fast")


class PairMaker:
    """One process.

    Args:
        solver: makes the pairs.
        path: the folder's.
        rank, world: this process makes every `world`-th shard, from number `rank` on.
    """

    def __init__(self, solver: PairSolver, path: Path, rank: int, world: int) -> None:
        self.solver, self.folder, self.rank, self.world = solver, PairFolder(path), rank, world

    def run(self, count: int, method: str, batch: int | None, channels_last: bool | None, progress: bool) -> None:
        """Make what is missing.

        Raises:
            OSError, DamagedPairsError, PairsMismatchError, TimeoutError: see `Pairs.make`.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        manifest = self._agree(count, method, batch, channels_last)
        self.folder.remove_leftovers(lambda k: self.rank == (0 if k is None else k % self.world))
        mine = range(self.rank, manifest.shards, self.world)
        there = {k: self.folder.pairs_there(manifest, k) for k in mine}
        each = Method.of(manifest.identity).batch
        wanted = {k: -(-manifest.pairs_in(k) // each) * each for k in mine}
        missing = [k for k in mine if there[k] < wanted[k]]
        self._check_room(manifest, sum(wanted[k] for k in missing))
        label = "making pairs" if self.world == 1 else f"making pairs, process {self.rank} of {self.world}"
        with (
            tqdm(
                total=sum(wanted.values()), initial=sum(min(there[k], wanted[k]) for k in mine), desc=label,
                unit="pair", file=sys.stderr, disable=not progress, dynamic_ncols=True,
            ) as bar,
            _one_behind() as write,
        ):  # fmt: skip
            for number in missing:
                tensors = self._shard(manifest, number, there[number], wanted[number], bar)
                write(self.folder.shard_path(number), tensors, {"manifest": manifest.key, "number": str(number)})

    def _shard(self, manifest: Manifest, number: int, there: int, wanted: int, bar: Any) -> dict[str, Tensor]:
        """A shard by batches, always the same ones: a model's rounding depends on what it is asked together.

        there, wanted: how many pairs it has, from when fewer were asked for, and shall have.
        """
        first, method = number * manifest.shard, Method.of(manifest.identity)
        parts = [self.folder.open_shard(manifest, number).tensors] if there else []
        for start in range(first + there, first + wanted, method.batch):
            parts.append(self.solver.solve(range(start, start + method.batch), method))
            bar.update(method.batch)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _agree(self, count: int, method: str, batch: int | None, channels_last: bool | None) -> Manifest:
        """The folder's manifest, written by the first process, which is the one that this call would have written.

        Raises:
            PairsMismatchError: the folder is of something else.
        """
        manifest = self._found()
        if manifest is None:
            chosen = choose_method(self.solver, count, method, batch, channels_last)
            shard = -(-LEAST_SHARD // chosen.batch) * chosen.batch
            manifest = Manifest(
                self.solver.identity(chosen), count, self.solver.shape, shard, self.solver.answers(), self._made_on()
            )
            self.folder.write_manifest(manifest)
            return manifest
        known = Method.of(manifest.identity)
        name, last = known.name if method == "auto" else method, channels_last
        last = name == SERIAL and (known.channels_last if last is None else last)  # rounds have no such format
        self._compare(manifest, Method(name, batch or known.batch, last))
        if count > manifest.count:
            manifest = replace(manifest, count=count)
            if self.rank == 0:
                self.folder.write_manifest(manifest)
        return manifest

    def _found(self) -> Manifest | None:
        """The manifest that is there; the first process does not wait for one."""
        began = time.monotonic()
        while True:
            try:
                return self.folder.read_manifest()
            except FileNotFoundError:
                if self.rank == 0:
                    return None
            if time.monotonic() - began > PATIENT:
                raise TimeoutError(
                    f"{self.folder.path / MANIFEST}: process {self.rank} of {self.world} waited {PATIENT:.0f} s for "
                    "process 0 to write it"
                )
            time.sleep(LOOK_EVERY)

    def _compare(self, manifest: Manifest, given: Method) -> None:
        wanted = self.solver.identity(given)
        differs = [name for name, value in wanted.items() if manifest.identity.get(name) != value]
        if manifest.shape != self.solver.shape:
            differs.append("shape")
        if not differs and not self._same_answers(manifest.answers):
            differs.append("model")
        if differs:
            told = ", ".join(
                f"{name} ({manifest.identity.get(name)}, now {wanted[name]})"
                if name in wanted and len(str(wanted[name])) < 20 else name for name in differs
            )  # fmt: skip
            raise PairsMismatchError(
                f"{self.folder.path}: expected to go on with the pairs there, and they were made with another "
                f"{told}; name another folder, or leave out what is not to be changed",
                tuple(differs),
            )
        now = self._made_on()
        other = [name for name, value in now.items() if manifest.made_on.get(name) != value]
        if other:
            told = ", ".join(f"{name} {manifest.made_on.get(name)}, now {now[name]}" for name in other)
            _log.warning("%s: begun with %s: pairs are the same up to rounding only", self.folder.path, told)

    def _same_answers(self, known: list[float]) -> bool:
        """Whether the model says what it said; its weights, if it has any, are the same."""
        found = self.solver.answers()
        size = max(map(abs, [*known, *found]))
        most = same_answers(self.solver.dtype) * size
        return len(found) == len(known) and all(abs(a - b) <= most for a, b in zip(found, known))

    def _made_on(self) -> dict[str, Any]:
        device = self.solver.device
        if device.type == "cuda":
            return {"torch": str(torch.__version__), "device": torch.cuda.get_device_name(device)}
        return {"torch": str(torch.__version__), "device": device.type, "threads": torch.get_num_threads()}

    def _check_room(self, manifest: Manifest, count: int) -> None:
        """Raises OSError where it is clear beforehand that the disk will be full."""
        if not count:
            return
        kept = self.solver.conditions(range(Method.of(manifest.identity).batch))[2].values()
        each = 8 * math.prod(manifest.shape) + sum(t[0].numel() * t.element_size() for t in kept)
        needed, free = count * each, shutil.disk_usage(self.folder.path).free
        if needed > free:
            reason = (
                f"{count} pairs take {needed / 2**30:.2g} GiB and {free / 2**30:.2g} GiB are free; what is there "
                "stays, and the same call goes on"
            )
            raise OSError(errno.ENOSPC, reason, str(self.folder.path))


def process_of_many() -> tuple[int, int]:
    """(rank, world) as torchrun says, (0, 1) where it did not start this process.

    Raises:
        ValueError: they are no such numbers.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(f"RANK, WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE in the environment, got {rank}, {world}")
    return rank, world


@contextmanager
def _one_behind() -> Iterator[Any]:
    """Writes in a thread of its own while the next shard is made; what it raises, the next call or the end raises."""
    pending: list[Future[None]] = []

    def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if pending:
            pending.pop().result()
        pending.append(pool.submit(lambda: write_durably(path, pack_shard(tensors, metadata))))

    with ThreadPoolExecutor(1) as pool:
        yield write
        if pending:
            pending.pop().result()
