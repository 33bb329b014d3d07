"""A system as the rounds on nodes want it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._types import Generators, Rows
from ..loop.base import Chain
from ..memory import Lease
from ..model.row_tables import amplifies
from ..nodes.composite import LinearChain
from ..nodes.grid import abscissae, density
from ..nodes.problem import NodeProblem, Spots
from ..schedule import Schedule, SpectralSlope
from ..schedule.cache import cached
from ..schedule.noise import discard_draws, fill_drift
from .placement import Placement
from .system import System


def linear_chain(schedule: Schedule, slope: SpectralSlope | str | None) -> tuple[LinearChain, Tensor | None]:
    """The chain with the slopes of a solver, and the class of every element: (D,) int32, None where there is one."""
    q = schedule.denoised_coef()[:, 1]
    unit, classes = torch.where(q == 0, 1, q), None
    if isinstance(slope, SpectralSlope):
        slopes, classes = slope.classes(schedule)
        classes = classes.int()
    else:
        slopes = schedule.slope()[:, None] * (slope is not None)
    return LinearChain(schedule.state_coef, schedule.model_coef, slopes, unit, abscissae(schedule)), classes


def node_problem(
    place: Placement, lease: Lease, noise: Tensor, generator: Generators, tol: float, settings: Any, backend: str,
    made: Chain | None, spots: Spots,
) -> NodeProblem:  # fmt: skip
    """The problem of one solve.

    place, lease: its memory. settings: history, ridge and floor of the secants. made: a chain whose noise was drawn
    already. spots: asked beside the nodes.
    """
    system, schedule, device = place.system, place.system.schedule, place.system.device
    slope = system.linear_model
    chain, classes = cached(schedule, ("linear", slope), lambda: linear_chain(schedule, slope))  # a spectrum: itself
    drift = place.drift(lease)
    if made is None:
        start = place.own(system.to_basis(noise.detach().reshape(system.batch, -1).to(system.dtype)))
    else:
        start = place.own(made.states[0].clone())
    if drift is not None and made is not None and made.drift is not None:
        drift.copy_(place.own(made.drift))
    elif drift is not None and drift.device == device and place.shared is None:
        fill_drift(drift, schedule, tuple(noise.shape), generator, noise.dtype)
        if system.basis is not None:
            system.basis.forward(drift.flatten(0, 1))
    elif drift is not None:  # one step's after the other
        part: Callable[[Tensor], Tensor] = lambda z: place.own(system.to_basis(z.to(system.dtype)))  # noqa: E731
        fill_drift(drift, schedule, tuple(noise.shape), generator, noise.dtype, device, part)
    elif made is None:
        discard_draws(schedule, tuple(noise.shape), generator, noise.dtype, device)
    return NodeProblem(
        chain, None if classes is None else place.own(classes.to(device)),
        cached(schedule, "density", lambda: density(schedule)), system.node_sizes, system.most_nodes, start, drift,
        partial(ask, system, lease) if place.shared is None else partial(place.shared.ask, lease),
        None if system.draft is None else partial(ask_draft, system),
        tol, settings.history, settings.ridge, settings.floor, backend,
        lambda what, make: cached(schedule, (what, slope, system.dtype, device), make), spots,
        elements=place.elements, host=place.host, amplifies=amplifies(system.model),
    )  # fmt: skip


def ask(
    system: System, lease: Lease, states: Tensor, rows: Tensor, slots: Tensor, out: Tensor, round: int
) -> None:  # fmt: skip
    """`NodeProblem.ask`, in no larger calls than the lease has memory for."""
    calls = -(-len(rows) // (system.most_nodes * system.batch))
    for flat, slot in zip(rows.tensor_split(calls), slots.tensor_split(calls)) if calls else ():
        system.evaluate(states[:, None], out, Rows(flat, 0, system.num_steps, len(flat), slot), lease, round)


def ask_draft(system: System, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
    """`NodeProblem.draft`."""
    assert system.draft is not None
    return system.to_basis(system.draft.rows(system.from_basis(states), steps, samples).to(states.dtype))
