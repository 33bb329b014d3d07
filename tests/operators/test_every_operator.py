"""What is true of every operator: its maps against its dense matrix, dtypes, gradients, samples on their own."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, Case, images

from deqdiff_fast import operators


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def dense(operator: operators.Operator, shape: tuple[int, ...], sample: int) -> torch.Tensor:
    """The (m, n) matrix of a sample's operator, made column by column from `A` alone."""
    numel = shape[1] * shape[2] * shape[3]
    columns = []
    for basis in torch.eye(numel, dtype=torch.float64):
        batch = torch.zeros(shape, dtype=torch.float64)
        batch[sample] = basis.reshape(shape[1:])
        columns.append(operator.A(batch)[sample].flatten())
    return torch.stack(columns, 1)


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def test_its_maps_are_those_of_its_dense_matrix(case: Case) -> None:
    operator, x = case.make(), images(case)
    y = torch.randn(operator.A(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sample in {0, len(x) - 1}:
        matrix = dense(operator, case.shape, sample)
        inverse = torch.linalg.pinv(matrix, rtol=operator.cutoff(torch.float64))
        for found, expected in (
            (operator.A(x), matrix @ rows(x)[sample]),
            (operator.A_adjoint(y), matrix.T @ rows(y)[sample]),
            (operator.A_dagger(y), inverse @ rows(y)[sample]),
        ):
            allowed = 1e-5 if operator.accuracy else 1e-9  # conjugate gradients end at theirs
            torch.testing.assert_close(rows(found)[sample], expected, rtol=allowed, atol=allowed * expected.abs().max())


def test_its_decomposition_is_one(case: Case) -> None:
    operator, x = case.make(), images(case)
    if not operator.decomposed:
        with pytest.raises(NotImplementedError, match="no singular value decomposition"):
            operator.V_adjoint(x)
        return
    values = operator.singular_values(x.shape, "cpu", torch.float64)
    coefficients = operator.V_adjoint(x)
    assert coefficients.is_floating_point()
    torch.testing.assert_close(rows(coefficients).norm(dim=1), rows(x).norm(dim=1))
    torch.testing.assert_close(operator.V(coefficients), x)
    y = operator.A(x)
    torch.testing.assert_close(operator.U(values * coefficients), y, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(operator.U_adjoint(y), (values * coefficients).expand_as(coefficients))
    assert bool((operator.U_adjoint(y)[(values == 0).expand_as(coefficients)] == 0).all())
    for sample in {0, len(x) - 1}:
        expected = torch.linalg.svdvals(dense(operator, case.shape, sample))
        own = values.expand(coefficients.shape)[sample].flatten().sort(descending=True).values
        torch.testing.assert_close(own[: len(expected)], expected[: len(own)], rtol=1e-7, atol=1e-7 * float(own[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_passes_its_own_check(case: Case, dtype: torch.dtype) -> None:
    operators.check(case.make(), case.shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_follows_the_dtype(case: Case, dtype: torch.dtype) -> None:
    operator, x = case.make(), images(case)
    exact, short = operator.A(x), operator.A(x.to(dtype))
    assert short.dtype == dtype
    scale = float(exact.abs().max())
    torch.testing.assert_close(short.double(), exact, rtol=0, atol=10 * torch.finfo(dtype).eps * scale)
    for found in (operator.A_adjoint(short), operator.A_dagger(short)):
        assert found.dtype == dtype
        assert bool(found.isfinite().all())
    if operator.decomposed:
        assert operator.V_adjoint(x.to(dtype)).dtype == dtype
        assert operator.U_adjoint(short).dtype == dtype


def test_samples_do_not_know_each_other(case: Case) -> None:
    operator, x = case.make(), images(case)
    y = operator.A(x)
    index = torch.tensor([1, 0, 1, 1])
    some = operator.for_samples(index)
    assert (some is not operator) == operator.per_sample
    torch.testing.assert_close(some.A(x[index]), y[index])
    torch.testing.assert_close(some.A_adjoint(y[index]), operator.A_adjoint(y)[index])
    torch.testing.assert_close(some.A_dagger(y[index]), operator.A_dagger(y)[index])
    again = some.for_samples(torch.tensor([2]))  # samples of samples
    torch.testing.assert_close(again.A(x[1:2]), y[1:2])
    if operator.decomposed:
        torch.testing.assert_close(some.V_adjoint(x[index]), operator.V_adjoint(x)[index])
        values = operator.singular_values(x.shape, "cpu", x.dtype)
        own = some.singular_values(x[index].shape, "cpu", x.dtype)
        torch.testing.assert_close(own, values[index] if values.dim() == 4 and len(values) > 1 else values)


def test_a_batch_of_another_size_is_refused_where_samples_have_their_own(case: Case) -> None:
    operator, x = case.make(), images(case)
    if operator.per_sample:
        with pytest.raises(ValueError, match=r"samples|mask is"):
            operator.A(torch.cat([x, x, x]))
    else:
        assert len(operator.A(torch.cat([x, x, x]))) == 3 * len(x)


def test_torch_differentiates_it(case: Case) -> None:
    """The derivative of y -> A^+ y is its transpose, and that of x -> A x is A^T."""
    operator, x = case.make(), images(case).requires_grad_()
    y = operator.A(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    (gradient,) = torch.autograd.grad(y, x, weights)
    torch.testing.assert_close(gradient, operator.A_adjoint(weights), rtol=1e-7, atol=1e-7)
    given, direction = weights.requires_grad_(), images(case, seed=9)
    (pulled,) = torch.autograd.grad(operator.A_dagger(given), given, direction)
    other = operator.A(images(case, seed=11)).detach()
    left, right = (pulled * other).flatten(1).sum(1), (operator.A_dagger(other) * direction).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_it_says_what_images_its_measurements_are_of(case: Case) -> None:
    operator, x = case.make(), images(case)
    assert operator.input_shape(operator.A(x).shape) == case.shape


def test_it_is_the_same_every_time(case: Case) -> None:
    x = images(case, torch.float32)
    one, two = case.make(), case.make()
    assert torch.equal(one.A(x), two.A(x))
    y = one.A(x)
    assert torch.equal(one.A_dagger(y), two.A_dagger(y))
    assert torch.equal(one.A_dagger(y), one.A_dagger(y))


def test_the_default_device_does_not_matter(case: Case) -> None:
    operator, x = case.make(), images(case)
    expected = operator.A_dagger(operator.A(x))
    index = torch.tensor([1])
    torch.set_default_device("meta")  # no number can be read there
    try:
        other = case.make()
        torch.testing.assert_close(other.A_dagger(other.A(x)), expected)
        assert other.for_samples(index).A(x[index]).device.type == "cpu"
        operators.check(other, case.shape)
    finally:
        torch.set_default_device(None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_follows_the_device(case: Case) -> None:
    operator, x = case.make(), images(case)
    y = operator.A(x.cuda())
    torch.testing.assert_close(y.cpu(), operator.A(x))
    torch.testing.assert_close(operator.A_dagger(y).cpu(), operator.A_dagger(y.cpu()), rtol=1e-5, atol=1e-5)
    index = torch.tensor([1, 0], device="cuda")
    torch.testing.assert_close(operator.for_samples(index).A(x.cuda()[index]).cpu(), operator.A(x)[[1, 0]])
    operators.check(operator, case.shape, torch.float32, "cuda")


def test_every_name_is_in_the_cases() -> None:
    made = {type(case.make()) for case in CASES.values()}
    named = {operators.Bicubic, operators.Blur, operators.Colorize, operators.Compose, operators.Downsample}
    assert made == named | {operators.Inpaint, operators.WalshHadamard}


def test_what_it_keeps_of_a_call_under_inference_mode_has_gradients(case: Case) -> None:
    with torch.inference_mode():
        operator, x = case.make(), images(case)
        operator.A_dagger(operator.A(x))
    given = images(case).requires_grad_()
    operator.A_dagger(operator.A(given)).sum().backward()
    assert given.grad is not None
