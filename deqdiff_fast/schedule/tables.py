"""Coefficient tables of the samplers whose formulas are known: DDIM, DDPM, Euler, DPM-Solver++(2M), flow matching.

Every step is first written in terms of the state and the denoised estimate, x' = A x + C0 x0 + C1 x0_previous + s z,
and `absorb` then substitutes x0 = p x + q o, so that the tables hold raw model outputs o whatever the prediction type.
Everything is float64 on the CPU; the functions return keyword arguments of `Schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
SPACINGS = ("leading", "trailing", "linspace", "quad")


def numbers(value: Any) -> Tensor:
    """A CPU tensor of an argument, Python's numbers with all of their digits: torch makes float32 of them."""
    plain = not isinstance(value, Tensor) and torch.as_tensor(value).is_floating_point()
    return torch.as_tensor(value, dtype=torch.float64 if plain else None).detach().cpu()


def vector(name: str, value: Tensor | Sequence[float], *, at_least: int = 1) -> Tensor:
    """A private float64 CPU copy of a one-dimensional, finite argument."""
    out = numbers(value).to(torch.float64, copy=True)
    if out.ndim != 1 or len(out) < at_least:
        raise ValueError(f"{name}: expected a one-dimensional tensor of at least {at_least} values, "
                         f"got shape {tuple(out.shape)}")  # fmt: skip
    if not bool(out.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got {out[~out.isfinite()][0].item()}")
    return out


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_values(fields: dict[str, Tensor], lags: int) -> None:
    """Raises ValueError for tables of the right shape that no chain can have."""
    if lags < 1:
        raise ValueError("state_coef: expected at least one lag, got shape with L = 0")
    for name, value in fields.items():
        if not bool(value.isfinite().all()):
            where = [int(k) for k in (~value.isfinite()).nonzero()[0]]
            raise ValueError(f"{name}: expected finite values, got {value[tuple(where)].item()} at index {where}")
    early = torch.arange(len(fields["timesteps"]))[:, None] < torch.arange(lags)[None, :]
    for name in ("state_coef", "model_coef"):
        if bool((fields[name][early] != 0).any()):
            raise ValueError(f"{name}: expected zeros where i - l < 0 (there is no state before x_0)")
    for name in ("signal", "sigma"):
        if bool((fields[name] < 0).any()):
            raise ValueError(f"{name}: expected values >= 0, got {fields[name].min().item()}")
    if bool(((fields["signal"] == 0) & (fields["sigma"] == 0)).any()):
        raise ValueError("signal, sigma: expected at least one of the two to be positive at every index")
    if bool(((fields["noise_coef"] != 0) & ~fields["draws"]).any()):
        raise ValueError("draws: expected True wherever noise_coef is not zero")


def timesteps(num_train: int, n: int, spacing: str = "leading") -> Tensor:
    """A descending choice of the timesteps a model was trained on.

    Args:
        num_train: the model's timesteps are 0..num_train-1.
        n: how many to choose, 1 to num_train.
        spacing: "leading", "trailing" or "linspace" as in diffusers (Lin et al. 2023, arXiv 2305.08891, Table 2);
            "quad" as in DDIM (Song et al. 2020, arXiv 2010.02502, appendix D.2), which repeats small timesteps when n
            is close to num_train (a repeated timestep is a step that does nothing).

    Returns:
        (n,) int64.

    Raises:
        ValueError: a bad size or an unknown spacing.
    """
    choice("spacing", spacing, SPACINGS)
    if not 1 <= n <= num_train:
        raise ValueError(f"n: expected 1 <= n <= num_train = {num_train}, got {n}")
    if spacing == "leading":
        steps = torch.arange(n, dtype=torch.float64) * (num_train // n)
    elif spacing == "trailing":
        steps = (num_train - torch.arange(n, dtype=torch.float64) * (num_train / n)).round().flip(0) - 1
    elif spacing == "linspace":
        steps = torch.linspace(0, num_train - 1, n, dtype=torch.float64).round()
    else:
        steps = (torch.linspace(0, math.sqrt(num_train * 0.8), n, dtype=torch.float64) ** 2).floor()
    return steps.flip(0).to(torch.int64)


def denoised_coef(signal: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """[p, q] of x0 = p x + q o, (T, 2), where x = signal x0 + sigma eps.

    o is eps, x0, eps - x0 or v = (signal eps - sigma x0) / r with r^2 = signal^2 + sigma^2 (r = 1: Salimans & Ho 2022,
    arXiv 2202.00512, appendix D; r != 1: the same v seen from unscaled coordinates, as in k-diffusion).
    """
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    if prediction_type == "sample":
        return torch.stack([zero, one], dim=1)
    if prediction_type == "epsilon":
        return torch.stack([1 / signal, -sigma / signal], dim=1)
    if prediction_type == "v_prediction":
        r2 = signal.square() + sigma.square()
        return torch.stack([signal / r2, -sigma / r2.sqrt()], dim=1)
    return torch.stack([one / (signal + sigma), -sigma / (signal + sigma)], dim=1)


def absorb(a: Tensor, c: Tensor, pq: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) a, (T, L) c of x' = a x + sum_l c_l x0_{i-l}, and (T, 2) [p, q] -> state_coef, model_coef, both (T, L)."""
    state, output = torch.zeros_like(c), torch.zeros_like(c)
    for lag in range(c.shape[1]):
        rows = slice(lag, None)
        p, q = pq[: len(pq) - lag].unbind(1)
        used = c[rows, lag] != 0  # 0 * (p = inf at vanishing signal) must stay 0
        state[rows, lag] = torch.where(used, c[rows, lag] * torch.where(used, p, 0), 0)
        output[rows, lag] = torch.where(used, c[rows, lag] * torch.where(used, q, 0), 0)
    state[:, 0] += a
    return state, output


def _cumulative_alphas(
    alphas_cumprod: Tensor | Sequence[float], steps: Tensor | Sequence[int], final: float, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Check what ddim and ddpm share; returns (T,) int64 timesteps and (T+1,) cumulative alphas along the chain."""
    choice("prediction_type", prediction_type, PREDICTION_TYPES[:3])
    table = vector("alphas_cumprod", alphas_cumprod)
    exact = vector("timesteps", steps)
    visited = exact.to(torch.int64)
    if not bool((visited == exact).all()):
        raise ValueError("timesteps: expected integers, got fractions; use Schedule.from_sigmas for continuous times")
    if bool((visited < 0).any()) or bool((visited >= len(table)).any()):
        raise ValueError(f"timesteps: expected values in 0..{len(table) - 1} (alphas_cumprod has {len(table)} values), "
                         f"got {int(visited.min())}..{int(visited.max())}")  # fmt: skip
    if bool((visited[1:] > visited[:-1]).any()):
        raise ValueError("timesteps: expected descending values (the order in which the chain visits them), "
                         f"got {visited[:8].tolist()}; flip them")  # fmt: skip
    if not 0 < final <= 1:
        raise ValueError(f"final_alpha_cumprod: expected a value in (0, 1], got {final}")
    abar = torch.cat([table[visited], torch.tensor([final], dtype=torch.float64)])
    if bool((abar[:-1] < 0).any()) or bool((abar[:-1] >= 1).any()):
        raise ValueError(f"alphas_cumprod: expected values in (0, 1), got {abar[:-1].min():g}..{abar[:-1].max():g}")
    if prediction_type == "epsilon" and bool((abar[:-1] == 0).any()):
        raise ValueError("alphas_cumprod: a zero terminal signal-to-noise ratio (alphas_cumprod = 0 at timestep "
                         f"{int(visited[0])}) cannot be used with prediction_type='epsilon', which divides by that "
                         "signal; use 'v_prediction' or 'sample', or start later")  # fmt: skip
    if bool((abar[1:] < abar[:-1]).any()):
        raise ValueError("alphas_cumprod: expected values that decrease with the timestep and stay below "
                         f"final_alpha_cumprod = {final}")  # fmt: skip
    return visited, abar


def ddim_tables(
    alphas_cumprod: Tensor | Sequence[float], steps: Tensor | Sequence[int], eta: float, final: float, kind: str
) -> dict[str, Any]:
    """DDIM, Song et al. 2020 (arXiv 2010.02502), equations 12 and 16."""
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta: expected a finite value >= 0, got {eta}")
    visited, abar = _cumulative_alphas(alphas_cumprod, steps, final, kind)
    now, after = abar[:-1], abar[1:]
    noise = eta * ((1 - after) / (1 - now) * (1 - now / after)).clamp_min(0).sqrt()
    variance = 1 - after - noise.square()  # of the part of the next state along the predicted noise
    if bool((variance < -1e-12).any()):
        raise ValueError(f"eta: expected a value <= 1, or one whose noise stays below the next level, got {eta}")
    a = variance.clamp_min(0).sqrt() / (1 - now).sqrt()
    c = after.sqrt() - now.sqrt() * a
    return _variance_preserving(visited, abar, a, c, noise, kind) | {"name": f"ddim(eta={eta:g})"}


def ddpm_tables(
    alphas_cumprod: Tensor | Sequence[float], steps: Tensor | Sequence[int], final: float, kind: str, variance: str
) -> dict[str, Any]:
    """Ancestral sampling, Ho et al. 2020 (arXiv 2006.11239), equations 6 and 7, generalised to skipped timesteps."""
    choice("variance", variance, ("fixed_small", "fixed_large"))
    visited, abar = _cumulative_alphas(alphas_cumprod, steps, final, kind)
    now, after = abar[:-1], abar[1:]
    beta = 1 - now / after
    a, c = (now / after).sqrt() * (1 - after) / (1 - now), after.sqrt() * beta / (1 - now)
    noise = (beta * (1 - after) / (1 - now) if variance == "fixed_small" else beta.clone()).sqrt()
    noise[-1] = 0 if variance == "fixed_large" else noise[-1]  # the last step returns the mean
    return _variance_preserving(visited, abar, a, c, noise, kind) | {"name": f"ddpm({variance})"}


def _variance_preserving(
    visited: Tensor, abar: Tensor, a: Tensor, c: Tensor, noise: Tensor, kind: str
) -> dict[str, Any]:
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    state, output = absorb(a, c[:, None], denoised_coef(signal[:-1], sigma[:-1], kind))
    return {"timesteps": visited, "input_scale": torch.ones_like(a), "state_coef": state, "model_coef": output,
            "noise_coef": noise, "signal": signal, "sigma": sigma, "prediction_type": kind}  # fmt: skip


def sigma_tables(
    sigmas: Tensor | Sequence[float],
    method: str,
    kind: str | None,
    flow: bool,
    steps: Tensor | Sequence[float] | None,
    input_scale: Tensor | Sequence[float] | None,
) -> dict[str, Any]:
    """Euler and DPM-Solver++(2M) over sigmas; see `Schedule.from_sigmas`."""
    choice("method", method, ("euler", "dpmpp_2m"))
    kind = kind or ("flow" if flow else "sample")
    choice("prediction_type", kind, PREDICTION_TYPES)
    sigma = vector("sigmas", sigmas, at_least=2)
    if bool((sigma[1:] >= sigma[:-1]).any()) or sigma[-1] < 0:
        raise ValueError("sigmas: expected strictly descending values, the last one >= 0 (the T model calls happen at "
                         f"sigmas[:-1]), got {sigma[:4].tolist()}..{sigma[-1].item()}")  # fmt: skip
    if flow and sigma[0] > 1:
        raise ValueError(f"sigmas: flow matching runs from 1 to 0, got {sigma[0].item()}; divide by its maximum")
    signal = 1 - sigma if flow else torch.ones_like(sigma)
    if kind == "epsilon" and signal[0] == 0:
        raise ValueError("sigmas: with prediction_type='epsilon' the first sigma of a flow must be below 1")
    now, after = sigma[:-1], sigma[1:]
    if steps is None:
        steps = now * 1000 if flow else now
    if input_scale is None:
        scaled = not flow and kind in ("epsilon", "v_prediction")
        input_scale = (now.square() + 1).rsqrt() if scaled else torch.ones_like(now)
    a = after / now
    c = (signal[1:] - signal[:-1] * a)[:, None]
    if method == "dpmpp_2m":
        c = c * _second_order(signal, sigma)
    state, output = absorb(a, c, denoised_coef(signal[:-1], now, kind))
    return {"timesteps": steps, "input_scale": vector("input_scale", input_scale), "state_coef": state,
            "model_coef": output, "noise_coef": torch.zeros_like(a), "signal": signal, "sigma": sigma,
            "prediction_type": kind, "name": f"{method}({'flow' if flow else 'sigmas'})"}  # fmt: skip


def _second_order(signal: Tensor, sigma: Tensor) -> Tensor:
    """Weights (T, 2) of the current and the previous denoised estimate.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 2; first step and a step to sigma = 0 are first order, as in
    k-diffusion's sample_dpmpp_2m. lambda = log(signal/sigma), h its step: weights 1 + h/(2 h_last), -h/(2 h_last).
    """
    h = (signal.log() - sigma.log()).diff()
    weights = torch.zeros(len(h), 2, dtype=torch.float64)
    weights[:, 0] = 1
    ratio = h[1:] / h[:-1] / 2  # h_last = inf (a flow starting at sigma = 1) gives weight 0
    ratio = torch.where(sigma[2:] > 0, ratio, 0)
    weights[1:, 0] += ratio
    weights[1:, 1] -= ratio
    return weights


def step_variance(signal: Tensor, sigma: Tensor) -> Tensor:
    """(T,) float64 > 0: variance of the noise that an ancestral step from level i to i + 1 adds (DDPM, eta = 1).

    sigma'^2 (1 - (sigma' signal / (signal' sigma))^2), for variance-preserving levels the posterior variance of Ho et
    al. 2020, eq. 7. Where it is not positive, as in a last step to sigma' = 0, the smallest positive one of the chain,
    else 1. signal, sigma: (T + 1,).
    """
    unchanged = (sigma[1:] * signal[:-1] / (signal[1:] * sigma[:-1])).square()
    variance = sigma[1:].square() * (1 - unchanged)
    usable = variance.isfinite() & (variance > 0)
    smallest = variance[usable].min() if bool(usable.any()) else torch.ones((), dtype=variance.dtype)
    return torch.where(usable, variance, smallest)
