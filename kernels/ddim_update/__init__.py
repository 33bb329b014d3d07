"""The batched DDIM update across timesteps: an affine scan over time."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _config
from .._checks import check_scan
from .._register import chain_sizes, register
from .._workspace import Layout, ProblemSize, ceil_div, nbytes, needs_none, wide
from .reference import ddim_update as _reference

__all__ = ["ddim_update", "ddim_update_bytes"]

_op = register(
    __name__,
    "ddim_update(Tensor(a!) states, Tensor predictions, Tensor state_coef, Tensor model_coef, Tensor lo, Tensor hi, "
    "Tensor(b!) sq_diff, Tensor(c!) sq_norm, Tensor? drift, Tensor(d!)? workspace) -> ()",
    _reference,
    validate=check_scan,
    cpp=chain_sizes,
)


def ddim_update(
    states: Tensor, predictions: Tensor, state_coef: Tensor, model_coef: Tensor, lo: Tensor, hi: Tensor,
    sq_diff: Tensor, sq_norm: Tensor, drift: Tensor | None = None, *, workspace: Tensor | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
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
    _op(backend, states, predictions, state_coef, model_coef, lo, hi, sq_diff, sq_norm, drift, workspace)


def layout(size: ProblemSize) -> Layout:
    """Squared norms of every row, summed over blocks of D."""
    blocks = ceil_div(size.numel, _config.config("ddim_update", size.device).block(size.dtype.itemsize))
    return {"partials": ((size.steps, size.batch, blocks, 2), wide(size.dtype))}


def ddim_update_bytes(
    steps: int, batch: int, numel: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the `workspace` with which `ddim_update` allocates nothing, for states (steps + 1, batch, numel)."""
    return 0 if needs_none(device, backend) else nbytes(layout(ProblemSize(steps, batch, numel, 1, dtype, device)))
