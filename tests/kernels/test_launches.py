"""How many kernels a round launches: what is left of the host's work on a device."""

from __future__ import annotations

import os

import kernel_operands
import pytest
import torch

from deqdiff_fast.kernels import (
    advance_window,
    anderson_step,
    available_backends,
    copy_rows,
    ddim_update,
    inverse_scan,
    mark_converged,
    newton_scan,
    node_scan,
    secant_fit,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def launches(monkeypatch):
    """The names of the Triton kernels that are launched, in order."""
    status = available_backends()["triton"]
    if status != "available":
        pytest.skip(status)
    if INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction as Kernel
    else:
        from triton.runtime.jit import JITFunction as Kernel
    seen, run = [], Kernel.run

    def counted(self, *args, **kwargs):
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Kernel, "run", counted)
    return seen


ON = {"backend": "triton"}
SCOPES = ("timestep", "trajectory", "triangular")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_triton_anderson_is_three(launches, problem, scope, damping):
    run = problem(5, 2, 17, 2, history=3).serve("triton")
    settings = {"ridge": 1e-3, "relative_ridge": True, "damping": damping, "stale": 1e6}
    anderson_step(*run.scan(), *run.history, 0, scope=scope, drift=run.drift, backend="triton", **settings)
    assert launches == ["anderson_scan_kernel", "anderson_solve_kernel", "anderson_mix_kernel"]


@pytest.mark.parametrize("secants", [0, 1, 3])
def test_triton_newton_is_at_most_three(launches, problem, secants):
    run = problem(5, 2, 17, 2).serve("triton")
    device, steps = run.states.device, 5
    z, e = (torch.zeros(secants + 1, steps, 2, 17, device=device) for _ in range(2))
    filled = torch.zeros(steps, 2, dtype=torch.int32, device=device)
    slope = torch.zeros(steps, 1, device=device)
    scan = run.scan()
    newton_scan(*scan[:4], slope, *scan[4:], z, e, filled, 0, drift=run.drift, backend="triton")
    linear = ["newton_linear_kernel", "newton_norms_kernel"]
    assert launches == (
        ["newton_prepare_kernel", "newton_weights_kernel", "newton_advance_kernel"] if secants else linear
    )


def test_triton_others_are_one_or_two(launches, problem):
    run = problem(5, 2, 17).serve("triton")
    ddim_update(*run.scan(), run.drift, backend="triton")
    assert launches == ["ddim_update_kernel", "ddim_norms_kernel"]
    launches.clear()
    device, bounds = run.states.device, [torch.zeros(2, dtype=torch.int32, device=run.states.device) for _ in range(2)]
    copy_rows(run.states[1:], run.states[1:].clone(), *bounds, backend="triton")
    assert launches == ["copy_rows_kernel"]
    launches.clear()
    advance_window(
        torch.ones(5, 2, device=device), torch.ones(5, 2, device=device), bounds[0], bounds[1] + 5,
        torch.zeros(2, 2, dtype=torch.int32, device=device), torch.zeros(4, 2, device=device),
        torch.zeros(10, dtype=torch.int64, device=device), 1e-3, 1e-2, 5, backend="triton",
    )  # fmt: skip
    assert launches == ["window_bounds_kernel", "active_rows_kernel"]
    launches.clear()
    mark_converged(*(torch.ones(5, 2, device=device) for _ in range(3)), torch.ones(2, device=device), 1e-3, 1e-6, **ON)
    assert launches == ["mark_converged_kernel"]
    launches.clear()
    tables = [torch.ones(5, 1, columns, 1, device=device) for columns in (1, 4)]
    node_scan(run.states, run.predictions, *tables, torch.zeros(5, dtype=torch.int32, device=device), **ON)
    assert launches == ["node_scan_kernel"]
    launches.clear()
    for op, kernels in (
        (secant_fit, ["secant_fit_kernel"]),
        (inverse_scan, ["inverse_prepare_kernel", "inverse_advance_kernel"]),
    ):
        given = kernel_operands.operands(op.__name__)
        op(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}, **ON)
        assert launches == kernels
        launches.clear()
