"""The diffusion chain as a fixed-point system: coefficient tables, slopes, and the model on its rows."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._types import Model
from ..kernels import newton_scan_bytes
from ..model.batched import BatchedModel
from ..model.draft_calls import DraftCalls
from ..model.weighted_norm import WeightedNorm
from ..nodes.grid import most_nodes
from ..schedule import Schedule, SpectralSlope
from ..schedule.cache import cached
from ..schedule.tables import step_variance

MOST_ELEMENTS = 2**23  # of the states of all timesteps, for all to be nodes: each wants 40 numbers
SANE_RMS = 1e4  # an input beyond this is the solver's doing, not the chain's: not the model's fault if it overflows


class Tables(NamedTuple):
    """A schedule's numbers where a solver wants them."""

    state_coef: Tensor
    model_coef: Tensor
    step_variance: Tensor
    diagonal_slope: Tensor

    @classmethod
    def of(cls, schedule: Schedule, device: torch.device, dtype: torch.dtype, accumulator: torch.dtype) -> Tables:
        def table(values: Tensor) -> Tensor:
            return values.to(device, accumulator).contiguous()

        return cls(
            table(schedule.state_coef),
            table(schedule.model_coef),
            table(step_variance(schedule.signal, schedule.sigma))[:, None],
            schedule.slope()[:, None].to(device, dtype),
        )


class System(BatchedModel):
    """One chain to solve: a model, a schedule and the shape of a batch of samples.

    States and predictions are time-major, (T + 1, B, D) and (T, B, D).

    Args:
        model, schedule, noise, model_kwargs, max_batch: as for `BatchedModel`.
        slope: what the solver linearises the model with: "scalar", the slope of unit Gaussian data; a `SpectralSlope`,
            in whose basis the chain is then solved; None for none.
        norm: the norm of errors, in whose coordinates the chain is then solved, with a slope that is the same for all
            entries; None for L2.
    """

    def __init__(
        self, model: Model, schedule: Schedule, noise: Tensor, model_kwargs: dict[str, Any] | None,
        max_batch: int | None, slope: SpectralSlope | str | None = "scalar", norm: WeightedNorm | None = None,
    ) -> None:  # fmt: skip
        basis = slope.basis() if isinstance(slope, SpectralSlope) else norm
        super().__init__(model, schedule, noise, model_kwargs, max_batch, basis)
        place = (noise.device, self.dtype, self.accumulator)
        tables = cached(schedule, place, lambda: Tables.of(schedule, *place))
        self.state_coef, self.model_coef, self.step_variance, self._scalar_slope = tables
        self.linear_model = slope
        """The argument `slope`."""
        self.draft: DraftCalls | None = None
        """What stands in for the model between rounds, where the solver wants it."""
        self.node_sizes = [schedule.num_steps]
        """Numbers of nodes of the first rounds, see `round_sizes`."""
        self.all_nodes = False  # whether all timesteps may be, if they are few; where noise is added, not

    @property
    def most_nodes(self) -> int:
        """How many nodes a round may have."""
        whole = self.all_nodes and self.num_steps * self.batch * self.numel <= MOST_ELEMENTS
        return self.num_steps if whole else most_nodes(self.num_steps, self.node_sizes)

    @cached_property
    def diagonal_slope(self) -> Tensor:
        """(T,) or (T, D), of the Gaussian model of the data; made where it is wanted, as rounds on nodes do without."""
        if not isinstance(self.linear_model, SpectralSlope):
            return self._scalar_slope
        slopes, which = self.linear_model.classes(self.schedule)  # as rounds on nodes have it, whose remainders stay
        return slopes.to(self.device, self.dtype).index_select(1, which.to(self.device))

    @cached_property
    def slope(self) -> Tensor:
        """The same as solvers linearise the model with: zeros where they do not."""
        return torch.zeros_like(self.diagonal_slope) if self.linear_model is None else self.diagonal_slope

    def to_basis(self, rows: Tensor) -> Tensor:
        """(n, D) in the coordinates of the solver, a copy."""
        rows = rows.clone(memory_format=torch.contiguous_format)  # the change of basis takes no other
        return rows if self.basis is None else self.basis.forward(rows)

    def from_basis(self, rows: Tensor) -> Tensor:
        """(n, D) in the coordinates of the model, a copy."""
        rows = rows.clone(memory_format=torch.contiguous_format)
        return rows if self.basis is None else self.basis.inverse(rows)

    def denoised(self, states: Tensor, predictions: Tensor, step: list[int]) -> Tensor:
        """(B, *shape): the clean sample predicted at timestep step[b] of each sample b, in the model's dtype."""
        at, who = torch.tensor(step, device=self.device), torch.arange(self.batch, device=self.device)
        p, q = self.denoised_coef[at].to(self.dtype).unbind(-1)
        clean = self.from_basis(p[:, None] * states[at, who] + q[:, None] * predictions[at, who])
        if self.schedule.clip is not None:
            clean = clean.clamp(-self.schedule.clip.range, self.schedule.clip.range)
        return clean.view(self.batch, *self.shape).to(self.model_dtype)

    def scratch_bytes(self, backend: str) -> int:
        """Bytes of `chain.scratch` for the guesses."""
        size = (self.num_steps, self.batch, self.numel)
        found: int = newton_scan_bytes(*size, 0, 1, self.dtype, self.dtype, self.device, backend)
        return found

    def bounds(self, value: int) -> Tensor:
        """(B,) int32, the same bound for every sample."""
        return torch.full((self.batch,), value, dtype=torch.int32, device=self.device)
