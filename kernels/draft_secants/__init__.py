"""What a round with a draft remembers: states, what the model said there beyond the draft, and the secants' fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _dispatch, _workspace
from . import _ops
from ._layout import draft_secants_bytes

__all__ = ["draft_secants", "draft_secants_bytes"]


def draft_secants(
    states: Tensor,
    predictions: Tensor,
    made: Tensor,
    at: Tensor,
    lo: Tensor,
    hi: Tensor,
    z: Tensor,
    rest: Tensor,
    filled: Tensor,
    weights: Tensor,
    column: int,
    ridge: float = 1e-6,
    floor: float = 1e-5,
    *,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Before a pass of `draft_scan`, in place, for the anchors n of every sample b with lo[b] <= at[n] < hi[b]:

        z[column, n] <- X, rest[column, n] <- E - made[n], weights[n] <- Z (Z dZ^T dZ Z + ridge)^-1 Z

    with X, E the state and prediction of row at[n], dZ the differences z[column - k, n] - X of the last filled[n]
    rounds and Z the inverse lengths of those worth keeping; filled[n] counts up. The Jacobian of what the model says
    beyond the draft is then about dR weights dZ^T, with dR the differences of `rest` (Fang and Saad 2009, doi
    10.1002/nla.617).

    Args:
        states, predictions, lo, hi, backend: as for `ddim_update`.
        made: (A, B, D), what the draft says at X. at: (A,) int64, rows of the chain, ascending.
        z, rest: (H + 1, A, B, D), rings over rounds, in the dtype of the states; this round goes to `column` (the round
            modulo H + 1). 0 <= H <= 7.
        filled: (A, B) int32, how many of the most recent columns are valid.
        weights: (A, B, H, H) float64; a column that is not to be read has zero on the diagonal.
        ridge, floor: as for `newton_scan`.
        workspace: as for `newton_scan`, of `draft_secants_bytes`.

    Raises:
        ValueError, BackendUnavailableError: as for `ddim_update`.
    """
    _dispatch.check_states(states, predictions, lo, hi)
    _workspace.check(workspace, states.device)
    batch, device, count = states.shape[1], states.device, made.shape[0]
    _dispatch.check_anchors(states, made, z, rest, weights, column)
    _dispatch._expect("at", at, (count,), (torch.int64,), device)
    _dispatch._expect("filled", filled, (count, batch), (torch.int32,), device)
    if not (ridge > 0 and math.isfinite(ridge)) or not (floor >= 0 and math.isfinite(floor)):
        raise ValueError(f"ridge, floor: expected finite numbers, ridge > 0 and floor >= 0, got {ridge}, {floor}")
    args = (states, predictions, made, at, lo, hi, z, rest, filled, weights, column, ridge, floor, workspace)
    if backend == "auto" and _dispatch.dispatched(states):
        _ops.secants_op(*args)
    else:
        _ops.run(backend, *args)
