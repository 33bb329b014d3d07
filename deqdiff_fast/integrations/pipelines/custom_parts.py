"""Parts of a pipeline that are not diffusers' own: hooks, wrapped functions, processors, classes of a user.

A parallel loop calls the denoiser on many timesteps at once, in another order and more often than the pipeline does,
and does not make the scheduler's steps. What counts calls, keeps something from one call to the next, or reads one
timestep for a whole batch would give another picture.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

KNOWN = {
    "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "optimum", "xformers",
    "sageattention", "flash_attn",
}  # fmt: skip
_SCHEDULER_METHODS = ("step", "scale_model_input")


def needs_serial(denoisers: nn.ModuleList, scheduler: Any, arguments: dict[str, Any]) -> str:
    """Why the loop must be left alone, known without a call; empty where it need not.

    arguments: those of the pipeline's call, by name.
    """
    scale = arguments.get("guidance_scale")
    if arguments.get("guess_mode") and isinstance(scale, (int, float)) and scale > 1:
        return "guess_mode=True with guidance_scale > 1 calls the ControlNet on half of the rows"
    for denoiser in denoisers:
        if getattr(denoiser, "is_cache_enabled", False):
            cache = type(getattr(denoiser, "_cache_config", None)).__name__
            return f"{type(denoiser).__name__}.enable_cache({cache}) keeps something from one step for the next"
        for name, module in denoiser.named_modules():
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
                if getattr(hook, "_is_stateful", False):
                    return f"the hook {type(hook).__name__} at {name or 'the model'} keeps something between steps"
    for method in _SCHEDULER_METHODS:
        function = getattr(type(scheduler), method, None)
        replaced = function is not None and not _known(function) and _known(type(scheduler))
        if method in vars(scheduler) or replaced:
            return f"scheduler.{method} was replaced, and whatever replaces it expects to see every step"
    return ""


def custom_parts(denoisers: nn.ModuleList) -> list[str]:
    """The parts of models that come from elsewhere than the libraries they are made of."""
    return list(dict.fromkeys(part for denoiser in denoisers for part in _custom_parts(denoiser)))


def _custom_parts(denoiser: nn.Module) -> Iterator[str]:
    for name, module in denoiser.named_modules():
        where = f" at {name}" if name else ""
        kind = type(module)
        if not _known(kind) or not _known(kind.forward):
            yield f"the class {kind.__name__}{where}"
        if "forward" in vars(module) and not _known_forward(module, vars(module)["forward"]):
            yield f"the wrapped forward{where}"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _known(hook):
                yield f"a forward hook{where}"
        processor = getattr(module, "processor", None)
        if processor is not None and not (_known(type(processor)) and _known(type(processor).__call__)):
            yield f"the processor {type(processor).__name__}{where}"


def _known(value: Any) -> bool:
    """Whether a class, or a function with all that it wraps, is of one of the libraries."""
    while isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, type) or not hasattr(value, "__globals__"):
        module = (value if isinstance(value, type) else type(value)).__module__
    else:
        module = value.__globals__.get("__name__", "")  # functools.wraps copies __module__
    return str(module).split(".")[0] in KNOWN


def _known_forward(module: nn.Module, forward: Any) -> bool:
    """Whether what stands in the place of a module's own `forward` is a library's: compiled, offloaded, cast."""
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if isinstance(forward, types.MethodType) and forward.__func__ is type(module).forward:
        return True
    inner = [vars(module)["_old_forward"]] if "_old_forward" in vars(module) else []
    registry = getattr(module, "_diffusers_hook", None)
    hooks = [*getattr(registry, "hooks", {}).values(), *filter(None, [getattr(module, "_hf_hook", None)])]
    inner += [reference.original_forward or reference.forward for reference in getattr(registry, "_fn_refs", [])[:1]]
    plain = all(f is not forward and _known_forward(module, f) for f in inner)
    return bool(inner) and plain and _known(forward) and all(_known(type(hook)) for hook in hooks)
