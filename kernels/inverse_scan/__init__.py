"""The inverse scan: every step of the chain solved for its own state, from the image to the noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _config
from .._checks import MAX_HISTORY, Arguments, check_rings, check_scan, check_slope
from .._register import chain_sizes, register
from .._workspace import Layout, ProblemSize, ceil_div, nbytes, needs_none, next_power_of_2, wide
from .reference import inverse_scan as _reference

__all__ = ["MAX_COLUMNS", "inverse_scan", "inverse_scan_bytes"]

MAX_COLUMNS = 32


def _validate(given: Arguments) -> None:
    check_scan(given, "sq_miss")
    check_slope(given)
    check_slope(given, "weight")
    check_rings(given, MAX_COLUMNS, (given["states"].dtype,))
    settings = {name: given[name] for name in ("damping", "ridge", "stale", "floor", "reach")}
    if not all(0 <= value < math.inf and (value > 0 or name == "floor") for name, value in settings.items()):
        raise ValueError(f"damping, ridge, stale, reach: expected finite numbers > 0, floor >= 0, got {settings}")


_op = register(
    __name__,
    "inverse_scan(Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor slope, "
    "Tensor weight, Tensor lo, Tensor hi, Tensor(b!) sq_miss, Tensor(c!) z, Tensor(d!) e, Tensor(e!) filled, "
    "int column, float damping, float ridge, float stale, float floor, float reach, Tensor? drift, "
    "Tensor(f!)? workspace) -> ()",
    _reference,
    validate=_validate,
    cpp=chain_sizes,
    cpp_serves=lambda given: given["z"].shape[0] <= MAX_HISTORY,
    storage=("states", "predictions", "z", "drift"),
)


def inverse_scan(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, weight: Tensor,
    lo: Tensor, hi: Tensor, sq_miss: Tensor, z: Tensor, e: Tensor, filled: Tensor, column: int, damping: float = 1.0,
    ridge: float = 1e-6, stale: float = 8.0, floor: float = 1e-6, reach: float = 1.0, drift: Tensor | None = None, *,
    workspace: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """One round of the inverse problem without the model call, in place, for rows lo[b] <= i < hi[b] of every sample b.

    State hi[b] is known; every row i below is the equation G_i(x_i) = x_{i+1} with the step G_i of the chain. From the
    last evaluation X, E and the rows after it, i = hi[b] - 1 down to lo[b]:

        N[i] = X[i] + dX gamma + damping (rho - dG gamma) / d,  rho = N[i+1] - G[i],  gamma = argmin |rho - dG gamma|

    with G[i] = sum_l state_coef[i,l] X[i-l] + model_coef[i,l] E[i-l] + drift[i], d = state_coef[i,0] + model_coef[i,0]
    slope[i], and the differences dX, dG = state_coef[i,0] dX + model_coef[i,0] dE to the rounds in the rings; then
    states <- N. A multisecant step of the second kind (Fang and Saad 2009, doi 10.1002/nla.617, equation 24), which
    minimises the residual and stays calm where the step's Jacobian is nearly singular, carried exactly through the
    chain. The terms of earlier states (l > 0) are those of the last iterate. The fixed point does not depend on slope
    or rings. A step that is not finite is not taken.

    Args:
        states, predictions, state_coef, model_coef, lo, hi, drift: as for `ddim_update`.
        slope: (T, 1) or (T, D), the diagonal part of d prediction / d state; d must not be zero.
        weight: (T, 1) or (T, D), what a miss of that row is worth.
        sq_miss: (T, B); row i receives |weight[i] (X[i+1] - G[i])|^2.
        z, e: (H + 1, W, B, D), rings of states and predictions; row i lives in slot i % W, this round in `column`
            (the round modulo H + 1). H < 32; above 7 the reference serves on the CPU.
        filled: (W, B) int32, how many of a row's most recent columns are valid; counted up here.
        column: the ring column of this round.
        damping: the part of the step along d that is taken; secant steps are taken whole.
        ridge: relative to normalised columns, > 0.
        stale: columns with |dG| > stale |rho| are left out: slopes of far away.
        floor: so are those with |dG| <= floor |G|: rounding.
        reach: longest step, relative to the state.
        workspace, backend: as for `ddim_update`, the workspace of `inverse_scan_bytes`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(
        backend, states, predictions, state_coef, model_coef, slope, weight, lo, hi, sq_miss, z, e, filled, column,
        damping, ridge, stale, floor, reach, drift, workspace,
    )  # fmt: skip


def layout(size: ProblemSize, ring: int, width: int) -> Layout:
    """The Gram of every row in the rings and what the row misses, summed over blocks."""
    pairs = next_power_of_2(ring - 1)
    blocks = ceil_div(size.numel, _config.config("inverse_prepare", size.device).block(size.dtype.itemsize))
    return {"partials": ((width, size.batch, blocks, pairs**2 + 1), torch.float64 if pairs > 8 else wide(size.dtype))}


def inverse_scan_bytes(
    width: int, batch: int, numel: int, history: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the `workspace` with which `inverse_scan` allocates nothing, for states (T + 1, batch, numel) and rings
    (history + 1, width, batch, numel) of `dtype`."""
    size = ProblemSize(width, batch, numel, 1, dtype, device)
    return 0 if needs_none(device, backend) else nbytes(layout(size, history + 1, width))
