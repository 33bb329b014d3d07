"""The fit of secants: how much of each a step is taken to be, for many steps at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import INDEX, MAX_HISTORY, WIDE, Arguments, expect
from .._register import register
from .reference import secant_fit as _reference

__all__ = ["secant_fit"]


def _validate(given: Arguments) -> None:
    gram, fit = given["gram"], given["fit"]
    if gram.dim() != 3 or not 1 <= gram.shape[1] < MAX_HISTORY:
        raise ValueError(f"gram: expected shape (R, H, H) with 1 <= H < {MAX_HISTORY}, got {tuple(gram.shape)}")
    (rows, columns, _), device = gram.shape, gram.device
    expect("gram", gram, (rows, columns, columns), WIDE, device)
    expect("fit", fit, (rows, columns, columns), (torch.float64,), device)
    expect("count", given["count"], (rows,), INDEX, device)
    for name, sizes in {"size": (rows,), "ridges": (columns, rows), "guess_error": (rows,)}.items():
        if given[name] is not None:
            expect(name, given[name], sizes, WIDE, device)


_op = register(
    __name__,
    "secant_fit(Tensor(a!) fit, Tensor gram, Tensor size, Tensor count, Tensor ridges, Tensor? guess_error, "
    "float floor, float guessed, float nonlinear) -> ()",
    _reference,
    validate=_validate,
    cpp=lambda given: dict(zip("RH", given["gram"].shape)),
    storage=("fit",),
)


def secant_fit(
    fit: Tensor, gram: Tensor, size: Tensor, count: Tensor, ridges: Tensor, guess_error: Tensor | None, floor: float,
    guessed: float, nonlinear: float, *, backend: str = "auto",
) -> None:  # fmt: skip
    """The least squares fit of a step by secants, in place: gamma = fit dZ^T dx.

    fit <- Z (Z dZ^T dZ Z + diag(ridge))^-1 Z for every row, with Z the inverse lengths of the columns that are kept and
    0 for the others: the multisecant weights of Fang and Saad 2009, doi 10.1002/nla.617, on normalised columns, in
    float64. A row whose system is not positive definite gets 0.

    Args:
        fit: (R, H, H) float64, is written.
        gram: (R, H, H) float32 or float64, dZ^T dZ, 1 <= H < 8; what is not finite drops out.
        size: (R,) the length of the state: a column shorter than `floor` times it is rounding.
        count: (R,) int32, answers known of a row: its first count - 1 columns are secants.
        ridges: (H, R) of every column, relative to its length squared.
        guess_error: (R,) the error of what the secants with a ridge above `guessed` end at; their ridge is at least the
            square of it relative to what the step may have changed beside the slope. None for none.
        guessed: the ridge of secants with a guessed end is above this.
        nonlinear: what part of a step a prediction may change by beside the slope.
        backend: as for `ddim_update`.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        BackendUnavailableError: a backend asked for by name cannot serve these tensors here.
    """
    _op(backend, fit, gram, size, count, ridges, guess_error, floor, guessed, nonlinear)
