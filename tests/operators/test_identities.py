"""Operators that are not what they say are refused, with the identity and the size of its violation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deqdiff_fast import operators

SHAPE = (2, 3, 8, 8)


class Average(operators.Downsample):
    """Right; what derives from it is wrong in one thing."""

    def __init__(self) -> None:
        super().__init__(2)


class NotLinear(Average):
    def A(self, x: Tensor) -> Tensor:
        return super().A(x) + 0.01 * super().A(x).square()


class Offset(Average):
    def A(self, x: Tensor) -> Tensor:
        return super().A(x) + 0.5


class NotTheAdjoint(Average):
    def A_adjoint(self, y: Tensor) -> Tensor:
        return 4 * super().A_adjoint(y)  # the mistake that is made most often: nearest neighbours


class NotTheInverse(Average):
    def A_dagger(self, y: Tensor) -> Tensor:
        return 0.99 * super().A_dagger(y)


class NotTheSmallest(Average):
    """A right inverse, but not Moore and Penrose's: it adds what A does not see."""

    def A_dagger(self, y: Tensor) -> Tensor:
        x = super().A_dagger(y)
        stripes = torch.tensor([1.0, -1.0]).to(x).repeat(4)
        return x * (1 + 0.1 * stripes)


class OutsideTheRange(operators.Colorize):
    """Of channels with two measured twice: an inverse that is wrong only where no image's measurement lies."""

    def A(self, x: Tensor) -> Tensor:
        return super().A(x).repeat(1, 2, 1, 1)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return super().A_adjoint(y[:, :1] + y[:, 1:])

    def A_dagger(self, y: Tensor) -> Tensor:
        return super().A_dagger((y[:, :1] + y[:, 1:]) / 2 + 0.1 * (y[:, :1] - y[:, 1:]))

    def input_shape(self, y_shape):  # type: ignore[no-untyped-def]
        return (y_shape[0], 3, *y_shape[2:])

    decomposed = False


class NotOrthonormal(Average):
    def V_adjoint(self, x: Tensor) -> Tensor:
        return 2 * super().V_adjoint(x)

    def V(self, c: Tensor) -> Tensor:
        return super().V(c) / 2


class OtherValues(Average):
    def singular_values(self, *args: object) -> Tensor:
        return 1.05 * super().singular_values(*args)  # type: ignore[arg-type]


class NotFinite(Average):
    def A(self, x: Tensor) -> Tensor:
        return super().A(x) * torch.nan


class OtherShape(Average):
    def A_adjoint(self, y: Tensor) -> Tensor:
        return super().A_adjoint(y)[..., :-1]


WRONG = {
    NotLinear: "linearity",
    Offset: "linearity",
    NotTheAdjoint: "<A x, y> = <x, A_adjoint y>",
    NotTheInverse: "A A_dagger A = A",
    NotTheSmallest: "A_dagger A symmetric",
    OutsideTheRange: "A A_dagger symmetric",
    NotOrthonormal: "||V_adjoint x|| = ||x||",
    OtherValues: "A = U diag(s) V_adjoint",
    NotFinite: "linearity",
    OtherShape: "A_adjoint: expected images",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wrong", list(WRONG), ids=lambda kind: kind.__name__)
def test_a_wrong_operator_is_refused_by_name(wrong: type[operators.Operator], dtype: torch.dtype) -> None:
    operators.check(Average(), SHAPE, dtype)
    with pytest.raises(ValueError) as raised:
        operators.check(wrong(), SHAPE, dtype)
    assert WRONG[wrong] in str(raised.value)
    assert wrong.__name__ in str(raised.value)


def test_the_size_of_the_violation_is_said() -> None:
    with pytest.raises(ValueError, match=r"by 1\.0e-02 \(relative\)"):
        operators.check(NotTheInverse(), SHAPE, torch.float64)


def test_a_coarse_cutoff_hides_no_mistake_elsewhere() -> None:
    """What is left out of a pseudo-inverse is the cutoff's size; that it is symmetric is not for it to decide."""

    class Tilted(operators.Blur):
        def A_dagger(self, y: Tensor) -> Tensor:
            x = super().A_dagger(y)
            return x + 0.01 * x.flip(-1)

    kernel = operators.Blur.gaussian(1.0).kernel
    operators.check(operators.Blur(kernel, rtol=0.1), SHAPE)
    with pytest.raises(ValueError, match=r"symmetric|A_dagger A A_dagger"):
        operators.check(Tilted(kernel, rtol=0.1), SHAPE)


def test_it_is_drawn_from_the_generator() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    operators.check(Average(), SHAPE, generator=generator)
    assert not torch.equal(before, generator.get_state())


def test_an_operator_that_is_badly_conditioned_passes_in_float32() -> None:
    """Its small singular values are rounding there, and left out."""
    operators.check(operators.Blur.gaussian(3.0, padding="reflect"), (2, 3, 32, 32), torch.float32)
    operators.check(operators.Blur.gaussian(3.0), (2, 3, 32, 32), torch.float32)


@pytest.mark.parametrize("what", ["A", "A_adjoint", "A_dagger"])
def test_maps_that_change_their_input_are_refused(what: str) -> None:
    """All identities hold for them, and restorations came out wrong."""
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    operator = operators.Inpaint(mask)
    setattr(operator, what, lambda x: x.mul_(mask))
    with pytest.raises(ValueError, match=f"Inpaint.{what}: expected to leave its input as it is"):
        operators.check(operator, SHAPE)
