"""Models that are not called as model(x, t): one with a mask, one that takes no label for "any label", one in numpy,
and one with a megabyte of side input for each sample. Each is compared with a serial chain.

    python examples/own_models.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deqdiff_fast as dq

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
SCHEDULE = dq.Schedule.ddim(ABAR, torch.arange(0, 1000, 25).flip(0))  # 40 steps
SIDE = 1 << 18  # numbers of side input for each sample: a megabyte

Case = tuple[Callable[..., Any], Tensor, dict[str, Any]]
"""Model, noise, model_kwargs."""


def eps(x: Tensor, t: Tensor, mean: Tensor, variance: float = 0.05) -> Tensor:
    """The exact prediction for data of that mean; stands in for a network."""
    abar = ABAR[t].view(-1, *[1] * (x.dim() - 1))
    return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * variance + 1 - abar)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def masked() -> Case:
    """Sets of 3, 5 and 2 atoms in rows of 5. The mask has a row for each sample, so it is repeated with its samples;
    noise and predictions are 0 where there is no atom, and so is everything between them."""
    mask = torch.arange(5)[None] < torch.tensor([3, 5, 2])[:, None]

    def model(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        there = mask[..., None].to(x.dtype)
        middle = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
        return eps(x, t, 0.5 * torch.tanh(x - middle)) * there

    return model, normal(3, 5, 2) * mask[..., None], {"mask": mask}


def no_label() -> Case:
    """A network that wants label=None for "any label". In one batch a part of the rows has a label and a part has none,
    so -1 says which, and the two parts are two calls."""

    def network(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return eps(x, t, torch.zeros(()) if label is None else label[:, None].to(x.dtype) - 1)

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        out, free = torch.empty_like(x), label < 0
        if bool(free.any()):
            out[free] = network(x[free], t[free], None)
        if not bool(free.all()):
            out[~free] = network(x[~free], t[~free], label[~free])
        return out

    guided = dq.guided(model, {"label": torch.tensor([0, 1, 2])}, {"label": torch.tensor([-1])}, scale=2.0)
    return guided, normal(3, 8), {}


def numpy_model() -> Case:
    """A model that is no torch at all. An ONNX file is `session.run(None, {"x": x.numpy(), "t": t.numpy()})`."""
    abar = ABAR.numpy()

    def network(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        a = abar[t][:, None]
        return np.sqrt(1 - a) * (x - np.sqrt(a) * 0.4 * np.tanh(x)) / (a * 0.05 + 1 - a)

    return lambda x, t: torch.from_numpy(network(x.numpy(), t.numpy())), normal(3, 8), {}


def side_inputs() -> Case:
    """A megabyte for each sample. As a tensor of B rows it would be copied for every timestep of a batch. `shared`
    hands the tensor itself to every call; the numbers of the samples, one for each, say which row is whose."""
    volumes = normal(3, SIDE)

    def model(x: Tensor, t: Tensor, volumes: Tensor, sample: Tensor) -> Tensor:
        features = volumes.view(len(volumes), 8, -1).std(2)  # once for each sample, whatever the number of rows
        return eps(x, t, features[sample])

    return model, normal(3, 8), {"volumes": dq.shared(volumes), "sample": torch.arange(3)}


@torch.no_grad()
def main() -> None:
    for case in (masked, no_label, numpy_model, side_inputs):
        model, noise, kwargs = case()
        sampler = dq.DEQSampler(model, SCHEDULE, solver="quasi-newton")
        out, expected = sampler.sample(noise, kwargs), sampler.serial(noise, kwargs).sample
        error = float(((out.sample - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())
        print(f"{case.__name__}: {SCHEDULE.num_steps} steps in {out.stats.rounds} rounds, largest error {error:.1e}")


if __name__ == "__main__":
    main()
