"""What a model may return, and what is wrong with what it did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def output_fault(value: Any, expected: tuple[int, ...], device: torch.device) -> str:
    """What is wrong with a prediction of that shape, and what was expected; empty if nothing is."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}; expected a tensor or an object with .sample"
    if value.shape == expected and value.is_floating_point() and value.device == device:
        return ""
    shape = tuple(value.shape)
    if shape != expected:
        hint = ""
        if value.dim() >= 2 and len(expected) >= 2 and shape[:2] == (expected[0], 2 * expected[1]):
            hint = "; a model that also predicts a variance must be wrapped to return its first half of the channels"
        return f"shape {shape}; expected {expected}{hint}"
    if not value.is_floating_point():
        return f"dtype {value.dtype}; expected a floating-point dtype"
    return f"device {value.device}; the noise is on {device}"
