"""The samplers as a model's author writes them: a loop, one call a step, coefficients looked up beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    abar: Tensor,
    timesteps: Tensor,
    *,
    eta: float = 0.0,
    velocity: bool = False,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """DDIM (Song et al. 2020, arXiv 2010.02502, equation 12); eta 1 is DDPM.

    Args:
        predict: eps, or v with `velocity`, from x: (B, *shape) and t: (B,).
        x: (B, *shape), the noise.
        abar: (N,) cumulative alphas.
        timesteps: (T,) int64, descending.
        eta: scales the noise that is added.
        draw: the noise for a state.
    """
    now = abar[timesteps].tolist()
    after = [*now[1:], 1.0]
    for t, a, b in zip(timesteps.to(x.device), now, after, strict=True):
        out = predict(x, t.expand(len(x)))
        if velocity:
            clean, eps = a**0.5 * x - (1 - a) ** 0.5 * out, (1 - a) ** 0.5 * x + a**0.5 * out
        else:
            clean, eps = (x - (1 - a) ** 0.5 * out) / a**0.5, out
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        x = b**0.5 * clean + (1 - b - sigma**2) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * draw(x)
    return x


@torch.no_grad()
def euler(predict: Predict, x: Tensor, sigmas: Tensor) -> Tensor:
    """Flow matching by Euler steps. predict: the velocity from x: (B, *shape), t: (B,) = 1000 sigma; sigmas: (T+1,)."""
    levels = sigmas.tolist()
    for t, now, after in zip((1000 * sigmas[:-1]).to(x.device, x.dtype), levels, levels[1:]):
        x = x + (after - now) * predict(x, t.expand(len(x)))
    return x


def guidance(net: Callable[..., Tensor], label: Tensor, none: Tensor, scale: float) -> Predict:
    """The guided prediction (Ho and Salimans 2022, arXiv 2207.12598), both branches in one call. label, none: (B,)."""
    both = torch.cat([none, label])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        low, high = net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return low + scale * (high - low)

    return predict
