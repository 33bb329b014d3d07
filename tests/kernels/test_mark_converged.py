"""mark_converged: each backend against the plain-torch reference; arguments, opcheck."""

from __future__ import annotations

import os

import pytest
import torch

from deqdiff_fast.kernels import available_backends, mark_converged

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs CUDA or TRITON_INTERPRET=1")


def rows_to_mark(steps, batch, dtype=torch.float64):
    """Steps of all lengths after others of all lengths, with zeros, NaN and Inf among both."""
    draw = torch.Generator().manual_seed(steps)
    diff, previous = (10 ** (9 * torch.rand(steps, batch, generator=draw, dtype=torch.float64) - 9) for _ in range(2))
    norm = torch.rand(steps, batch, generator=draw, dtype=torch.float64) + 0.5
    odd = [0.0, float("nan"), float("inf")]
    for k, tensor in enumerate((diff, previous, norm)):
        for at, value in enumerate(odd):
            tensor.view(-1)[(7 * at + 3 * k) % tensor.numel()] = value
    return [t.to(dtype) for t in (diff, norm, previous)], torch.tensor([1.0, 0.01, 0.3][:batch], dtype=dtype)


@runs_triton
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (63, 2), (100, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton_marks_as_the_reference(steps, batch, dtype):
    given, strict = rows_to_mark(steps, batch, dtype)
    expected = [t.clone() for t in given]  # not in float64: what keeps 0 / 0 from NaN depends on the dtype
    actual = [t.clone().to(DEVICE) for t in given]
    mark_converged(*expected, strict, 1e-3, 1e-6, backend="reference")
    mark_converged(*actual, strict.to(DEVICE), 1e-3, 1e-6, backend="triton")
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (63, 2), (100, 3)])
@pytest.mark.parametrize("kind", ["dense", "strided", "float32"])
def test_cpp_marks_as_the_reference(steps, batch, kind):
    if available_backends()["cpp"] != "available":
        pytest.skip(available_backends()["cpp"])
    given, strict = rows_to_mark(steps, batch, torch.float32 if kind == "float32" else torch.float64)
    expected, actual = ([t.clone() for t in given] for _ in range(2))
    if kind == "strided":
        actual = [torch.stack([t, t], 1)[:, 0] for t in actual]
    mark_converged(*expected, strict, 1e-3, 1e-6, backend="reference")
    mark_converged(*actual, strict, 1e-3, 1e-6, backend="cpp")
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0, equal_nan=True)
    assert torch.equal(actual[1].nan_to_num(), given[1].nan_to_num())


def test_opcheck_and_bad_arguments():
    given, strict = rows_to_mark(9, 2)
    torch.library.opcheck(torch.ops.deqdiff_fast.mark_converged.default, (*given, strict, 1e-3, 1e-6))
    with pytest.raises(ValueError, match=r"previous: expected shape \(9, 2\), got \(8, 2\)"):
        mark_converged(*given[:2], given[2][1:], strict, 1e-3, 1e-6)
    with pytest.raises(ValueError, match="strict: expected dtype float64, got float32"):
        mark_converged(*given, strict.float(), 1e-3, 1e-6)
