"""Backward passes that cannot be differentiated again, and say so whichever gradient is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Refuse(Function):
    """The first `count` tensors as they are, tied to all others."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "gradient: expected to be differentiated once, this mode is once_differentiable; for second derivatives, "
            "and for torch.autograd.functional.jvp, hvp and vhp, use gradient='unrolled'"
        )


def first_order(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """Torch's `once_differentiable`, but for its error, which nothing meets where only the gradients with respect to
    some inputs are asked for: they come out as zero. `ctx` has the noise and has saved all other inputs."""

    @wraps(backward)
    def wrapper(ctx: Any, grad: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, grad)
        if not torch.is_grad_enabled():
            return found
        grads = [x for x in found if x is not None]
        refuse: Callable[..., tuple[Tensor, ...]] = _Refuse.apply
        tied = iter(refuse(len(grads), *grads, grad, ctx.noise, *ctx.saved_tensors))
        return tuple(None if x is None else next(tied) for x in found)

    return wrapper
