"""What the checks of the ops' arguments share. Everything here raises ValueError, naming the argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MAX_HISTORY = 8
MAX_LAGS = 16  # PNDM with its Runge-Kutta start needs 11
WIDE = (torch.float32, torch.float64)
STORAGE = (*WIDE, torch.bfloat16, torch.float16)
INDEX = (torch.int32,)
Arguments = dict[str, Any]  # of an op, by the names of its schema


def check_types(given: Arguments, types: list[tuple[str, str]]) -> None:
    """What the dispatcher sees to in its own calls: tensors where the schema has tensors, dense ones, and numbers."""
    for name, kind in types:
        value = given[name]
        if kind.startswith("Tensor"):
            if isinstance(value, Tensor):
                if value.layout is not torch.strided:
                    raise ValueError(f"{name}: expected a dense tensor, got one of layout {value.layout}")
            elif value is not None or not kind.endswith("?"):
                raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
        elif kind == "int" and (isinstance(value, (bool, float, str)) or value is None or abs(value) >= 2**63):
            raise ValueError(f"{name}: expected an int, got {value!r}")
        elif kind == "float" and (isinstance(value, (bool, str)) or value is None):
            raise ValueError(f"{name}: expected a number, got {value!r}")


def expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """A tensor of that shape, one of those dtypes and that device."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device} like states, got {tensor.device}")


def check_states(given: Arguments) -> None:
    """What every op on a chain takes."""
    states = given["states"]
    if states.dim() != 3 or states.shape[0] < 2 or states.shape[2] < 1:
        raise ValueError(f"states: expected shape (T + 1, B, D) with T, D >= 1, got {tuple(states.shape)}")
    (rows, batch, size), device = states.shape, states.device
    expect("states", states, (rows, batch, size), STORAGE, device)
    expect("predictions", given["predictions"], (rows - 1, batch, size), STORAGE, device)
    expect("lo", given["lo"], (batch,), INDEX, device)
    expect("hi", given["hi"], (batch,), INDEX, device)
    check_workspace(given.get("workspace"), device)


def check_scan(given: Arguments, *sums: str) -> None:
    """What the scans over a chain share; `sums` are named sq_diff and sq_norm unless given."""
    check_states(given)
    states, state_coef, drift = given["states"], given["state_coef"], given["drift"]
    if state_coef.dim() != 2 or not 1 <= state_coef.shape[1] <= MAX_LAGS:
        raise ValueError(f"state_coef: expected shape (T, L) with 1 <= L <= {MAX_LAGS}, got {tuple(state_coef.shape)}")
    (steps, batch, size), device, lags = given["predictions"].shape, states.device, state_coef.shape[1]
    expect("state_coef", state_coef, (steps, lags), WIDE, device)
    expect("model_coef", given["model_coef"], (steps, lags), WIDE, device)
    for name in sums or ("sq_diff", "sq_norm"):
        expect(name, given[name], (steps, batch), WIDE, device)
    if drift is not None:
        expect("drift", drift, (steps, batch, size), STORAGE, device)


def check_workspace(workspace: Tensor | None, device: torch.device) -> None:
    """A run of bytes on the device, if any."""
    if workspace is None:
        return
    kind = (str(workspace.dtype).removeprefix("torch."), workspace.dim(), workspace.is_contiguous())
    if kind != ("uint8", 1, True):
        raise ValueError(
            f"workspace: expected a contiguous uint8 tensor of one dimension, got {kind[0]} {tuple(workspace.shape)}"
        )
    expect("workspace", workspace, workspace.shape, (torch.uint8,), device)


def check_slope(given: Arguments, name: str = "slope") -> None:
    """One number a row, or one an element."""
    slope, states = given[name], given["states"]
    (rows, _, size), device = states.shape, states.device
    if slope.shape not in ((rows - 1, 1), (rows - 1, size)) or not slope.is_floating_point() or slope.device != device:
        raise ValueError(
            f"{name}: expected a floating-point tensor {(rows - 1, 1)} or {(rows - 1, size)} on {device}, got "
            f"{slope.dtype} {tuple(slope.shape)} on {slope.device}"
        )


def check_rings(given: Arguments, most: int, dtypes: tuple[torch.dtype, ...] = STORAGE) -> None:
    """Rings of states and predictions, at most `most` columns."""
    (_, batch, size), device = given["states"].shape, given["states"].device
    z, filled = given["z"], given["filled"]
    if z.dim() != 4 or not 1 <= z.shape[0] <= most or z.shape[1] < 1 or z.shape[2:] != (batch, size):
        raise ValueError(f"z: expected shape (H + 1, W, {batch}, {size}) with H < {most}, got {tuple(z.shape)}")
    expect("z", z, z.shape, dtypes, device)
    expect("e", given["e"], z.shape, (z.dtype,), device)
    expect("filled", filled, z.shape[1:3], INDEX, device)
    check_column(given["column"], z.shape[0], "H + 1")


def check_column(column: int, ring: int, name: str) -> None:
    if not 0 <= column < ring:
        raise ValueError(f"column: expected 0 <= column < {ring} (the round modulo {name}), got {column}")


def check_ridge(given: Arguments) -> None:
    """Of a least squares fit of secants."""
    ridge, floor = given["ridge"], given["floor"]
    if not (ridge > 0 and math.isfinite(ridge)) or not (floor >= 0 and math.isfinite(floor)):
        raise ValueError(f"ridge, floor: expected finite numbers, ridge > 0 and floor >= 0, got {ridge}, {floor}")


def check_windows(given: Arguments) -> None:
    """Values of the windows lo, hi, where reading them costs nothing (on the CPU); the CUDA kernels clamp instead."""
    steps, limit = given["predictions"].shape[0], given["predictions"].shape[0]
    for name in ("f", "e"):  # rings of rows
        if given.get(name) is not None:
            limit = given[name].shape[1]
    for b, (first, last) in enumerate(zip(given["lo"].tolist(), given["hi"].tolist(), strict=True)):
        if not 0 <= first <= last <= steps:
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi <= {steps}, got {first}, {last} for sample {b}")
        if last - first > limit:
            raise ValueError(f"lo, hi: expected at most W = {limit} active rows, got {last - first} for sample {b}")
