"""DDIM on the noise levels of a diffusers scheduler."""

from __future__ import annotations

import inspect
from typing import Any

from ..schedule import Schedule, timesteps


def ddim_schedule(
    scheduler: Any, steps: int, *, eta: float = 0.0, spacing: str | None = None, clip: bool | None = None
) -> Schedule:
    """DDIM on the noise schedule of any diffusers scheduler that has one (Song et al. 2020, arXiv 2010.02502).

    Args:
        scheduler: one without `alphas_cumprod` (flow matching, EDM) is taken as it is, which leaves nothing for the
            other arguments to change.
        steps: number of timesteps T.
        eta: 0 is deterministic, 1 ancestral.
        spacing: "leading", "trailing", "linspace", "quad", or None for the scheduler's own.
        clip: None clamps the denoised estimate as the scheduler's config says, False never does.

    Raises:
        ValueError: settings that cannot be combined.
        NotAffineError: as `Schedule.from_diffusers`.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        if eta or spacing:
            name = type(scheduler).__name__
            raise ValueError(f"{name} is no DDPM noise schedule: eta and spacing do not apply to it; leave them out")
        return Schedule.from_diffusers(scheduler, steps)
    changes: dict[str, Any] = {"clip_sample": False} if clip is False else {}
    if spacing not in (None, "quad"):
        changes["timestep_spacing"] = spacing
    ddim = _as_ddim(scheduler, changes)
    if spacing != "quad":
        return Schedule.from_diffusers(ddim, steps, eta=eta)
    if ddim.config.clip_sample:
        raise ValueError("spacing='quad' comes without clipping, and this scheduler clips: pass clip=False (--no-clip)")
    return Schedule.ddim(
        ddim.alphas_cumprod,
        timesteps(len(ddim.alphas_cumprod), steps, "quad"),
        eta=eta,
        final_alpha_cumprod=float(ddim.final_alpha_cumprod),
        prediction_type=ddim.config.prediction_type,
    )


def _as_ddim(scheduler: Any, changes: dict[str, Any]) -> Any:
    """A `DDIMScheduler` with its noise levels and settings: `from_config` puts its own defaults where the scheduler has
    those of its own class, and makes betas anew."""
    from diffusers import DDIMScheduler

    config, levels = scheduler.config, scheduler.alphas_cumprod
    own = {name: config[name] for name in inspect.signature(DDIMScheduler.__init__).parameters if name in config}
    own |= {"clip_sample": config.get("clip_sample", False), "beta_schedule": "linear", "trained_betas": None}
    ddim = DDIMScheduler.from_config(config, **{**own, "num_train_timesteps": len(levels), **changes})
    ddim.alphas_cumprod = levels.cpu()
    if not ddim.config.set_alpha_to_one:
        ddim.final_alpha_cumprod = ddim.alphas_cumprod[0]
    return ddim
