"""DEQRestorer against the papers' loops, against itself one step after the other, and on the bundled model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.operators import Downsample, Inpaint, Operator
from deqdiff_fast.restoration import DiffPIR

_spec = importlib.util.spec_from_file_location("published_loops", Path(__file__).with_name("published_loops.py"))
assert _spec is not None
assert _spec.loader is not None
published_loops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published_loops)

SHAPE = (3, 8, 8)
METHODS = ("ddnm", "ddrm", "diffpir", "pigdm")


def operators() -> dict[str, Operator]:
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    return {
        "average": Downsample(2), "inpaint": Inpaint(mask), "blur": dq.operators.Blur(torch.outer(kernel, kernel)),
        "grey": dq.operators.Colorize(), "hadamard": dq.operators.WalshHadamard((8, 8), 0.4),
    }  # fmt: skip


class Bare:
    """Only the three maps of an operator: nobody sees its singular vectors."""

    def __init__(self, operator: Operator) -> None:
        self.A, self.A_adjoint, self.A_dagger = operator.A, operator.A_adjoint, operator.A_dagger


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measured(operator: Operator, sigma: float, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Measurements of images that the mixture of the tests could have made."""
    x = 0.6 * torch.randn(batch, *SHAPE, generator=generator(7), dtype=dtype)
    y = operator.A(x)
    return y + sigma * torch.randn(y.shape, generator=generator(8), dtype=dtype)


@pytest.mark.parametrize("eta", [0.0, 0.85])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(operators()))
def test_serial_is_the_papers_loop(mixture: Any, ddim: Any, name: str, method: str, sigma: float, eta: float) -> None:
    operator, schedule, model = operators()[name], ddim(8, eta), mixture(SHAPE)
    y = measured(operator, sigma)
    restorer = dq.DEQRestorer(model, schedule, operator, sigma=sigma, method=method)
    got = restorer.serial(y, generator=generator())
    loop = published_loops.Loop(model, schedule, operator, y, sigma, SHAPE, 0, fresh=method == "ddrm")
    if method == "diffpir":
        expected = loop.diffpir(DiffPIR().weight) if sigma else loop.ddnm()
    elif method == "ddnm" and sigma:
        expected = loop.ddnm_plus()
    else:
        expected = getattr(loop, method)()
    assert float((got.sample - expected).abs().max()) < 1e-6
    if sigma == 0:
        assert float(got.consistency.max()) <= 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.85])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(operators()))
def test_parallel_is_serial(
    mixture: Any, ddim: Any, relative_error: Any, name: str, method: str, sigma: float, eta: float
) -> None:
    operator, schedule, model = operators()[name], ddim(20, eta), mixture(SHAPE)
    y = measured(operator, sigma)
    for tol, allowed in ((None, 1e-2), (1e-5, 1e-4)):
        restorer = dq.DEQRestorer(
            model, schedule, operator, sigma=sigma, method=method, tol=tol, solver="quasi-newton", on_failure="raise"
        )
        expected = restorer.serial(y, generator=generator())
        got = restorer.restore(y, generator=generator())
        assert bool(got.converged.all())
        assert float(relative_error(got.sample, expected.sample).max()) <= allowed
        if sigma == 0:
            assert float(got.consistency.max()) <= 1e-4
        assert got.stats.rounds < schedule.num_steps
