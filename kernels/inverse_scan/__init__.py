"""The inverse scan: every step of the chain solved for its own state, from the image to the noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _dispatch
from . import _ops

__all__ = ["MAX_COLUMNS", "inverse_scan"]

MAX_COLUMNS = 32


def inverse_scan(
    states: Tensor,
    predictions: Tensor,
    state_coef: Tensor,
    model_coef: Tensor,
    slope: Tensor,
    weight: Tensor,
    lo: Tensor,
    hi: Tensor,
    sq_miss: Tensor,
    z: Tensor,
    e: Tensor,
    filled: Tensor,
    column: int,
    damping: float = 1.0,
    ridge: float = 1e-6,
    stale: float = 8.0,
    floor: float = 1e-6,
    reach: float = 1.0,
    drift: Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """One round of the inverse problem without the model call, in place, for rows lo[b] <= i < hi[b] of every sample b.

    State hi[b] is known; every row i below is the equation G_i(x_i) = x_{i+1} with the step G_i of the chain. From the
    last evaluation X, E and the rows after it, i = hi[b] - 1 down to lo[b]:

        N[i] = X[i] + dX gamma + damping (rho - dG gamma) / d,  rho = N[i+1] - G[i],  gamma = argmin |rho - dG gamma|

    with G[i] = sum_l state_coef[i,l] X[i-l] + model_coef[i,l] E[i-l] + drift[i], d = state_coef[i,0] + model_coef[i,0]
    slope[i], and the differences dX, dG = state_coef[i,0] dX + model_coef[i,0] dE to the rounds in the rings; then
    states <- N. A multisecant step of the second kind (Fang and Saad 2009, doi 10.1002/nla.617, equation 24), which
    minimises the residual and stays calm where the step's Jacobian is nearly singular, carried exactly through the
    chain. The terms of earlier states (l > 0) are those of the last iterate. The fixed point does not depend on slope
    or rings.

    Args:
        states, predictions, state_coef, model_coef, lo, hi, drift, backend: as for `ddim_update`.
        slope: (T, 1) or (T, D), the diagonal part of d prediction / d state; d must not be zero.
        weight: (T, 1) or (T, D), what a miss of that row is worth.
        sq_miss: (T, B); row i receives |weight[i] (X[i+1] - G[i])|^2.
        z, e: (H + 1, W, B, D), rings of states and predictions; row i lives in slot i % W, this round in `column`
            (the round modulo H + 1). H < 32; above 7 torch does it, whatever the backend.
        filled: (W, B) int32, how many of a row's most recent columns are valid; counted up here.
        damping: the part of the step along d that is taken; secant steps are taken whole.
        ridge: relative to normalised columns, > 0. stale: columns with |dG| > stale |rho| are left out: slopes of far
            away. floor: so are those with |dG| <= floor |G|: rounding. reach: longest step, relative to the state.

    A step that is not finite is not taken. Raises ValueError, BackendUnavailableError: as for `ddim_update`.
    """
    _dispatch.check_scan(states, predictions, state_coef, model_coef, lo, hi, sq_miss, sq_miss, drift)
    (rows, batch, size), device = states.shape, states.device
    _dispatch.check_slope(slope, rows - 1, size, device)
    _dispatch.check_slope(weight, rows - 1, size, device, "weight")
    if z.dim() != 4 or not 1 <= z.shape[0] <= MAX_COLUMNS or z.shape[1] < 1 or z.shape[2:] != (batch, size):
        raise ValueError(f"z: expected shape (H + 1, W, {batch}, {size}) with H < {MAX_COLUMNS}, got {tuple(z.shape)}")
    if e.shape != z.shape or e.dtype != z.dtype or z.dtype != states.dtype or e.device != device:
        raise ValueError(f"e: expected {states.dtype} {tuple(z.shape)} like z, got {e.dtype} {tuple(e.shape)}")
    if filled.shape != z.shape[1:3] or filled.dtype != torch.int32:
        raise ValueError(f"filled: expected int32 {tuple(z.shape[1:3])}, got {filled.dtype} {tuple(filled.shape)}")
    if not 0 <= column < z.shape[0]:
        raise ValueError(f"column: expected 0 <= column < {z.shape[0]} (the round modulo H + 1), got {column}")
    settings = {"damping": damping, "ridge": ridge, "stale": stale, "floor": floor, "reach": reach}
    if (
        not all(math.isfinite(value) and value >= 0 for value in settings.values())
        or not damping * ridge * stale * reach > 0
    ):
        raise ValueError(f"damping, ridge, stale, reach: expected finite numbers > 0, floor >= 0, got {settings}")
    args = (states, predictions, state_coef, model_coef, slope, weight, lo, hi, sq_miss, z, e, filled, column, damping,
            ridge, stale, floor, reach, drift)  # fmt: skip
    if backend == "auto" and _dispatch.dispatched(states):
        _ops.inverse_op(*args)
    else:
        _ops.run(backend, *args)
