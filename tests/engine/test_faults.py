"""What goes wrong in users' hands ends in a clear error or in the right sample, never in a wrong one."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq

pytestmark = pytest.mark.usefixtures("rows_are_known")

SOLVERS = ["picard", "anderson", "triangular", "deq-ddim", "paradigms"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_at_one_timestep(mixture, ddim, noise, solver, value):
    model = mixture()

    def broken(x, t):
        out = model(x, t)
        out[t == 450] = value
        return out

    sampler = dq.DEQSampler(broken, ddim(20), solver=solver)
    with pytest.raises(dq.NonFiniteError, match=r"NaN or Inf at timestep 450 .* round 1, sample 0") as caught:
        sampler.sample(noise(2))
    assert caught.value.timestep == 450
    assert caught.value.step == 10
    assert caught.value.round == 1
    with pytest.raises(dq.NonFiniteError, match="timestep 450"):
        sampler.serial(noise(2))


def test_non_finite_names_the_sample(mixture, ddim, noise):
    model = mixture()
    start = noise(3)
    start[1] += 100

    def broken(x, t):
        return torch.where(x.mean((1, 2, 3), keepdim=True) > 50, torch.nan, model(x, t))

    with pytest.raises(dq.NonFiniteError, match="sample 1"):
        dq.DEQSampler(broken, ddim(20), solver="quasi-newton").sample(start)


@pytest.mark.parametrize("solver", SOLVERS)
def test_overflowing_chain(ddim, noise, solver):
    sampler = dq.DEQSampler(lambda x, t: 1e12 * x, ddim(20), solver=solver)
    with pytest.raises(dq.NonFiniteError, match="timestep"):
        sampler.sample(noise(1))


@pytest.mark.parametrize("solver", SOLVERS)
def test_transient_overflow_is_repaired(ddim, noise, relative_error, solver):
    """A stiff linear model: serial steps shrink the state, but Picard's powers grow like 150^n / n! and overflow."""
    schedule = ddim(100)
    stiffness = torch.zeros(1000)
    stiffness[schedule.timesteps] = (-1.5 / schedule.model_coef[:, 0]).float()

    def stiff(x, t):
        return stiffness[t][:, None, None, None] * (x - 0.7)

    sampler = dq.DEQSampler(stiff, schedule, solver=solver, tol=1e-3, max_rounds=100)
    reference = sampler.serial(noise(2))
    assert reference.sample.abs().max() < 10
    out = sampler.sample(noise(2))
    assert relative_error(out.sample, reference.sample).max() < 1e-3
    assert out.converged.all()
    if solver == "picard":
        assert out.stats.repairs > 0, "the test must meet an overflow"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x[:, :2], r"shape \(20, 2, 8, 8\); expected .* \(round 1, timesteps 900 to 0\)"),
        (lambda x: x[:-1], r"shape \(19, 3, 8, 8\); .*round 1"),
        (lambda x: torch.cat([x, x], 1), "shape .*predicts a variance"),
        (lambda x: x.long(), "dtype torch.int64"),
        (lambda x: x.to(torch.complex64), "dtype torch.complex64"),
        (lambda x: None, "NoneType"),
        (lambda x: x.to("meta"), "device meta"),
    ],
)
def test_wrong_output(ddim, noise, bad, message):
    with pytest.raises(dq.ModelOutputError, match=f"{message}"):
        dq.DEQSampler(lambda x, t: bad(x), ddim(10), solver="picard").sample(noise(2))


def test_exception_in_the_model_passes_through_and_memory_survives(mixture, ddim, noise, relative_error):
    model, armed = mixture(), [True]

    def flaky(x, t):
        if armed[0]:
            raise KeyError("mine")
        return model(x, t)

    sampler = dq.DEQSampler(flaky, ddim(20), solver="quasi-newton", tol=1e-5)
    with pytest.raises(KeyError, match="mine"):
        sampler.sample(noise(2))
    armed[0] = False
    assert relative_error(sampler.sample(noise(2)).sample, sampler.serial(noise(2)).sample).max() < 1e-4


def test_model_that_is_not_deterministic(mixture, ddim, noise):
    model = mixture()
    sampler = dq.DEQSampler(
        lambda x, t: model(x, t) + 0.3 * torch.randn_like(x), ddim(20), solver="quasi-newton", max_rounds=6
    )
    out = sampler.sample(noise(1))
    assert out.sample.isfinite().all()
    assert out.stats.finished_serially > 0, "noise in the model must not pass for convergence"


def test_model_that_changes_its_input(mixture, ddim, noise, relative_error):
    model = mixture()

    def rude(x, t):
        out = model(x, t)
        x.zero_()
        return out

    out = dq.DEQSampler(rude, ddim(20), solver="quasi-newton", tol=1e-5).sample(noise(2))
    assert relative_error(out.sample, dq.DEQSampler(model, ddim(20)).serial(noise(2)).sample).max() < 1e-4


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


def test_interrupting_callback_leaves_no_lease(mixture, ddim, noise):
    memory = dq.SolverMemory()
    sampler = dq.DEQSampler(mixture(), ddim(), memory=memory)

    def stop(info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample(noise(), callback=stop)
    assert memory.stats()["active"] == 0
    sampler.sample(noise(), callback=lambda info: None)  # where nobody looks on, a first solve may need no slab
    assert memory.stats()["reuses"] >= 1, "the slab of the interrupted solve must be free again"


def test_threads_do_not_share_memory(mixture, ddim, noise, relative_error):
    from concurrent.futures import ThreadPoolExecutor

    sampler = dq.DEQSampler(mixture(), ddim(20), tol=1e-5)
    starts = [noise(2, seed=k) for k in range(6)]
    expected = [sampler.serial(s).sample for s in starts]
    with ThreadPoolExecutor(3) as pool:
        outs = list(pool.map(lambda s: sampler.sample(s).sample, starts * 2))
    for out, reference in zip(outs, expected * 2):
        assert relative_error(out, reference).max() < 1e-4


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
