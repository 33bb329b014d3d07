"""The two linear solves of restoration with noise: by singular vectors, or by conjugate gradients without them."""

from __future__ import annotations

from torch import Tensor

from ..operators import Operator
from .conjugate_gradients import conjugate_gradients
from .levels import column

ITERATIONS, TOL = 100, 1e-6


def proximal(operator: Operator, x0: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """argmin over z of ||A z - y||^2 + weight ||z - x0||^2, row by row. weight: (n,) > 0."""
    if operator.decomposed:
        values, rho = operator.singular_values(x0.shape, x0.device, x0.dtype), column(weight, operator.V_adjoint(x0))
        c = operator.V_adjoint(x0)
        return x0 + operator.V(values * (operator.U_adjoint(y) - values * c) / (values.square() + rho))
    rho = column(weight, x0)
    change = conjugate_gradients(
        lambda v: operator.A_adjoint(operator.A(v)) + rho * v,
        operator.A_adjoint(y - operator.A(x0)), iterations=ITERATIONS, tol=TOL,
    )  # fmt: skip
    return x0 + change


def weighted_residual(operator: Operator, x0: Tensor, y: Tensor, range_variance: Tensor, variance: Tensor) -> Tensor:
    """A^T (range_variance A A^T + variance)^-1 (y - A x0), row by row; both (n,)."""
    if operator.decomposed:
        c = operator.V_adjoint(x0)
        values = operator.singular_values(x0.shape, x0.device, x0.dtype)
        total = column(range_variance, c) * values.square() + column(variance, c)
        return operator.V(values * (operator.U_adjoint(y) - values * c) / total)
    off = y - operator.A(x0)
    inner = conjugate_gradients(
        lambda v: column(range_variance, v) * operator.A(operator.A_adjoint(v)) + column(variance, v) * v,
        off, iterations=ITERATIONS, tol=TOL,
    )  # fmt: skip
    return operator.A_adjoint(inner)
