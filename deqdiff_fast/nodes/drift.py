"""The noise of a stochastic chain, carried from node to node."""

from __future__ import annotations

import torch
from torch import Tensor

from .composite import LinearChain
from .node_grid import per_element


def composite_drift(chain: LinearChain, classes: Tensor | None, nodes: tuple[int, ...], drift: Tensor) -> Tensor:
    """(n, L, B, D): what the noise of the steps up to the next node adds to the state there and those before it.

    drift: (T, B, D), what every step adds.
    """
    steps, lags = chain.state_coef.shape
    at = torch.tensor(nodes)
    length = torch.cat([at[1:], torch.tensor([steps])]) - at
    found = drift.new_zeros(len(nodes), lags, *drift.shape[1:])
    for done in range(int(length.max())):
        live = (done < length).nonzero()[:, 0]
        row = at[live] + done
        here = live.to(drift.device)
        new = drift[row.to(drift.device)]
        for lag in range(min(lags, done)):  # states before the node carry none of it
            there = row - lag
            gain = chain.state_coef[row, lag, None] + chain.model_coef[row, lag, None] * chain.slope[there]
            new += per_element(gain.to(drift.device, drift.dtype), classes) * found[here, lag]
        found[here, 1:] = found[here, :-1]
        found[here, 0] = new
    return found
