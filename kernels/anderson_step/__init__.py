"""One Anderson round on the trajectory: scan, residual, Gram row, ridge solve, mix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _config
from .._checks import INDEX, MAX_HISTORY, STORAGE, WIDE, Arguments, check_column, check_scan, expect
from .._register import chain_sizes, register
from .._workspace import Layout, ProblemSize, ceil_div, nbytes, needs_none, next_power_of_2, wide
from .reference import anderson_step as _reference

__all__ = ["SCOPES", "anderson_step", "anderson_step_bytes"]

SCOPES = ("timestep", "trajectory", "triangular")  # the position is the extension's code for the scope


def _validate(given: Arguments) -> None:
    check_scan(given)
    states, f, scope = given["states"], given["f"], given["scope"]
    if f.dim() != 4 or not 1 <= f.shape[0] <= MAX_HISTORY or f.shape[1] < 1:
        raise ValueError(f"f: expected shape (M, W, B, D) with 1 <= M <= {MAX_HISTORY}, W >= 1, got {tuple(f.shape)}")
    (history, width), (_, batch, size), device = f.shape[:2], states.shape, states.device
    expect("f", f, (history, width, batch, size), STORAGE, device)
    expect("g", given["g"], (history, width, batch, size), STORAGE, device)
    expect("gram", given["gram"], (width, batch, history, history), WIDE, device)
    expect("filled", given["filled"], (width, batch), INDEX, device)
    check_column(given["column"], history, "the history")
    ridge, damping, stale = given["ridge"], given["damping"], given["stale"]
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge: expected a finite number >= 0, got {ridge}")
    if not math.isfinite(damping):
        raise ValueError(f"damping: expected a finite number, got {damping}")
    if not stale >= 0:
        raise ValueError(f"stale: expected a number >= 0 (inf keeps every column), got {stale}")


_op = register(
    __name__,
    "anderson_step(Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor lo, Tensor hi, "
    "Tensor(b!) sq_diff, Tensor(c!) sq_norm, Tensor(d!) f, Tensor(e!) g, Tensor(f!) gram, Tensor(g!) filled, "
    "int column, str scope, float ridge, bool relative_ridge, float damping, float stale, Tensor? drift, "
    "Tensor(h!)? workspace) -> ()",
    _reference,
    validate=_validate,
    cpp=lambda given: chain_sizes(given) | dict(zip("MW", given["f"].shape)) | {"scope": SCOPES.index(given["scope"])},
    storage=("states", "predictions", "f", "g", "drift"),
)


def anderson_step(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, f: Tensor, g: Tensor, gram: Tensor, filled: Tensor, column: int, *, scope: str,
    ridge: float, relative_ridge: bool, damping: float, stale: float, drift: Tensor | None = None,
    workspace: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """One Anderson round without the model call, in place: states[i+1] <- sum_j alpha_j (F_j - (1 - damping) G_j).

    F is the scan of `ddim_update`, G = F - states its residual; alpha minimises |sum_j alpha_j G_j|^2 + ridge |alpha|^2
    with sum alpha = 1 over the last M rounds (Walker and Ni 2011, SIAM J. Numer. Anal. 49(4), eq. 2.2; on diffusion
    trajectories: Pokle et al. 2022, arXiv 2210.12867, alg. 1, and, over prefixes, Tang et al. 2024, arXiv 2402.09970).
    Row lo[b], all of whose inputs are final, takes the plain step, so each round finishes at least one more state.
    When the newest residual is zero or the system has no finite solution, the row takes the plain step.

    Args:
        states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift: as for `ddim_update`.
        f, g: (M, W, B, D), M <= 8: histories of F and G as rings; row i lives in slot i % W, a round in one column.
            Columns that `filled` does not cover are never read, whatever they hold. g may be stored narrower than f.
        gram: (W, B, M, M) float32 or float64, inner products of the columns of g; one row and column are renewed.
        filled: (W, B) int32, how many of the ring columns up to `column` are valid for the slot; raised by one, up to
            M. Zero it for a slot that a new row takes over.
        column: round % M, where this round is stored.
        scope: "timestep": one alpha per row; "trajectory": one per sample; "triangular": row i's alpha minimises the
            sum over rows lo..i, which respects causality.
        ridge: >= 0, in units of the Gram (state squared), or relative to its diagonal if `relative_ridge`.
        relative_ridge: whether the ridge is relative.
        damping: weight of the new iterate; 1 is undamped.
        stale: a column whose squared residual exceeds `stale` times the newest one's is left out; inf keeps all.
        workspace: as for `ddim_update`, of `anderson_step_bytes`.
        backend: as for `ddim_update`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(
        backend, states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, f, g, gram, filled, column,
        scope, ridge, relative_ridge, damping, stale, drift, workspace,
    )  # fmt: skip


def layout(size: ProblemSize, history: int, narrow: int) -> Layout:
    """The Gram rows and norms, summed over blocks of D, and the weights. narrow: bytes of the narrowest element of the
    history: 16-byte accesses for this one, more of them for the others."""
    blocks = ceil_div(size.numel, _config.config("anderson_scan", size.device).block(narrow))
    rows = (size.steps, size.batch)
    return {
        "partials": ((*rows, blocks, next_power_of_2(history + 2)), wide(size.dtype)),
        "alpha": ((*rows, history), wide(size.dtype)),
    }


def anderson_step_bytes(
    steps: int, batch: int, numel: int, history: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device,
    backend: str = "auto",
) -> int:  # fmt: skip
    """Bytes of the `workspace` with which `anderson_step` allocates nothing, for states (steps + 1, batch, numel) of
    `dtype` and a history whose narrower half is kept in `stored`."""
    if needs_none(device, backend):
        return 0
    size = ProblemSize(steps, batch, numel, 1, dtype, device)
    return nbytes(layout(size, history, min(stored.itemsize, dtype.itemsize)))
