"""One Anderson round on the trajectory: scan, residual, Gram row, ridge solve, mix."""

from __future__ import annotations

from torch import Tensor

from .. import _dispatch, _ops, _workspace
from ._layout import anderson_step_bytes

__all__ = ["anderson_step", "anderson_step_bytes"]


def anderson_step(
    states: Tensor,
    predictions: Tensor,
    state_coef: Tensor,
    model_coef: Tensor,
    lo: Tensor,
    hi: Tensor,
    sq_diff: Tensor,
    sq_norm: Tensor,
    f: Tensor,
    g: Tensor,
    gram: Tensor,
    filled: Tensor,
    column: int,
    *,
    scope: str,
    ridge: float,
    relative_ridge: bool,
    damping: float,
    stale: float,
    drift: Tensor | None = None,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One Anderson round without the model call, in place: states[i+1] <- sum_j alpha_j (F_j - (1 - damping) G_j).

    F is the scan of `ddim_update`, G = F - states its residual; alpha minimises |sum_j alpha_j G_j|^2 + ridge |alpha|^2
    with sum alpha = 1 over the last M rounds (Walker and Ni 2011, SIAM J. Numer. Anal. 49(4), eq. 2.2; on diffusion
    trajectories: Pokle et al. 2022, arXiv 2210.12867, alg. 1, and, over prefixes, Tang et al. 2024, arXiv 2402.09970).
    Row lo[b], all of whose inputs are final, takes the plain step, so each round finishes at least one more state.

    Args: those of `ddim_update`, and
        f, g: (M, W, B, D), M <= 8: histories of F and G as rings; row i lives in slot i % W, a round in one column.
            Columns that `filled` does not cover are never read, whatever they hold. g may be stored narrower than f.
        gram: (W, B, M, M) float32 or float64, inner products of the columns of g; one row and column are renewed.
        filled: (W, B) int32, how many of the ring columns up to `column` are valid for the slot; raised by one, up to
            M. Zero it for a slot that a new row takes over.
        column: round % M, where this round is stored.
        scope: "timestep": one alpha per row; "trajectory": one per sample; "triangular": row i's alpha minimises the
            sum over rows lo..i, which respects causality.
        ridge: >= 0, in units of the Gram (state squared), or relative to its diagonal if `relative_ridge`.
        damping: weight of the new iterate; 1 is undamped.
        stale: a column whose squared residual exceeds `stale` times the newest one's is left out; inf keeps all.
        workspace: (N,) uint8 scratch with which a call on a GPU allocates nothing: at least as many bytes as
            `anderson_step_bytes` says, not shared with calls on other streams. Other backends leave it alone.

    When the newest residual is zero or the system has no finite solution, the row takes the plain step.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _dispatch.check_scan(states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift)
    _workspace.check(workspace, states.device)
    _dispatch.check_anderson(states, f, g, gram, filled, column, scope, ridge, damping, stale)
    args = (
        states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, f, g, gram, filled, column, scope,
        ridge, relative_ridge, damping, stale, drift, workspace,
    )  # fmt: skip
    if backend == "auto" and _dispatch.dispatched(states):
        _ops.anderson_op(*args)
    else:
        _ops.run_anderson(backend, *args)
