"""Forward-mode tangents and the transforms of torch.func: a solve would lose what they carry, so they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch
from torch.utils._pytree import tree_leaves

from .._devices import hidden_settings, users_settings
from .._types import Model, parameters_of, unwrap_output

INSTEAD = "differentiate with torch.autograd, requires_grad_() and backward()"


def check_inputs(model: Any, reverse: bool = False, **given: Any) -> None:
    """Raises NotImplementedError inside torch.func, and where an argument, a parameter of the model or the conditioning
    of a guided one has a tangent. reverse: torch.func.grad, vjp and jacrev may pass."""
    transforms = {level.key().name for level in _functorch.get_interpreter_stack() or ()}
    if transforms - ({"Grad"} if reverse else set()):
        raise NotImplementedError(
            f"torch.func: expected a call outside its transforms, got one inside {', '.join(sorted(transforms))}; "
            f"{INSTEAD}, or call it outside and use what it returns"
        )
    if forward_ad._current_level >= 0:
        own = [parameters_of(model), list(getattr(model, "conditioning_tensors", list)())]
        for name, values in {**given, "model": own}.items():
            if any(has_tangent(value) for value in tree_leaves(values)):
                raise NotImplementedError(
                    f"{name}: expected tensors without a forward-mode tangent, which a solve would lose; {INSTEAD}, or "
                    "detach them"
                )


def call(model: Model, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> Any:
    """What a model means by its output. Raises NotImplementedError where that has a tangent, of a tensor that
    `check_inputs` could not see."""
    if hidden_settings() is not None:
        with users_settings():
            return call(model, x, t, kwargs)
    if forward_ad._current_level < 0:
        return unwrap_output(model(x, t, **kwargs))
    with forward_ad._set_fwd_grad_enabled(True):  # torch.autograd.Function turns them off
        output = unwrap_output(model(x, t, **kwargs))
        if has_tangent(output):
            raise NotImplementedError(
                f"model: expected predictions without a forward-mode tangent, which a solve would lose; {INSTEAD}"
            )
    return output


def has_tangent(value: Any) -> bool:
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    return isinstance(value, Tensor) and unpack(value).tangent is not None
