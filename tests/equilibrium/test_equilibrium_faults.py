"""What goes wrong in an implicit layer is named, and what it refuses."""

from __future__ import annotations

import math
import pickle
import warnings

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.equilibrium import AndersonSolver, RelaxedSolver, ReversibleSolver


def test_nan_is_named_with_its_step_and_sample():
    calls = []

    def f(z):
        calls.append(1)
        value = torch.tanh(0.9 * z.roll(1, 1) + torch.arange(4.0) / 4)
        if len(calls) == 4:
            value = value.clone()
            value[1, 2] = math.nan
        return value

    for solver in ("anderson", "relaxed", "reversible"):
        calls.clear()
        with pytest.raises(dq.NonFiniteError, match="equilibrium: NaN or Inf in step") as caught:
            dq.equilibrium(f, torch.zeros(3, 4), solver=solver, tol=1e-7)
        assert caught.value.sample == 1
        assert caught.value.step == (2 if solver == "reversible" else 4)  # two evaluations a step
        assert pickle.loads(pickle.dumps(caught.value)).step == caught.value.step


def test_overflow_is_named_too():
    with pytest.raises(dq.NonFiniteError, match=r"diverged|returned"):
        dq.equilibrium(lambda z: z * z * 1e3 + 1, torch.ones(2, 3), solver="relaxed", max_steps=100)


@pytest.mark.filterwarnings("ignore::deqdiff_fast.ConvergenceWarning")
def test_norms_that_overflow_are_not_nan():
    for solver in ("relaxed", "anderson"):
        z, info = dq.equilibrium(lambda z: -z, torch.full((1, 4), 1e30), solver="relaxed", max_steps=5)
        assert not bool(info.converged.any())
        assert bool(z.isfinite().all())
        for size in (1e30, 1e-30):
            z, info = dq.equilibrium(lambda z, size=size: 0.5 * z + size, torch.zeros(2, 4), solver=solver, tol=1e-3)
            assert bool(info.converged.all())
            torch.testing.assert_close(z / size, torch.full((2, 4), 2.0), rtol=2e-3, atol=0)
            z, info = dq.equilibrium(
                lambda z, size=size: 0.9 * z + size, torch.zeros(2, 4), solver="relaxed", max_steps=5
            )
            assert not bool(info.converged.any())


def test_nan_in_the_adjoint_is_named():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return 0.5 * z

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.nan

    x = torch.ones(2, 3, requires_grad=True)
    z, _ = dq.equilibrium(lambda z: Bad.apply(z) + x, torch.zeros(2, 3))
    with pytest.raises(dq.NonFiniteError, match="the adjoint of equilibrium"):
        z.sum().backward()


def test_failure_warns_or_raises():
    f, start = (lambda z: 0.99 * z + 1), torch.zeros(2, 3)
    with pytest.warns(dq.ConvergenceWarning, match="2 of 2 samples not converged after 5 steps of relaxed"):
        z, info = dq.equilibrium(f, start, solver="relaxed", max_steps=5)
    assert not bool(info.converged.any())
    assert info.steps.tolist() == [5, 5]
    with pytest.raises(dq.NotConvergedError) as caught:
        dq.equilibrium(f, start, solver="relaxed", max_steps=5, on_failure="raise")
    assert torch.equal(caught.value.solution[0], z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = dq.equilibrium(f, start, solver="relaxed", max_steps=5, on_failure="ignore")
    assert not bool(info.converged.any())
    w = torch.full((1,), 0.99, requires_grad=True)
    good = torch.full((2, 3), 100.0)
    z, _ = dq.equilibrium(lambda z: w * z + 1, good, solver="relaxed", max_steps=5, on_failure="raise")
    with pytest.raises(dq.NotConvergedError, match="adjoint"):
        z.sum().backward()


@pytest.mark.filterwarnings("ignore::deqdiff_fast.ConvergenceWarning")
def test_the_best_point_known_is_returned():
    """Where Anderson's last step is a bad one."""
    calls = []

    def f(z):
        calls.append(1)
        return torch.cos(z.roll(1, 1) + torch.arange(4.0)) * 0.9 + (100.0 if len(calls) == 8 else 0.0)

    with torch.no_grad():
        z, info = dq.equilibrium(f, torch.zeros(1, 4), tol=1e-12, max_steps=8)
    assert info.residual[0] == info.residual_trace[3:, 0].min() < info.residual_trace[-1, 0]
    assert float(z.abs().max()) < 1


def test_strict_arguments():
    f, start = (lambda z: 0.5 * z), torch.ones(2, 3)
    with pytest.raises(TypeError):
        dq.equilibrium(f, start, stop_mode="rel")
    with pytest.raises(TypeError):
        dq.equilibrium(f, start, "anderson")
    for wrong in (
        {"solver": "broyden"}, {"gradient": "exact"}, {"tol": 0}, {"tol": math.inf}, {"max_steps": 0},
        {"max_steps": True}, {"on_failure": "serial"}, {"gradient": "reversible", "solver": "anderson"},
        {"gradient": dq.Reversible(relaxation=0.5), "solver": ReversibleSolver(relaxation=0.8)},
    ):  # fmt: skip
        name = "gradient" if "solver" in wrong and "gradient" in wrong else next(iter(wrong))
        with pytest.raises(ValueError, match=f"^{name}: "):
            dq.equilibrium(f, start, **wrong)
    for wrong in ({"solver": AndersonSolver}, {"solver": 3}, {"gradient": 3}):
        with pytest.raises(TypeError, match=f"^{next(iter(wrong))}: "):
            dq.equilibrium(f, start, **wrong)
    with pytest.raises(TypeError, match=r"^f: "):
        dq.equilibrium(None, start)
    for bad in (torch.ones(2, dtype=torch.int64), torch.ones(()), torch.ones(0, 3), [1.0]):
        with pytest.raises(ValueError, match=r"^z0: "):
            dq.equilibrium(f, bad)
    for make in (
        lambda: AndersonSolver(history=1), lambda: AndersonSolver(damping=0), lambda: AndersonSolver(ridge=0),
        lambda: RelaxedSolver(damping=2), lambda: ReversibleSolver(relaxation=1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            make()


@pytest.mark.parametrize("output", [torch.ones(2), torch.ones(2, 3, dtype=torch.int64), None, [torch.ones(2, 3)]])
def test_what_f_returns_is_checked(output):
    with pytest.raises(dq.ModelOutputError, match=r"^f: "):
        dq.equilibrium(lambda z: output, torch.ones(2, 3))


def test_an_input_changed_in_place_is_noticed():
    with pytest.raises(dq.ModelOutputError, match=r"^f: .*in place"):
        dq.equilibrium(lambda z: z.mul_(0.5), torch.ones(2, 3))
    with torch.inference_mode():
        _, info = dq.equilibrium(lambda z: 0.5 * z + 1, torch.ones(2, 3))
    assert bool(info.converged.all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", ["anderson", "relaxed", "reversible"])
def test_the_same_memory_every_time_is_no_fixed_point(mode, solver):
    """An output buffer, or where nothing tells of a change the input itself, was seen as equal to what it held."""
    out, start = torch.empty(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)

    def in_place(z):
        return torch.cos(z, out=z if mode is torch.inference_mode else out)

    for f in (lambda z: torch.cos(z, out=out), in_place):
        with mode():
            z, info = dq.equilibrium(f, start.clone(), solver=solver, tol=1e-9, max_steps=90)
        assert bool(info.converged.all())
        torch.testing.assert_close(z, torch.cos(z.clone()), rtol=1e-8, atol=0)
