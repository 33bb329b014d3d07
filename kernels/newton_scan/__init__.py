"""The quasi-Newton scan: linearised predictions, carried exactly through the chain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _dispatch, _workspace
from . import _ops
from ._layout import newton_scan_bytes

__all__ = ["newton_scan", "newton_scan_bytes"]


def newton_scan(
    states: Tensor,
    predictions: Tensor,
    state_coef: Tensor,
    model_coef: Tensor,
    slope: Tensor,
    lo: Tensor,
    hi: Tensor,
    sq_diff: Tensor,
    sq_norm: Tensor,
    z: Tensor | None = None,
    e: Tensor | None = None,
    filled: Tensor | None = None,
    column: int = 0,
    ridge: float = 1e-6,
    floor: float = 1e-5,
    drift: Tensor | None = None,
    *,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One quasi-Newton round without the model call, in place, for the rows lo[b] <= i < hi[b] of every sample b.

    N[i+1] = sum_l state_coef[i,l] N[i-l] + model_coef[i,l] Ê[i-l] + drift[i], with the prediction linearised at the old
    state, Ê[i] = E[i] + J[i] (N[i] - X[i]); then states <- N. J[i] = slope[i] plus a multisecant correction from the
    last H rounds: (dE - c dX) (dX^T dX + ridge)^-1 dX^T on normalised columns. Whatever J is, the fixed point is the
    serial chain. Scan: Lim et al. 2024, arXiv 2309.12252 (DEER); Gonzalez et al. 2024, arXiv 2407.19115 (quasi-DEER).
    Secants: Fang and Saad 2009, doi 10.1002/nla.617.

    Args:
        states, predictions, state_coef, model_coef, lo, hi, drift, backend: as for `ddim_update`.
        slope: (T, 1) for one slope a timestep, or (T, D).
        sq_diff: (T, B); row i receives max(|N[i+1] - X[i+1]|^2, |F[i+1] - X[i+1]|^2) with F the plain step, so that a
            slope that damps too much cannot pass for convergence. sq_norm: (T, B), |N[i+1]|^2.
        z, e: (H + 1, W, B, D), rings of states and predictions; row i lives in slot i % W, this round in `column`
            (the round modulo H + 1). They may be stored narrower than the states: they only shape the correction.
            Without them the old states count as zero: the scan of a linear model.
        filled: (W, B) int32, how many of a row's most recent columns are valid; counted up here.
        ridge: relative to normalised columns, > 0. floor: a step shorter than this, relative to the state, is rounding
            and is left out.
        workspace: (N,) uint8 scratch with which a call on a GPU allocates nothing: at least as many bytes as
            `newton_scan_bytes` says, not shared with calls on other streams. Other backends leave it alone.

    Raises:
        ValueError, BackendUnavailableError: as for `ddim_update`.
    """
    _dispatch.check_scan(states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift)
    _workspace.check(workspace, states.device)
    (rows, batch, size), device = states.shape, states.device
    _dispatch.check_slope(slope, rows - 1, size, device)
    if (z is None) != (e is None) or (z is None) != (filled is None):
        raise ValueError("z, e, filled: expected all three or none of them")
    if z is not None and e is not None and filled is not None:
        if z.dim() != 4 or not 1 <= z.shape[0] <= _dispatch.MAX_HISTORY or z.shape[2:] != (batch, size):
            raise ValueError(
                f"z: expected shape (H + 1, W, {batch}, {size}) with H < {_dispatch.MAX_HISTORY}, got {tuple(z.shape)}"
            )
        if not z.is_floating_point() or z.device != device:
            raise ValueError(f"z: expected a floating-point tensor on {device}, got {z.dtype} on {z.device}")
        if e.shape != z.shape or e.dtype != z.dtype or e.device != device:
            raise ValueError(f"e: expected {z.dtype} {tuple(z.shape)} like z, got {e.dtype} {tuple(e.shape)}")
        if filled.shape != z.shape[1:3] or filled.dtype != torch.int32:
            raise ValueError(f"filled: expected int32 {tuple(z.shape[1:3])}, got {filled.dtype} {tuple(filled.shape)}")
        if not 0 <= column < z.shape[0]:
            raise ValueError(f"column: expected 0 <= column < {z.shape[0]} (the round modulo H + 1), got {column}")
    if not (ridge > 0 and math.isfinite(ridge)) or not (floor >= 0 and math.isfinite(floor)):
        raise ValueError(f"ridge, floor: expected finite numbers, ridge > 0 and floor >= 0, got {ridge}, {floor}")
    args = (states, predictions, state_coef, model_coef, slope, lo, hi, sq_diff, sq_norm, z, e, filled, column, ridge,
            floor, drift, workspace)  # fmt: skip
    if backend == "auto" and _dispatch.dispatched(states):
        _ops.newton_op(*args)
    else:
        _ops.run(backend, *args)
