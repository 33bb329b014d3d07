"""The scan over nodes: a chain in composite steps, with remainders interpolated between the nodes."""

from __future__ import annotations

from torch import Tensor

from .._checks import INDEX, MAX_LAGS, STORAGE, Arguments, expect
from .._register import chain_sizes, register
from .._workspace import wide
from .reference import node_scan as _reference

__all__ = ["MAX_STENCIL", "node_scan"]

MAX_STENCIL = 8


def _validate(given: Arguments) -> None:
    states, state_coef, remainder_coef = given["states"], given["state_coef"], given["remainder_coef"]
    if states.dim() != 3 or states.shape[0] < 2 or states.shape[2] < 1:
        raise ValueError(f"states: expected shape (n + 1, B, D) with n, D >= 1, got {tuple(states.shape)}")
    (rows, batch, size), device, kinds = states.shape, states.device, (states.dtype,)
    expect("states", states, states.shape, STORAGE, device)
    nodes = given["remainder"].shape[0] if given["remainder"].dim() == 3 else 0
    if nodes < 1:
        raise ValueError(f"remainder: expected shape (m, B, D) with m >= 1, got {tuple(given['remainder'].shape)}")
    expect("remainder", given["remainder"], (nodes, batch, size), kinds, device)
    if state_coef.dim() != 4 or not 1 <= state_coef.shape[1] <= MAX_LAGS or state_coef.shape[3] < 1:
        raise ValueError(
            f"state_coef: expected shape (n, L, L, K) with 1 <= L <= {MAX_LAGS}, got {tuple(state_coef.shape)}"
        )
    lags, count, most = state_coef.shape[1], state_coef.shape[3], min(nodes, MAX_STENCIL)
    if remainder_coef.dim() != 4 or not 1 <= remainder_coef.shape[2] <= most:
        raise ValueError(
            f"remainder_coef: expected shape (n, L, S, K) with 1 <= S <= {most}, got {tuple(remainder_coef.shape)}"
        )
    numbers = (wide(states.dtype),)
    expect("state_coef", state_coef, (rows - 1, lags, lags, count), numbers, device)
    expect("remainder_coef", remainder_coef, (rows - 1, lags, remainder_coef.shape[2], count), numbers, device)
    expect("start", given["start"], (rows - 1,), INDEX, device)
    if given["classes"] is not None:
        expect("classes", given["classes"], (size,), INDEX, device)
    elif count != 1:
        raise ValueError(f"classes: expected a tensor ({size},) with K = {count} classes, got None")
    if given["drift"] is not None:
        expect("drift", given["drift"], (rows - 1, lags, batch, size), kinds, device)


def _check_values(given: Arguments) -> None:
    """What the C++ form checks for itself; the Triton kernel clamps on a GPU."""
    remainder_coef, classes = given["remainder_coef"], given["classes"]
    last, count = given["remainder"].shape[0] - remainder_coef.shape[2], remainder_coef.shape[3]
    for j, first in enumerate(given["start"].tolist()):
        if not 0 <= first <= last:
            raise ValueError(f"start: expected 0 <= start <= m - S = {last}, got {first} for step {j}")
    for d, kind in enumerate([] if classes is None else classes.tolist()):
        if not 0 <= kind < count:
            raise ValueError(f"classes: expected 0 <= classes <= K - 1 = {count - 1}, got {kind} for element {d}")


def _sizes(given: Arguments) -> Arguments:
    stencil, count = given["remainder_coef"].shape[2:]
    return {**chain_sizes(given), "M": given["remainder"].shape[0], "S": stencil, "K": count}


_op = register(
    __name__,
    "node_scan(Tensor(a!) states, Tensor remainder, Tensor state_coef, Tensor remainder_coef, Tensor start, "
    "Tensor? classes, Tensor? drift) -> ()",
    _reference,
    validate=_validate,
    cpp=_sizes,
    check_values=_check_values,
    storage=("states", "remainder", "drift"),
    as_stored=("state_coef",),
)


def node_scan(
    states: Tensor, remainder: Tensor, state_coef: Tensor, remainder_coef: Tensor, start: Tensor,
    classes: Tensor | None = None, drift: Tensor | None = None, *, backend: str = "auto",
) -> None:  # fmt: skip
    """Walk a chain in composite steps from node to node, in place, with the model's part interpolated between nodes.

    Nodes are the timesteps at which the model was asked. Between two of them the chain takes many steps at once: what
    is linear in the L carried values is carried exactly, and the remainder, what the model said beyond its linear part,
    is interpolated from S of m nodes. They may be other nodes than the n of the states, whose remainders are not known
    yet. For j = 0 ... n - 1 and all l < L at once

        y_l <- sum_m state_coef[j,l,m,k] y_m + sum_s remainder_coef[j,l,s,k] remainder[start[j]+s] + drift[j,l]

    and states[j+1] <- y_0, from y = (states[0], 0, ..., 0); k = classes[d] is the class of element d, say of one
    variance. An exponential integrator with polynomial remainders: Hochbruck and Ostermann 2010, doi
    10.1017/S0962492910000048, for diffusion Lu et al. 2022, arXiv 2206.00927; all steps at once, as `ddim_update`.

    Args:
        states: (n + 1, B, D), time first; row 0 is given, rows 1 to n are written.
        remainder: (m, B, D), dtype of the states, m >= 1.
        state_coef: (n, L, L, K), 1 <= L <= 16, float32, or float64 where the states are.
        remainder_coef: (n, L, S, K), dtype of state_coef, 1 <= S <= min(m, 8).
        start: (n,) int32, the first row of `remainder` that step j interpolates from, 0 <= start[j] <= m - S. With the
            same nodes on both sides it may lie ahead of j.
        classes: (D,) int32 in [0, K); None where K is 1.
        drift: (n, L, B, D), dtype of the states, or None.
        backend: as for `ddim_update`. On a GPU values of `start` and `classes` that are out of range are clamped, not
            read back.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(backend, states, remainder, state_coef, remainder_coef, start, classes, drift)
