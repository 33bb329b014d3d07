"""Which noise level each state of a diffusers chain has, x_i = signal_i x0 + sigma_i eps, and how x0 follows from it.

Schedulers do not say in which coordinates they keep their states, so the readings that their tables allow are tried,
and the first is taken along which an exact model stays on its path (`path_error`). Only previews, initial
guesses and Newton slopes depend on the choice; the recursion itself does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import NotAffineError
from .affine_fit import Recursion
from .path_error import path_error
from .probe import ProbeRun, chain_timesteps
from .tables import PREDICTION_TYPES, denoised_coef

_LOG = logging.getLogger("deqdiff_fast")
_KINDS = {"flow_prediction": "flow", "trigflow": "v_prediction"}
_PATH_TOLERANCE = 1e-4  # the schedulers' own tables are float32; a wrong reading misses by far more
Levels = tuple[Tensor, Tensor]


def prediction_types(scheduler: Any) -> list[str]:
    """The configured prediction type, or those to try for a scheduler that has no such key, most likely first."""
    kind = scheduler.config.get("prediction_type", None)
    if kind is None:
        known = hasattr(scheduler, "alphas_cumprod")
        return ["epsilon", "v_prediction", "sample"] if known else ["flow", "epsilon", "v_prediction", "sample"]
    kind = _KINDS.get(kind, kind)
    if kind not in PREDICTION_TYPES:
        raise NotAffineError(f"config.prediction_type={kind!r} is not known; expected 'epsilon', 'v_prediction', "
                             "'sample' or 'flow_prediction'")  # fmt: skip
    return [kind]


def describe(scheduler: Any, probe: ProbeRun, recursion: Recursion, start: int, exact_x0: bool) -> dict[str, Any]:
    """signal, sigma, prediction_type and x0_coef (None where the prediction type says it, unless exact_x0).

    Args:
        start: which of the scheduler's timesteps the chain begins with.

    Raises:
        NotAffineError: no reading of the scheduler's tables fits.
    """
    best: tuple[float, dict[str, Any]] | None = None
    for fields in _readings(scheduler, probe, recursion, start, exact_x0):
        miss = _path_error(recursion, fields)
        if best is None or miss < best[0]:
            best = miss, fields
        if miss <= _PATH_TOLERANCE:
            break
    if best is None:
        raise NotAffineError("its noise levels cannot be read: neither sigmas nor alphas_cumprod fit its timesteps")
    if best[0] > _PATH_TOLERANCE:
        _LOG.debug("%s: an exact model leaves its path by %.1e; the noise levels are approximate, which affects speed "
                   "and previews but not the sample", type(scheduler).__name__, best[0])  # fmt: skip
    return best[1]


def _readings(
    scheduler: Any, probe: ProbeRun, recursion: Recursion, start: int, exact_x0: bool
) -> Iterator[dict[str, Any]]:
    measured = measured_x0(probe)
    candidates = _levels(scheduler, probe, start, measured)
    for kind in prediction_types(scheduler):
        for signal, sigma in candidates:
            fields = {"signal": signal, "sigma": sigma, "prediction_type": kind}
            formula = denoised_coef(signal[:-1], sigma[:-1], kind)
            if measured is not None:
                same = torch.allclose(measured, formula, rtol=1e-5, atol=1e-7) and not exact_x0
                yield fields | {"x0_coef": None if same else measured}
                continue
            if hasattr(scheduler, "precondition_outputs"):
                yield fields | {"x0_coef": _preconditioned(scheduler, sigma[:-1])}
            if bool(formula.isfinite().all()):
                yield fields | {"x0_coef": None}
                yield fields | {"x0_coef": formula * torch.tensor([1.0, -1.0], dtype=torch.float64)}  # output negated
    if measured is None and recursion.state_coef.shape[1] == 1:  # consistency models: the step's mean is the estimate
        own_mean = torch.cat([recursion.state_coef, recursion.model_coef], dim=1)
        for signal, sigma in candidates:
            yield {"signal": signal, "sigma": sigma, "prediction_type": "sample", "x0_coef": own_mean}


def _preconditioned(scheduler: Any, sigma: Tensor) -> Tensor:
    """[p, q] of the EDM denoiser c_skip x + c_out o (Karras et al. 2022, arXiv 2206.00364, equation 7)."""
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    return torch.stack([scheduler.precondition_outputs(one, zero, sigma),
                        scheduler.precondition_outputs(zero, one, sigma)], dim=1)  # fmt: skip


def measured_x0(probe: ProbeRun) -> Tensor | None:
    """(T, 2) [p, q] of pred_original_sample = p x + q o, or None where step() does not return it or adds noise."""
    if probe.denoised is None:
        return None
    terms = torch.stack([probe.states[:-1], probe.outputs], dim=2)
    size = terms.norm(dim=1, keepdim=True)
    found = torch.linalg.lstsq(terms / size, probe.denoised[:, :, None], rcond=1e-13, driver="gelsd").solution
    residual = (probe.denoised - (terms / size @ found)[:, :, 0]).norm(dim=1)
    if bool((residual > 1e-9 * (probe.denoised.norm(dim=1) + 1)).any()):
        return None
    pq: Tensor = found[:, :, 0] / size[:, 0]
    pq[pq.abs() < 1e-12 * pq.abs().amax(1, keepdim=True)] = 0  # rounding where one of the two enters with nothing
    return pq


def _path_error(recursion: Recursion, fields: dict[str, Any]) -> float:
    """The largest one of the chain under this reading; infinite where the reading is not a finite one."""
    step = (recursion.state_coef, recursion.model_coef, recursion.noise_coef)
    return float(path_error(fields["signal"], fields["sigma"], *step, x0_coef(fields)).max())


def x0_coef(fields: dict[str, Any]) -> Tensor:
    """(T, 2) [p, q] of x0 = p x + q o under this reading."""
    pq: Tensor | None = fields["x0_coef"]
    return denoised_coef(fields["signal"][:-1], fields["sigma"][:-1], fields["prediction_type"]) if pq is None else pq


def _levels(scheduler: Any, probe: ProbeRun, start: int, measured: Tensor | None) -> list[Levels]:
    """Candidates (signal, sigma), both (T+1,), most likely first."""
    out: list[Levels] = []
    every = torch.stack(chain_timesteps(scheduler)).to(torch.float64)
    count, total = len(probe.timesteps), len(every)
    present = slice(start, start + count + 1)
    steps = every[present]
    sigmas = _table(scheduler, "sigmas")
    if sigmas is not None and len(sigmas) == total + 1:
        sigmas = sigmas[present]
    if measured is not None:  # KDPM2 interleaves two tables of sigmas, so read them off the estimate: signal 1 and
        ratio = -measured[:, 1] / measured[:, 0]  # epsilon: sigma; v_prediction: sigma sqrt(1 + sigma^2)
        if scheduler.config.get("prediction_type") == "v_prediction":
            ratio = (((1 + 4 * ratio.square()).sqrt() - 1) / 2).sqrt()
        last = sigmas[-1:] if sigmas is not None else torch.zeros(1, dtype=torch.float64)
        out.append(_coordinates(torch.cat([ratio, last]))[0])
    if sigmas is not None and len(sigmas) == count + 1:
        out += _coordinates(sigmas)
    table = _table(scheduler, "alphas_cumprod")
    if table is not None and bool((steps == steps.round()).all()) and steps.min() >= 0 and steps.max() < len(table):
        abar = table[steps.long()]
        if hasattr(scheduler, "initial_alpha_cumprod"):  # DDIMInverse: the state is one step behind its timestep
            first = table[every[start - 1].long()] if start else torch.as_tensor(float(scheduler.initial_alpha_cumprod))
            out.append(_preserving(torch.cat([first[None], abar[:count]])))
        final = torch.as_tensor([float(getattr(scheduler, "final_alpha_cumprod", 1.0))], dtype=torch.float64)
        out.append(_preserving(torch.cat([abar, final])[: count + 1]))
    times = torch.as_tensor(scheduler.timesteps).to("cpu", torch.float64)[present]
    if hasattr(scheduler, "_alpha_cumprod"):  # Wuerstchen: a function of the continuous time
        out.append(_preserving(scheduler._alpha_cumprod(times, torch.device("cpu")).to(torch.float64)))
    alphas, betas = _table(scheduler, "alphas"), _table(scheduler, "betas")
    if alphas is not None and betas is not None and len(alphas) == len(betas) == total + 1:  # IPNDM: not variances
        out.append((alphas[present], betas[present]))
    if scheduler.config.get("prediction_type") == "trigflow":
        out.append((times.cos().clamp_min(0), times.sin() * float(scheduler.config.sigma_data)))
    return [(a, s) for a, s in out if bool((a.isfinite() & s.isfinite() & (a >= 0) & (s >= 0) & (a + s > 0)).all())]


def _table(scheduler: Any, name: str) -> Tensor | None:
    value = getattr(scheduler, name, None)
    return None if value is None else torch.as_tensor(value).detach().to("cpu", torch.float64)


def _preserving(abar: Tensor) -> Levels:
    return abar.to(torch.float64).sqrt(), (1 - abar.to(torch.float64)).sqrt()


def _coordinates(sigma: Tensor) -> list[Levels]:
    """Unscaled, variance-preserving and flow coordinates of the same sigmas."""
    scale = (sigma.square() + 1).rsqrt()
    return [(torch.ones_like(sigma), sigma), (scale, sigma * scale), (1 - sigma, sigma)]
