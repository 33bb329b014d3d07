"""Fitting a draft to pairs of predictions: what they are, and by what they differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.draft import Draft
from .prediction_pairs import PairBatch, PairStore

BATCH = {"cpu": 12}  # pairs in a step of the optimizer, by device; small where a row costs what it costs ...
BATCH_ELSEWHERE = 64  # ... and large where few rows leave the device idle
RATE, WEIGHT_DECAY = 2e-3, 1e-3
WARMUP, WARM = 100, 0.1  # steps until the rate is reached, or part of the stage, whichever is over first
JACOBIAN = 0.3  # weight of the differences
SLACK = 1e-3  # mean square, below which a difference is rounding
MOST_NORM = 1.0  # of a gradient


def loss_of(draft: Draft, batch: PairBatch) -> tuple[Tensor, float]:
    """The loss, and what part of the differences the draft misses (root mean square).

    A draft stands in for the model's Jacobian, so besides the predictions the difference of the two of each pair
    counts, relative to its size.
    """
    size = draft.output_size(batch.times).view(-1, *[1] * (batch.inputs.dim() - 1)).to(batch.inputs.dtype)
    off = (draft.predict(batch.inputs, batch.times, batch.pooled) - batch.predictions) / size
    one, other = (batch.predictions / size).chunk(2)
    apart = (one - other).square().flatten(1).mean(1)
    wrong = (off[: len(one)] - off[len(one) :]).square().flatten(1).mean(1)
    missed = (wrong.sum() / apart.sum().clamp_min(1e-12)).sqrt()
    return 2 * off.square().mean() + JACOBIAN * (wrong / (apart + SLACK)).mean(), float(missed.detach())


class Fit:
    """AdamW with a warm-up and a cosine over one stage. What it needs to go on later is in `state`."""

    def __init__(self, draft: Draft, store: PairStore, seed: int, device: torch.device) -> None:
        self.draft, self.store, self.device = draft, store, device
        self.optimizer = torch.optim.AdamW(draft.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.missed = 0, 1.0

    def step(self, done: float) -> None:
        """One step. done: part of the stage that is over, 0 to 1."""
        warm = max((self.steps + 1) / WARMUP, done / WARM)
        rate = min(1.0, warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        self.optimizer.param_groups[0]["lr"] = rate * RATE
        count = BATCH.get(self.device.type, BATCH_ELSEWHERE)
        batch = self.store.draw(count, self.generator, self.device)
        with torch.enable_grad():
            loss, missed = loss_of(self.draft, batch)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.draft.parameters(), MOST_NORM)
            self.optimizer.step()
        self.steps += 1
        self.missed += (missed - self.missed) / min(self.steps, 50)

    def run(self, progress: Callable[[], float], after_step: Callable[[Fit], object]) -> None:
        """Steps until `progress`, the part of the stage that is over, is 1."""
        self.draft.train().requires_grad_(True)
        while (done := progress()) < 1:
            self.step(done)
            after_step(self)
        self.draft.eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "draft": self.draft.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps,
            "generator": self.generator.get_state(), "missed": self.missed,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.draft.load_state_dict(state["draft"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.steps, self.missed = state["steps"], state["missed"]
