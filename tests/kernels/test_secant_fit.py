"""The fit of secants against a solve of every row by itself, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_operands import operands

from deqdiff_fast.kernels import secant_fit

SETTINGS = {"floor": 1e-5, "guessed": 5e-3, "nonlinear": 0.3}
TENSORS = ("gram", "size", "count", "ridges", "guess_error")


def one_row(gram, size, count, ridges, guess_error):
    """By numpy-like loops over the columns kept."""
    columns = len(gram)
    lengths = [math.sqrt(float(gram[k, k])) for k in range(columns)]
    kept = [
        k for k in range(columns)
        if k + 1 < count and lengths[k] > SETTINGS["floor"] * size
    ]  # fmt: skip
    found = torch.zeros(columns, columns, dtype=torch.float64)
    if not kept:
        return found
    ridge = [float(ridges[k]) for k in kept]
    if guess_error is not None:
        ridge = [
            max(r, (float(guess_error) / (SETTINGS["nonlinear"] * lengths[k])) ** 2) if r > SETTINGS["guessed"] else r
            for r, k in zip(ridge, kept)
        ]
    system = gram[kept][:, kept] + torch.diag(torch.tensor([r * lengths[k] ** 2 for r, k in zip(ridge, kept)]))
    found[torch.tensor(kept)[:, None], torch.tensor(kept)] = torch.linalg.inv(system)
    return found


def problem(rows, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    secants = normal(rows, columns, 40) * 10 ** (1.5 * normal(rows, columns, 1))
    ridges = torch.where(normal(columns, rows) > 0, 1e-2, 1e-6).double()
    return {
        "gram": secants @ secants.transpose(1, 2),
        "size": 100 * normal(rows).abs(),
        "count": torch.randint(0, columns + 2, (rows,), generator=draw, dtype=torch.int32),
        "ridges": ridges,
        "guess_error": 0.3 * normal(rows).abs(),
    }


def placed(given, backend):
    there = {k: v if v is None or backend != "triton" or not torch.cuda.is_available() else v.cuda()
             for k, v in given.items()}  # fmt: skip
    return torch.full_like(there["gram"], float("nan"), dtype=torch.float64), there


@pytest.mark.parametrize("guess", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7])
def test_as_every_row_by_itself(backend, columns, guess):
    given = problem(9 if columns < 5 else 4, columns) | ({} if guess else {"guess_error": None})
    fit, there = placed(given, backend)
    secant_fit(fit, **there, **SETTINGS, backend=backend)
    for r, row in enumerate(fit.cpu()):
        error = None if given["guess_error"] is None else given["guess_error"][r]
        size, count = float(given["size"][r]), int(given["count"][r])
        expected = one_row(given["gram"][r], size, count, given["ridges"][:, r], error)
        torch.testing.assert_close(row, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
        assert torch.equal(row == 0, expected == 0), "the columns kept"


def test_float32_grams(backend):
    given = problem(6, 3)
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    fit, there = placed(narrow, backend)
    exact, same = placed({k: v.double() if v.is_floating_point() else v for k, v in narrow.items()}, backend)
    secant_fit(fit, **there, **SETTINGS, backend=backend)
    secant_fit(exact, **same, **SETTINGS, backend=backend)
    torch.testing.assert_close(fit, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["column", "product", "nowhere"])
def test_what_is_not_finite(backend, value, where):
    """A broken column drops out; the others are as ever."""
    given = problem(4, 3) | {"count": torch.full((4,), 4, dtype=torch.int32)}
    before, there = placed(given, backend)
    secant_fit(before, **there, **SETTINGS, backend=backend)
    if where == "column":
        given["gram"][1, 2, :] = given["gram"][1, :, 2] = value
    elif where == "product":
        given["gram"][1, 0, 2] = given["gram"][1, 2, 0] = value
    fit, there = placed(given, backend)
    secant_fit(fit, **there, **SETTINGS, backend=backend)
    assert fit.isfinite().all()
    assert torch.equal(fit[[0, 2, 3]], before[[0, 2, 3]])
    if where == "column":
        assert not fit[1, 2].any()
        assert not fit[1, :, 2].any()
        assert fit[1, :2, :2].any()


def test_no_rows(backend):
    fit, there = placed(problem(0, 3), backend)
    secant_fit(fit, **there, **SETTINGS, backend=backend)


def test_the_dispatcher():
    torch.library.opcheck(torch.ops.deqdiff_fast.secant_fit.default, tuple(operands("secant_fit").values()))


@pytest.mark.parametrize("name", TENSORS)
def test_shapes_are_refused_by_name(name):
    given = operands("secant_fit")
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        secant_fit(**given | {name: given[name][None]})


def test_no_more_columns_than_a_history_has():
    given = problem(2, 8)
    with pytest.raises(ValueError, match=r"gram: expected shape \(R, H, H\) with 1 <= H < 8"):
        secant_fit(torch.zeros(2, 8, 8, dtype=torch.float64), **given, **SETTINGS)
