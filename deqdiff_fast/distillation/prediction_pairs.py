"""What a draft is fitted to: pairs of inputs of the same time, with what the model said to both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.draft_conditions import Pooled
from ..model.draft_levels import DraftLevels, interpolate
from ..model.recording import Recording

MOST_BYTES = 2**29  # of inputs and predictions
LEAST_PAIRS = 64
NEAR = 1e-5  # relative distance of inputs that are one and the same
CLEANEST, SAMPLES = 0.1, 16  # part of the recorded rows, and how many of them, that show what samples are like


class PairBatch(NamedTuple):
    """inputs, predictions: (2 n, *shape); times: (2 n,); row k and row n + k are a pair."""

    inputs: Tensor
    times: Tensor
    predictions: Tensor
    pooled: Pooled


class PairStore:
    """Rows on the host, and pairs of them.

    Args:
        pooled: the conditions that rows refer to by their number.
    """

    def __init__(self, pooled: Pooled) -> None:
        self.pooled = {name: value.cpu() for name, value in pooled.items()}
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.pairs = torch.empty(0, 2, dtype=torch.int64)
        self.rows = 0

    def add(self, inputs: Tensor, times: Tensor, predictions: Tensor, condition: Tensor) -> int:
        """Rows, (n, *shape), (n,), (n, *shape) and (n,); returns the number of the first."""
        first = self.rows
        x, y = inputs.detach().float().cpu(), predictions.detach().float().cpu().view(inputs.shape)
        self._parts.append((x, times.detach().cpu().double(), y, condition.cpu()))
        self.rows += len(inputs)
        return first

    def pair(self, one: Tensor, other: Tensor) -> None:
        """Rows that belong together, (n,) numbers each."""
        self.pairs = torch.cat([self.pairs, torch.stack([one.cpu(), other.cpu()], 1)])

    def merged(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All rows."""
        if len(self._parts) > 1:
            self._parts = [tuple(torch.cat(parts) for parts in zip(*self._parts))]  # type: ignore[list-item]
        return self._parts[0]

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> PairBatch:
        """`count` of the pairs at random, on the device."""
        x, t, y, condition = self.merged()
        at = self.pairs[torch.randint(len(self.pairs), (count,), generator=generator)].T.flatten()
        pooled = {name: value[condition[at]].to(device) for name, value in self.pooled.items()}
        return PairBatch(x[at].to(device), t[at].to(device), y[at].to(device), pooled)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rows": list(self.merged()), "pairs": self.pairs, "pooled": self.pooled}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> PairStore:
        """What `state` gave."""
        store = cls(state["pooled"])
        store.add(*state["rows"])
        store.pairs = state["pairs"]
        return store


def pairs_of(recording: Recording, levels: DraftLevels, shape: tuple[int, ...]) -> tuple[PairStore, Tensor]:
    """The pairs in what solves have asked, and clean samples, (n, *shape), as predicted at the least noise.

    The iterates of a state, round after round, are the inputs of the same time that lie nearest to each other.

    Raises:
        ValueError: there are too few, or they are not of samples of that shape.
    """
    x, t, y, pooled = recording.tensors()
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"recording: expected samples of shape {shape}, got {tuple(x.shape[1:])}")
    store = PairStore(pooled)
    store.add(x, t, y, torch.arange(len(x)))
    for time in torch.tensor(sorted(set(t.tolist())), dtype=t.dtype):
        rows = (t == time).nonzero()[:, 0]
        if len(rows) < 2:
            continue
        flat = x[rows].flatten(1)
        apart = torch.cdist(flat, flat)
        apart.masked_fill_(apart <= NEAR * flat.norm(dim=1)[:, None] + 1e-12, torch.inf)
        near, other = apart.min(1)
        found = near.isfinite()
        store.pair(rows[found], rows[other[found]])
    if len(store.pairs) < LEAST_PAIRS:
        raise ValueError(
            f"recording: expected at least {LEAST_PAIRS} pairs of predictions at the same timestep, got "
            f"{len(store.pairs)} among {len(x)} rows; record more solves in rounds"
        )
    return store, _clean(x, t, y, levels)


def _clean(x: Tensor, t: Tensor, y: Tensor, levels: DraftLevels) -> Tensor:
    """The clean samples that the rows of least noise predict."""
    log_snr, norm, clean, noise = (interpolate(levels.times, table, t) for table in levels[1:])
    count = min(len(t), max(SAMPLES, int(CLEANEST * len(t))))
    at = log_snr.topk(count).indices
    a, b = log_snr[at].sigmoid().sqrt(), (-log_snr[at]).sigmoid().sqrt()
    share = noise[at] * a - clean[at] * b
    spread = (slice(None), *[None] * (x.dim() - 1))
    return ((noise[at] * norm[at] / share)[spread] * x[at] - (b / share)[spread] * y[at]).float()
