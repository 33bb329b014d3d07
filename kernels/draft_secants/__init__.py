"""The history of a solve with a draft: states, remainders (the model's output minus the draft's), and their fit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _config
from .._checks import INDEX, Arguments, check_anchors, check_ridge, check_states, expect
from .._register import chain_sizes, register
from .._workspace import Layout, ProblemSize, ceil_div, nbytes, needs_none, next_power_of_2, wide
from .reference import draft_secants as _reference

__all__ = ["draft_secants", "draft_secants_bytes"]


def _validate(given: Arguments) -> None:
    check_states(given)
    check_anchors(given)
    expect("anchor_rows", given["anchor_rows"], given["z"].shape[1:2], (torch.int64,), given["z"].device)
    expect("filled", given["filled"], given["z"].shape[1:3], INDEX, given["z"].device)
    check_ridge(given)


_op = register(
    __name__,
    "draft_secants(Tensor states, Tensor predictions, Tensor draft_cache, Tensor anchor_rows, Tensor lo, Tensor hi, "
    "Tensor(a!) z, Tensor(b!) remainder, Tensor(c!) filled, Tensor(d!) secant_weights, int column, float ridge, "
    "float floor, Tensor(e!)? workspace) -> ()",
    _reference,
    validate=_validate,
    cpp=chain_sizes,
    storage=("states", "predictions", "draft_cache"),
)


def draft_secants(
    states: Tensor, predictions: Tensor, draft_cache: Tensor, anchor_rows: Tensor, lo: Tensor, hi: Tensor, z: Tensor,
    remainder: Tensor, filled: Tensor, secant_weights: Tensor, column: int, ridge: float = 1e-6, floor: float = 1e-5, *,
    workspace: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Record a round at the anchors and fit the remainder's Jacobian, in place, before a sweep of `draft_scan`.

    For the anchors n of every sample b with lo[b] <= anchor_rows[n] < hi[b]:

        z[column, n] <- X, remainder[column, n] <- E - draft_cache[n], secant_weights[n] <- Z (Z dZ^T dZ Z + ridge)^-1 Z

    with X, E the state and prediction of row anchor_rows[n], dZ the differences z[column - k, n] - X of the last
    filled[n] rounds and Z the inverse lengths of those worth keeping; filled[n] counts up. The Jacobian of the
    remainder is then about dR secant_weights dZ^T, with dR the differences of `remainder` (Fang and Saad 2009, doi
    10.1002/nla.617).

    Args:
        states, predictions, lo, hi, backend: as for `ddim_update`.
        draft_cache: (A, B, D), the draft's output at X.
        anchor_rows: (A,) int64, rows of the chain, ascending.
        z, remainder: (H + 1, A, B, D), rings over rounds, in the dtype of the states; this round goes to `column` (the
            round modulo H + 1). 0 <= H <= 7.
        filled: (A, B) int32, how many of the most recent columns are valid.
        secant_weights: (A, B, H, H) float64; a column that is not to be read has zero on the diagonal.
        column: the ring column of this round.
        ridge, floor: as for `newton_scan`.
        workspace: as for `ddim_update`, of `draft_secants_bytes`.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(
        backend, states, predictions, draft_cache, anchor_rows, lo, hi, z, remainder, filled, secant_weights, column,
        ridge, floor, workspace,
    )  # fmt: skip


def layout(size: ProblemSize, ring: int) -> Layout:
    """Grams of the anchors (`size.steps` of them) and the squared size of their states, summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("draft_gram", size.device).block(size.dtype.itemsize))
    pairs = next_power_of_2(max(ring - 1, 1))
    return {"partials": ((size.steps, size.batch, blocks, pairs**2 + 1), wide(size.dtype))}


def draft_secants_bytes(
    anchors: int, batch: int, numel: int, history: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the `workspace` with which `draft_secants` allocates nothing, for rings (history + 1, anchors, batch,
    numel) of `dtype`."""
    if needs_none(device, backend):
        return 0
    return nbytes(layout(ProblemSize(anchors, batch, numel, 1, dtype, device), history + 1))
