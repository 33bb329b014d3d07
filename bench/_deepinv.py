"""deepinv's own restoration methods on a diffusion model and the operators of this library; pip install deepinv."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deqdiff_fast.operators import Operator
from deqdiff_fast.schedule import Schedule

from ._problems import Problem


class SigmaDenoiser(torch.nn.Module):
    """deepinv's convention, denoiser(x, sigma) -> E[image | x = image + sigma n] with pixels in [0, 1], of a model.

    In the model's units, pixels in [-1, 1], the noise is 2 sigma. The timestep is interpolated in the logarithm of the
    noise level between the model's own (the nearest for a model that takes whole ones only).
    """

    def __init__(self, problem: Problem, train_steps: int = 1000) -> None:
        super().__init__()
        schedule: Schedule = problem.schedule(train_steps, 0.0)
        self.model, self.kind = problem.model, schedule.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"--model: expected one that predicts epsilon or v for deepinv's methods, got {self.kind}")
        self.whole = not isinstance(problem.model, torch.nn.Module)
        level = (schedule.sigma / schedule.signal)[:-1].flip(0)  # ascending
        self.levels = level.log().numpy()
        self.timesteps = schedule.timesteps.flip(0).double().numpy()
        self.calls = self.rows = 0

    def forward(self, x: Tensor, sigma: Tensor | float, **kwargs: Any) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        level = 2 * torch.as_tensor(sigma, dtype=torch.float64).flatten().cpu().expand(len(x))
        times = np.interp(level.clamp(min=1e-12).log().numpy(), self.levels, self.timesteps)
        t = torch.from_numpy(times.round().astype(np.int64) if self.whole else times.astype(np.float32)).to(x.device)
        level = level.to(x)[:, None, None, None]
        signal = 1 / (1 + level**2).sqrt()
        state = signal * (2 * x - 1)
        output = self.model(state, t)
        output = getattr(output, "sample", output)
        if self.kind == "epsilon":
            clean = (state - signal * level * output) / signal
        else:
            clean = signal * state - signal * level * output
        return (clean + 1) / 2


class Baseline(NamedTuple):
    """One of deepinv's methods with one setting."""

    name: str
    setting: str
    run: Callable[[Tensor, Any, tuple[int, ...], int], Tensor]  # measurements, physics, images' shape, seed


def physics_of(operator: Operator, shape: tuple[int, ...], sigma: float, device: str) -> Any:
    """deepinv's DecomposablePhysics of an operator, for images in [0, 1] with noise of sigma there."""
    import deepinv

    one = torch.zeros((1, *shape[1:]), device=device)
    values = operator.singular_values(one.shape, device, torch.float32).expand_as(operator.V_adjoint(one)).contiguous()
    return deepinv.physics.DecomposablePhysics(
        U=operator.U,
        U_adjoint=operator.U_adjoint,
        V=operator.V,
        V_adjoint=operator.V_adjoint,
        mask=values,
        img_size=tuple(shape[1:]),
        noise_model=deepinv.physics.GaussianNoise(sigma),
        device=device,
    )


def baselines(denoiser: SigmaDenoiser, evaluations: int, sigma: float, device: str, tune: bool) -> Iterator[Baseline]:
    """DDRM, DiffPIR and DPS with deepinv's defaults, within so many evaluations a sample; `tune`: other settings too.

    DPS back-propagates through each of its evaluations, and does not make one at its last time.
    """
    from deepinv import sampling
    from deepinv.optim.data_fidelity import L2

    def ddrm(eta: float, etab: float) -> Callable[..., Tensor]:
        method = sampling.DDRM(denoiser, sigmas=np.linspace(1, 0, evaluations), eta=eta, etab=etab)
        return lambda y, physics, shape, seed: method(y, physics, seed=seed)

    def diffpir(weight: float, zeta: float) -> Callable[..., Tensor]:
        method = sampling.DiffPIR(
            denoiser, L2(), sigma=sigma, max_iter=evaluations, zeta=zeta, lambda_=weight, device=device
        )
        return lambda y, physics, shape, seed: method(y, physics, seed=seed)

    def dps(weight: float) -> Callable[..., Tensor]:
        draws = torch.Generator(device)  # seeded by every call
        method = sampling.DPS(denoiser, num_steps=evaluations + 1, weight=weight, device=device, rng=draws)
        return lambda y, physics, shape, seed: method(y, physics, x_init=shape, seed=seed)

    for eta, etab in ((0.85, 1.0), (0.5, 1.0), (0.2, 1.0))[: None if tune else 1]:
        yield Baseline("DDRM", f"eta {eta:g}, etab {etab:g}", ddrm(eta, etab))
    for weight, zeta in ((7.0, 0.1), (7.0, 0.5), (7.0, 1.0), (15.0, 0.5))[: None if tune else 1]:
        yield Baseline("DiffPIR", f"lambda {weight:g}, zeta {zeta:g}", diffpir(weight, zeta))
    for weight in (1.0, 30.0, 100.0, 300.0)[: None if tune else 1]:
        yield Baseline("DPS", f"weight {weight:g}", dps(weight))
