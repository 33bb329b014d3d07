"""Frozen coefficient tables of a sampling chain.

With the states x_0 (noise) ... x_T (sample), the raw model outputs o_i = model(input_scale_i x_i, t_i) and frozen
standard normal noise z_i, every schedule is the recursion

    x_{i+1} = sum_l state_coef[i, l] x_{i-l} + model_coef[i, l] o_{i-l} + noise_coef[i] z_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from . import tables
from .clip import Clip
from .from_diffusers import scheduler_fields
from .path_error import path_error

_IDENTITY_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Schedule:
    """A sampling chain as float64 CPU tables, of T steps and L lags (L = 1 for one-step methods).

    Build one with `ddim`, `ddpm`, `from_sigmas` or `from_diffusers`; the constructor takes any tables. They are copied;
    do not write to the copies.

    Args:
        timesteps: (T,) int64 or float64, what the model is called with, in chain order.
        input_scale: (T,), the model sees input_scale[i] * x_i.
        state_coef, model_coef: (T, L), entries with i - l < 0 are zero. The prediction type is absorbed.
        noise_coef: (T,).
        signal, sigma: (T+1,), x_i = signal_i x0 + sigma_i eps in state coordinates; index T is the sample.
        prediction_type: "epsilon" (o = eps), "sample" (o = x0), "v_prediction" (o = signal eps - sigma x0, with signal
            and sigma normalised to signal^2 + sigma^2 = 1) or "flow" (o = eps - x0).
        clip: clipping of the denoised estimate, see `Clip`.
        name: for messages and statistics.
        init_noise_sigma: standard deviation of x_0. A chain starts from the *state* x_0, so draw `torch.randn(...) *
            schedule.init_noise_sigma`, as diffusers pipelines do with the attribute of the same name.
        x0_coef: (T, 2) [p, q] of x0 = p x + q o where they do not follow from the prediction type (EDM
            preconditioning).
        draws: (T,) bool, the steps at which the generator is asked for noise, in chain order, one tensor of the state's
            shape each; None: where noise_coef is not zero. A step with draws but zero noise_coef discards its noise.

    Raises:
        ValueError: wrong shapes, values that are not finite, or coefficients of states before x_0.
    """

    timesteps: Tensor
    input_scale: Tensor
    state_coef: Tensor
    model_coef: Tensor
    noise_coef: Tensor
    signal: Tensor
    sigma: Tensor
    prediction_type: str = "epsilon"
    clip: Clip | None = None
    name: str = "custom"
    init_noise_sigma: float = 1.0
    x0_coef: Tensor | None = None
    draws: Tensor | None = None

    @with_torch_defaults
    def __post_init__(self) -> None:
        tables.choice("prediction_type", self.prediction_type, tables.PREDICTION_TYPES)
        steps = tables.numbers(self.timesteps)
        kind = torch.float64 if steps.is_floating_point() else torch.int64
        fields: dict[str, Tensor] = {"timesteps": tables.vector("timesteps", steps).to(kind)}
        for name in ("input_scale", "noise_coef", "signal", "sigma"):
            fields[name] = tables.vector(name, getattr(self, name))
        t = len(fields["timesteps"])
        for name in ("state_coef", "model_coef", *(("x0_coef",) if self.x0_coef is not None else ())):
            fields[name] = tables.numbers(getattr(self, name)).to(torch.float64, copy=True)
        drawn = fields["noise_coef"] != 0 if self.draws is None else torch.as_tensor(self.draws).detach().cpu().bool()
        fields["draws"] = drawn.clone()
        lags = fields["state_coef"].shape[-1]
        expected = {"input_scale": (t,), "noise_coef": (t,), "draws": (t,), "signal": (t + 1,), "sigma": (t + 1,),
                    "state_coef": (t, lags), "model_coef": (t, lags), "x0_coef": (t, 2)}  # fmt: skip
        for name, shape in expected.items():
            if name in fields and fields[name].shape != shape:
                raise ValueError(f"{name}: expected shape {shape} for T = {t}, got {tuple(fields[name].shape)}")
        tables.check_values(fields, lags)
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if not 0 < self.init_noise_sigma < float("inf"):
            raise ValueError(f"init_noise_sigma: expected a finite value > 0, got {self.init_noise_sigma}")
        if self.clip is not None and self.clip.gain.shape != (t,):
            raise ValueError(f"clip.gain: expected shape {(t,)}, got {tuple(self.clip.gain.shape)}")

    @property
    def num_steps(self) -> int:
        """T, the number of model calls of the serial chain."""
        return len(self.timesteps)

    @property
    def lags(self) -> int:
        """L, the number of states and outputs that one step looks at."""
        return int(self.state_coef.shape[1])

    @cached_property
    def stochastic(self) -> bool:
        """Whether the chain adds noise on its way."""
        return bool((self.noise_coef != 0).any())

    @with_torch_defaults
    def denoised_coef(self) -> Tensor:
        """(T, 2) float64 [p, q]: the denoised estimate of step i is x0 = p x_i + q o_i."""
        if self.x0_coef is not None:
            return self.x0_coef
        return tables.denoised_coef(self.signal[:-1], self.sigma[:-1], self.prediction_type)

    @with_torch_defaults
    def slope(self, variance: float | Tensor = 1.0) -> Tensor:
        """The c_i with E[o_i | x_i] = c_i x_i for zero-mean Gaussian data.

        E[x0 | x] = signal v / (signal^2 v + sigma^2) x, and x0 = p x + q o; 0 where the output does not enter x0.

        Args:
            variance: v >= 0, of the data: a number, or (D,), one for each coefficient.

        Returns:
            (T,) or (T, D) float64. x_i is in state coordinates (before input_scale).

        Raises:
            ValueError: a negative variance.
        """
        v = torch.as_tensor(variance, dtype=torch.float64)
        if not bool((v >= 0).all()):
            raise ValueError(f"variance: expected values >= 0, got {variance}")
        p, q = self.denoised_coef().unbind(1)
        rows = [self.signal[:-1], self.sigma[:-1], p, q]
        signal, sigma, p, q = (row[:, None] for row in rows) if v.dim() else rows
        total = signal.square() * v + sigma.square()
        mean = torch.where(total > 0, signal * v / total, 0)
        slope = (mean - p) / q
        return torch.where(slope.isfinite(), slope, 0)

    @with_torch_defaults
    def path_error(self) -> Tensor:
        """(T,) float64: how far each step leaves the path of one data point; see `path_error.path_error`."""
        return path_error(
            self.signal, self.sigma, self.state_coef, self.model_coef, self.noise_coef, self.denoised_coef()
        )

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> Schedule:
        """Build, and refuse tables that violate their own identities (which would be this library's mistake)."""
        schedule = cls(**fields)
        worst = float(schedule.path_error().max())
        size = max(1.0, float(schedule.state_coef.abs().max()), float(schedule.model_coef.abs().max()))
        if worst > _IDENTITY_TOLERANCE * size:  # large terms that cancel (a signal near zero) leave their rounding
            raise ArithmeticError(f"schedule {schedule.name}: a step misses its own marginal by {worst:.1e} (relative);"
                                  " please report this with the arguments that you passed")  # fmt: skip
        return schedule

    @classmethod
    @with_torch_defaults
    def ddim(
        cls,
        alphas_cumprod: Tensor | Sequence[float],
        timesteps: Tensor | Sequence[int],
        eta: float = 0.0,
        final_alpha_cumprod: float = 1.0,
        prediction_type: str = "epsilon",
    ) -> Schedule:
        """DDIM (Song et al. 2020, arXiv 2010.02502, equation 12).

        Args:
            alphas_cumprod: (N,) in (0, 1). A zero terminal signal-to-noise ratio works with "v_prediction" and
                "sample".
            timesteps: (T,) int, descending, in 0..N-1 (a repeated one is a step that does nothing).
            eta: scales the noise of equation 16; 0 is deterministic, 1 ancestral.
            final_alpha_cumprod: cumulative alpha of the sample; diffusers' set_alpha_to_one=False is alphas_cumprod[0].
            prediction_type: "epsilon", "v_prediction" or "sample".

        Raises:
            ValueError: a bad argument, by name.
        """
        return cls._checked(tables.ddim_tables(alphas_cumprod, timesteps, eta, final_alpha_cumprod, prediction_type))

    @classmethod
    @with_torch_defaults
    def ddpm(
        cls,
        alphas_cumprod: Tensor | Sequence[float],
        timesteps: Tensor | Sequence[int],
        final_alpha_cumprod: float = 1.0,
        prediction_type: str = "epsilon",
        variance: str = "fixed_small",
    ) -> Schedule:
        """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, equations 6 and 7), any subset of timesteps.

        Args:
            alphas_cumprod, timesteps, final_alpha_cumprod, prediction_type: as in `ddim`.
            variance: "fixed_small" (the posterior's, beta-tilde) or "fixed_large" (beta, no noise at the last step).

        Raises:
            ValueError: a bad argument, by name.
        """
        fields = tables.ddpm_tables(alphas_cumprod, timesteps, final_alpha_cumprod, prediction_type, variance)
        return cls._checked(fields) if variance == "fixed_small" else cls(**fields)  # fixed_large widens the marginals

    @classmethod
    @with_torch_defaults
    def from_sigmas(
        cls,
        sigmas: Tensor | Sequence[float],
        method: str = "euler",
        *,
        prediction_type: str | None = None,
        flow: bool = False,
        timesteps: Tensor | Sequence[float] | None = None,
        input_scale: Tensor | Sequence[float] | None = None,
    ) -> Schedule:
        """Euler or DPM-Solver++(2M) over noise levels, for k-diffusion and flow-matching models.

        Args:
            sigmas: (T+1,), strictly descending, the last usually 0 (k-diffusion's get_sigmas_*); the model is called at
                the first T.
            method: "euler" (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn) or "dpmpp_2m" (Lu et al.
                2022, arXiv 2211.01095, algorithm 2; first order at the first step and at a step to 0, as in
                k-diffusion's sample_dpmpp_2m).
            prediction_type: None for "flow" where `flow`, else for "sample", as k-diffusion's `model(x, sigma) ->
                denoised`.
            flow: True: x = (1 - sigma) x0 + sigma eps, as in flow matching. False: x = x0 + sigma eps, start from
                randn * sigmas[0] (`init_noise_sigma`).
            timesteps: (T,), what the model is called with; None for 1000 sigma where `flow`, else for sigma. Pass it
                for a model that was trained on integer timesteps.
            input_scale: (T,), what the model's input is multiplied with; None for 1, and for 1 / sqrt(sigma^2 + 1)
                without `flow` where the prediction type is "epsilon" or "v_prediction".

        Raises:
            ValueError: a bad argument, by name.
        """
        fields = tables.sigma_tables(sigmas, method, prediction_type, flow, timesteps, input_scale)
        start = torch.hypot(fields["signal"][0], fields["sigma"][0]) if flow else fields["sigma"][0]
        return cls._checked(fields | {"init_noise_sigma": 1.0 if flow else float(start)})

    @classmethod
    def from_diffusers(cls, scheduler: Any, num_inference_steps: int | None = None, **kwargs: Any) -> Schedule:
        """The chain of a diffusers scheduler, found by probing its `step()` without any model.

        Args:
            scheduler: any that is affine in states, outputs and noise; it is not changed.
            num_inference_steps: T; None, without timesteps or sigmas, for the timesteps that the scheduler already has.
            **kwargs: of its `set_timesteps` (timesteps=, sigmas=, mu=, ...) or `step` (eta=, s_churn=, ...), by name.

        Raises:
            NotAffineError: it cannot be expressed exactly, with the reason and the config key to change.
            TypeError: no scheduler, or an unknown keyword argument.
            ValueError: a bad number of steps, or none where the scheduler has no timesteps yet.
        """
        return cls(**scheduler_fields(scheduler, num_inference_steps, **kwargs))
