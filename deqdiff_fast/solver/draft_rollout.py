"""A pass of a draft along the chain: the draft is asked at an anchor, and the states up to the next one follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import draft_scan
from ..kernels.draft_scan import MAX_OUTPUT
from ..loop.base import Chain
from .anchors import Segment


@dataclass
class DraftMemory:
    """A: the number of anchors. Tensors as for `kernels.draft_secants` and `kernels.draft_scan`, the last one aside."""

    z: Tensor  # (H + 1, A, B, D)
    remainder: Tensor  # (H + 1, A, B, D)
    filled: Tensor  # (A, B) int32
    secant_weights: Tensor  # (A, B, H, H)
    draft_cache: Tensor  # (A, B, D) what the draft predicts at the states as they are, if `cache_valid`
    correction: Tensor  # (2, B, D)
    anchor_rows: Tensor  # (A,) int64
    weights: Tensor  # (T, 2)
    interpolation: Tensor  # (T, A) what every timestep takes from the anchors on both sides of it
    carry: Tensor  # (2, L, B, D)
    predictions: Tensor  # (T, B, D) what the draft predicts at every timestep
    cache_valid: bool = False


def make_pass(
    chain: Chain, memory: DraftMemory, segments: list[Segment], lo: Tensor, hi: Tensor, first: int, column: int,
    rollout: bool,
) -> None:  # fmt: skip
    """Segments that follow one another, for rows lo[b] <= i < hi[b].

    first: no row before it is solved for. column: of the rings. rollout: the chain of the draft alone.
    """
    assert chain.draft is not None
    before = -1
    for k, (number, start, stop) in enumerate(segments):
        draft_output = chain.draft.row(start, chain.states[start]) if start >= first else None
        draft_scan(
            chain.states, chain.predictions, draft_output, memory.draft_cache, memory.correction, memory.weights,
            chain.state_coef, chain.model_coef, chain.slope, lo, hi, chain.sq_diff, chain.sq_norm, memory.carry,
            memory.z, memory.remainder, memory.secant_weights, column, number, before, start, stop, rollout=rollout,
            last=k == len(segments) - 1, drift=chain.drift, workspace=chain.scratch, backend=chain.backend,
        )  # fmt: skip
        before = start


def sanitized(draft_output: Tensor, slope: Tensor, states: Tensor) -> Tensor:
    """What a draft predicts, and where that cannot be used what is right for unit Gaussian data."""
    return torch.where(draft_output.abs() < MAX_OUTPUT, draft_output, slope * states)
