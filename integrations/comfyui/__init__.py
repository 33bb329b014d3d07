"""A ComfyUI node: DEQ Sampler, `sample_deq` as a SAMPLER. Copy or link this folder into ComfyUI's custom_nodes."""

from __future__ import annotations

from typing import Any

import comfy.samplers

from deqdiff_fast.integrations import k_diffusion

# What ComfyUI's batching decides from the first row of a call, or tiles over its rows.
_WRONG = {
    "area": "an area",
    "mask": "a mask",
    "timestep_start": "a timestep range",
    "timestep_end": "a timestep range",
    "start_percent": "a timestep range",
    "end_percent": "a timestep range",
    "control": "a ControlNet",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
}
_PROMPTS = "a batch of several prompts; sample them one after the other"


def refuse(model: Any, x: Any, extra_args: dict[str, Any]) -> None:
    """Refuse what is wrong when the rows of a call are at several noise levels.

    Args:
        model: ComfyUI's KSamplerX0Inpaint around a guider with `conds`, {name: list of conditionings}.
        x: (B, ...).
        extra_args: those of the sampler.

    Raises:
        ValueError: with the reason.
    """
    guider = getattr(model, "inner_model", model)
    conds = getattr(guider, "conds", None)
    if not isinstance(conds, dict):
        raise ValueError(f"DEQ Sampler: {type(guider).__name__} has no conds to check; use an ordinary sampler for it")
    for name, entries in conds.items():
        for cond in entries or ():
            for key, what in _WRONG.items():
                if cond.get(key) is not None:
                    raise ValueError(f"DEQ Sampler: the {name} conditioning has {what} ({key}), which would be applied "
                                     "to steps or rows that it is not meant for; take it out")  # fmt: skip
            for key, value in cond.get("model_conds", {}).items():
                tensor = getattr(value, "cond", None)
                rows = [len(item) for item in (tensor if isinstance(tensor, (list, tuple)) else [tensor])
                        if getattr(item, "dim", int)() > 0]  # fmt: skip
                if max(rows, default=1) > 1:
                    raise ValueError(f"DEQ Sampler: the {name} conditioning has {max(rows)} rows in {key}: {_PROMPTS}")
    if extra_args.get("denoise_mask") is not None:
        if "denoise_mask_function" in extra_args.get("model_options", {}):
            raise ValueError("DEQ Sampler: a mask that changes with the step (differential diffusion) is decided from "
                             "the first row of a call; use an ordinary sampler")  # fmt: skip
        if len(x) > 1:
            raise ValueError(f"DEQ Sampler: a noise mask works for one image at a time, got a batch of {len(x)}")


def sample_deq(
    model: Any, x: Any, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None, **options: Any
) -> Any:
    """`deqdiff_fast.integrations.k_diffusion.sample_deq` after a check of ComfyUI's own conditioning."""
    refuse(model, x, extra_args or {})
    network = getattr(getattr(model, "inner_model", None), "inner_model", None)
    if network is not None:
        model.base_model = network  # the guider is made anew for every run: what was measured stays with its network
    return k_diffusion.sample_deq(model, x, sigmas, extra_args, callback, disable, **options)


class DEQSamplerNode:
    """All steps of a sampler solved at once; the result is that of euler or dpmpp_2m, to the tolerance."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The widgets, as ComfyUI asks for them. A window of 0 solves all steps at once; max_rounds 0 sets no limit."""
        return {
            "required": {
                "method": (["euler", "dpmpp_2m"],),
                "tol": ("FLOAT", {"default": 0.01, "min": 1e-6, "max": 1.0, "step": 1e-4, "round": False}),
                "window": ("INT", {"default": 0, "min": 0, "max": 10000}),
                "max_rounds": ("INT", {"default": 0, "min": 0, "max": 10000}),
                "max_batch": ("INT", {"default": 16, "min": 1, "max": 4096}),
                "verify": ("BOOLEAN", {"default": True}),
            }
        }

    def get_sampler(
        self, method: str, tol: float, window: int, max_rounds: int, max_batch: int, verify: bool
    ) -> tuple[Any]:
        """The sampler as an object that ComfyUI's sampling nodes take."""
        options = {"method": method, "tol": tol, "window": window or "auto", "max_rounds": max_rounds or None}
        options |= {"max_batch": max_batch, "verify": verify}
        return (comfy.samplers.KSAMPLER(sample_deq, options),)


NODE_CLASS_MAPPINGS = {"DEQSampler": DEQSamplerNode}
NODE_DISPLAY_NAME_MAPPINGS = {"DEQSampler": "DEQ Sampler"}
