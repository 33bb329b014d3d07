"""Argument checks of the public objects: every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..memory import SolverMemory
from ..model.draft import Draft
from ..schedule import Schedule

LEAST = {torch.float64: 1e-130, torch.float32: 1e-14}  # a sample's size, whose squares and those of its steps count
MOST = {torch.float64: 1e150} | dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e15)


def check_model(model: object) -> None:
    if not callable(model):
        raise TypeError(f"model: expected a callable model(x, t, **model_kwargs), got {type(model).__name__}")


def check_memory(memory: object) -> None:
    if memory is not None and not isinstance(memory, SolverMemory):
        raise TypeError(f"memory: expected a deqdiff_fast.SolverMemory or None, got {type(memory).__name__}")


def check_draft(draft: object, schedule: Schedule) -> None:
    if not callable(draft):
        raise TypeError(f"draft: expected a callable like the model, draft(x, t), or None, got {type(draft).__name__}")
    if isinstance(draft, Draft) and not schedule.timesteps.is_floating_point():  # looked up: one beyond would fail late
        last, known = int(schedule.timesteps.max()), draft.last_timestep
        if last > known:
            raise ValueError(
                f"draft: expected one that knows the schedule's timesteps, up to {last}; this ends at {known}: "
                "it was made for another model"
            )


def check_draft_shape(draft: object, noise: Tensor) -> None:
    if isinstance(draft, Draft) and draft.shape != tuple(noise.shape[1:]):
        raise ValueError(f"noise: expected samples of the draft's shape {draft.shape}, got {tuple(noise.shape[1:])}")


def check_schedule(schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule: expected a deqdiff_fast.Schedule, got {type(schedule).__name__}; a diffusers scheduler "
            "becomes one with Schedule.from_diffusers(scheduler, num_inference_steps)"
        )


def positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a number > 0 or None, got {value!r}")
    return number


def count(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise ValueError(f"{name}: expected an int >= 1 or None, got {value!r}")
    return None if value is None else int(value)


def window(value: Any) -> int | str:
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"window: expected 'auto' or an int >= 1, got {value!r}")
    return int(value)


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not any(value == item and type(value) is type(item) for item in allowed):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_noise(noise: object) -> None:
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise: expected a tensor (B, *shape), got {type(noise).__name__}")
    if noise.dim() < 2 or 0 in noise.shape[1:]:
        raise ValueError(f"noise: expected shape (B, *shape) with a non-empty sample shape, got {tuple(noise.shape)}")
    if noise.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"noise: expected a floating-point dtype, got {noise.dtype}")
    _check_size("noise", noise)


def check_image(image: object) -> None:
    """An image to invert: pixels in [-1, 1] or latents; byte images and NaN are refused."""
    if not isinstance(image, Tensor):
        raise TypeError(f"image: expected a tensor (B, *shape), got {type(image).__name__}")
    if image.dim() < 2 or 0 in image.shape[1:]:
        raise ValueError(f"image: expected shape (B, *shape) with a non-empty image shape, got {tuple(image.shape)}")
    if image.shape[0] == 0:
        raise ValueError("image: expected at least one image, got an empty batch")
    if image.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        hint = "; scale pixels to [-1, 1] first" if image.dtype == torch.uint8 else ""
        raise ValueError(f"image: expected a floating-point dtype, got {image.dtype}{hint}")
    _check_size("image", image)


def _check_size(name: str, samples: Tensor) -> None:
    """Values must be there and finite, and a sample, unless it is zero, of a size whose square is a number of its
    dtype."""
    if samples.layout is not torch.strided or samples.is_meta:
        kind = "on the meta device, without values" if samples.is_meta else f"of layout {samples.layout}"
        raise ValueError(f"{name}: expected a dense tensor with values, got one {kind}")
    least = LEAST.get(samples.dtype, LEAST[torch.float32])
    largest = samples.detach().flatten(1).abs().amax(1).tolist()  # one look at a device
    if not all(map(math.isfinite, largest)):
        raise ValueError(f"{name}: expected finite values, got NaN or Inf")
    small = [size for size in largest if 0 < size < least]
    if small:
        raise ValueError(
            f"{name}: expected samples with values of at least {least:g} in {samples.dtype}, or zeros, got a largest "
            f"one of {min(small):.1e}; squares of them are rounded to zero: change the units, or use float64"
        )


def check_shape(shape: object) -> None:
    whole = isinstance(shape, (tuple, list)) and all(type(n) is int and n > 0 for n in shape)
    if not whole or not shape:
        raise ValueError(f"shape: expected that of one sample, a tuple of ints >= 1 without the batch, got {shape!r}")


def check_kwargs(model_kwargs: object) -> None:
    if model_kwargs is not None and not isinstance(model_kwargs, dict):
        raise TypeError(f"model_kwargs: expected a dict or None, got {type(model_kwargs).__name__}")


def check_callback(callback: object) -> None:
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")


def check_trajectory(trajectory: object, noise: Tensor, steps: int) -> None:
    if trajectory is None:
        return
    if not isinstance(trajectory, Tensor):
        raise TypeError(f"init_trajectory: expected a tensor or None, got {type(trajectory).__name__}")
    expected = (steps + 1, *noise.shape)
    if tuple(trajectory.shape) != expected:
        raise ValueError(f"init_trajectory: expected shape {expected}, got {tuple(trajectory.shape)}")
    if trajectory.device != noise.device:
        raise ValueError(f"init_trajectory: expected device {noise.device}, got {trajectory.device}")
    if trajectory.layout is not torch.strided:
        raise ValueError(f"init_trajectory: expected a dense tensor, got one of layout {trajectory.layout}")
    largest, most = float(trajectory.detach().abs().max()) if trajectory.numel() else 0.0, MOST[noise.dtype]
    if not math.isfinite(largest):
        raise ValueError("init_trajectory: expected finite values, got NaN or Inf; leave it out to start without one")
    if largest > most:
        raise ValueError(
            f"init_trajectory: expected values up to {most:g} for a noise of {noise.dtype}, whose squares are no "
            f"overflow, got {largest:.1e}; leave it out to start without one"
        )


def cuda_graph(value: Any) -> bool | str:
    """True needs a device to record on; raises ValueError without one."""
    chosen: bool | str = choice("cuda_graph", value, ("auto", True, False))
    if chosen is True and not torch.cuda.is_available():
        raise ValueError(
            "cuda_graph: expected 'auto' or False on a machine without a CUDA device, got True; torch finds no such "
            "device (torch.cuda.is_available() is False)"
        )
    return chosen
