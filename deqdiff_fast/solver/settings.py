"""What the settings of solvers that keep a history must be."""

from __future__ import annotations

from typing import Any

import torch

from ..loop.base import ProblemSize


def check_secant_settings(history: Any, ridge: float, floor: float, nodes: Any, max_rounds: int | None) -> None:
    """Raises ValueError, naming the setting."""
    if isinstance(history, bool) or not isinstance(history, int) or not 0 <= history <= 7:
        raise ValueError(f"history: expected an int from 0 to 7, got {history!r}")
    if not (ridge > 0 and floor >= 0):
        raise ValueError(f"ridge, floor: expected ridge > 0 and floor >= 0, got {ridge!r}, {floor!r}")
    if not isinstance(nodes, bool):
        raise ValueError(f"nodes: expected True or False, got {nodes!r}")
    check_max_rounds(max_rounds)


def check_max_rounds(max_rounds: int | None) -> None:
    """Raises ValueError."""
    if max_rounds is not None and not max_rounds >= 1:
        raise ValueError(f"max_rounds: expected an int >= 1 or None, got {max_rounds!r}")


def history_dtype(given: torch.dtype | None, size: ProblemSize) -> torch.dtype:
    """What a history is stored in: what was asked for, else the dtype of the states."""
    return size.dtype if given is None else given


def check_history_dtype(given: torch.dtype | None) -> None:
    """Raises ValueError for what the kernels do not store."""
    if given not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"history_dtype: expected torch.float32, bfloat16, float16 or None, got {given!r}")
