"""The batched DDIM update across timesteps."""

from __future__ import annotations

from torch import Tensor

from .. import _dispatch, _ops, _workspace
from ._layout import ddim_update_bytes

__all__ = ["ddim_update", "ddim_update_bytes"]


def ddim_update(
    states: Tensor,
    predictions: Tensor,
    state_coef: Tensor,
    model_coef: Tensor,
    lo: Tensor,
    hi: Tensor,
    sq_diff: Tensor,
    sq_norm: Tensor,
    drift: Tensor | None = None,
    *,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Advance every active timestep of the chain at once, in place: one Picard round without the model call.

    F[i+1] = sum_{l<L} state_coef[i,l] F[i-l] + model_coef[i,l] predictions[i-l] + drift[i] for lo[b] <= i < hi[b], with
    F = states up to row lo[b]; then states <- F. This is the sampler's own step (DDIM: Song et al. 2021, arXiv
    2010.02502, eq. 12) as an affine scan over time, the map of Pokle et al. 2022, arXiv 2210.12867, eq. 9.

    Args:
        states: (T + 1, B, D), time first; row 0 is the noise, row T the sample. Overwritten in the window.
        predictions: (T, B, D), the model's outputs; row i was computed from states[i].
        state_coef, model_coef: (T, L) float32 or float64, 1 <= L <= 16; zero where i - l < 0.
        lo, hi: (B,) int32 with 0 <= lo <= hi <= T, the active rows of each sample. Not read back from a GPU.
        sq_diff, sq_norm: (T, B) float32 or float64; row i receives |F[i+1] - states[i+1]|^2 and |F[i+1]|^2 in the
            window, in units of the state squared, summed over D; other rows are left alone.
        drift: (T, B, D), frozen noise already multiplied by its coefficient, or None.
        workspace: (N,) uint8 scratch with which a call on a GPU allocates nothing: at least as many bytes as
            `ddim_update_bytes` says, not shared with calls on other streams. Other backends leave it alone.
        backend: "auto", "reference", "cpp" or "triton".

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _dispatch.check_scan(states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift)
    _workspace.check(workspace, states.device)
    args = (states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift, workspace)
    if backend == "auto" and _dispatch.dispatched(states):
        _ops.ddim_op(*args)
    else:
        _ops.run_ddim(backend, *args)
