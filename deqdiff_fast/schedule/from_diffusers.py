"""Any affine diffusers scheduler as a `Schedule`, by probing `step()` instead of writing a formula per scheduler.

The scheduler's own code is run on random probes and the recursion is fitted to what it did, so its quirks are inherited
(`affine_fit`); a second, independent run must then be reproduced. Clipping of the denoised estimate is switched off
for the fit and put back as a pointwise correction of the model output that is verified against the clipped scheduler.
Whatever cannot be verified raises NotAffineError. Multi-call schedulers (Heun, PNDM, KDPM2) have one timestep per call.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from .._devices import with_torch_defaults
from ..errors import NotAffineError
from . import noise_levels as levels
from .affine_fit import Recursion, fit
from .clip import Clip
from .probe import ALL_STEPS, ProbeRun, StepRange, run, step_accepts

_MAX_LAGS = 16  # PNDM with its Runge-Kutta start looks back 11 calls, everything else at most 5
_FIT_TOLERANCE = 1e-10
_VERIFY_TOLERANCE = 1e-8
_PROBE_SCALE = 30.0
_BROWNIAN = ("its noise is a Brownian tree seeded from one number, so its steps are correlated and a generator cannot "
             "replay them; use DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'")  # fmt: skip
_HISTORY = ("counter", "cur_sample", "ets", "last_sample", "model_outputs", "prev_derivative", "sample")
_TOKENS = "it samples discrete tokens, not Gaussian latents"
REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CosineDPMSolverMultistepScheduler": _BROWNIAN.replace("DPMSolverMultistep", "EDMDPMSolverMultistep"),
    "DPMSolverSDEScheduler": _BROWNIAN,
    "CogVideoXDPMScheduler": "it draws two noises a step and discards one; use CogVideoXDDIMScheduler",
    "HeliosScheduler": "it changes the resolution between stages, so its states are not one chain",
    "HeliosDMDScheduler": "it changes the resolution between stages, so its states are not one chain",
    "PiflowScheduler": "the model returns several predictions per channel, which a network-free policy integrates",
    "RFD4ProteinaScheduler": "step() needs a mask that depends on the molecule",
    "RePaintScheduler": "step() needs the image and the mask to inpaint, and pipelines also go back in time",
    "ScoreSdeVeScheduler": "it has no step(); its corrector scales steps by the norm of the model output",
    "KarrasVeScheduler": "it has no step(); use EDMEulerScheduler or HeunDiscreteScheduler",
}


@with_torch_defaults
def scheduler_fields(
    scheduler: Any, num_inference_steps: int | None = None, *, step_range: StepRange = ALL_STEPS, **kwargs: Any
) -> dict[str, Any]:
    """The fields of a `Schedule`, for three to four runs of the chain on 192 numbers and no model call.

    Args:
        scheduler, num_inference_steps, **kwargs: as in `Schedule.from_diffusers`.
        step_range: the steps of the chain that are made, where that is not all of them (image-to-image starts late).

    Raises:
        NotAffineError, TypeError, ValueError: as `Schedule.from_diffusers`.
    """
    name = type(scheduler).__name__
    check_scheduler(scheduler)
    replaced = next((name for name in ("step", "scale_model_input") if name in vars(scheduler)), None)
    if replaced:
        raise ValueError(f"scheduler: its {replaced} was replaced on the object, so a copy of it would still run the "
                         "original; take that off again, or override it in a subclass")  # fmt: skip
    if num_inference_steps is not None and (not isinstance(num_inference_steps, int) or num_inference_steps < 1):
        raise ValueError(f"num_inference_steps: expected an int >= 1 or None, got {num_inference_steps!r}")
    step_kwargs, set_kwargs = _split(scheduler, kwargs)
    try:
        return _build(scheduler, num_inference_steps, step_range, set_kwargs, step_kwargs)
    except NotAffineError as error:
        raise NotAffineError(f"{name} cannot be solved in parallel with this configuration: {error}") from error


def _split(scheduler: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    for_step = step_accepts(scheduler)
    for_set = set(inspect.signature(scheduler.set_timesteps).parameters) - {"num_inference_steps", "device"}
    unknown = [key for key in kwargs if key not in for_step | for_set]
    if unknown:
        raise TypeError(f"from_diffusers() got unexpected keyword arguments {unknown}; {type(scheduler).__name__} has "
                        f"{sorted(for_set)} in set_timesteps and {sorted(for_step)} in step")  # fmt: skip
    return ({k: v for k, v in kwargs.items() if k in for_step and k not in for_set},
            {k: v for k, v in kwargs.items() if k in for_set})  # fmt: skip


def check_scheduler(scheduler: Any) -> None:
    """Raises NotAffineError or TypeError for one that its class or configuration rules out, without a step of it."""
    name = type(scheduler).__name__
    for base in type(scheduler).__mro__:
        if base.__name__ in REFUSED:
            raise NotAffineError(f"{name} cannot be solved in parallel: {REFUSED[base.__name__]}")
    for needed in ("step", "set_timesteps", "config"):
        if not hasattr(scheduler, needed):
            raise TypeError(f"scheduler: expected a diffusers scheduler, got {name}, which has no {needed}")
    config = scheduler.config
    if config.get("thresholding"):
        raise NotAffineError(f"{name}: config.thresholding=True (dynamic thresholding) rescales each sample by its own "
                             "quantile; load the scheduler with thresholding=False, or use clip_sample=True where the "
                             "scheduler has it")  # fmt: skip
    if config.get("variance_type") in ("learned", "learned_range"):
        raise NotAffineError(f"{name}: config.variance_type={config['variance_type']!r} lets the model predict the "
                             "variance that multiplies the noise; set variance_type to 'fixed_small' (DDPM, UnCLIP) or "
                             "None (DPMSolver) and let the model return the first half of its channels")  # fmt: skip


def _build(
    scheduler: Any, count: int | None, step_range: StepRange, set_kwargs: dict[str, Any], step_kwargs: dict[str, Any]
) -> dict[str, Any]:
    clip_key = next((key for key in ("clip_sample", "clip_denoised") if scheduler.config.get(key)), None)
    given = step_range is not ALL_STEPS  # by a pipeline, at the first step of its loop
    plain = _prepared(scheduler, count, set_kwargs, {clip_key: False} if clip_key else {}, given)
    probe = _probe(plain, step_kwargs, step_range, seed=0)
    # alternate columns between fit and hold-out, so that both see the small and the large sample
    order = torch.cat([torch.arange(k, probe.states.shape[1], 2) for k in (0, 1)])
    recursion = fit(probe.states[:, order], probe.outputs[:, order], probe.noises[:, order], max_lags=_MAX_LAGS,
                    tolerance=_FIT_TOLERANCE)  # fmt: skip
    _verify(recursion, _probe(plain, step_kwargs, step_range, seed=1))
    steps = torch.stack(probe.timesteps)
    steps = steps.to(torch.float64 if steps.is_floating_point() else torch.int64)
    fields = {
        "timesteps": steps,
        "input_scale": probe.input_scale,
        "state_coef": recursion.state_coef,
        "model_coef": recursion.model_coef,
        "noise_coef": recursion.noise_coef,
        "draws": probe.draws,
        "name": f"{type(scheduler).__name__}({len(steps)})",
        "init_noise_sigma": float(getattr(plain, "init_noise_sigma", 1.0)),
        **levels.describe(plain, probe, recursion, step_range.start, exact_x0=clip_key is not None),
    }
    if clip_key is None:
        return fields
    clipped = _probe(_prepared(scheduler, count, set_kwargs, {}, given), step_kwargs, step_range, seed=2)
    bound = float(scheduler.config.get("clip_sample_range", 1.0))
    gain = _clip_gain(recursion, clipped, levels.x0_coef(fields), bound, clip_key)
    if not bool((gain.abs() > _VERIFY_TOLERANCE).any()):  # the key exists but step() does not look at it (CogVideoX)
        return fields
    return fields | {"clip": Clip(bound, gain)}


def _prepared(
    scheduler: Any, count: int | None, set_kwargs: dict[str, Any], config: dict[str, Any], given: bool
) -> Any:
    """A private copy on the CPU with its timesteps set; the user's scheduler is never touched.

    given: it stands before the first step that is asked for, whatever its counters say.
    """
    own = copy.deepcopy(scheduler)
    for key, value in vars(own).items():
        if isinstance(value, Tensor):
            setattr(own, key, value.detach().cpu())
    if config:
        own.register_to_config(**config)
    if count is not None or any(value is not None for value in set_kwargs.values()):
        if count is not None:
            set_kwargs = {"num_inference_steps": count} | set_kwargs
        own.set_timesteps(**set_kwargs)
        return own
    if given:
        return own
    if not _has_timesteps(own):
        raise ValueError("num_inference_steps: expected an int, or timesteps= or sigmas=, or a scheduler on which "
                         "set_timesteps was called; got None and a fresh scheduler")  # fmt: skip
    first = (None, 0, getattr(own, "_begin_index", None))
    if getattr(own, "_step_index", None) not in first or any(_is_kept(getattr(own, name, None)) for name in _HISTORY):
        raise ValueError("scheduler: it is in the middle of a chain; call set_timesteps or pass num_inference_steps")
    return own


def _has_timesteps(scheduler: Any) -> bool:
    """Whether `set_timesteps` was called: not all schedulers count the steps, DDPM does not count custom ones."""
    if getattr(scheduler, "num_inference_steps", None) is not None:
        return True
    own, fresh = (
        torch.as_tensor(s.timesteps).cpu() for s in (scheduler, type(scheduler).from_config(scheduler.config))
    )
    return own.shape != fresh.shape or not torch.equal(own, fresh)


def _is_kept(value: Any) -> bool:
    """Whether a scheduler keeps something there from a step that it has made."""
    return (
        any(map(_is_kept, value))
        if isinstance(value, list)
        else value is not None and value is not False and (isinstance(value, Tensor) or value != 0)
    )


def _probe(prepared: Any, step_kwargs: dict[str, Any], step_range: StepRange, seed: int) -> ProbeRun:
    try:
        return run(copy.deepcopy(prepared), step_kwargs, seed, _PROBE_SCALE, step_range)
    except NotAffineError:
        raise
    except Exception as error:  # whatever a scheduler raises on a configuration that it does not support
        raise NotAffineError(f"its step() raised {type(error).__name__}: {error}") from error


def _verify(recursion: Recursion, probe: ProbeRun) -> None:
    replay = recursion.replay(probe.states[0], probe.outputs, probe.noises)
    scale = probe.states.abs().cummax(dim=0).values.amax(1)
    error = (replay - probe.states).abs().amax(1) / scale
    if not bool(error.max() <= _VERIFY_TOLERANCE):
        raise NotAffineError(f"an independent run differs from the fitted recursion by {error.max():.1e} (relative) at "
                             f"step {int(error.argmax()) - 1}")  # fmt: skip


def _clip_gain(recursion: Recursion, probe: ProbeRun, pq: Tensor, bound: float, key: str) -> Tensor:
    """gain (T,) of `Clip`, found on one half of the columns of a clipped run and verified on all of them."""
    reason = f"its clipping is not a correction of the denoised estimate; set {key}=False"
    lags = recursion.state_coef.shape[1]
    outputs: list[Tensor] = []
    gains: list[Tensor] = []
    for i, raw in enumerate(probe.outputs):
        x0 = pq[i, 0] * probe.states[i] + pq[i, 1] * raw
        change = x0.clamp(-bound, bound) - x0
        remainder = probe.states[i + 1] - recursion.noise_coef[i] * probe.noises[i] - recursion.model_coef[i, 0] * raw
        for lag in range(min(lags, i + 1)):
            remainder = remainder - recursion.state_coef[i, lag] * probe.states[i - lag]
            if lag:
                remainder = remainder - recursion.model_coef[i, lag] * outputs[i - lag]
        effect = recursion.model_coef[i, 0] * change
        even = slice(0, None, 2)
        gain = remainder[even] @ effect[even] / effect[even].square().sum()
        if not bool(gain.isfinite()):  # the output does not act at once; later steps see the corrected one
            gain = 1 / pq[i, 1]
        scale = probe.states[i : i + 2].abs().amax(0) + effect.abs() + raw.abs()
        if not bool(gain.isfinite()) or bool(((remainder - gain * effect).abs() > _VERIFY_TOLERANCE * scale).any()):
            raise NotAffineError(f"at step {i} {reason}")
        gains.append(gain)
        outputs.append(raw + gain * change)
    return torch.stack(gains)
