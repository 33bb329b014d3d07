"""Measurements are met by every operator and method; batches of them end sample by sample; what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operator_cases import CASES, images
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.operators import Blur, Downsample, Inpaint, Operator

SHAPE = (3, 8, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def allowed(operator: Operator, size: tuple[int, ...], dtype: torch.dtype) -> float:
    """1e-4, or what singular values that count as zero in this dtype, and are not, let through."""
    if not operator.decomposed:
        return 1e-4
    counted, there = (int((operator.singular_values(size, "cpu", d) > 0).sum()) for d in (dtype, torch.float64))
    return 1e-4 if counted == there else operator.cutoff(dtype)


@pytest.mark.parametrize(
    ("method", "dtype"), [("ddnm", torch.float32), ("ddrm", torch.float64), ("pigdm", torch.float32)]
)
@pytest.mark.parametrize("name", list(CASES))
def test_measurements_without_noise_are_met(
    mixture: Any, ddim: Any, relative_error: Any, name: str, method: str, dtype: torch.dtype
) -> None:
    """By operators that leave nothing open too."""
    case = CASES[name]
    operator = case.make()
    if method == "ddrm" and not operator.decomposed:
        pytest.skip("it needs singular vectors")
    y = operator.A(0.6 * images(case, dtype))
    restorer = dq.DEQRestorer(mixture(case.shape[1:]), ddim(10, 0.5), operator, method=method, solver="quasi-newton")
    found, exact = (solve(y, generator=generator()) for solve in (restorer.restore, restorer.serial))
    assert bool(found.converged.all())
    assert float(relative_error(found.sample, exact.sample).max()) <= 1e-2
    off = (operator.A(found.sample) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
    assert float(off.max()) <= allowed(operator, case.shape, dtype)
    assert float(found.consistency.max()) <= allowed(operator, case.shape, dtype)


class Bare:
    """Only the three maps of an operator."""

    def __init__(self, operator: Operator) -> None:
        self.A, self.A_adjoint, self.A_dagger = operator.A, operator.A_adjoint, operator.A_dagger


@pytest.mark.parametrize("method", ["ddnm", "pigdm"])
@pytest.mark.parametrize("hidden", [False, True], ids=["decomposed", "bare"])
def test_measurements_that_leave_nothing_open(mixture: Any, ddim: Any, method: str, hidden: bool) -> None:
    """A blur that can be undone, whose unknowns are rounding."""
    blur = Blur.gaussian(0.7)
    x = 0.6 * torch.randn(2, *SHAPE, generator=generator(7))
    operator = Bare(blur) if hidden else blur
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(20, 0.5), operator, method=method, solver="quasi-newton")
    found = restorer.restore(blur.A(x), generator=generator())
    assert bool(found.converged.all())
    assert float((found.sample - x).abs().max()) <= 1e-3


@pytest.mark.parametrize("method", ["ddnm", "ddrm", "diffpir", "pigdm"])
def test_samples_end_by_themselves(mixture: Any, ddim: Any, relative_error: Any, method: str) -> None:
    """One image is measured wholly and ends at once, the other hardly at all and does not in so few rounds."""
    masks = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    masks[1] = torch.rand(8, 8, generator=generator(1)) < 0.05
    y = Inpaint(masks).A(0.6 * torch.randn(2, *SHAPE, generator=generator(7), dtype=torch.float64))
    restorer = dq.DEQRestorer(
        mixture(SHAPE), ddim(40), Inpaint(masks), method=method, solver="picard", max_rounds=6, on_failure="warn"
    )
    expected = restorer.serial(y, generator=generator()).sample
    with pytest.warns(UserWarning, match="did not converge"):
        found = restorer.restore(y, generator=generator())
    assert found.converged.tolist() == [True, False]
    off = relative_error(found.sample, expected)
    assert float(off[0]) <= 1e-2 < float(off[1])


@pytest.mark.parametrize(
    "operator",
    [Blur.uniform(9), Blur.uniform(9, "reflect"), Blur.gaussian(2.0, angle=30.0)],
    ids=["uniform", "reflect", "anisotropic"],
)
def test_a_kernel_larger_than_the_images_is_named(mixture: Any, ddim: Any, operator: Blur) -> None:
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8), operator)
    for solve in (restorer.restore, restorer.serial):
        with pytest.raises(ValueError, match=r"kernel: \d+ x \d+ is larger than the images, 8 x 8"):
            solve(torch.zeros(1, *SHAPE))


def test_a_mask_that_measures_nothing_is_named(mixture: Any, ddim: Any) -> None:
    with pytest.raises(ValueError, match="mask: empty"):
        dq.DEQRestorer(mixture(SHAPE), ddim(8), Inpaint(torch.zeros(8, 8, dtype=torch.bool)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["ddnm", "ddrm", "diffpir", "pigdm"])
def test_measurements_that_are_no_numbers_are_named(mixture: Any, ddim: Any, method: str, value: float) -> None:
    def measured(operator: Any) -> Tensor:
        return operator.A(0.3 * torch.randn(3, *SHAPE, generator=generator()))

    y = measured(Downsample(2))
    y[2, 0, 1, 1] = value
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8), Downsample(2), sigma=0.1, method=method)
    with pytest.raises(ValueError, match="y: expected finite measurements, got NaN or Inf in sample 2"):
        restorer.restore(y, generator=generator())
