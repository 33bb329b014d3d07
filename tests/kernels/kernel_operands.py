"""Small valid arguments of every op, by the names of its schema."""

from __future__ import annotations

from typing import Any

import torch

STEPS, BATCH, SIZE, COLUMNS, NODES = 4, 2, 6, 3, 5


def _scan(normal: Any) -> dict[str, Any]:
    rows = (STEPS, BATCH)
    coef = torch.full((STEPS, 1), 0.5, dtype=torch.float64)
    return {
        "states": normal(STEPS + 1, BATCH, SIZE),
        "predictions": normal(*rows, SIZE),
        "state_coef": coef,
        "model_coef": coef.clone(),
        "lo": torch.zeros(BATCH, dtype=torch.int32),
        "hi": torch.full((BATCH,), STEPS, dtype=torch.int32),
        "sq_diff": torch.ones(rows, dtype=torch.float64),
        "sq_norm": torch.ones(rows, dtype=torch.float64),
        "drift": normal(*rows, SIZE),
        "workspace": None,
    }


def _rings(normal: Any, a: str, b: str) -> dict[str, Any]:
    ring = (COLUMNS, STEPS, BATCH, SIZE)
    return {a: normal(*ring), b: normal(*ring), "filled": torch.full(ring[1:3], 2, dtype=torch.int32), "column": 1}


def _stopping(scan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sums = {name: scan[name] for name in ("sq_diff", "sq_norm")}
    marks = {"previous": sums["sq_norm"].clone(), "strict": torch.ones(BATCH, dtype=torch.float64)}
    bounds = {
        "lo": scan["lo"],
        "hi": scan["hi"],
        "previous_bounds": torch.zeros(2, BATCH, dtype=torch.int32),
        "decision": torch.zeros(4, BATCH, dtype=torch.float64),
        "rows": torch.zeros(STEPS * BATCH, dtype=torch.int64),
    }
    return {
        "mark_converged": {**sums, **marks, "freeze": 1e-3, "floor": 1e-6},
        "advance_window": {**sums, **bounds, "freeze": 1e-3, "finish": 1e-3, "width": 3},
        "copy_rows": {"target": scan["states"], "source": scan["predictions"], "first": scan["lo"], "last": scan["hi"]},
    }


def _nodes(normal: Any) -> dict[str, Any]:
    """Two lags, three nodes nearby out of others than those of the states, five classes of elements."""
    lags, stencil, kinds = 2, 3, 5
    return {
        "states": normal(STEPS + 1, BATCH, SIZE),
        "remainder": normal(NODES, BATCH, SIZE),
        "state_coef": torch.full((STEPS, lags, lags, kinds), 0.5),
        "remainder_coef": torch.full((STEPS, lags, stencil, kinds), 0.25),
        "start": torch.tensor([0, 2, 1, 0], dtype=torch.int32),
        "classes": torch.tensor([4, 0, 3, 3, 1, 2], dtype=torch.int32),
        "drift": normal(STEPS, lags, BATCH, SIZE),
    }


def _secants(normal: Any) -> dict[str, Any]:
    """Rows with all, some and none of their secants."""
    columns = normal(NODES, COLUMNS, SIZE)
    return {
        "fit": torch.zeros(NODES, COLUMNS, COLUMNS, dtype=torch.float64),
        "gram": columns @ columns.transpose(1, 2),
        "size": normal(NODES).abs(),
        "count": torch.tensor([4, 3, 2, 1, 4], dtype=torch.int32),
        "ridges": torch.full((COLUMNS, NODES), 1e-6).scatter_(0, torch.tensor([[0, 1, 2, 0, 1]]), 1e-2),
        "guess_error": 0.1 * normal(NODES).abs(),
        "floor": 1e-5, "guessed": 5e-3, "nonlinear": 0.3,
    }  # fmt: skip


def operands(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of `op`, in the order of its schema."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    scan, fit = _scan(normal), {"ridge": 1e-6, "floor": 1e-5}
    slope, coefs = torch.full((STEPS, 1), 0.1, dtype=torch.float32), ("state_coef", "model_coef", "lo", "hi")
    mix = {"scope": "timestep", "ridge": 1e-3, "relative_ridge": True, "damping": 1.0, "stale": 8.0}
    gram = torch.zeros(STEPS, BATCH, COLUMNS, COLUMNS, dtype=torch.float64)
    inverse = {"damping": 1.0, "ridge": 1e-6, "stale": 8.0, "floor": 1e-6, "reach": 1.0}
    found: dict[str, dict[str, Any]] = {
        "ddim_update": scan,
        "anderson_step": {**scan, **_rings(normal, "f", "g"), "gram": gram, **mix},
        "newton_scan": {**scan, "slope": slope, **_rings(normal, "z", "e"), **fit},
        "inverse_scan": {
            **{name: scan[name] for name in ("states", "predictions", *coefs, "drift", "workspace")}, "slope": slope,
            "weight": slope.clone(), "sq_miss": scan["sq_diff"], **_rings(normal, "z", "e"), **inverse,
        },
        "node_scan": _nodes(normal),
        "secant_fit": _secants(normal),
        **_stopping(scan),
    }  # fmt: skip
    schema = getattr(torch.ops.deqdiff_fast, op).default._schema
    return {argument.name: found[op][argument.name] for argument in schema.arguments}


OPS = (
    "ddim_update", "anderson_step", "newton_scan", "inverse_scan", "node_scan", "secant_fit", "mark_converged",
    "advance_window", "copy_rows",
)  # fmt: skip


def given_to(op):
    """Those of a launch: a workspace among them, where the op takes one."""
    given = operands(op)
    return given | {"workspace": torch.zeros(1 << 20, dtype=torch.uint8)} if "workspace" in given else given
