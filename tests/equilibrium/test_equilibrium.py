"""What an implicit layer promises of its solution and of its batch."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.equilibrium import AndersonSolver, EquilibriumInfo, RelaxedSolver
from deqdiff_fast.equilibrium.anderson import mixing_weights

SOLVERS = ["anderson", "relaxed", "reversible", AndersonSolver(history=2), RelaxedSolver(damping=0.5)]


DIM = 16


@pytest.fixture
def contraction():
    """f of samples of very different rates, with nothing that sums over the batch: the bits of a row are its own."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.linalg.qr(torch.randn(5, DIM, DIM, generator=generator))[0]
    rates = torch.tensor([0.1, 0.5, 0.9, 0.97, 0.3])[:, None, None]
    x = torch.randn(5, DIM, generator=generator)

    def f(rows):
        return lambda z: torch.tanh((rates[rows] * matrices[rows] * z[:, None]).sum(2) + x[rows])

    return f


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s if isinstance(s, str) else s.name)
def test_every_solver_finds_the_fixed_point(contraction, solver):
    f = contraction(slice(None))
    z, info = dq.equilibrium(f, torch.zeros(5, DIM), solver=solver, tol=1e-5, max_steps=500)
    assert isinstance(info, EquilibriumInfo)
    assert bool(info.converged.all())
    assert float(((f(z) - z).norm(dim=1) / z.norm(dim=1)).max()) < 2e-5
    assert info.residual_trace.shape == (int(info.steps.max()), 5)
    assert bool((info.residual <= 1e-5).all())
    for sample, step in enumerate(info.steps.tolist()):
        assert float(info.residual_trace[step - 1, sample]) == float(info.residual[sample])
    calls = 2 * len(info.residual_trace) - 1 if solver == "reversible" else len(info.residual_trace)
    assert info.evaluations in (calls, calls + 1)  # once more for a gradient
    assert info.solver
    assert info.gradient == "implicit"


@pytest.mark.filterwarnings("ignore::deqdiff_fast.ConvergenceWarning")
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s if isinstance(s, str) else s.name)
def test_batch_mates_change_nothing(contraction, solver):
    settings = {"solver": solver, "tol": 1e-5, "max_steps": 60}
    together, info = dq.equilibrium(contraction(slice(None)), torch.zeros(5, DIM), **settings)
    for sample in (0, 1, 4):  # quick ones, frozen long before the others end
        alone, own = dq.equilibrium(contraction(slice(sample, sample + 1)), torch.zeros(1, DIM), **settings)
        assert own.steps.tolist() == [int(info.steps[sample])]
        assert torch.equal(own.residual, info.residual[sample : sample + 1])
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-6, atol=1e-7)
    # other mates, in the place of the last: not a bit changes
    other = torch.tensor([0, 1, 2, 3, 2])
    again, info = dq.equilibrium(contraction(other), torch.zeros(5, DIM), **settings)
    assert torch.equal(again[:4], together[:4])


def test_a_diverging_batch_mate_changes_nothing():
    slopes = torch.tensor([[0.5], [3.0]])
    for solver in ("relaxed", "reversible"):
        settings = {"solver": solver, "tol": 1e-6, "max_steps": 40}
        with pytest.warns(dq.ConvergenceWarning, match="1 of 2 samples not converged"):
            z, info = dq.equilibrium(lambda z: slopes * z + 1, torch.zeros(2, 3), **settings)
        alone, own = dq.equilibrium(lambda z: slopes[:1] * z + 1, torch.zeros(1, 3), **settings)
        assert info.converged.tolist() == [True, False]
        assert torch.equal(z[:1], alone)
        assert int(info.steps[0]) == int(own.steps[0])


NO_FIXED_POINT = {
    "shift": lambda z: z + 1,
    "slow shift": lambda z: z + 1e-4,
    "escape": lambda z: z + 1 / z.clamp_min(1e-3),  # |f(z) - z| / |f(z)| falls below any tolerance
    "logarithmic escape": lambda z: z + torch.exp(-z),
}


NOT_CONTRACTING = {
    "growth": lambda z: 1.0001 * z,
    "rotation": lambda z: torch.stack([z[:, 1], -z[:, 0]], 1),
    "doubling": lambda z: 2 * z - 3,
    "cycle": lambda z: torch.where(z > 0, -z, -z + 1),
    "logistic": lambda z: 3.9 * z.sigmoid() * (1 - z.sigmoid()) * 4,
}


@pytest.mark.filterwarnings("ignore::deqdiff_fast.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["anderson", "relaxed", "reversible"])
@pytest.mark.parametrize("name", NO_FIXED_POINT)
def test_a_function_without_a_fixed_point_never_converges(solver, name):
    for start in (0.5, 1.0, 4.0):
        for tol in (1e-1, 1e-3, 1e-5) if solver != "anderson" or "shift" in name else (1e-3, 1e-5):
            _, info = dq.equilibrium(
                NO_FIXED_POINT[name], torch.full((1, 2), start, dtype=torch.float64), solver=solver, tol=tol,
                max_steps=300,
            )  # fmt: skip
            # Anderson may leap to where 1 / z is rounded away: a fixed point in floating-point numbers
            assert not bool(info.converged.any()) or float(info.residual) < 1e-14, (start, tol, info.steps)


@pytest.mark.filterwarnings("ignore::deqdiff_fast.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["anderson", "relaxed", "reversible"])
@pytest.mark.parametrize("name", NOT_CONTRACTING)
def test_no_false_convergence_without_a_contraction(solver, name):
    """Where a solver finds the fixed point none the less, as Anderson does that of a linear function, it is one."""
    f = NOT_CONTRACTING[name]
    start = torch.tensor([[0.3, 0.8]], dtype=torch.float64)
    for tol in (1e-2, 1e-4):
        z, info = dq.equilibrium(f, start, solver=solver, tol=tol, max_steps=100)
        if solver == "relaxed":
            assert not bool(info.converged.any())
        if bool(info.converged.all()):
            small = tol * max(float(z.norm()), 1e-3 * float(start.norm()))
            assert float((f(z) - z).norm()) <= 4 * small


def test_a_warm_start_takes_two_steps(contraction):
    f = contraction(slice(0, 2))
    z, _ = dq.equilibrium(f, torch.zeros(2, DIM), tol=1e-6)
    _, info = dq.equilibrium(f, z, tol=1e-3)
    assert int(info.steps.max()) <= 2
    _, info = dq.equilibrium(lambda z: z, torch.ones(2, 3))  # everything is a fixed point
    assert info.steps.tolist() == [1, 1]
    _, info = dq.equilibrium(lambda z: 0 * z, torch.ones(2, 3))  # zero is one
    assert bool(info.converged.all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["implicit", "reversible", "unrolled"])
def test_dtypes(dtype, gradient):
    w = torch.full((1,), 0.5, dtype=dtype, requires_grad=True)
    z, info = dq.equilibrium(lambda z: w * z + 1, torch.zeros(2, 3, dtype=dtype), gradient=gradient, tol=2e-2)
    assert z.dtype == dtype
    assert bool(info.converged.all())
    (grad,) = torch.autograd.grad(z.double().sum(), w)
    assert float(grad.detach()) == pytest.approx(24, rel=0.1)  # 6 / (1 - w)^2


@pytest.mark.parametrize("solver", ["anderson", "relaxed", "reversible"])
def test_autocast_is_for_f_alone(contraction, solver):
    """f computes in float32 as it is: so must the solver."""
    f = contraction(slice(0, 3))
    settings = {"solver": solver, "tol": 1e-5, "max_steps": 200}
    z, info = dq.equilibrium(f, torch.zeros(3, DIM), **settings)
    with torch.autocast("cpu", torch.bfloat16):
        again, other = dq.equilibrium(f, torch.zeros(3, DIM), **settings)
    assert torch.equal(z, again)
    assert info.steps.tolist() == other.steps.tolist()


def test_shapes_and_strides():
    x = torch.randn(3, 4, 5, 2).permute(0, 3, 1, 2)
    z, _ = dq.equilibrium(lambda z: 0.5 * z + x, torch.zeros_like(x), tol=1e-6)
    torch.testing.assert_close(z, 2 * x, rtol=1e-4, atol=1e-5)
    z, _ = dq.equilibrium(lambda z: 0.5 * z + 1, torch.zeros(4), tol=1e-6)
    torch.testing.assert_close(z, torch.full((4,), 2.0), rtol=1e-4, atol=1e-5)


def test_spectral_radius():
    rates = torch.tensor([[0.9, 0.2, 0.1, 0.0], [0.3, -0.6, 0.1, 0.2]])
    angle = torch.tensor(1.0)
    turn = 0.7 * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    _, info = dq.equilibrium(lambda z: rates * z + 1, torch.zeros(2, 4))
    before = torch.random.get_rng_state()
    torch.testing.assert_close(info.spectral_radius(), torch.tensor([0.9, 0.6]), rtol=2e-2, atol=0)
    assert torch.equal(before, torch.random.get_rng_state())
    _, info = dq.equilibrium(lambda z: z @ turn + 1, torch.zeros(2, 2), max_steps=200)
    torch.testing.assert_close(info.spectral_radius(200), torch.tensor([0.7, 0.7]), rtol=2e-2, atol=0)
    _, info = dq.equilibrium(lambda z: torch.ones(2, 2), torch.zeros(2, 2))
    assert info.spectral_radius().tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"^iterations: "):
        info.spectral_radius(1)


def test_mixing_weights_minimise():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(3, 4, 30, generator=generator, dtype=torch.float64)
    alpha = mixing_weights(g @ g.mT, 2, 1e-12)
    torch.testing.assert_close(alpha.sum(1), torch.ones(3, dtype=torch.float64))
    least = (alpha[:, None] @ g).norm(dim=2)
    for _ in range(20):
        other = alpha + 0.1 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
        assert bool(((other / other.sum(1, keepdim=True))[:, None] @ g).norm(dim=2).ge(least - 1e-9).all())
    zero = torch.zeros(1, 3, 3)
    assert mixing_weights(zero, 1, 1e-8).tolist() == [[0, 1, 0]]
