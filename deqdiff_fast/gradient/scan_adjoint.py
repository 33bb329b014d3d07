"""The transpose of a chain's recursion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..schedule import Schedule


def scan_adjoint(
    schedule: Schedule, cotangent: Tensor, vjp: Callable[[int, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Cotangents of the states x_{i+1} = sum_l a[i,l] x_{i-l} + b[i,l] e_{i-l}, from the last one to the noise.

    Args:
        cotangent: (T + 1, B, D), the direct ones of all states.
        vjp: (i, cotangent of e_i (B, D)) -> that of x_i, where the predictions e depend on the states (None: they do
            not).

    Returns:
        (T + 1, B, D) of the states, row 0 of the noise, and (T, B, D) of the predictions.
    """
    to_states, to_predictions = cotangent.clone(), torch.zeros_like(cotangent[1:])
    for i in reversed(range(schedule.num_steps)):
        for lag in range(min(schedule.lags, i + 1)):
            to_states[i - lag] += float(schedule.state_coef[i, lag]) * to_states[i + 1]
            to_predictions[i - lag] += float(schedule.model_coef[i, lag]) * to_states[i + 1]
        if vjp is not None:
            to_states[i] += vjp(i, to_predictions[i])
    return to_states, to_predictions
