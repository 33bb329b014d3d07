"""The quasi-Newton scan: linearised predictions, carried exactly through the chain."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _config
from .._checks import MAX_HISTORY, Arguments, check_ridge, check_rings, check_scan, check_slope
from .._register import chain_sizes, register
from .._workspace import Layout, ProblemSize, ceil_div, nbytes, needs_none, next_power_of_2, wide
from .reference import newton_scan as _reference

__all__ = ["newton_scan", "newton_scan_bytes"]


def _validate(given: Arguments) -> None:
    check_scan(given)
    check_slope(given)
    rings = [given[name] for name in ("z", "e", "filled") if given[name] is not None]
    if len(rings) not in (0, 3):
        raise ValueError("z, e, filled: expected all three or none of them")
    if rings:
        check_rings(given, MAX_HISTORY)
    check_ridge(given)


_op = register(
    __name__,
    "newton_scan(Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor slope, Tensor lo, "
    "Tensor hi, Tensor(b!) sq_diff, Tensor(c!) sq_norm, Tensor(d!)? z, Tensor(e!)? e, Tensor(f!)? filled, int column, "
    "float ridge, float floor, Tensor? drift, Tensor(g!)? workspace) -> ()",
    _reference,
    validate=_validate,
    cpp=chain_sizes,
    storage=("states", "predictions", "z", "drift"),
)


def newton_scan(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, z: Tensor | None = None, e: Tensor | None = None, filled: Tensor | None = None,
    column: int = 0, ridge: float = 1e-6, floor: float = 1e-5, drift: Tensor | None = None, *,
    workspace: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
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
            slope that damps too much cannot pass for convergence.
        sq_norm: (T, B); row i receives |N[i+1]|^2.
        z, e: (H + 1, W, B, D), rings of states and predictions; row i lives in slot i % W, this round in `column`
            (the round modulo H + 1). They may be stored narrower than the states: they only shape the correction.
            Without them the old states count as zero: the scan of a linear model.
        filled: (W, B) int32, how many of a row's most recent columns are valid; counted up here.
        column: the ring column of this round.
        ridge: relative to normalised columns, > 0.
        floor: a step shorter than this, relative to the state, is rounding and is left out.
        workspace: as for `ddim_update`, of `newton_scan_bytes`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(
        backend, states, predictions, state_coef, model_coef, slope, lo, hi, sq_diff, sq_norm, z, e, filled, column,
        ridge, floor, drift, workspace,
    )  # fmt: skip


def linear_layout(size: ProblemSize) -> Layout:
    """Without secants: three squared norms of every row, summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("newton_linear", size.device).block(size.dtype.itemsize))
    return {"partials": ((size.steps, size.batch, blocks, 3), wide(size.dtype))}


def secant_layout(size: ProblemSize, ring: int, stored: torch.dtype) -> Layout:
    """With secants of `ring` > 1 columns kept in `stored`: Grams summed over blocks, the inverse of every row, and the
    states that narrower rings cannot keep."""
    real = wide(size.dtype)
    blocks = ceil_div(size.numel, _config.config("newton_prepare", size.device).block(stored.itemsize))
    rows, pairs = (size.steps, size.batch), next_power_of_2(ring - 1)
    found: Layout = {"partials": ((*rows, blocks, pairs**2 + 2), real)}
    found["secant_weights"] = ((*rows, pairs, pairs), torch.float64)
    if size.lags > 1:
        found["e_hat"] = ((size.lags, size.batch, size.numel), real)
    if stored != size.dtype:
        found["exact"] = ((*rows, size.numel), size.dtype)
    return found


def newton_scan_bytes(
    steps: int, batch: int, numel: int, history: int, lags: int, dtype: torch.dtype, stored: torch.dtype,
    device: torch.device, backend: str = "auto",
) -> int:  # fmt: skip
    """Bytes of the `workspace` with which `newton_scan` allocates nothing, for states (steps + 1, batch, numel) of
    `dtype`, coefficients of `lags` lags and rings of history + 1 columns kept in `stored`; history 0: no secants."""
    if needs_none(device, backend):
        return 0
    size = ProblemSize(steps, batch, numel, lags, dtype, device)
    return nbytes(secant_layout(size, history + 1, stored) if history else linear_layout(size))
