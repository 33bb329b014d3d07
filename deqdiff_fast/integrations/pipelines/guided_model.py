"""The calls of one timestep, repeated for many timesteps and samples at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..._types import unwrap_output
from ...model.padding import is_compiled
from .calls import Call
from .combination import Combination
from .overwriting import FixedOutputs


class GuidedModel:
    """`model(x, t, rows)` -> what the scheduler is given, for any mixture of timesteps and samples.

    x: (n, *shape); t: (n,) the scheduler's timesteps; rows: (n,) which of the B samples each row belongs to.
    """

    def __init__(
        self, calls: list[Call], combination: Combination, batch: int, fixed: FixedOutputs | None = None
    ) -> None:
        self.calls, self.combination, self.batch, self.fixed = calls, combination, batch, fixed
        denoisers = [call.component.module for call in calls if not call.component.auxiliary]
        self.base_model = denoisers[0]  # what is learned of it outlives this call of the pipeline
        compiled = any(is_compiled(call.component.module) for call in calls)
        self._compiled_call_impl = compiled or None  # where the sampler looks: it then pads its batches
        self.deqdiff_variant = (repr(combination), *((self.copies(call), *call.kind()) for call in calls))

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        parts: list[Tensor] = []
        leaves: list[list[Any]] = []
        for call in self.calls:
            copies = self.copies(call)
            index = torch.cat([rows + k * self.batch for k in range(copies)])
            assert call.placement is not None
            assert call.rule is not None
            extra = call.extra_of(index, leaves)
            output = call.repeat(call.placement.fill(x, index), call.rule(t, copies, index), extra)
            leaves.append(tree_leaves(output) if call.component.auxiliary else [])
            if not call.component.auxiliary:
                parts += call.placement.parts(unwrap_output(output), x.shape[1:])
        output = self.combination(parts)
        return output if self.fixed is None else self.fixed.put(output, t, rows)

    def __str__(self) -> str:
        """How the loop was understood: the calls of a step, and what becomes of their outputs."""
        said = []
        for call in self.calls:
            assert call.rule is not None
            rows = f" on {self.copies(call)} rows a sample" if self.copies(call) > 1 else ""
            part = " beside what stays" if call.placement is not None and call.placement.rest is not None else ""
            said.append(f"{call.component.name}(x{part}, {call.rule.name}){rows}")
        counts = {each: said.count(each) for each in said}
        calls = ", ".join(f"{count} {each}" if count > 1 else each for each, count in counts.items())
        return f"{calls}: {self.combination}" + (", where the mask leaves it" if self.fixed is not None else "")

    def copies(self, call: Call) -> int:
        """How often the samples occur in the batch of one call: twice where guidance takes both halves at once."""
        return int(call.x.shape[0]) // self.batch
