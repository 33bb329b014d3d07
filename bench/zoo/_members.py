"""The zoo: every model with its chains, what it is conditioned on, and the loop that its author would sample it by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deqdiff_fast as dq

from .. import _policy
from .._problems import ABAR
from . import _cache, _data, _loops
from ._recipes import LABELS, NO_LABEL, POLYNOMIAL, QUADRATIC

GUIDANCE = 3.0


class Chain(NamedTuple):
    """A number of steps, and how much noise is added on the way; eta 1 is DDPM."""

    steps: int
    eta: float = 0.0


@dataclass
class Request:
    """One sample of a model: what the library is given, and what the author's loop calls."""

    model: Any
    predict: _loops.Predict
    kwargs: dict[str, Any] = field(default_factory=dict)
    weight: Tensor | None = None
    """Like a sample: 1 for the entries that are read and used, 0 for the others; None where all are."""


Ask = Callable[[nn.Module, int, str], Request]


def _plain(net: nn.Module, seed: int, device: str) -> Request:
    return Request(net, net)


def _with_guidance(net: nn.Module, seed: int, device: str) -> Request:
    label, none = torch.tensor([seed % LABELS], device=device), torch.tensor([NO_LABEL], device=device)
    model = dq.guided(net, {"label": label}, {"label": none}, GUIDANCE)
    return Request(model, _loops.guidance(net, label, none, GUIDANCE))


def _imputing(net: nn.Module, seed: int, device: str) -> Request:
    draw = torch.Generator().manual_seed(10**5 + seed)
    clean, mask = _data.series(1, draw), _data.given(1, draw)
    kwargs = {"observed": (mask * clean).to(device), "mask": mask.to(device)}
    return Request(net, partial(net, **kwargs), kwargs, 1 - kwargs["mask"][0])


def _padded(net: nn.Module, seed: int, device: str) -> Request:
    mask = _data.node_counts(1, torch.Generator().manual_seed(10**5 + seed)).to(device)
    kwargs = {"mask": mask}
    return Request(net, partial(net, **kwargs), kwargs, mask[0, :, None].expand(_data.NODES, _data.NODE))


@dataclass(frozen=True)
class Member:
    """A model of the zoo. abar: its cumulative alphas, None for a flow."""

    name: str
    what: str
    shape: tuple[int, ...]
    chains: tuple[Chain, ...]
    ask: Ask = _plain
    abar: Tensor | None = None
    velocity: bool = False

    def net(self, folder: Path, fit: int | None, device: str) -> nn.Module:
        """The trained network, from the cache in `folder` where it is there. fit: training steps, None: its own."""
        return _cache.trained(self.name, folder, fit).to(device)

    def timesteps(self, steps: int) -> Tensor:
        """(steps,) int64, descending, evenly spaced from 0. Raises ValueError."""
        assert self.abar is not None
        if steps > len(self.abar):
            raise ValueError(f"--steps: expected at most {len(self.abar)} for {self.name}, got {steps}")
        return torch.arange(steps).flip(0) * (len(self.abar) // steps)

    @staticmethod
    def sigmas(steps: int) -> Tensor:
        """(steps + 1,) float64 from 1 to 0, evenly spaced."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def schedule(self, chain: Chain) -> dq.Schedule:
        if self.abar is None:
            return dq.Schedule.from_sigmas(self.sigmas(chain.steps), "euler", flow=True)
        predicted = "v_prediction" if self.velocity else "epsilon"
        return dq.Schedule.ddim(self.abar, self.timesteps(chain.steps), chain.eta, prediction_type=predicted)

    def loop(self, chain: Chain, request: Request) -> Callable[..., Tensor]:
        """The author's loop: from the noise (1, *shape) to the sample; for DDIM with a `draw`, see `_loops.ddim`."""
        if self.abar is None:
            return partial(_loops.euler, request.predict, sigmas=self.sigmas(chain.steps))
        given = {"abar": self.abar, "timesteps": self.timesteps(chain.steps)}
        return partial(_loops.ddim, request.predict, **given, eta=chain.eta, velocity=self.velocity)


_ALL = (
    Member(
        "digits", "digits 1 x 8 x 8, U-Net, eps", (1, 8, 8),
        (Chain(50), Chain(100), Chain(1000), Chain(100, 1.0), Chain(1000, 1.0)), abar=ABAR,
    ),
    Member(
        "guided", "digits by label, transformer, flow, Euler, guidance 3", (1, 8, 8),
        (Chain(28), Chain(100)), _with_guidance,
    ),
    Member(
        "signal", "spikes on a smooth background 2 x 128, 1-D U-Net, eps", _data.SIGNAL,
        (Chain(100), Chain(1000)), abar=ABAR,
    ),
    Member(
        "imputation", "series 8 x 48, the given entries never read, convolutions, eps", _data.SERIES,
        (Chain(50), Chain(50, 1.0)), _imputing, QUADRATIC,
    ),
    Member(
        "policy", "action sequences 16 x 7, MLP, v", (_policy.HORIZON, _policy.ACTIONS),
        (Chain(100), Chain(100, 1.0)), abar=ABAR, velocity=True,
    ),
    Member(
        "graph", "5 to 12 nodes of 5 entries, padded to 12, attention, eps", (_data.NODES, _data.NODE),
        (Chain(100), Chain(1000, 1.0)), _padded, POLYNOMIAL,
    ),
)  # fmt: skip
MEMBERS = {member.name: member for member in _ALL}
