"""What each operator is, by other people's formulas, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from operator_cases import draw
from torch.nn import functional

from deqdiff_fast import operators

Blur = operators.Blur


def test_averages_are_torchs() -> None:
    x = draw(2, 3, 12, 8)
    torch.testing.assert_close(operators.Downsample(4).A(x), functional.avg_pool2d(x, 4))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_is_torchs_antialiased_inside(factor: int) -> None:
    """torch's takes other weights where the kernel goes over the border."""
    x = draw(2, 3, 8 * factor, 10 * factor)
    expected = functional.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(operators.Bicubic(factor).A(x)[inside], expected[inside])


def test_bicubic_mirrors_at_the_border_and_keeps_constants() -> None:
    x, operator = draw(1, 1, 16, 16), operators.Bicubic(2)
    torch.testing.assert_close(operator.A(torch.ones_like(x)), torch.ones_like(x[..., ::2, ::2]))
    mirrored = torch.cat([x.flip(-1), x, x.flip(-1)], -1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], -2)
    torch.testing.assert_close(operator.A(x), operator.A(mirrored)[..., 8:16, 8:16])


@pytest.mark.parametrize("size", [(3, 5), (4, 3), (2, 2)])
@pytest.mark.parametrize("padding", ["circular", "reflect", "replicate", "constant"])
def test_blur_is_the_convolution_of_a_padded_image(padding: str, size: tuple[int, int]) -> None:
    kernel, x = draw(size[0], 1) * draw(1, size[1], seed=1), draw(2, 3, 7, 9)
    top, left = size[0] - 1 - size[0] // 2, size[1] - 1 - size[1] // 2
    padded = functional.pad(x, (left, size[1] // 2, top, size[0] // 2), mode=padding)
    flipped = kernel.flip(0, 1).expand(3, 1, *size)  # torch correlates
    # with the flipped kernel the centre, h // 2, lies h - 1 - h // 2 from the top
    torch.testing.assert_close(Blur(kernel, padding).A(x), functional.conv2d(padded, flipped, groups=3))


def test_valid_blur_needs_nothing_outside() -> None:
    kernel, x = draw(3, 1) * draw(1, 4, seed=1), draw(2, 3, 7, 9)
    expected = functional.conv2d(x, kernel.flip(0, 1).expand(3, 1, 3, 4), groups=3)
    torch.testing.assert_close(Blur(kernel, "valid").A(x), expected)


def test_a_gaussian_has_its_moments() -> None:
    kernel = Blur.gaussian((2.0, 0.8), angle=90).kernel[0, 0]
    assert kernel.sum().item() == pytest.approx(1)
    offset = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    down, right = (math.sqrt(float((kernel.sum(k) * offset**2).sum())) for k in (1, 0))
    assert (down, right) == pytest.approx((0.8, 2.0), rel=0.03)  # turned by 90 degrees, cut off at 3 deviations
    turned = Blur.gaussian((2.0, 0.8), angle=45).kernel[0, 0]
    assert float((turned * offset[:, None] * offset).sum()) > 1  # down and right together


def test_batches_of_kernels_are_as_each_alone() -> None:
    kernels, x = draw(2, 1, 3, 3), draw(2, 3, 6, 6)
    together = Blur(kernels).A(x)
    for sample in range(2):
        torch.testing.assert_close(together[sample : sample + 1], Blur(kernels[sample, 0]).A(x[sample : sample + 1]))


def test_colors_are_summed_by_weight() -> None:
    x = draw(2, 3, 4, 5)
    expected = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    torch.testing.assert_close(operators.Colorize().A(x), expected)


def test_walsh_hadamard_measures_signed_sums_of_all_pixels() -> None:
    operator, x = operators.WalshHadamard((8, 8), 0.25, seed=3), draw(2, 1, 8, 8)
    y = operator.A(x)
    assert y.shape == (2, 1, 16)
    torch.testing.assert_close(y[:, :, 0], x.sum((2, 3)) / 8)  # the mean is always there
    rows = torch.stack([operator.A(pixel.reshape(1, 1, 8, 8))[0, 0] for pixel in torch.eye(64, dtype=x.dtype)], 1)
    torch.testing.assert_close(rows.abs(), torch.full_like(rows, 1 / 8))
    torch.testing.assert_close(rows @ rows.T, torch.eye(16, dtype=x.dtype))
    assert not torch.equal(operators.WalshHadamard((8, 8), 0.25, seed=4).A(x), y)
    assert torch.equal(operators.WalshHadamard((8, 8), 0.25, seed=3).A(x), y)


def test_pixels_that_are_not_measured_may_be_nan() -> None:
    mask = torch.tensor([[True, False]])
    y = operators.Inpaint(mask).A_dagger(torch.tensor([[[[1.0, math.nan]]]]))
    assert y.flatten().tolist() == [1.0, 0.0]


def test_composition_of_products_is_exact_and_of_others_by_conjugate_gradients() -> None:
    x = draw(2, 3, 8, 8)
    blur, average, mask = Blur.gaussian(0.8), operators.Downsample(2), operators.Inpaint(draw(4, 4) > 0.4)
    exact = operators.Compose(blur, average)
    assert exact.decomposed
    torch.testing.assert_close(exact.A(x), average.A(blur.A(x)))
    iterated = operators.Compose(blur, average, mask)
    assert not iterated.decomposed
    torch.testing.assert_close(iterated.A(x), mask.A(average.A(blur.A(x))))
    y = iterated.A(x)
    torch.testing.assert_close(iterated.A(iterated.A_dagger(y)), y, rtol=1e-5, atol=1e-5)
    nested = operators.Compose(exact, operators.Colorize())
    assert nested.decomposed
    torch.testing.assert_close(nested.A(x), operators.Colorize().A(exact.A(x)))
    assert not operators.Compose(Blur.gaussian((2.0, 0.5), angle=20, size=5), average).decomposed


def test_a_decomposition_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    operator, x = operators.Downsample(2), draw(3, 1, 4, 4)
    for _ in range(3):
        operator.A_dagger(operator.A(x))
    assert len(calls) == 2  # height and width
    kernels = draw(3, 1, 3, 1) * draw(3, 1, 1, 3, seed=1)
    several = Blur(kernels, "reflect")
    several.A(x)
    before = len(calls)
    several.for_samples(torch.tensor([2, 0])).A(x[:2])  # between model calls
    assert len(calls) == before


@pytest.mark.parametrize("damping", [0.0, 0.3, torch.tensor([0.1, 2.0], dtype=torch.float64)])
def test_least_squares_are_the_normal_equations(damping: float | torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    forward = lambda x: (matrices @ x[..., None])[..., 0]  # noqa: E731
    adjoint = lambda y: (matrices.mT @ y[..., None])[..., 0]  # noqa: E731
    added = torch.as_tensor(damping, dtype=torch.float64).reshape(-1, 1, 1) * torch.eye(6, dtype=torch.float64)
    maps = torch.linalg.pinv(matrices.mT @ matrices + added, rtol=1e-10) @ matrices.mT
    found = operators.least_squares(forward, adjoint, y, damping=damping, tol=1e-12)
    torch.testing.assert_close(found, (maps @ y[..., None])[..., 0])
    weights = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(found, y, weights)
    torch.testing.assert_close(gradient, (maps.mT @ weights[..., None])[..., 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_of_what_no_image_has_are_zero(dtype: torch.dtype) -> None:
    """As are the gradients that a null part passes on: steps along their rounding led to 1e108."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(400, 8, 8, generator=generator, dtype=torch.float64))[0]
    matrices, y = left[..., :5].to(dtype) / 2, (left[..., 5:] @ torch.ones(3, 1, dtype=torch.float64))[..., 0].to(dtype)
    found = operators.least_squares(
        lambda x: (matrices @ x[..., None])[..., 0], lambda y: (matrices.mT @ y[..., None])[..., 0], y
    )
    assert float(found.norm(dim=1).max()) < 100 * torch.finfo(dtype).eps


NAN = math.nan
REFUSED = {
    "mask: empty": lambda: operators.Inpaint(torch.zeros(4, 4)),
    "mask: empty (sample 1)": lambda: operators.Inpaint(
        torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1).expand(2, 1, 3, 3)
    ),
    "mask: expected bool, or zeros and ones": lambda: operators.Inpaint(torch.full((4, 4), 0.5)),
    "or NaN": lambda: operators.Inpaint(torch.full((4, 4), NAN)),
    "mask: expected a tensor (H, W)": lambda: operators.Inpaint(torch.ones(4)),
    "the mask is (1, 1, 4, 4)": lambda: operators.Inpaint(torch.ones(4, 4)).A(torch.zeros(1, 3, 4, 5)),
    "factor: expected a whole number >= 2": lambda: operators.Downsample(1),
    "factor: expected a whole number >= 2, got 2.0": lambda: operators.Bicubic(2.0),  # type: ignore[arg-type]
    "factor: 4 does not divide images of 8 x 6": lambda: operators.Downsample(4).A(torch.zeros(1, 1, 8, 6)),
    "factor: 2 does not divide images of 7 x 6": lambda: operators.Bicubic(2).A(torch.zeros(1, 1, 7, 6)),
    "kernel: it holds NaN": lambda: Blur(torch.tensor([[1.0, NAN]])),
    "kernel: it is zero everywhere": lambda: Blur(torch.zeros(3, 3)),
    "kernel: expected a real tensor (h, w)": lambda: Blur(torch.ones(3)),
    "kernel: 5 x 5 is larger than the images, 4 x 8": lambda: Blur.uniform(5).A(torch.zeros(1, 1, 4, 8)),
    "kernel: 3 x 9 is larger than the images, 4 x 8": lambda: Blur.uniform((3, 9), "reflect").A(
        torch.zeros(1, 1, 4, 8)
    ),
    "needs one that is a product": lambda: Blur(draw(3, 3), "reflect"),
    "padding: expected one of": lambda: Blur(torch.ones(3, 3), "mirror"),
    "rtol: expected": lambda: Blur(torch.ones(3, 3), rtol=-1.0),
    "std: expected numbers > 0": lambda: Blur.gaussian(0.0),
    "size: expected an odd number": lambda: Blur.gaussian(1.0, size=4),
    "there are kernels for 2 samples": lambda: Blur(draw(2, 1, 3, 3)).A(torch.zeros(3, 1, 8, 8)),
    "it is for 2 samples, 3 rows came": lambda: Blur(draw(2, 1, 3, 1), "valid").A(torch.zeros(3, 1, 8, 8)),
    "it is for 3 channels, 2 came": lambda: Blur(draw(1, 3, 3, 1), "valid").A(torch.zeros(3, 2, 8, 8)),
    "weights: expected finite numbers": lambda: operators.Colorize([0.0, 0.0]),
    "weights: there are 3, images of 4 channels": lambda: operators.Colorize().A(torch.zeros(1, 4, 2, 2)),
    "expected measurements (B, 1, H, W) of Colorize": lambda: operators.Colorize().A_dagger(torch.zeros(1, 3, 2, 2)),
    "size: expected (H, W) whose product is a power of two": lambda: operators.WalshHadamard((3, 4), 0.5),
    "ratio: expected": lambda: operators.WalshHadamard((4, 4), 0.0),
    "it is for images of (4, 4)": lambda: operators.WalshHadamard((4, 4), 0.5).A(torch.zeros(1, 1, 4, 8)),
    "expected measurements (B, C, 8)": lambda: operators.WalshHadamard((4, 4), 0.5).A_dagger(torch.zeros(1, 1, 7)),
    "operators: expected one or more": lambda: operators.Compose(),
    "expected a floating tensor (B, C, H, W), got torch.float32 of shape (3, 4": lambda: operators.Downsample(2).A(
        torch.zeros(3, 4, 4)
    ),
    "got torch.int64 of shape": lambda: Blur.uniform(3).A(torch.zeros(1, 1, 4, 4, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_what_is_wrong_is_named(message: str) -> None:
    with pytest.raises(ValueError) as raised:
        REFUSED[message]()
    assert message in str(raised.value)
