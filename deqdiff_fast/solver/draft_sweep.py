"""A pass of a draft along the chain: what the anchors say, and the states that follow, piece after piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import newton_scan
from .anchors import Piece
from .base import Chain
from .secants import Secants

WILD = 1e6  # what a draft says beyond this, or NaN, is not believed


@dataclass
class DraftedMemory:
    """A: the number of anchors."""

    z: Tensor  # (H + 1, A, B, D) states at which the model was called, a ring over rounds
    rest: Tensor  # (H + 1, A, B, D) what it said there beyond the draft
    filled: Tensor  # (A, B) int32: how many of the last rounds can be used
    made: Tensor  # (A, B, D) what the draft says at the states, if `known`
    turn: Tensor  # (A, B, D) how much further the predictions are along the new chain, beyond the slope
    shares: Tensor  # (T, A) what every timestep takes from that, if `shared`
    now: Tensor  # (T, B, D) predictions along the new chain, without the slope where they are still to be found
    plain: Tensor  # (T + 1, B, D) the plain step; then the old states
    sq_diff: Tensor  # (T, B) of no use
    known: bool = False
    shared: bool = False
    rounds: int = 0


class Sweep:
    """Rows first <= i < last, lo[b] <= i < hi[b] of sample b; lo, hi: (B,). The pieces go in order."""

    def __init__(self, chain: Chain, memory: DraftedMemory, lo: Tensor, hi: Tensor, first: int, last: int) -> None:
        self.chain, self.memory, self.lo, self.hi, self.first, self.last = chain, memory, lo, hi, first, last
        step = torch.arange(chain.num_steps, device=lo.device)[:, None]
        self.open = (step >= lo)[..., None]  # (T, B, 1)
        self.tilt = chain.slope[:, None] * self.open  # predictions before lo are what they are

    def say(self, row: int) -> Tensor:
        """(B, D): what the draft says at the state of that row."""
        assert self.chain.draft is not None
        state = self.chain.states[row]
        return heard(self.chain.draft.row(row, state), self.chain.slope[row], state)

    def chart(self, number: int, row: int) -> None:
        """The prediction at an anchor, beyond the slope: the draft's, or the model's where that is known."""
        chain, memory = self.chain, self.memory
        said = chain.predictions[row]
        if row >= self.first:
            memory.made[number].copy_(self.say(row))
            active = (self.lo <= row) & (row < self.hi)
            said = torch.where(active[:, None], memory.made[number], said)
        torch.addcmul(said, chain.slope[row], chain.states[row], value=-1, out=memory.turn[number])

    def turn(self, number: int, row: int, secants: Secants, active: Tensor) -> None:
        """How much further the prediction is at the new state of an anchor, of the samples active: (B,) there."""
        chain, memory = self.chain, self.memory
        said, dx = self.say(row), chain.states[row] - memory.plain[row]
        change = secants.add(number, dx, said - memory.made[number]).addcmul_(chain.slope[row], dx, value=-1)
        memory.turn[number].copy_(change.masked_fill_(~active[:, None], 0))
        memory.made[number].copy_(said)

    def advance(self, piece: Piece) -> None:
        """The states that follow the rows of a piece, from what its anchor and the one before say."""
        chain, memory = self.chain, self.memory
        number, start, stop = piece.number, max(piece.start, self.first), min(piece.stop, self.last)
        if start >= stop:
            return
        now = memory.now[start:stop]
        for near in range(max(number - 1, 0), number + 1):
            now.addcmul_(memory.shares[start:stop, near, None, None], memory.turn[near])
        newton_scan(
            chain.states, memory.now, chain.state_coef, chain.model_coef, chain.slope, self.lo.clamp(start, stop),
            self.hi.clamp(start, stop), memory.sq_diff, chain.sq_norm, drift=chain.drift, workspace=chain.scratch,
            backend=chain.backend,
        )  # fmt: skip
        if chain.state_coef.shape[1] > 1:  # later steps use these predictions again, as they are
            now.addcmul_(self.tilt[start:stop], chain.states[start:stop])


def heard(said: Tensor, slope: Tensor, states: Tensor) -> Tensor:
    """What a draft says, and where that cannot be used what is right for unit Gaussian data."""
    return torch.where(said.abs() < WILD, said, slope * states)
