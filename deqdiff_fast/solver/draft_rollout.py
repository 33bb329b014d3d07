"""A pass of a draft along the chain: the draft is asked at an anchor, and the states up to the next one follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import draft_scan
from ..kernels.draft_scan.reference import WILD
from ..loop.base import Chain
from .anchors import Piece


@dataclass
class DraftedMemory:
    """A: the number of anchors. Tensors as for `kernels.draft_secants` and `kernels.draft_scan`, but `now`."""

    z: Tensor  # (H + 1, A, B, D)
    rest: Tensor  # (H + 1, A, B, D)
    filled: Tensor  # (A, B) int32
    weights: Tensor  # (A, B, H, H)
    made: Tensor  # (A, B, D), if `known`
    turn: Tensor  # (2, B, D)
    at: Tensor  # (A,) int64
    shares: Tensor  # (T, 2)
    between: Tensor  # (T, A) what every timestep takes from the anchors on both sides of it
    carry: Tensor  # (2, L, B, D)
    now: Tensor  # (T, B, D) what the draft foretells
    known: bool = False


def sweep(
    chain: Chain, memory: DraftedMemory, pieces: list[Piece], lo: Tensor, hi: Tensor, first: int, column: int,
    charting: bool,
) -> None:  # fmt: skip
    """Pieces that follow one another, for rows lo[b] <= i < hi[b]; first: no row before it is solved for."""
    assert chain.draft is not None
    before = -1
    for k, (number, start, stop) in enumerate(pieces):
        said = chain.draft.row(start, chain.states[start]) if start >= first else None
        draft_scan(
            chain.states, chain.predictions, said, memory.made, memory.turn, memory.shares, chain.state_coef,
            chain.model_coef, chain.slope, lo, hi, chain.sq_diff, chain.sq_norm, memory.carry, memory.z, memory.rest,
            memory.weights, column, number, before, start, stop, charting=charting, last=k == len(pieces) - 1,
            drift=chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
        before = start


def heard(said: Tensor, slope: Tensor, states: Tensor) -> Tensor:
    """What a draft says, and where that cannot be used what is right for unit Gaussian data."""
    return torch.where(said.abs() < WILD, said, slope * states)
