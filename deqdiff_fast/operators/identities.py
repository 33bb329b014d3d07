"""What a linear operator, its adjoint, its pseudo-inverse and its singular vectors owe each other, tried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from .base import Operator, Shape, compute_dtype

Violation = tuple[str, float, float]  # the identity, its relative violation, what is allowed


@with_torch_defaults
def check(
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> None:
    """Raise unless an operator is linear and its maps are what they say, on random images.

    Linearity, A^T by <A x, y> = <x, A^T y>, A^+ by the four identities of Penrose (Proc. Cambridge Philos. Soc.
    51, 1955), and where `decomposed` A = U diag(s) V^T with V orthonormal. A wrong operator passes with probability 0,
    if it is wrong by more than rounding and `Operator.cutoff` allow.

    Args:
        operator: for as many samples as `shape` has, if it is different for each.
        shape: (B, C, H, W) of the images.
        dtype: of the trial; float64 is the strictest.
        device: of the trial.
        generator: for the random images, on the host; None: a fixed seed.

    Raises:
        ValueError: an identity is violated, by name and size; or A does not take such images, or writes into them.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)

    def draw(size: Shape) -> Tensor:
        return torch.randn(tuple(size), generator=generator, dtype=torch.float64).to(dtype).to(device)

    with torch.no_grad():
        for identity, violation, allowed in _violations(operator, tuple(shape), draw):
            if not violation <= allowed:  # NaN is not
                raise ValueError(
                    f"{_name(operator)} violates {identity} by {violation:.1e} (relative); at most "
                    f"{allowed:.1e} is rounding in {dtype}"
                )


def _violations(operator: Operator, shape: tuple[int, ...], draw: Callable[[Shape], Tensor]) -> Iterator[Violation]:
    x, z = draw(shape), draw(shape)
    image, other = _left_alone(operator, "A", x), operator.A(z)
    if len(image) != shape[0]:
        raise ValueError(f"{_name(operator)}.A: {shape[0]} images came, {len(image)} measurements went")
    y = draw(image.shape)
    back, inverse = (_left_alone(operator, what, y) for what in ("A_adjoint", "A_dagger"))
    for what, found in (("A_adjoint", back), ("A_dagger", inverse)):
        if tuple(found.shape) != shape:
            raise ValueError(f"{_name(operator)}.{what}: expected images {shape}, got {tuple(found.shape)}")
    if operator.input_shape(image.shape) != shape:
        got = operator.input_shape(image.shape)
        raise ValueError(f"{_name(operator)}.input_shape: expected {shape}, got {got}")
    rounding = 1000 * torch.finfo(x.dtype).eps
    yield "A(2 x + z) = 2 A x + A z (linearity)", _apart(operator.A(2 * x + z), 2 * image + other), rounding
    yield "<A x, y> = <x, A_adjoint y>", _skew(image, y, x, back), rounding
    truncated, amplified, iterated = _tolerances(operator, x)
    if operator.decomposed:
        yield from _decomposition(operator, x, image, truncated, amplified)
    kept, fitted, w = operator.A_dagger(image), operator.A(inverse), draw(image.shape)
    yield "A A_dagger A = A", _apart(operator.A(kept), image), truncated
    yield "A_dagger A symmetric", _skew(kept, z, x, operator.A_dagger(other)), iterated
    yield "A A_dagger symmetric", _skew(fitted, w, y, operator.A(operator.A_dagger(w))), amplified
    yield "A_dagger A A_dagger = A_dagger", _apart(operator.A_dagger(fitted), inverse), iterated


def _tolerances(operator: Operator, x: Tensor) -> tuple[float, float, float]:
    """What identities may miss: where values below the cutoff are left out, other ones of measurements, of images.

    Small singular values amplify rounding. Conjugate gradients end at a gradient of accuracy |A^T y|, with an error of
    min(s, accuracy / s) in the measurements, at most its root, and a larger one in the image.
    """
    eps = torch.finfo(x.dtype).eps
    truncated = max(1000 * eps, 4 * operator.cutoff(x.dtype))
    if not operator.decomposed:
        root = operator.accuracy**0.5
        return max(truncated, 3 * root), max(truncated, 3 * root), max(truncated, min(0.5, 30 * root))
    values = _host(operator.singular_values(x.shape, x.device, compute_dtype(x.dtype)))
    smallest = torch.where(values > 0, values, torch.inf).min() / values.max()
    amplified = max(1000 * eps, min(0.1, 20 * eps / float(smallest)))
    return max(truncated, amplified), amplified, amplified


def _decomposition(
    operator: Operator, x: Tensor, image: Tensor, truncated: float, amplified: float
) -> Iterator[Violation]:
    rounding = 1000 * torch.finfo(x.dtype).eps
    values = operator.singular_values(x.shape, x.device, compute_dtype(x.dtype))
    if values.is_complex() or not bool((values >= 0).all()):
        raise ValueError(f"{_name(operator)}.singular_values: expected real numbers >= 0")
    coefficients = operator.V_adjoint(x)
    yield "V V_adjoint = 1", _apart(operator.V(coefficients), x), rounding
    norms = _norms(_host(coefficients)), _norms(_host(x))
    yield "||V_adjoint x|| = ||x||", _apart(*norms), rounding
    scaled = values * coefficients
    yield "A = U diag(s) V_adjoint", _apart(operator.U(scaled), image), truncated
    yield "U_adjoint A = diag(s) V_adjoint", _apart(operator.U_adjoint(image), scaled), amplified


def _left_alone(operator: Operator, what: str, x: Tensor) -> Tensor:
    """A map of x. Raises ValueError where it changes x itself."""
    kept, found = x.clone(), getattr(operator, what)(x)
    if not torch.equal(x, kept):
        raise ValueError(f"{_name(operator)}.{what}: expected to leave its input as it is; let it change a copy")
    return found  # type: ignore[no-any-return]


def _name(operator: Operator) -> str:
    """Whose maps these are."""
    return type(getattr(operator, "physics", operator)).__name__


def _apart(found: Tensor, expected: Tensor) -> float:
    """The relative distance of the worst sample."""
    away, size = _norms(_host(found) - _host(expected)), _norms(_host(expected))
    return float((away / torch.where(size > 0, size, 1)).max())


def _skew(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    """How far <a, b> is from <c, d>, in units of the norms, that of the worst sample."""
    a, b, c, d = map(_host, (a, b, c, d))
    away = ((a * b).flatten(1).sum(1) - (c * d).flatten(1).sum(1)).abs()
    size = torch.maximum(_norms(a) * _norms(b), _norms(c) * _norms(d))
    return float((away / torch.where(size > 0, size, 1)).max())


def _host(x: Tensor) -> Tensor:
    return x.detach().cpu().to(torch.float64)


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1)
    return norms


__all__ = ["check"]
