"""The calls of the denoiser that a pipeline makes for one timestep: recorded, and repeated for many at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..._types import unwrap_output
from ...model.padding import is_compiled
from ...model.sample_kwargs import select_rows
from .families import Family, Guidance


@dataclass
class Call:
    """One recorded call: its input x: (R, ...), the timestep, and what else was passed, by position or by name."""

    x: Tensor
    timestep: Any
    extra: dict[str, Any]
    family: Family
    positional: int  # how many of the arguments came by position
    further: tuple[Any, ...] = ()  # those after the timestep
    _values: list[Any] = field(default_factory=list)

    @classmethod
    def record(cls, family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call that a pipeline makes with these arguments."""
        further, extra = tree_map(lambda value: value, (args[2:], kwargs))  # of its own: some pipelines write into them
        x = args[0] if args else extra.pop(family.inputs)
        timestep = args[1] if len(args) > 1 else extra.pop("timestep")
        call = cls(x, timestep, extra, family, len(args), further)
        call._values = [
            value.clone() if isinstance(value, Tensor) else value for value in tree_leaves((further, extra))
        ]
        return call

    def arrange(
        self, x: Tensor, timestep: Any, further: tuple[Any, ...], extra: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) for other values in the convention of this call, on which wrappers of a model may rely."""
        named = {self.family.inputs: x, "timestep": timestep}
        args = tuple(named.pop(name) for name in (self.family.inputs, "timestep")[: self.positional])
        return (*args, *further), {**named, **extra}

    def same_extra(self, other: Call) -> bool:
        """Whether another call passes the same conditions as this one did, which may have been written to since."""
        theirs, shape = tree_flatten((other.further, other.extra))
        mine = tree_flatten((self.further, self.extra))[1]
        return shape == mine and all(_same(a, b) for a, b in zip(self._values, theirs))


def _same(recorded: Any, now: Any) -> bool:
    if isinstance(recorded, Tensor) or isinstance(now, Tensor):
        alike = isinstance(recorded, Tensor) and isinstance(now, Tensor) and recorded.shape == now.shape
        return alike and torch.equal(recorded, now)
    return recorded is now or bool(recorded == now)


class GuidedModel:
    """`model(x, t, rows)` -> guided prediction, for any mixture of timesteps and samples.

    x: (n, *shape); t: (n,) the scheduler's timesteps; rows: (n,) which of the B samples each row belongs to.
    """

    def __init__(self, denoiser: Any, family: Family, calls: list[Call], guidance: Guidance, batch: int) -> None:
        self.denoiser, self.family, self.calls = denoiser, family, calls
        self.guidance, self.batch = guidance, batch
        self._compiled_call_impl = is_compiled(denoiser) or None  # where the sampler looks: it then pads its batches
        self.base_model = denoiser  # what is learned of it outlives this call of the pipeline
        self.deqdiff_variant = (repr(family), repr(guidance), *(self._kind(call) for call in calls))
        for call in calls:
            self._check(call)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for call in self.calls:
            copies = self.copies(call)
            times = self.family.model_timestep(t, x).repeat(copies)
            args, kwargs = call.arrange(torch.cat([x] * copies), times, *self._expand(call, rows))
            parts += self.parts(unwrap_output(self.denoiser(*args, **kwargs)), copies, x.shape[1])
        return self.guidance.combine(parts)

    def _kind(self, call: Call) -> tuple[Any, ...]:
        """What calls of the same cost, and as smooth in time, have in common."""
        leaves, structure = tree_flatten((call.further, call.extra))
        shapes = (tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf)[:80] for leaf in leaves)
        return tuple(call.x.shape[1:]), self.copies(call), str(structure), *shapes

    def copies(self, call: Call) -> int:
        """How often the samples occur in the batch of one call: twice where guidance takes both halves at once."""
        return int(call.x.shape[0]) // self.batch

    def parts(self, output: Tensor, copies: int, channels: int) -> list[Tensor]:
        """The halves of an output, without a predicted variance."""
        if self.family.variance and output.shape[1] == 2 * channels:
            output = output[:, :channels]
        return list(output.chunk(copies))

    def _expand(self, call: Call, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        index = torch.cat([rows + k * self.batch for k in range(self.copies(call))])
        per_row = {name: value for name, value in call.extra.items() if name not in self.family.shared}
        further: tuple[Any, ...] = select_rows(call.further, len(call.x), index)
        return further, {**call.extra, **select_rows(per_row, len(call.x), index)}

    def _check(self, call: Call) -> None:
        total = call.x.shape[0]
        if self.copies(call) * self.batch != total:
            raise ValueError(
                f"the pipeline calls its model on {total} rows for {self.batch} samples; expected a multiple of that"
            )
        places = {f"argument {k}": value for k, value in enumerate(call.further, 3)}
        for name, value in (places | call.extra).items():
            for leaf in () if name in self.family.shared else tree_flatten(value)[0]:
                if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] not in (1, total):
                    raise ValueError(
                        f"{name}: expected tensors with one row for each of the {total} rows of a model call, got "
                        f"shape {tuple(leaf.shape)}; which rows belong to which sample is not known"
                    )
