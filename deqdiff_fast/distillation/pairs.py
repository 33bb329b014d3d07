"""`Pairs`: noises and the samples that a model makes of them, as a data set on disk."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._types import Model
from ..engine import arguments
from ..schedule import Schedule
from .make_pairs import PairMaker, process_of_many
from .pair_folder import PairFolder
from .pair_solver import CONDITION, ROUNDS, SERIAL, Conditions, PairSolver
from .shard_file import ShardFile
from .teacher import inputs_like

MOST_OPEN = 4096  # shards that stay mapped

_log = logging.getLogger("deqdiff_fast")


class Pairs(Dataset[dict[str, Any]]):
    """Pairs of a noise and the sample that a model makes of it, for training one-step students.

    A `torch.utils.data.Dataset` over the folder that `Pairs.make` or `deqdiff-fast pairs` has filled; files are mapped
    into memory, and each is compared with its checksum when it is first read. Can be pickled, for workers of a
    `DataLoader`; give that `collate_fn=Pairs.collate`.

    `pairs[k]` is a dict: "noise", (C, H, W) float32, the state that `DEQSampler.sample` starts from; "sample",
    (C, H, W) float32; "condition", the row of the one tensor in `model_kwargs` that has one for each sample, a dict of
    such rows by their names where there are several, or None.

    Args:
        folder: with the pairs.
        partial: whether to take a folder that is not finished, or in which some shards are damaged, and what is whole
            of it, in the order of its numbers.
        check: whether to compare shards with their checksums.

    Raises:
        FileNotFoundError: there is no manifest, or, unless `partial`, some pairs are missing.
        DamagedPairsError: the manifest is damaged; on reading, a shard is.
    """

    def __init__(self, folder: str | Path, *, partial: bool = False, check: bool = True) -> None:
        self.folder, self.check = Path(folder), check
        self._files = PairFolder(self.folder)
        self.manifest = self._files.read_manifest()
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        every = range(self.manifest.shards)
        missing = [k for k in every if not self._files.is_finished(self.manifest, k)]
        if missing and not partial:
            raise FileNotFoundError(
                f"{self._files.shard_path(missing[0])}: {len(missing)} of {len(every)} shards are missing or not "
                "finished; make the same pairs again to go on, or pass partial=True for what is there"
            )
        self._shards = sorted(set(every) - set(missing))
        if partial:
            damaged = set(self.verify())
            self._shards = [k for k in self._shards if self._files.shard_path(k) not in damaged]
            if damaged:
                _log.warning("%s: %d damaged shards are left out", self.folder, len(damaged))
        self._length = sum(map(self.manifest.pairs_in, self._shards))

    @classmethod
    def make(
        cls,
        model: Model,
        schedule: Schedule,
        shape: tuple[int, ...],
        count: int,
        folder: str | Path,
        *,
        model_kwargs: Conditions = None,
        seed: int = 0,
        method: str = "auto",
        batch: int | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Pairs:
        """Make pairs, or those that a folder lacks.

        Pair k is the same whenever, by however many processes and after however many interruptions it is made: its
        noise comes from a generator of its own, seeded with 1,000,003 seed + k, and it is always made together with the
        same others, since a model's rounding depends on the size of a batch. Files are written under another name and
        renamed when they are whole and on the disk, so that a process may be killed at any moment; the same call then
        goes on. A larger `count` goes on too, a smaller one changes nothing. Under torchrun every process makes its
        share of the files, without talking to the others; the first one writes the manifest.

        Args:
            model, schedule: as for `DEQSampler`.
            shape: (C, ...), of one sample.
            count: how many pairs there are to be.
            folder: is created.
            model_kwargs: conditions: keyword arguments with n rows, of which pair k has row k mod n, or a function of
                pairs' numbers, (b,) int64, that returns those of b samples, always the same ones. A guided model's own
                conditions count as well. Mark with `shared` what belongs to no sample.
            seed: of all noise.
            method: "serial": the plain chain, exact. "rounds": a `DEQSampler`, to `tol`, which takes fewer evaluations
                on long chains. "auto": what makes more pairs a second here, by timing, when the folder is begun.
            batch: how many are made at a time; None for the best number, by timing, when the folder is begun.
            device: of the model's inputs; None for that of its first parameter.
            progress: whether to show a bar.
            **settings: `tol`, `draft` and `spectrum` of a `DEQSampler`, for rounds; `channels_last`, whether the plain
                chain gives the model (B, C, H, W) in `torch.channels_last`: by default, where `batch` is None, if that
                is faster, by timing, and the model says the same.

        Returns:
            The pairs; as one of many processes, those that are there by then.

        Raises:
            TypeError, ValueError: a bad argument, by name. PairsMismatchError: the folder was begun with another
                model, schedule or setting. DamagedPairsError: its manifest is damaged; damaged shards are made anew.
            NonFiniteError, ModelOutputError: the model's fault.
            OSError: a file cannot be written; `errno.ENOSPC` where the disk is full. What was finished is of use.
        """
        _check(model, schedule, shape, count, method, batch, settings)
        channels_last = settings.pop("channels_last", None)
        like = inputs_like(model, device)
        solver = PairSolver(model, schedule, tuple(shape), model_kwargs, like, seed, **settings)
        rank, world = process_of_many()
        PairMaker(solver, Path(folder), rank, world).run(count, method, batch, channels_last, progress)
        return cls(folder, partial=world > 1)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: int) -> dict[str, Any]:
        """Raises IndexError; DamagedPairsError and FileNotFoundError, which name a shard."""
        if not -self._length <= k < self._length:
            raise IndexError(f"pair {k} of {self._length}")
        place, row = divmod(k % self._length, self.manifest.shard)
        tensors = self._shard(self._shards[place]).tensors
        rows = {name: value[row].clone() for name, value in tensors.items()}
        own = {name.removeprefix(CONDITION): v for name, v in rows.items() if name.startswith(CONDITION)}
        condition: Any = next(iter(own.values())) if len(own) == 1 else own or None
        return {"noise": rows["noise"], "sample": rows["sample"], "condition": condition}

    def _shard(self, number: int) -> ShardFile:
        found = self._open.get(number)
        if found is None:
            found = self._open[number] = self._files.open_shard(self.manifest, number, self.check)
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return found

    def verify(self) -> list[Path]:
        """The shards that are damaged, of those that are there. Reads all of them."""
        return [self._files.shard_path(k) for k in self._shards if not self._files.pairs_there(self.manifest, k)]

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        """Pairs to a batch, as a `DataLoader` wants it; a condition that is None stays None."""
        first = items[0]["condition"]
        if isinstance(first, Tensor):
            condition: Any = torch.stack([item["condition"] for item in items])
        else:
            condition = first and {name: torch.stack([item["condition"][name] for item in items]) for name in first}
        stacked = {name: torch.stack([item[name] for item in items]) for name in ("noise", "sample")}
        return {**stacked, "condition": condition}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def __repr__(self) -> str:
        return f"Pairs({str(self.folder)!r}): {len(self)} pairs of shape {self.manifest.shape}"


def _check(model: Any, schedule: Any, shape: Any, count: Any, method: Any, batch: Any, settings: Any) -> None:
    """Raises TypeError or ValueError, naming the argument."""
    arguments.check_model(model)
    arguments.check_schedule(schedule)
    arguments.check_shape(shape)
    if arguments.count("count", count) is None:
        raise ValueError("count: expected an int >= 1, got None")
    arguments.count("batch", batch)
    arguments.choice("method", method, ("auto", SERIAL, ROUNDS))
    last = arguments.choice("channels_last", settings.get("channels_last"), (None, False, True))
    if last and (method == ROUNDS or len(shape) != 3):
        raise ValueError(f"channels_last: expected a shape (C, H, W) and no rounds, got {tuple(shape)}, {method!r}")
    unknown = sorted(set(settings) - {"tol", "draft", "spectrum", "channels_last"})
    if unknown:
        raise TypeError(f"Pairs.make() got an unexpected keyword argument {unknown[0]!r}")
