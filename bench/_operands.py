"""Inputs of the kernels as a solve meets them: a DDIM chain, states on its way, a history of M different rounds.

Predictions change from round to round. Were they always the same, the second round would find F(x) = x, and kernels
that skip columns of weight zero would be timed on work that no solve has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.kernels import (
    anderson_step,
    anderson_step_bytes,
    ddim_update,
    ddim_update_bytes,
    inverse_scan,
    inverse_scan_bytes,
    newton_scan,
    newton_scan_bytes,
    node_scan,
    secant_fit,
)

from . import _paper
from ._problems import ABAR, TRAIN_STEPS

RIDGE = 1e-3


@dataclass(frozen=True)
class Shape:
    """(B, T, D, M): samples, timesteps, elements per sample, history."""

    batch: int
    steps: int
    size: int
    history: int

    @property
    def elements(self) -> int:
        """State elements: what one round computes."""
        return self.batch * self.steps * self.size

    def __str__(self) -> str:
        return f"({self.batch}, {self.steps}, {self.size}, {self.history})"


OPS = ("ddim_update", "anderson_step", "newton_scan", "inverse_scan", "node_scan", "secant_fit")
HISTORY_OPS, PAPER_OPS = OPS[1:4], OPS[:2]
STENCIL, CLASSES = 4, 135  # of the scan over nodes: those of a spectral prior of 3 x 32 x 32 images


def elements_moved(op: str, shape: Shape) -> float:
    """Elements read or written for each state element, every tensor once. ddim_update: predictions and old state in,
    new state out. anderson_step: predictions and old state in, M columns of f and g in, new state and a column of f and
    g out. newton_scan, inverse_scan: predictions and old state in, M columns of z and e in, new state and a column of z
    and e out. node_scan: remainders in, new state out. secant_fit: a Gram in and a fit in float64 out every timestep.
    """
    fixed = {"ddim_update": 3, "node_scan": 2, "secant_fit": 3 * shape.history**2 / shape.size}
    return fixed.get(op, 2 * shape.history + 5)


class Inputs:
    """A chain in the middle of a solve. `bank` holds the predictions of successive rounds; all sides share it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        t, b, d = shape.steps, shape.batch, shape.size
        if not 1 <= t <= TRAIN_STEPS:
            raise ValueError(f"--shape: expected 1 <= T <= {TRAIN_STEPS}, got {t}")
        schedule = dq.Schedule.ddim(ABAR, torch.arange(t).flip(0) * (TRAIN_STEPS // t))
        on_cpu = torch.device(device).type == "cpu"
        self.accumulator = torch.float64 if on_cpu or dtype == torch.float64 else torch.float32
        self.state_coef = schedule.state_coef.to(device, self.accumulator).contiguous()
        self.model_coef = schedule.model_coef.to(device, self.accumulator).contiguous()
        self.slope = schedule.slope().to(device, self.accumulator)[:, None].contiguous()
        draw = torch.Generator().manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=draw)

        start = normal(b, d)
        # noise predictions: near the noise itself, with what one round after the other still changes
        self.bank = [(0.9 * start + 0.1 * normal(t, b, d)).to(device, dtype) for _ in range(min(shape.history + 2, 7))]
        self.states = torch.cat([start[None], start + 0.3 * normal(t, b, d)]).to(device, dtype)

    def predictions(self, round: int) -> Tensor:
        return self.bank[round % len(self.bank)]

    def moved(self, op: str) -> int:
        """Bytes that the op has to read and write."""
        return round(elements_moved(op, self.shape) * self.shape.elements) * self.dtype.itemsize


class Fused:
    """Operands of one backend's ops, on memory of their own."""

    def __init__(self, inputs: Inputs, backend: str, scope: str = "timestep", relative: bool = False) -> None:
        self.inputs, self.backend, self.scope, self.relative = inputs, backend, scope, relative
        shape, device = inputs.shape, inputs.device
        t, b, d, m = shape.steps, shape.batch, shape.size, shape.history
        self.states, self.predictions = inputs.states.clone(), inputs.predictions(0).clone()
        self.lo = torch.zeros(b, dtype=torch.int32, device=device)
        self.hi = torch.full((b,), t, dtype=torch.int32, device=device)
        self.sums = [torch.zeros(t, b, dtype=inputs.accumulator, device=device) for _ in range(2)]
        self.f, self.g = (torch.zeros(m, t, b, d, dtype=inputs.dtype, device=device) for _ in range(2))
        self.gram = torch.zeros(t, b, m, m, dtype=inputs.accumulator, device=device)
        self.filled = torch.zeros(t, b, dtype=torch.int32, device=device)
        self.z, self.e = (torch.zeros(m + 1, t, b, d, dtype=inputs.dtype, device=device) for _ in range(2))
        self._nodes(shape)
        self._secants(shape)
        self.round, self.workspace, self.weight = 0, None, torch.ones_like(inputs.slope)
        self._make_workspace()

    def _nodes(self, shape: Shape) -> None:
        """Coefficients by class, every timestep a node; the model's part from nodes on both sides."""
        (t, d), device, kind = (shape.steps, shape.size), self.states.device, self.states.dtype
        wide = torch.float64 if kind == torch.float64 else torch.float32
        stencil, kinds = min(STENCIL, t), min(CLASSES, d)
        tables = [
            (coef[:, :, None, None] / columns).expand(t, 1, columns, kinds).to(wide).contiguous()
            for coef, columns in ((self.inputs.state_coef, 1), (self.inputs.model_coef, stencil))
        ]
        start = (torch.arange(t, device=device) - 1).clamp_(0, t - stencil).int()
        classes = torch.randperm(d, generator=torch.Generator().manual_seed(0)).remainder_(kinds).int().to(device)
        self.nodes = (*tables, start, classes)

    def _secants(self, shape: Shape) -> None:
        """Grams of a timestep's secants, of which the first ones are ten times as long as the last."""
        rows, columns, device = shape.steps * shape.batch, shape.history, self.states.device
        wide = torch.float64 if self.states.dtype == torch.float64 else torch.float32
        draw = torch.Generator().manual_seed(0)
        secants = torch.randn(rows, columns, 64, generator=draw) * torch.logspace(0, -1, columns)[:, None]
        gram = (secants @ secants.mT).to(device, wide).contiguous()
        size, count = torch.full((rows,), 8.0, device=device, dtype=wide), torch.full((rows,), columns + 1)
        ridges = torch.full((columns, rows), 1e-6, device=device, dtype=wide)
        fit = torch.zeros(rows, columns, columns, device=device, dtype=torch.float64)
        self.secants = (fit, gram, size, count.int().to(device), ridges)

    def _make_workspace(self) -> None:
        """Scratch memory for the ops, as a solve has it; other launch shapes may need more of it."""
        shape, stored, device = self.inputs.shape, self.inputs.dtype, self.states.device
        t, b, d, m = shape.steps, shape.batch, shape.size, shape.history
        room = max(
            ddim_update_bytes(t, b, d, stored, device, self.backend),
            anderson_step_bytes(t, b, d, m, stored, stored, device, self.backend),
            newton_scan_bytes(t, b, d, m, 1, stored, stored, device, self.backend),
            inverse_scan_bytes(t, b, d, m, stored, device, self.backend),
        )
        if room > (0 if self.workspace is None else len(self.workspace)):
            self.workspace = torch.empty(room, dtype=torch.uint8, device=device)

    def prepare(self) -> None:
        """What the model does between two rounds: new predictions."""
        self._make_workspace()
        self.round += 1
        self.predictions.copy_(self.inputs.predictions(self.round))

    def ddim_update(self, backend: str | None = None) -> None:
        ddim_update(
            self.states, self.predictions, self.inputs.state_coef, self.inputs.model_coef, self.lo, self.hi, *self.sums,
            workspace=self.workspace, backend=backend or self.backend,
        )  # fmt: skip

    def anderson_step(self, backend: str | None = None) -> None:
        anderson_step(
            self.states, self.predictions, self.inputs.state_coef, self.inputs.model_coef, self.lo, self.hi, *self.sums,
            self.f, self.g, self.gram, self.filled, self.round % self.inputs.shape.history, scope=self.scope,
            ridge=RIDGE, relative_ridge=self.relative, damping=1.0, stale=float("inf"), workspace=self.workspace,
            backend=backend or self.backend,
        )  # fmt: skip

    def newton_scan(self, backend: str | None = None) -> None:
        newton_scan(
            self.states, self.predictions, self.inputs.state_coef, self.inputs.model_coef, self.inputs.slope, self.lo,
            self.hi, *self.sums, self.z, self.e, self.filled, self.round % (self.inputs.shape.history + 1),
            workspace=self.workspace, backend=backend or self.backend,
        )  # fmt: skip

    def inverse_scan(self, backend: str | None = None) -> None:
        inverse_scan(
            self.states, self.predictions, self.inputs.state_coef, self.inputs.model_coef, self.inputs.slope,
            self.weight, self.lo, self.hi, self.sums[0], self.z, self.e, self.filled,
            self.round % (self.inputs.shape.history + 1), workspace=self.workspace, backend=backend or self.backend,
        )  # fmt: skip

    def secant_fit(self, backend: str | None = None) -> None:
        secant_fit(*self.secants, None, 1e-5, 5e-3, 0.3, backend=backend or self.backend)

    def node_scan(self, backend: str | None = None) -> None:
        node_scan(self.states, self.predictions, *self.nodes, backend=backend or self.backend)

    def fill(self, op: str) -> Fused:
        """Run as many rounds as there are history columns, with the quickest backend."""
        for _ in range(self.inputs.shape.history + 1):
            self.prepare()
            getattr(self, op)("auto")
        return self


class Paper:
    """Operands of the paper's formulation, on memory of their own."""

    def __init__(self, inputs: Inputs, loop: bool = False, compile: bool = False) -> None:
        self.inputs, self.states, self.predictions = inputs, inputs.states.clone(), inputs.predictions(0).clone()
        self.chain = _paper.Chain.of(inputs.state_coef, inputs.model_coef, inputs.dtype)
        self.solver = _paper.Anderson(self.chain, self.states, inputs.shape.history, RIDGE)
        self.scan = _paper.scan_loop if loop else _paper.scan_cumsum
        if compile:
            torch._dynamo.reset()  # else the specialisations of earlier shapes count towards its limit
        self.update = torch.compile(_paper.ddim_update) if compile else _paper.ddim_update
        self.compute = torch.compile(_paper.anderson_round) if compile else _paper.anderson_round
        self.round = 0

    def prepare(self) -> None:
        self.round += 1
        self.predictions.copy_(self.inputs.predictions(self.round))

    def ddim_update(self) -> None:
        self.update(self.scan, self.chain, self.states, self.predictions)

    def anderson_step(self) -> tuple[float, float]:
        return self.solver.step(self.predictions, self.scan, self.compute)

    def fill(self, op: str = "anderson_step") -> Paper:
        """Run as many eager rounds as there are history columns."""
        for _ in range(self.inputs.shape.history):
            self.prepare()
            self.solver.step(self.predictions, self.scan)  # eager, whatever `op` will run
        return self


class Copy:
    """A plain copy that reads n / 2 bytes and writes n / 2: as many bytes read and written as the op moves."""

    def __init__(self, moved: int, device: str) -> None:
        count = moved // 8
        self.source = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device)
        self.target = torch.zeros_like(self.source)

    def run(self) -> None:
        self.target.copy_(self.source)
