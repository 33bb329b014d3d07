"""The two linear solves of restoration with noise: by singular vectors, or by conjugate gradients without them."""

from __future__ import annotations

from torch import Tensor

from ..operators import Operator, least_squares
from .levels import column

TOL = 1e-6


def proximal(operator: Operator, x0: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """argmin over z of ||A z - y||^2 + weight ||z - x0||^2, row by row. weight: (n,) > 0."""
    if operator.decomposed:
        values, rho = operator.singular_values(x0.shape, x0.device, x0.dtype), column(weight, operator.V_adjoint(x0))
        c = operator.V_adjoint(x0)
        return x0 + operator.V(values * (operator.U_adjoint(y) - values * c) / (values.square() + rho))
    return x0 + least_squares(operator.A, operator.A_adjoint, y - operator.A(x0), damping=weight, tol=TOL)


def weighted_residual(operator: Operator, x0: Tensor, y: Tensor, range_variance: Tensor, variance: Tensor) -> Tensor:
    """A^T (range_variance A A^T + variance)^-1 (y - A x0), row by row; both (n,)."""
    if operator.decomposed:
        c = operator.V_adjoint(x0)
        values = operator.singular_values(x0.shape, x0.device, x0.dtype)
        total = column(range_variance, c) * values.square() + column(variance, c)
        return operator.V(values * (operator.U_adjoint(y) - values * c) / total)
    off, ratio = y - operator.A(x0), variance / range_variance
    found = least_squares(operator.A, operator.A_adjoint, off, damping=ratio, tol=TOL)
    return found / column(range_variance, found)
