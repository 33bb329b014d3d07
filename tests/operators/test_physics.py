"""Objects of other libraries are taken as they are; with deepinv, where it is installed, its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import draw
from torch import Tensor

from deqdiff_fast import operators


class Foreign:
    """Three maps, nothing else: every second column."""

    def A(self, x: Tensor) -> Tensor:
        return x[..., ::2]

    def A_adjoint(self, y: Tensor) -> Tensor:
        return torch.stack([y, torch.zeros_like(y)], -1).flatten(-2)

    A_dagger = A_adjoint


class WithVectors(torch.nn.Module):
    """A decomposition with V the flipped image, as deepinv's `DecomposablePhysics`: U, V and singular values `mask`."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def V_adjoint(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    V = V_adjoint

    def U(self, c: Tensor) -> Tensor:
        return c.flip(-2)

    U_adjoint = U

    def A(self, x: Tensor) -> Tensor:
        return self.U(self.mask * self.V_adjoint(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.V(self.mask * self.U_adjoint(y))

    def A_dagger(self, y: Tensor) -> Tensor:
        raise AssertionError("its singular values say it")


class Doubled(WithVectors):
    """V is not orthonormal, so only the three maps serve."""

    def V_adjoint(self, x: Tensor) -> Tensor:
        return 2 * x.flip(-1)

    def A_dagger(self, y: Tensor) -> Tensor:
        return y


def test_an_operator_is_itself() -> None:
    operator = operators.Downsample(2)
    assert operators.take(operator) is operator


def test_three_maps_are_enough() -> None:
    taken = operators.take(Foreign())
    assert not taken.decomposed
    assert taken.for_samples(torch.tensor([0])) is taken
    assert taken.input_shape((2, 3, 4, 2)) == (2, 3, 4, 4)
    operators.check(taken, (2, 3, 4, 4), torch.float64)


def test_singular_vectors_are_used_where_they_are_orthonormal() -> None:
    values = draw(1, 3, 6, 5) * (draw(1, 3, 6, 5, seed=1) > 0.3)
    taken = operators.take(WithVectors(values), (3, 6, 5))
    assert taken.decomposed
    operators.check(taken, (2, 3, 6, 5), torch.float64)
    assert not operators.take(Doubled(values), (3, 6, 5)).decomposed
    assert not operators.take(WithVectors(-values), (3, 6, 5)).decomposed  # they would be no singular values


def test_a_module_with_parameters_for_each_sample() -> None:
    physics = WithVectors(draw(3, 1, 6, 5))
    taken, x = operators.take(physics, (3, 6, 5)), draw(3, 3, 6, 5, seed=2)
    assert taken.per_sample
    index = torch.tensor([2, 0, 2, 1])
    torch.testing.assert_close(taken.for_samples(index).A(x[index]), taken.A(x)[index])
    operators.check(taken, (3, 3, 6, 5), torch.float64)
    assert len(physics.mask) == 3  # the object itself is as it was


def test_what_is_missing_is_named() -> None:
    class Half:
        A = Foreign.A
        A_adjoint = Foreign.A_adjoint

    with pytest.raises(TypeError, match="Half has no A_dagger"):
        operators.take(Half())


def test_what_is_no_tensor_is_named() -> None:
    class Listed(Foreign):
        def A(self, x: Tensor) -> Any:
            return [x]

    with pytest.raises(ValueError, match=r"Listed.A: expected a tensor, got list"):
        operators.take(Listed()).A(draw(1, 3, 4, 4))


@pytest.fixture(scope="module")
def deepinv() -> Any:
    return pytest.importorskip("deepinv")


SHAPE = (2, 3, 16, 24)


def same(ours: operators.Operator, theirs: Any, inverse: bool = True) -> None:
    """A, A^T and A^+ are the same maps."""
    x = draw(*SHAPE).float()
    y = ours.A(x)
    torch.testing.assert_close(theirs.A(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.A_adjoint(y), ours.A_adjoint(y), rtol=1e-4, atol=1e-5)
    if not inverse:  # theirs is made by iterations that end early
        return
    projected, expected = theirs.A(theirs.A_dagger(y)), ours.A(ours.A_dagger(y))
    torch.testing.assert_close(projected, expected, rtol=1e-2, atol=2e-3)


def test_ours_are_deepinvs(deepinv: Any) -> None:
    physics = deepinv.physics
    mask = (draw(1, 1, 16, 24) > 0.4).float()
    same(operators.Inpaint(mask), physics.Inpainting(img_size=SHAPE[1:], mask=mask))
    same(operators.Colorize((0.2, 0.5, 0.3)), physics.Decolorize(srf=(0.2, 0.5, 0.3)))
    average = torch.full((1, 1, 4, 4), 1 / 16)
    for factor in (2, 4):
        x = draw(*SHAPE).float()
        bicubic = physics.DownsamplingMatlab(factor=factor)
        torch.testing.assert_close(operators.Bicubic(factor).A(x), bicubic.A(x), rtol=1e-4, atol=1e-5)
    # deepinv takes the first pixel of every block, ours is centred: roll by the difference
    blocks = physics.Downsampling(img_size=SHAPE[1:], filter=average, factor=4, padding="circular")
    torch.testing.assert_close(operators.Downsample(4).A(x), blocks.A(x.roll((-1, -1), (2, 3))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (4, 6)])
def test_our_blurs_are_deepinvs(deepinv: Any, size: tuple[int, int]) -> None:
    kernel = (draw(size[0], 1) * draw(1, size[1], seed=1)).float()[None, None]
    kernel /= kernel.sum()
    for padding in ("circular", "reflect", "replicate", "valid"):
        same(operators.Blur(kernel, padding), deepinv.physics.Blur(filter=kernel, padding=padding), inverse=False)
    same(operators.Blur(kernel), deepinv.physics.BlurFFT(img_size=SHAPE[1:], filter=kernel))


def test_deepinvs_physics_are_taken(deepinv: Any) -> None:
    physics = deepinv.physics
    mask, kernel = (draw(1, 1, 16, 24) > 0.4).float(), draw(1, 1, 3, 3).float()
    kernel /= kernel.sum()
    x = draw(*SHAPE).float()
    taken = {
        "inpainting": (physics.Inpainting(img_size=SHAPE[1:], mask=mask), True),
        "fourier": (physics.BlurFFT(img_size=SHAPE[1:], filter=kernel), True),
        "grey": (physics.Decolorize(), True),
        "one pixel": (physics.SinglePixelCamera(m=100, img_size=(3, 16, 16)), True),
        "blur": (physics.Blur(filter=kernel, padding="circular"), False),
        "down": (physics.Downsampling(img_size=SHAPE[1:], filter="bicubic", factor=2), False),
        "random": (physics.CompressedSensing(m=50, img_size=(3, 16, 16)), False),
    }
    for name, (theirs, decomposed) in taken.items():
        operator = operators.take(theirs)
        assert operator.decomposed is decomposed, name
        images = x if name not in ("one pixel", "random") else x[..., :16].contiguous()
        torch.testing.assert_close(operator.A(images), theirs.A(images), rtol=1e-4, atol=1e-5)
        operators.check(operator, tuple(images.shape))


def test_deepinvs_masks_for_each_sample(deepinv: Any) -> None:
    mask = (draw(2, 1, 16, 24) > 0.4).float()
    theirs = deepinv.physics.Inpainting(img_size=SHAPE[1:], mask=mask)
    taken, x = operators.take(theirs), draw(*SHAPE).float()
    index = torch.tensor([1, 1, 0])
    torch.testing.assert_close(taken.for_samples(index).A(x[index]), theirs.A(x)[index])
