"""Types that more than one module speaks of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_map

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


@dataclass(frozen=True, eq=False)
class Shared:
    """A value in model_kwargs that belongs to no sample, see `shared`; the model is given the value itself."""

    value: Any


register_pytree_node(Shared, lambda marked: ([marked.value], None), lambda values, _: Shared(*values))


def shared(value: Any) -> Any:
    """Mark a value in `model_kwargs`, or in a container there, as one for all samples, however long it is.

    The model is given the value itself, in every call. Without the mark a tensor whose first dimension is B, the number
    of samples, and a list or tuple of B strings belong to the samples and are repeated for the timesteps of a batch: a
    table of four noise levels is taken for one level a sample where there happen to be four samples.

    What is large and belongs to the samples need not be repeated: `{"volumes": shared(volumes), "sample":
    torch.arange(B)}` hands all B volumes to every call, and with them the number of the sample of each row.

    Args:
        value: a tensor, list, dict, or anything else.

    Returns:
        What to put into `model_kwargs` in its place.
    """
    return value if isinstance(value, Shared) else Shared(value)


def without_marks(kwargs: Any) -> Any:
    """`kwargs` as a model is given them: the values themselves in the place of what `shared` made of them."""
    plain = lambda value: value.value if isinstance(value, Shared) else value  # noqa: E731
    return tree_map(plain, kwargs, is_leaf=lambda value: isinstance(value, Shared))


@dataclass
class Rows:
    """The (timestep, sample) pairs of one batched model call, timestep-major."""

    flat: Tensor | None
    """(n,) int64 indices i * B + b, or None where the rows are all samples of timesteps [lo, hi)."""
    lo: int
    hi: int
    count: int
    slots: Tensor | None = None
    """(n,) int64, where these rows lie in the tensors of states and predictions; None: where `flat` says."""


class Coordinates(Protocol):
    """A linear change of coordinates of rows (n, D), in place."""

    def forward(self, rows: Tensor, spare: Tensor | None = None) -> Tensor:
        """Into those of the solver; spare: scratch of the same shape and dtype. Returns rows."""
        ...

    def inverse(self, rows: Tensor, spare: Tensor | None = None) -> Tensor:
        """Into those of the model."""
        ...


def unwrap_output(output: Any) -> Any:
    """What a model means by its output: the tensor itself, `.sample` of an object (diffusers), the first of a tuple."""
    value: Any = output if isinstance(output, Tensor) else getattr(output, "sample", output)
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return value if isinstance(value, Tensor) else getattr(value, "sample", value)


def parameters_of(model: Any) -> list[Tensor]:
    """Those of a module, or of a wrapper with such a method."""
    found = getattr(model, "parameters", None)
    return [value for value in found() if isinstance(value, Tensor)] if callable(found) else []


__all__ = [
    "Backend", "Coordinates", "FrozenNoise", "Generators", "Model", "OnFailure", "Rows", "Shared",
    "parameters_of", "shared", "unwrap_output", "without_marks",
]  # fmt: skip
