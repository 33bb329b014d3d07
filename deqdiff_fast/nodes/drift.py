"""The noise of a stochastic chain, carried from node to node."""

from __future__ import annotations

import torch
from torch import Tensor

from .composite import LinearChain
from .node_grid import per_element


def composite_drift(
    chain: LinearChain, classes: Tensor | None, nodes: tuple[int, ...], drift: Tensor,
    device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """(n, L, B, D): what the noise of the steps up to the next node adds to the state there and those before it.

    drift: (T, B, D), what every step adds. device: of the result, None: that of the drift.
    """
    steps, lags = chain.state_coef.shape
    device = drift.device if device is None else device
    at = torch.tensor(nodes)
    length = torch.cat([at[1:], torch.tensor([steps])]) - at
    found = drift.new_zeros(len(nodes), lags, *drift.shape[1:], device=device)
    for done in range(int(length.max())):
        live = (done < length).nonzero()[:, 0]
        row = at[live] + done
        here = live.to(device)
        new = drift[row.to(drift.device)].to(device)
        for lag in range(min(lags, done)):  # states before the node carry none of it
            there = row - lag
            gain = chain.state_coef[row, lag, None] + chain.model_coef[row, lag, None] * chain.slope[there]
            new += per_element(gain.to(device, drift.dtype), classes) * found[here, lag]
        found[here, 1:] = found[here, :-1]
        found[here, 0] = new
    return found
