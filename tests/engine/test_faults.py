"""What goes wrong in users' hands ends in a clear error or in the right sample, never in a wrong one."""

from __future__ import annotations

import gc

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


@pytest.mark.parametrize("solver", ["quasi-newton", "parataa", "parareal", "picard", "anderson"])
def test_a_broken_model_leaves_no_lease(ddim, noise, solver):
    """At once, and not when Python next looks for cycles: on a GPU it is the memory of a whole chain."""
    memory = dq.SolverMemory()
    sampler = dq.DEQSampler(lambda x, t: x + torch.nan, ddim(), solver=solver, memory=memory)
    gc.disable()
    try:
        with pytest.raises(dq.NonFiniteError):
            sampler.sample(noise())
        assert memory.stats()["active"] == 0
    finally:
        gc.enable()


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
