"""A segment of a draft's sweep along the chain: an anchor's correction, and the states up to the next anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _config
from .._checks import WIDE, Arguments, check_anchors, check_scan, check_slope, expect
from .._register import chain_sizes, register
from .._workspace import Layout, ProblemSize, ceil_div, nbytes, needs_none, next_power_of_2, wide
from .reference import MAX_OUTPUT
from .reference import draft_scan as _reference

__all__ = ["MAX_OUTPUT", "draft_scan", "draft_scan_bytes"]


def _validate(given: Arguments) -> None:
    check_scan(given)
    check_slope(given)
    check_anchors(given)
    states = given["states"]
    (rows, batch, size), device, kinds = states.shape, states.device, (states.dtype,)
    if given["draft_output"] is not None:
        expect("draft_output", given["draft_output"], (batch, size), kinds, device)
    expect("correction", given["correction"], (2, batch, size), kinds, device)
    expect("weights", given["weights"], (rows - 1, 2), WIDE, device)
    expect("carry", given["carry"], (2, given["state_coef"].shape[1], batch, size), (wide(states.dtype),), device)
    count = given["draft_cache"].shape[0]
    anchor, previous_start, start, stop = (given[name] for name in ("anchor", "previous_start", "start", "stop"))
    if not 0 <= anchor < count or not 0 <= start < stop <= rows - 1 or not -1 <= previous_start < start:
        raise ValueError(
            f"anchor, previous_start, start, stop: expected 0 <= anchor < {count} and -1 <= previous_start < start < "
            f"stop <= {rows - 1}, got {anchor}, {previous_start}, {start}, {stop}"
        )


_op = register(
    __name__,
    "draft_scan(Tensor(a!) states, Tensor predictions, Tensor? draft_output, Tensor(b!) draft_cache, "
    "Tensor(c!) correction, Tensor weights, Tensor state_coef, Tensor model_coef, Tensor slope, Tensor lo, "
    "Tensor hi, Tensor(d!) sq_diff, Tensor(e!) sq_norm, Tensor(f!) carry, Tensor z, Tensor remainder, "
    "Tensor secant_weights, int column, int anchor, int previous_start, int start, int stop, bool rollout, bool last, "
    "Tensor? drift, Tensor(g!)? workspace) -> ()",
    _reference,
    validate=_validate,
    cpp=chain_sizes,
)


def draft_scan(
    states: Tensor, predictions: Tensor, draft_output: Tensor | None, draft_cache: Tensor, correction: Tensor,
    weights: Tensor, state_coef: Tensor, model_coef: Tensor, slope: Tensor, lo: Tensor, hi: Tensor, sq_diff: Tensor,
    sq_norm: Tensor, carry: Tensor, z: Tensor, remainder: Tensor, secant_weights: Tensor, column: int, anchor: int,
    previous_start: int, start: int, stop: int, *, rollout: bool = False, last: bool = True,
    drift: Tensor | None = None, workspace: Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Sweep one segment of the chain, in place: rows max(start, lo[b]) <= i < min(stop, hi[b]) of every sample b.

    N[i+1] = sum_l state_coef[i,l] N[i-l] + model_coef[i,l] Ê[i-l] + drift[i], then states <- N, with

        Ê[i] = E[i] + slope[i] (N[i] - X[i]) + weights[i,0] correction[n-1] + weights[i,1] correction[n]
        correction[n] = draft_output - draft_cache[n] + (S - slope) (N - X) in row start; then draft_cache[n] <- it

    n = `anchor` the anchor of row start, X the old states, S the Jacobian that `draft_secants` has fitted.
    correction[n] is zero for samples that are not active in row start, and in row lo[b]: its state is final, and there
    the model's own prediction stands, even where a draft differs about the same state. The segments of a sweep go in
    order, each after the draft was called at the state that the one before has reached; nothing else may use
    `correction`, `carry` and the workspace in between. At X that solves the chain nothing changes, whatever the draft.
    Cf. deferred correction, and Parareal (Lions, Maday, Turinici 2001).

    Args:
        states, predictions, state_coef, model_coef, lo, hi, drift, backend: as for `ddim_update`; the Triton kernels
            take up to 4 lags.
        draft_output: (B, D), the draft at states[start]; None where no sample is active in that row. Values that are
            not below 1e6, and NaN, are replaced by slope[start] states[start].
        draft_cache: (A, B, D), the draft's output at the anchors of X.
        correction: (2, B, D), that of anchor n in n % 2.
        weights: (T, 2), weights of the two anchors' correction in each row.
        slope: as for `newton_scan`.
        sq_diff: (T, B); row i receives max(|N[i+1] - X[i+1]|^2, |F[i+1] - X[i+1]|^2), F the plain step.
        sq_norm: (T, B), |N[i+1]|^2. The Triton kernels write both for the whole sweep in a segment that is `last`.
        carry: (2, L, B, D) float32, or float64 where the states are: F and Ê from segment to segment.
        z, remainder, secant_weights, column: as `draft_secants` left them.
        anchor, previous_start: the anchor's index, and the row of the anchor before it, -1 where there is none.
        start, stop: rows of the segment.
        rollout: make the draft's own chain instead, the first guess: E, X, draft_cache and S count as zero, and before
            lo[b] the model's prediction is the draft's output. sq_diff, sq_norm and z, remainder are left alone then.
        last: whether the segment is the sweep's last.
        workspace: (N,) uint8 of `draft_scan_bytes`; a GPU needs it, for what a segment leaves for the next.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(
        backend, states, predictions, draft_output, draft_cache, correction, weights, state_coef, model_coef,
        slope, lo, hi, sq_diff, sq_norm, carry, z, remainder, secant_weights, column, anchor, previous_start, start,
        stop, rollout, last, drift, workspace,
    )  # fmt: skip


def layout(size: ProblemSize, ring: int) -> Layout:
    """What segments leave for later ones: the dots of the secants with the next anchor's step, for this anchor and the
    next, and three squared norms of every row, all summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("draft_scan", size.device).block(size.dtype.itemsize))
    pairs, real = next_power_of_2(max(ring - 1, 1)), wide(size.dtype)
    return {
        "dots": ((2, size.batch, blocks, pairs), real),
        "partials": ((size.steps, size.batch, blocks, 3), real),
    }


def draft_scan_bytes(
    steps: int, batch: int, numel: int, history: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the `workspace` of `draft_scan` for states (steps + 1, batch, numel) of `dtype` and rings of
    history + 1 columns."""
    if needs_none(device, backend):
        return 0
    return nbytes(layout(ProblemSize(steps, batch, numel, 1, dtype, device), history + 1))
