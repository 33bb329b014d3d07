"""Noise, guesses and settings that are bad, tiny or of another layout: refused by name, or solved like others."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import pytest
import torch

import deqdiff_fast as dq

pytestmark = pytest.mark.usefixtures("rows_are_known")


SOLVERS = ["picard", "anderson", "triangular", "deq-ddim", "paradigms"]


def test_empty_batch(mixture, ddim):
    for run in (dq.DEQSampler(mixture(), ddim()).sample, dq.DEQSampler(mixture(), ddim()).serial):
        out = run(torch.empty(0, 3, 8, 8))
        assert out.sample.shape == (0, 3, 8, 8)
        assert out.converged.shape == (0,)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step(mixture, ddim, noise, solver):
    sampler = dq.DEQSampler(mixture(), ddim(1), solver=solver)
    out = sampler.sample(noise(2))
    assert torch.allclose(out.sample, sampler.serial(noise(2)).sample)
    assert out.stats.rounds == 1


def test_non_contiguous_noise(mixture, ddim, noise):
    start = noise(2).permute(0, 1, 3, 2)
    sampler = dq.DEQSampler(mixture(), ddim(10), solver="quasi-newton")  # "auto" decides by the clock
    assert not start.is_contiguous()
    for solve in (sampler.sample, sampler.serial):
        assert torch.equal(solve(start).sample, solve(start.contiguous()).sample)


def test_noise_is_left_alone(mixture, ddim, noise):
    start = noise(2)
    before = start.clone()
    dq.DEQSampler(mixture(), ddim(10)).sample(start)
    assert torch.equal(start, before)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([1.0], TypeError, "noise: expected a tensor"),
        (torch.zeros(4), ValueError, "noise: expected shape"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, "noise: expected a floating-point dtype"),
        (torch.full((2, 3), float("nan")), ValueError, "noise: expected finite"),
    ],
)
def test_bad_noise(mixture, ddim, bad, error, message):
    with pytest.raises(error, match=message):
        dq.DEQSampler(mixture(), ddim()).sample(bad)


def test_bad_calls(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim())
    with pytest.raises(TypeError, match="model_kwargs: expected a dict"):
        sampler.sample(noise(), model_kwargs=[1])
    with pytest.raises(TypeError, match="generator: expected"):
        sampler.sample(noise(), generator=3)
    with pytest.raises(ValueError, match="generator: expected 2"):
        sampler.sample(noise(), generator=[torch.Generator()])
    with pytest.raises(TypeError, match="callback: expected"):
        sampler.sample(noise(), callback=1)
    with pytest.raises(ValueError, match="init_trajectory: expected shape"):
        sampler.sample(noise(), init_trajectory=noise())
    with pytest.raises(TypeError, match="model: expected"):
        dq.DEQSampler(None, ddim())
    with pytest.raises(TypeError, match="from_diffusers"):
        dq.DEQSampler(mixture(), "ddim")


class Output(NamedTuple):
    loss: float
    sample: torch.Tensor


@pytest.mark.parametrize("pack", [lambda y: [y, 1], lambda y: (Output(0.0, y), None), lambda y: Output(0.0, y)])
def test_what_a_model_may_return(mixture, ddim, noise, pack):
    model = mixture()
    found = [dq.DEQSampler(f, ddim(5), solver="picard") for f in (model, lambda x, t: pack(model(x, t)))]
    assert torch.equal(*(sampler.sample(noise()).sample for sampler in found))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("solve", ["sample", "invert"])
def test_a_starting_guess_must_be_finite(mixture, ddim, noise, solve, value):
    guess = torch.zeros(6, 2, 3, 8, 8)
    guess[2, 1, 0, 0, 0] = value
    model, schedule = mixture(), ddim(5)
    call = dq.DEQSampler(model, schedule).sample if solve == "sample" else dq.DEQInverter(model, schedule).invert
    with pytest.raises(ValueError, match="init_trajectory: expected finite values, got NaN or Inf"):
        call(noise(2).clamp(-1, 1), init_trajectory=guess)
    with pytest.raises(TypeError, match="init_trajectory: expected a tensor or None, got list"):
        call(noise(2).clamp(-1, 1), init_trajectory=[guess])
    assert model.calls == 0


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.bfloat16, 1e20), (torch.float64, 1e200)])
def test_a_starting_guess_whose_squares_overflow_is_refused(mixture, ddim, noise, dtype, size):
    """Else the first round is taken for an overflow of the model."""
    guess, start = torch.zeros(6, 2, 3, 8, 8, dtype=torch.float64), noise(2, dtype=dtype)
    guess[2, 1, 0, 0, 0] = size
    sampler = dq.DEQSampler(mixture(), ddim(5), solver="picard")
    with pytest.raises(ValueError, match=r"init_trajectory: expected values up to 1e\+\d+ .*, got \d.\de\+"):
        sampler.sample(start, init_trajectory=guess)
    guess[2, 1, 0, 0, 0] = 1e14 if dtype != torch.float64 else 1e140
    assert sampler.sample(start, init_trajectory=guess).converged.all()


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_values_in_order_are_refused(mixture, ddim, noise, kind):
    made = {"sparse": lambda x: x.to_sparse(), "meta": lambda x: x.to("meta")}[kind]
    sampler, inverter = dq.DEQSampler(mixture(), ddim(5)), dq.DEQInverter(mixture(), ddim(5))
    for name, call in (("noise", sampler.sample), ("noise", sampler.serial), ("image", inverter.invert)):
        with pytest.raises(ValueError, match=f"{name}: expected a dense tensor with values, got one (of|on)"):
            call(made(noise(2)))
    with pytest.raises(ValueError, match="init_trajectory: expected"):
        sampler.sample(noise(2), init_trajectory=made(torch.zeros(6, 2, 3, 8, 8)))


def test_settings_may_be_numbers_of_numpy(mixture, ddim, noise):
    numpy = pytest.importorskip("numpy")
    settings = {"tol": numpy.float32(1e-3), "max_rounds": numpy.int64(4), "window": numpy.int32(3)}
    found = dq.DEQSampler(mixture(), ddim(5), max_batch=numpy.int8(3), **settings).sample(noise(2))
    assert found.converged.all()
    assert found.stats.window == 3
    assert dq.DEQInverter(mixture(), ddim(5), **settings).window == 3
    for make in (dq.DEQSampler, dq.DEQInverter):
        with pytest.raises(TypeError, match=r"memory: expected a deqdiff_fast\.SolverMemory or None, got int"):
            make(mixture(), ddim(5), memory=1 << 20)


@pytest.mark.parametrize("solver", ["quasi-newton", "auto", "parareal", *SOLVERS])
@pytest.mark.parametrize("scale", [1e-20, 1e-100])
def test_tiny_states_are_solved_like_others(ddim, noise, relative_error, solver, scale):
    weights = noise(8, (8,), seed=2, dtype=torch.float64)

    def model(x, t):
        return scale * (torch.tanh(x / scale @ weights) + 0.5 * x / scale)

    sampler = dq.DEQSampler(model, ddim(12), solver=solver, tol=1e-3)
    start = scale * noise(2, (8,), dtype=torch.float64)
    out, expected = sampler.sample(start), sampler.serial(start)
    assert out.converged.all()
    assert relative_error(out.sample / scale, expected.sample / scale).max() < 3e-3


@pytest.mark.parametrize(("scale", "dtype"), [(1e-20, torch.float32), (1e-140, torch.float64), (1e-20, torch.bfloat16)])
def test_states_whose_squares_vanish_are_refused(mixture, ddim, noise, scale, dtype):
    start, model = noise(2, dtype=dtype), mixture()
    start[1] *= scale
    calls = {"noise": dq.DEQSampler(model, ddim(5)).sample, "image": dq.DEQInverter(model, ddim(5)).invert}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name}: expected samples .* at least 1e-.* change the units"):
            call(start)
    assert model.calls == 0
    start[1] = 0
    dq.DEQSampler(mixture(), ddim(5)).sample(start)


def test_the_batch_axis_may_lie_innermost(mixture, ddim, noise, relative_error):
    def last(x):
        return x.movedim(0, -1).contiguous().movedim(-1, 0)

    sampler = dq.DEQSampler(mixture(), ddim(20), solver="quasi-newton")
    expected = sampler.serial(noise(2)).sample
    for start, init in ((last(noise(2)), None), (noise(2), last(expected))):
        assert relative_error(sampler.sample(start, init=init).sample, expected).max() < 1e-2
    assert dq.DEQInverter(mixture(), ddim(20)).invert(last(expected)).converged.all()


def test_after_a_solve_under_inference_mode(mixture, ddim, noise):
    sampler = dq.DEQSampler(mixture(), ddim(100), solver="quasi-newton")
    with torch.inference_mode():
        sampler.sample(noise(1))
    for gradient in (False, False, True):
        out = sampler.sample(noise(1).requires_grad_(gradient))
        assert out.converged.all()
        assert out.sample.requires_grad is gradient
    out.sample.sum().backward()


def test_parameters_that_are_no_method(mixture, ddim, noise):
    class Model:
        parameters: ClassVar = {"width": 8}
        __call__ = staticmethod(mixture())

    sampler = dq.DEQSampler(Model(), ddim(5), solver="picard")
    assert sampler.sample(noise(2)).converged.all()
    sampler.warmup((3, 8, 8))
