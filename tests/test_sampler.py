"""The promise: DEQSampler returns the serial chain's sample, to the tolerance asked for."""

from __future__ import annotations

import logging

import pytest
import torch

import deqdiff_fast as dq

pytestmark = pytest.mark.usefixtures("rows_are_known")

SOLVERS = [
    "quasi-newton",
    dq.QuasiNewton(history=5, slope=None),
    "picard",
    "anderson",
    "triangular",
    dq.Anderson(scope="trajectory"),
    "deq-ddim",
]


def plain_ddim(model, noise, schedule, generator=None):
    """The chain written out from the DDIM paper (Song et al. 2021, eq. 12), to check `serial` itself."""
    x = noise.double()
    for i in range(schedule.num_steps):
        a0, s0, a1, s1 = schedule.signal[i], schedule.sigma[i], schedule.signal[i + 1], schedule.sigma[i + 1]
        t = schedule.timesteps[i].expand(len(x))
        eps = model(x, t)
        scale = schedule.noise_coef[i]
        x = a1 * (x - s0 * eps) / a0 + (s1**2 - scale**2).clamp(min=0).sqrt() * eps
        if scale != 0:
            x = x + scale * torch.randn(noise.shape, generator=generator, dtype=noise.dtype).double()
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_serial_is_ddim(mixture, ddim, noise, relative_error, eta):
    model, schedule, start = mixture(), ddim(20, eta), noise(2)
    expected = plain_ddim(model, start, schedule, torch.Generator().manual_seed(3))
    got = dq.DEQSampler(model, schedule).serial(start, generator=torch.Generator().manual_seed(3))
    assert relative_error(got.sample, expected).max() < 1e-5
    assert got.stats.model_evals == 40
    assert got.converged.all()


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s if isinstance(s, str) else s.name)
@pytest.mark.parametrize(
    ("steps", "eta", "prediction"), [(20, 0.0, "epsilon"), (50, 0.5, "v_prediction"), (100, 0.0, "sample")]
)
def test_matches_serial(mixture, ddim, noise, relative_error, solver, steps, eta, prediction):
    model, schedule, start = mixture(prediction=prediction), ddim(steps, eta, prediction), noise(3)
    for tol, allowed in ((None, 1e-2), (1e-5, 1e-4)):
        sampler = dq.DEQSampler(model, schedule, solver=solver, tol=tol)
        reference = sampler.serial(start, generator=torch.Generator().manual_seed(1))
        out = sampler.sample(start, generator=torch.Generator().manual_seed(1))
        assert out.converged.all()
        assert relative_error(out.sample, reference.sample).max() <= allowed
        assert out.sample.dtype == start.dtype
        assert out.sample.shape == start.shape
        assert out.stats.rounds <= steps
        assert len(out.stats.residual_trace) == out.stats.rounds
        assert out.stats.model_evals <= 3 * steps * out.stats.rounds + 3 * out.stats.finished_serially


def test_parallel_is_fewer_rounds_than_steps(mixture, ddim, noise):
    out = dq.DEQSampler(mixture(), ddim(100), solver="quasi-newton").sample(noise(1))
    assert out.stats.rounds <= 20
    assert out.stats.finished_serially == 0


@pytest.mark.parametrize("window", [1, 7, 20, 1000])
@pytest.mark.parametrize("solver", ["picard", "triangular", "anderson"])
def test_windows(mixture, ddim, noise, relative_error, window, solver):
    model, start = mixture(), noise(3)
    sampler = dq.DEQSampler(model, ddim(40), solver=solver, window=window, tol=1e-4)
    out = sampler.sample(start)
    assert relative_error(out.sample, sampler.serial(start).sample).max() < 1e-4
    assert out.stats.window == min(window, 40)
    assert out.converged.all()
    if window == 1:
        assert out.stats.rounds == 40
        assert out.stats.model_evals == 120


def test_final_rows_are_not_evaluated_again(mixture, ddim, noise):
    model = mixture()
    sampler = dq.DEQSampler(model, ddim(50), solver="picard")
    seen = []
    out = sampler.sample(noise(2), callback=lambda info: seen.append(info.front.tolist()))
    expected, front = 0, [0, 0]
    for after in seen:
        expected += sum(50 - f for f in front)
        assert all(b > a or a == 50 for a, b in zip(front, after)), "every round must settle at least one more state"
        front = after
    assert out.stats.model_evals == expected == model.rows


def test_samples_are_independent_of_their_batch(mixture, ddim, noise, relative_error):
    sampler = dq.DEQSampler(mixture(), ddim(30), solver="quasi-newton", tol=1e-4)
    start = noise(3)
    together = sampler.sample(start).sample
    alone = torch.cat([sampler.sample(start[b : b + 1]).sample for b in range(3)])
    assert relative_error(together, alone).max() < 1e-4


@pytest.mark.parametrize("max_batch", [1, 7, 64])
def test_chunks(mixture, ddim, noise, max_batch):
    sizes = []
    model = mixture()

    def spy(x, t):
        sizes.append(len(x))
        return model(x, t)

    whole = dq.DEQSampler(model, ddim(20), solver="quasi-newton").sample(noise(2))
    cut = dq.DEQSampler(spy, ddim(20), solver="quasi-newton", max_batch=max_batch).sample(noise(2))
    assert max(sizes) <= max_batch
    assert cut.stats.model_calls == len(sizes)
    assert cut.stats.rounds == whole.stats.rounds
    assert torch.allclose(cut.sample, whole.sample, atol=1e-5)


def test_model_kwargs_follow_their_sample(ddim, noise, relative_error):
    start, shift = noise(3), torch.tensor([0.0, 1.0, -2.0])

    def model(x, t, shift, scale, extra):
        assert len(shift) == len(x)
        assert extra["keep"].shape == (7,)
        return scale * (0.5 * x + shift[:, None, None, None])

    kwargs = {"shift": shift, "scale": 0.5, "extra": {"keep": torch.zeros(7)}}
    sampler = dq.DEQSampler(model, ddim(15), window=6, tol=1e-5)
    reference = sampler.serial(start, model_kwargs=kwargs).sample
    assert relative_error(sampler.sample(start, model_kwargs=kwargs).sample, reference).max() < 1e-4


def test_callback_previews_and_stops(mixture, ddim, noise):
    seen = []

    def callback(info):
        seen.append((info.preview(), info.sample(), float(info.residual.max())))
        assert info.num_steps == 50
        assert info.round == len(seen)
        return info.round == 2

    out = dq.DEQSampler(mixture(), ddim(50), solver="quasi-newton").sample(noise(2), callback=callback)
    assert out.stats.stop_reason == "callback"
    assert out.stats.rounds == 2
    assert not out.converged.any()
    assert all(p.shape == (2, 3, 8, 8) and p.isfinite().all() for p, _, _ in seen)
    assert torch.equal(seen[-1][1], out.sample)


@pytest.mark.parametrize("on_failure", ["serial", "warn", "raise"])
def test_out_of_rounds(mixture, ddim, noise, relative_error, on_failure):
    sampler = dq.DEQSampler(mixture(), ddim(50), solver="quasi-newton", max_rounds=2, tol=1e-6, on_failure=on_failure)
    start = noise(2)
    if on_failure == "serial":
        out = sampler.sample(start)
        assert out.converged.all()
        assert out.stats.finished_serially > 0
        assert out.stats.stop_reason == "max_rounds"
        assert relative_error(out.sample, sampler.serial(start).sample).max() < 1e-5
    elif on_failure == "warn":
        with pytest.warns(dq.ConvergenceWarning, match="2 of 2 samples did not converge in 2 rounds"):
            out = sampler.sample(start)
        assert not out.converged.any()
        assert out.sample.isfinite().all()
    else:
        with pytest.raises(dq.NotConvergedError, match="raise max_rounds") as caught:
            sampler.sample(start)
        assert caught.value.solution.sample.shape == start.shape


@pytest.mark.parametrize("solver", ["quasi-newton", "triangular"])
def test_init_trajectory_saves_rounds(mixture, ddim, noise, solver):
    sampler = dq.DEQSampler(mixture(), ddim(50), solver=solver)
    first = sampler.sample(noise(1), return_trajectory=True)
    near = noise(1) + 1e-4 * noise(1, seed=5)
    warm, cold = sampler.sample(near, init_trajectory=first.trajectory), sampler.sample(near)
    assert first.trajectory.shape == (51, 1, 3, 8, 8)
    assert torch.equal(first.trajectory[-1], first.sample)
    assert warm.stats.rounds < cold.stats.rounds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(mixture, ddim, noise, relative_error, dtype):
    seen = set()
    model = mixture()

    def spy(x, t):
        seen.add(x.dtype)
        return model(x, t)

    sampler = dq.DEQSampler(spy, ddim(20), solver="quasi-newton", tol=1e-9 if dtype == torch.float64 else None)
    start = noise(2).to(dtype)
    out, reference = sampler.sample(start), sampler.serial(start)
    assert seen == {dtype}
    assert out.sample.dtype == dtype
    assert relative_error(out.sample, reference.sample).max() < (1e-9 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_backends_agree(mixture, ddim, noise, relative_error, backend):
    start = noise(2)
    expected = dq.DEQSampler(mixture(), ddim(20), solver="quasi-newton", backend="reference", tol=1e-5).sample(start)
    out = dq.DEQSampler(mixture(), ddim(20), solver="quasi-newton", backend=backend, tol=1e-5).sample(start)
    assert out.stats.rounds == expected.stats.rounds
    assert relative_error(out.sample, expected.sample).max() < 1e-5


@pytest.mark.parametrize("solver", [dq.Anderson, dq.QuasiNewton])
@pytest.mark.parametrize("window", ["auto", 5])
def test_narrow_history(mixture, ddim, noise, relative_error, solver, window):
    """bfloat16 rings blunt the steps, they do not move the fixed point."""
    schedule, start = ddim(16), noise(2, (3, 4, 4))
    model = mixture((3, 4, 4))
    narrow = dq.DEQSampler(model, schedule, solver=solver(history_dtype=torch.bfloat16), tol=1e-5, window=window)
    out = narrow.sample(start)
    assert out.converged.all()
    assert out.stats.finished_serially == 0
    assert relative_error(out.sample, narrow.serial(start).sample).max() < 1e-5
    with pytest.raises(ValueError, match=r"history_dtype: expected .* got torch.int8"):
        solver(history_dtype=torch.int8)


def test_unknown_and_bad_arguments(mixture, ddim):
    with pytest.raises(TypeError, match="ridge"):
        dq.DEQSampler(mixture(), ddim(), ridge=1.0)
    for name, value in {
        "solver": "newton?", "tol": -1.0, "max_rounds": 0, "window": 0, "backend": "cuda", "gradient": "magic",
        "on_failure": "ignore", "max_batch": 1.5, "cuda_graph": "yes", "deterministic": 1,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected .* got"):
            dq.DEQSampler(mixture(), ddim(), **{name: value})
    for bad in ({"history": 0}, {"history": 9}, {"scope": "all"}, {"ridge": -1.0}, {"damping": 0.0}, {"stale": 0.5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
            dq.Anderson(**bad)


def test_nothing_is_printed(mixture, ddim, noise, capsys, caplog):
    with caplog.at_level(logging.DEBUG, logger="deqdiff_fast"):
        dq.DEQSampler(mixture(), ddim()).sample(noise())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_many_lags(mixture, noise, relative_error):
    """The Runge-Kutta start of diffusers' default PNDM looks back 11 model calls."""
    diffusers = pytest.importorskip("diffusers")
    schedule = dq.Schedule.from_diffusers(diffusers.PNDMScheduler(skip_prk_steps=False), 20)
    assert schedule.lags > 4
    sampler = dq.DEQSampler(mixture(), schedule, solver="quasi-newton", tol=1e-5)
    out = sampler.sample(noise(2))
    assert out.converged.all()
    assert relative_error(out.sample, sampler.serial(noise(2)).sample).max() < 1e-4
