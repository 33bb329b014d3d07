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
    operator, model = operators()[name], mixture(SHAPE)
    schedule = ddim(4 if method == "pigdm" else 8, eta)  # a whole Jacobian of each row is dear
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
@pytest.mark.parametrize("name", ["inpaint", "blur", "hadamard"])
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


@pytest.mark.parametrize("method", ["diffpir", "pigdm"])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_singular_vectors_are_not_needed(mixture: Any, ddim: Any, method: str, sigma: float) -> None:
    operator = operators()["blur"]
    y = measured(operator, sigma)
    both = [
        dq.DEQRestorer(mixture(SHAPE), ddim(8), one, sigma=sigma, method=method).serial(y, generator=generator()).sample
        for one in (operator, Bare(operator))
    ]
    assert torch.allclose(*both, atol=1e-4)


@pytest.mark.parametrize("method", ["ddnm", "diffpir", "pigdm"])
def test_multistep_schedules_without_noise(mixture: Any, karras: Any, relative_error: Any, method: str) -> None:
    model, sigmas, operator = mixture(SHAPE, "sample"), karras(16), operators()["average"]
    levels = torch.tensor([float((1 - a) / a) ** 0.5 for a in published_abar()])

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        t = (levels - sigma.float()[:, None]).abs().argmin(1)
        return model(x * column(published_abar()[t].sqrt(), x).to(x), t)

    schedule = dq.Schedule.from_sigmas(sigmas, "dpmpp_2m")
    restorer = dq.DEQRestorer(denoiser, schedule, operator, method=method, solver="quasi-newton", tol=1e-4)
    y = measured(operator, 0.0)
    expected, got = (solve(y, generator=generator()) for solve in (restorer.serial, restorer.restore))
    assert float(relative_error(got.sample, expected.sample).max()) < 1e-3
    assert float(got.consistency.max()) < 1e-4
    with pytest.raises(ValueError, match="schedule: expected a one-step schedule"):
        dq.DEQRestorer(denoiser, schedule, operator, sigma=0.1)


def published_abar() -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.dim() - 1))


@pytest.mark.parametrize("method", METHODS)
def test_samples_do_not_know_each_other(mixture: Any, ddim: Any, method: str) -> None:
    """A batch with a mask and a noise level for each sample is restored as each alone is."""
    masks = torch.rand(3, 1, 8, 8, generator=generator(1)) < torch.tensor([0.3, 0.5, 0.8]).view(3, 1, 1, 1)
    sigma = torch.tensor([0.1, 0.3, 0.0]) if method in ("ddnm", "ddrm") else torch.tensor([0.1, 0.3, 0.2])
    x = measured(Inpaint(masks), 0.2, batch=3)
    settings = {"method": method, "solver": "quasi-newton", "tol": 1e-4}
    together = dq.DEQRestorer(mixture(SHAPE), ddim(12, 0.5), Inpaint(masks), sigma=sigma, **settings)
    got = together.restore(x, generator=[generator(b) for b in range(3)])
    assert bool(got.converged.all())
    for b in range(3):
        alone = dq.DEQRestorer(
            mixture(SHAPE), ddim(12, 0.5), Inpaint(masks[b : b + 1]), sigma=float(sigma[b]), **settings
        )
        one = alone.serial(x[b : b + 1], generator=[generator(b)]).sample
        assert float((got.sample[b] - one[0]).norm() / one.norm()) < 1e-3


@pytest.mark.parametrize("method", ["ddnm", "ddrm", "diffpir"])
def test_gradients_are_the_serial_chains(mixture: Any, ddim: Any, apart: Any, method: str) -> None:
    operator, y = operators()["blur"], measured(operators()["blur"], 0.1).requires_grad_()
    noise = torch.randn(2, *SHAPE, generator=generator(), dtype=torch.float64).requires_grad_()
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8), operator, sigma=0.1, method=method, tol=1e-8, solver="picard")
    direction = torch.randn(2, *SHAPE, generator=generator(3), dtype=torch.float64)
    sample = restorer.restore(y, noise=noise, generator=generator(5)).sample
    found = torch.autograd.grad((sample * direction).sum(), (noise, y))
    with torch.no_grad():
        for given, grad, at in ((noise, found[0], 0), (y, found[1], 1)):
            step = torch.randn(given.shape, generator=generator(9), dtype=torch.float64)
            moved = [
                restorer.serial(
                    y + sign * 1e-5 * step * at, noise=noise + sign * 1e-5 * step * (1 - at) if at == 0 else noise,
                    generator=generator(5),
                ).sample
                for sign in (1, -1)
            ]  # fmt: skip
            expected = float(((moved[0] - moved[1]) * direction).sum() / 2e-5)
            assert float((grad * step).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_fitted_noise_lowers_the_loss_and_keeps_the_measurement(mixture: Any, ddim: Any) -> None:
    operator = operators()["inpaint"]
    y, target = measured(operator, 0.0, dtype=torch.float32), torch.zeros(2, *SHAPE)
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8, 0.5), operator, solver="quasi-newton")

    def loss(sample: Tensor) -> Tensor:
        return (sample - target).square().flatten(1).mean(1)

    fitted = restorer.fit_noise(y, loss, generator=generator(), steps=8, lr=0.2)
    assert fitted.losses.shape == (8, 2)
    lowest = fitted.losses.amin(0)
    assert bool((lowest < 0.98 * fitted.losses[0]).all())
    assert torch.allclose(loss(fitted.restoration.sample).double(), lowest, rtol=0.05)
    assert float(fitted.restoration.consistency.max()) < 1e-4
    with pytest.raises(ValueError, match="loss: expected a tensor"):
        restorer.fit_noise(y, lambda sample: sample, steps=1)


def test_the_noise_level_is_estimated(mixture: Any, ddim: Any) -> None:
    flat = torch.zeros(2, 3, 8, 8)
    mask = torch.ones(8, 8, dtype=torch.bool)
    y = flat + 0.2 * torch.randn(flat.shape, generator=generator(3))
    restored = dq.DEQRestorer(mixture(SHAPE), ddim(8), Inpaint(mask), sigma=None).restore(y, generator=generator())
    assert torch.allclose(restored.sigma, torch.full((2,), 0.2, dtype=torch.float64), rtol=0.3)


def test_what_is_refused(mixture: Any, ddim: Any) -> None:
    model, schedule, operator = mixture(SHAPE), ddim(8), operators()["inpaint"]
    restorer, y = dq.DEQRestorer(model, schedule, operator), measured(operator, 0.0)
    broken = y.clone()
    broken[1] = torch.nan
    for given, message in (
        (broken, "y: expected finite measurements, got NaN or Inf in sample 1"),
        (100 * y, "y: expected measurements of images in"),
        ((y * 255).to(torch.uint8), "scale pixels"),
        (y[:0], "at least one sample"),
    ):
        with pytest.raises(ValueError, match=message):
            restorer.restore(given)
    with pytest.raises(ValueError, match="noise: expected shape"):
        restorer.restore(y, noise=torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="sigma: expected"):
        dq.DEQRestorer(model, schedule, operator, sigma=-1.0)
    with pytest.raises(ValueError, match="method: expected one of"):
        dq.DEQRestorer(model, schedule, operator, method="dps")
    with pytest.raises(TypeError, match="A_dagger"):
        dq.DEQRestorer(model, schedule, lambda x: x)
    with pytest.raises(TypeError, match="unexpected keyword"):
        dq.DEQRestorer(model, schedule, operator, tolerance=1.0)
    for method in ("ddnm", "ddrm"):
        with pytest.raises(ValueError, match="singular vectors"):
            dq.DEQRestorer(model, schedule, Bare(operator), sigma=0.1, method=method)


def test_the_model_is_called_in_the_dtype_of_the_measurements(mixture: Any, ddim: Any) -> None:
    model, seen = mixture(SHAPE), set[torch.dtype]()

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return model(x, t)

    y = measured(operators()["average"], 0.0, dtype=torch.float32)
    restorer = dq.DEQRestorer(watched, ddim(8), operators()["average"], solver="quasi-newton")
    got = restorer.restore(y.bfloat16(), generator=generator()).sample
    assert seen == {torch.bfloat16}
    assert got.dtype == torch.bfloat16
    expected = dq.DEQRestorer(model, ddim(8), operators()["average"]).serial(y, generator=generator()).sample
    assert float((got.float() - expected).norm() / expected.norm()) < 0.05


def test_a_callback_ends_a_restoration(mixture: Any, ddim: Any) -> None:
    y = measured(operators()["average"], 0.0)
    spectrum = dq.SpectralSlope(torch.full(SHAPE, 0.25), torch.eye(3))
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(20), operators()["average"], solver="picard", spectrum=spectrum)
    got = restorer.restore(y, generator=generator(), callback=lambda info: True)
    assert got.stats.stop_reason == "callback"
    assert got.stats.rounds == 1
    assert not bool(got.converged.any())


def test_a_draft_is_restored_too(mixture: Any, ddim: Any, relative_error: Any) -> None:
    """A draft that is the model itself foretells everything."""
    y, operator = measured(operators()["blur"], 0.1), operators()["blur"]
    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(20), operator, sigma=0.1, draft=mixture(SHAPE))
    got, expected = (solve(y, generator=generator()) for solve in (restorer.restore, restorer.serial))
    assert float(relative_error(got.sample, expected.sample).max()) < 1e-2


def test_an_operator_that_is_none_is_refused(mixture: Any, ddim: Any) -> None:
    class Crooked(Bare):
        def __init__(self, operator: Operator) -> None:
            super().__init__(operator)
            self.A = lambda x: operator.A(x) + x.abs()

    restorer = dq.DEQRestorer(mixture(SHAPE), ddim(8), Crooked(operators()["inpaint"]))
    with pytest.raises(ValueError, match="violates"):
        restorer.restore(measured(operators()["inpaint"], 0.0))


def test_bundled_model_takes_a_third_of_the_calls() -> None:
    """And half of the rounds of the paper's Anderson setting."""
    integrations = pytest.importorskip("deqdiff_fast.integrations.diffusers")
    loaded = integrations.load_model("bundled")
    schedule, operator = integrations.ddim_schedule(loaded.scheduler, 50, clip=False), Downsample(4)
    spectrum = loaded.spectrum  # an image like those that the model knows, if a formless one
    white = (
        torch.randn(1, spectrum.variance.numel(), generator=generator(1)) * spectrum.variance.sqrt().flatten().float()
    )
    x = spectrum.basis().inverse(white).view(1, 3, 32, 32).clamp(-1, 1)
    rounds = {}
    with torch.no_grad():
        for solver in ("quasi-newton", "deq-ddim"):
            restorer = dq.DEQRestorer(loaded.model, schedule, operator, solver=solver, spectrum=spectrum)
            got = restorer.restore(operator.A(x), generator=generator())
            rounds[solver] = got.stats.rounds
            assert float(got.consistency.max()) <= 1e-4
            if solver == "quasi-newton":
                expected = restorer.serial(operator.A(x), generator=generator()).sample
                assert float((got.sample - expected).norm() / expected.norm()) <= 1e-2
    assert rounds["quasi-newton"] <= 50 // 3
    assert 2 * rounds["quasi-newton"] <= rounds["deq-ddim"]
