"""Types that more than one module speaks of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Model = Callable[..., Any]
"""`model(x, t, **model_kwargs) -> prediction`; x: (n, *shape), t: (n,); any n."""

OnFailure = Literal["serial", "raise", "warn"]
Backend = Literal["auto", "reference", "cpp", "triton"]


@dataclass
class FrozenNoise:
    """Noise drawn beforehand, in the place of a generator: (n, B, *shape) for the n steps that draw, in chain order."""

    draws: Tensor

    def select(self, samples: Tensor) -> FrozenNoise:
        """That of some of the samples, (m,) indices."""
        return FrozenNoise(self.draws[:, samples])


Generators = torch.Generator | list[torch.Generator] | FrozenNoise | None


@dataclass
class Rows:
    """The (timestep, sample) pairs of one batched model call, timestep-major."""

    flat: Tensor | None
    """(n,) int64 indices i * B + b, or None where the rows are all samples of timesteps [lo, hi)."""
    lo: int
    hi: int
    count: int


class DraftRows(Protocol):
    """A cheap stand-in for the model, on rows of a chain, in the coordinates of its solver."""

    evals: int
    """Rows that it was called on so far."""

    def row(self, step: int, states: Tensor) -> Tensor:
        """(B, D) states of timestep `step` -> (B, D) predictions."""
        ...

    def rows(self, states: Tensor, steps: Tensor) -> Tensor:
        """(n, B, D) states of timesteps steps: (n,) -> (n, B, D) predictions."""
        ...


def unwrap_output(output: Any) -> Any:
    """What a model means by its output: the tensor itself, `.sample` of an object (diffusers), the first of a tuple."""
    value: Any = output if isinstance(output, Tensor) else getattr(output, "sample", output)
    return value[0] if isinstance(value, (tuple, list)) and value else value


__all__ = ["Backend", "DraftRows", "FrozenNoise", "Generators", "Model", "OnFailure", "Rows", "unwrap_output"]
