"""Reference of the scan over nodes (composite steps with interpolated remainders), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def node_scan(
    states: Tensor, remainder: Tensor, state_coef: Tensor, remainder_coef: Tensor, start: Tensor,
    classes: Tensor | None = None, drift: Tensor | None = None,
) -> None:  # fmt: skip
    """y_l <- sum_m state_coef[j,l,m,k] y_m + sum_s remainder_coef[j,l,s,k] remainder[start[j]+s] + drift[j,l].

    For j = 0 ... n - 1 and l < L, all y at once, k = classes[d] the class of an element; y = (states[0], 0, ..., 0) at
    first, states[j+1] <- y_0 after step j.
    """
    wide = torch.float64 if states.dtype == torch.float64 else torch.float32
    stencil = remainder_coef.shape[2]
    kind = slice(None) if classes is None else classes.long()  # one class: its column goes along all elements
    carried = torch.zeros(state_coef.shape[1], *states.shape[1:], dtype=wide, device=states.device)
    carried[0] = states[0]
    for j, first in enumerate(start.tolist()):
        nearby = remainder[first : first + stencil].to(wide)
        of_states, of_nearby = state_coef[j, ..., kind], remainder_coef[j, ..., kind]  # (L, L, D), (L, S, D)
        following = (of_states[:, :, None] * carried).sum(1) + (of_nearby[:, :, None] * nearby).sum(1)
        carried = following if drift is None else following + drift[j].to(wide)
        states[j + 1] = carried[0].to(states.dtype)
