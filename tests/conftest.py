"""Models whose behaviour is known exactly, and schedules, shared by the tests."""

from __future__ import annotations

import importlib.util
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deqdiff_fast import Schedule
from deqdiff_fast.engine.row_check import RowRecord

torch.set_num_threads(int(os.environ.get("DEQDIFF_TEST_THREADS", torch.get_num_threads())))
ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
LEVELS = torch.stack([ABAR, ABAR.sqrt(), (1 - ABAR).sqrt()], dim=1)


def load_module(file: Path, name: str) -> ModuleType:
    """A module by its path: the tests are no package, and their folders are on no path."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HELPERS = (
    "app/app_cases", "cli/cli_cases", "distillation/distill_cases", "distillation/pair_cases", "engine/graph_tape",
    "entry_points", "former_names", "integrations/plain_samplers", "inversion/descent_cases",
    "kernels/interpreter_cache", "kernels/kernel_operands", "kernels/races", "operators/operator_cases",
    "planner/planner_cases", "pretended_cuda/graph_api", "pretended_cuda/graph_solves", "ranks/rank_launch",
    "schedule/scheduler_cases", "solvers",
)  # fmt: skip
for helper in HELPERS:  # for `from solvers import SOLVERS`; one may import those before it
    load_module(Path(__file__).parent / f"{helper}.py", helper.rpartition("/")[2])


class PeakBytes(TorchDispatchMode):
    """Bytes of tensors that are alive, backward passes included, and the most there were at a time."""

    def __enter__(self) -> PeakBytes:
        self.live: dict[int, int] = {}
        self.peak = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.fixture
def peak_bytes() -> type[PeakBytes]:
    return PeakBytes


class Mixture:
    """The exact prediction for data drawn from a mixture of isotropic Gaussians, in any prediction type."""

    def __init__(self, shape: tuple[int, ...] = (3, 8, 8), prediction: str = "epsilon", components: int = 5) -> None:
        draw = torch.Generator().manual_seed(0)
        self.means = torch.randn(components, *shape, generator=draw, dtype=torch.float64).flatten(1) * 0.6
        self.variance, self.prediction, self.calls, self.rows = 0.05, prediction, 0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        abar, alpha, sigma = LEVELS.to(x.device)[t].unsqueeze(-1).unbind(1)
        flat, spread = x.double().flatten(1), abar * self.variance + 1 - abar
        offset = flat[:, None] - alpha[:, None] * self.means.to(x.device)
        share = (-offset.square().sum(-1) / (2 * spread)).softmax(-1)
        out = eps = sigma * (share[..., None] * offset).sum(1) / spread
        if self.prediction != "epsilon":
            out = clean = (flat - sigma * eps) / alpha
        if self.prediction == "v_prediction":
            out = alpha * eps - sigma * clean
        return out.view_as(x).to(x.dtype)


@pytest.fixture
def rows_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No solve looks whether the model's rows are independent: for tests that count its calls and rows."""
    monkeypatch.setattr(RowRecord, "due", lambda self: False)


@pytest.fixture
def mixture() -> Callable[..., Mixture]:
    return Mixture


@pytest.fixture
def ddim() -> Callable[..., Schedule]:
    def make(steps: int = 20, eta: float = 0.0, prediction_type: str = "epsilon") -> Schedule:
        timesteps = torch.arange(steps).flip(0) * (1000 // steps)
        return Schedule.ddim(ABAR, timesteps, eta=eta, prediction_type=prediction_type)

    return make


@pytest.fixture
def noise() -> Callable[..., Tensor]:
    def make(
        batch: int = 2, shape: tuple[int, ...] = (3, 8, 8), seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return make


@pytest.fixture
def karras() -> Callable[..., Tensor]:
    def make(steps: int = 20, low: float = 0.05, high: float = 14.0) -> Tensor:
        """(steps + 1,) noise levels of k-diffusion's get_sigmas_karras."""
        ramp = torch.linspace(0, 1, steps)
        return torch.cat([(high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7, torch.zeros(1)])

    return make


def backpropagation(model: Callable[..., Tensor], schedule: Schedule, noise: Tensor, **kwargs: Any) -> Tensor:
    """The sample of the serial chain by the schedule's tables, with autograd on."""
    states, outs = [noise], []
    for i in range(schedule.num_steps):
        t = schedule.timesteps[i].expand(len(noise))
        outs.append(model(states[-1] * schedule.input_scale[i], t, **kwargs))
        x = torch.zeros_like(noise)
        for lag in range(min(schedule.lags, i + 1)):
            x = x + schedule.state_coef[i, lag] * states[i - lag] + schedule.model_coef[i, lag] * outs[i - lag]
        states.append(x)
    return states[-1]


@pytest.fixture(name="backpropagation")
def _backpropagation() -> Callable[..., Tensor]:
    return backpropagation


def apart(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """(relative error, 1 - cosine) of two gradients."""
    a, b = got.double().flatten(), expected.double().flatten()
    return float((a - b).norm() / b.norm()), 1 - float(torch.cosine_similarity(a, b, dim=0))


@pytest.fixture(name="apart")
def _apart() -> Callable[[Tensor, Tensor], tuple[float, float]]:
    return apart


class Bent(nn.Module):
    """A small smooth network in float64, with a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(7, 16), nn.Linear(16, 6)
        self.double()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | float = 0.0) -> Tensor:
        h = torch.cat([x + cond, t[:, None].to(x.dtype) / 1000], dim=1)
        return 0.6 * x + 0.4 * self.outer(torch.tanh(self.inner(h)))


@pytest.fixture
def bent() -> Callable[..., Bent]:
    return Bent


def relative_error(x: Tensor, reference: Tensor) -> Tensor:
    """(B,) relative L2 error."""
    difference = (x.double() - reference.double()).flatten(1).norm(dim=1)
    return difference / reference.double().flatten(1).norm(dim=1)


@pytest.fixture(name="relative_error")
def _relative_error() -> Callable[[Tensor, Tensor], Tensor]:
    return relative_error


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Builders of tiny diffusers pipelines, for tests of several folders and for the benchmarks."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return load_module(Path(__file__).with_name("tiny_pipelines.py"), "tiny_pipelines")
