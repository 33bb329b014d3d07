"""A piece of a draft's chain: what an anchor says, and the states that follow it up to the next one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch, _workspace
from . import _ops
from ._layout import draft_scan_bytes

__all__ = ["draft_scan", "draft_scan_bytes"]


def draft_scan(
    states: Tensor,
    predictions: Tensor,
    said: Tensor | None,
    made: Tensor,
    turn: Tensor,
    shares: Tensor,
    state_coef: Tensor,
    model_coef: Tensor,
    slope: Tensor,
    lo: Tensor,
    hi: Tensor,
    sq_diff: Tensor,
    sq_norm: Tensor,
    carry: Tensor,
    z: Tensor,
    rest: Tensor,
    weights: Tensor,
    column: int,
    number: int,
    previous: int,
    start: int,
    stop: int,
    *,
    charting: bool = False,
    last: bool = True,
    drift: Tensor | None = None,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One piece of a pass along the chain, in place: rows max(start, lo[b]) <= i < min(stop, hi[b]) of every sample b.

    N[i+1] = sum_l state_coef[i,l] N[i-l] + model_coef[i,l] Ê[i-l] + drift[i], then states <- N, with

        Ê[i] = E[i] + slope[i] (N[i] - X[i]) + shares[i,0] turn[n-1] + shares[i,1] turn[n]
        turn[n] = said - made[n] + (S - slope) (N - X) at row start, and then made[n] <- said

    n = `number` the anchor of row start, X the old states, S the Jacobian that `draft_secants` has fitted. turn[n] is
    zero for samples that are not active in row start, and in row lo[b]: its state is final, and there the model's own
    prediction stands, even where a draft says something else about the same state. The pieces of a pass go in order,
    each after the draft was asked at the state that the one before has reached; nothing else may use `turn`, `carry`
    and the workspace in between. At X that solves the chain nothing changes, whatever the draft says. Cf. deferred
    correction, and Parareal (Lions, Maday, Turinici 2001).

    charting: make the draft's own chain instead, the first guess: E, X, made and S count as zero, and before lo[b] the
    model's prediction is what was said. sq_diff, sq_norm and z, rest are left alone then.

    Args:
        states, predictions, state_coef, model_coef, lo, hi, drift, backend: as for `ddim_update`; the Triton kernels
            take up to 4 lags.
        said: (B, D), the draft at states[start]; None where no sample is active in that row. Values that are not
            below 1e6, and NaN, are replaced by slope[start] states[start].
        made: (A, B, D). turn: (2, B, D), that of anchor n in n % 2. shares: (T, 2).
        slope: as for `newton_scan`.
        sq_diff: (T, B); row i receives max(|N[i+1] - X[i+1]|^2, |F[i+1] - X[i+1]|^2), F the plain step. sq_norm:
            (T, B), |N[i+1]|^2. The Triton kernels write both for the whole pass in a piece that is `last`.
        carry: (2, L, B, D) float32, or float64 where the states are: F and Ê from piece to piece.
        z, rest, weights, column: as `draft_secants` left them.
        number, previous: of the anchor, and the row of the anchor before it, -1 where there is none.
        workspace: (N,) uint8 of `draft_scan_bytes`; a GPU needs it, for what a piece leaves for the next.

    Raises:
        ValueError, BackendUnavailableError: as for `ddim_update`.
    """
    _dispatch.check_scan(states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift)
    _workspace.check(workspace, states.device)
    (rows, batch, size), device, lags = states.shape, states.device, state_coef.shape[1]
    _dispatch.check_slope(slope, rows - 1, size, device)
    _dispatch.check_anchors(states, made, z, rest, weights, column)
    kinds = (states.dtype,)
    if said is not None:
        _dispatch._expect("said", said, (batch, size), kinds, device)
    _dispatch._expect("turn", turn, (2, batch, size), kinds, device)
    _dispatch._expect("shares", shares, (rows - 1, 2), (torch.float32, torch.float64), device)
    _dispatch._expect("carry", carry, (2, lags, batch, size), (_workspace.wide(states.dtype),), device)
    if not 0 <= number < made.shape[0] or not 0 <= start < stop <= rows - 1 or not -1 <= previous < start:
        raise ValueError(
            f"number, previous, start, stop: expected 0 <= number < {made.shape[0]} and -1 <= previous < start < stop "
            f"<= {rows - 1}, got {number}, {previous}, {start}, {stop}"
        )
    args = (states, predictions, said, made, turn, shares, state_coef, model_coef, slope, lo, hi, sq_diff, sq_norm,
            carry, z, rest, weights, column, number, previous, start, stop, charting, last, drift,
            workspace)  # fmt: skip
    if backend == "auto" and _dispatch.dispatched(states):
        _ops.scan_op(*args)
    else:
        _ops.run(backend, *args)
