"""Answers that stand out in time: of a bump in the model, or of states that pass to the other side of a decision.

As long as states are far off, what interpolation misses between nodes is large, and hides what a bump does. The answers
at the nodes and at the spots of a first solve together are dense in time, so that each is foretold by its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chain import NodeChain
from .composite import leave_one_out
from .elements import joined
from .node_grid import Transfer, per_element
from .problem import NodeOutcome, NodeProblem
from .spots import SpotStates, remainder_at

AROUND, JUMP = 8, 8.0  # answers on either side, and how many times what is little on either of them stands out
LEAST_JUMP = 0.1  # part of the tolerance: what an answer that stands out would do to the sample, or to the next state
SUSPECTS = 4  # such answers, at most
NOTICED = 0.3  # part of the tolerance: what nodes that lie elsewhere may miss there


def suspects(spots: SpotStates, chain: NodeChain, answers: Tensor) -> tuple[int, ...]:
    """Timesteps around answers that stand out, to be asked again until states have settled; answers: (m, 1, D).

    None where few spots were asked, or where there are not enough timesteps on either side to tell.
    """
    problem, nodes = chain.problem, chain.grid.nodes
    if len(spots.timesteps) <= AROUND:
        return ()
    which = slice(problem.spots.sample, problem.spots.sample + 1)
    at, order = torch.tensor([*nodes, *spots.timesteps]).sort()
    like, order = spots.states, order.to(spots.states.device)
    missed, abscissa = leave_one_out(problem.chain, at), problem.chain.abscissa[at]
    tables = (missed, problem.chain.influence[at], problem.chain.model_coef[at, :1])
    loo, far, near = (table.to(like.device, like.dtype) for table in tables)
    states = torch.cat([chain.states[:-1, which], spots.states])[order]
    known = chain.history.base()[:, which]
    own = torch.cat([known, remainder_at(spots.tables, problem.classes, answers, spots.states)])[order]
    parts = []
    for piece in problem.elements.pieces(like.shape[2]):
        classes = None if problem.classes is None else problem.classes[piece]
        off = torch.mm(loo, own[:, 0, piece])[:, None]
        following = torch.cat([states[1:, :, piece], chain.states[-1:, which, piece]])
        carried = (off * per_element(far, classes), off * near[:, None], following)
        parts.append(tuple(values.norm(dim=2)[:, 0] for values in carried))
    to_sample, to_next, sizes = problem.elements.norms(*joined(parts))
    here = abscissa[2:-2]
    near1, far1 = (here - abscissa[1:-3]) * (abscissa[3:-1] - here), (here - abscissa[:-4]) * (abscissa[4:] - here)
    effect = torch.maximum(to_sample / sizes[-1], to_next / sizes).cpu()[2:-2].double()
    jumps = (effect * (at[3:-1] - at[1:-3]) / 2).tolist()
    apart = (near1 * far1).tolist()  # what is smooth is missed in proportion to these distances
    found, times = list[tuple[float, int]](), at.tolist()
    for k, jump in enumerate(jumps):  # of times[k + 2]; its neighbours answer to it
        sides = range(max(0, k - AROUND), max(0, k - 2)), range(k + 3, min(k + AROUND + 1, len(jumps)))
        if all(sides) and jump > LEAST_JUMP * problem.tol:
            little = [sorted(max(jumps[j], jumps[j] / apart[j] * apart[k]) for j in side)[:2][-1] for side in sides]
            found += [(jump, k)] if jump > JUMP * max(little) else []
    around = {t for _, k in sorted(found)[-SUSPECTS:] for t in times[k : k + 5]}
    return tuple(sorted(around - set(nodes)))


def passed_over(problem: NodeProblem, outcome: NodeOutcome, suspects: tuple[int, ...]) -> set[int]:
    """Timesteps in and around those where answers stood out, if it took nodes there to get the sample right: later
    solves, whose nodes may lie elsewhere, are to look there."""
    nodes, start = outcome.grid.nodes, problem.start
    if outcome.rough is not False or not {*suspects} & {*nodes}:
        return set()
    there = sorted({*suspects, *nodes})
    sides = zip(there[:1] + there, there, there[1:] + there[-1:])
    found = {k for before, k, after in sides if {before, k, after} & {*suspects}}
    inside, others = (tuple(k for k in nodes if (k in found) is within) for within in (True, False))
    if not others:
        return found
    among = torch.tensor([k in found for k in nodes], device=start.device)
    weights = Transfer.of(problem.chain, others, inside, start.dtype, start.device).scaled
    one = slice(problem.spots.sample, problem.spots.sample + 1)
    left, known = outcome.remainder[among, one], outcome.remainder[~among, one]
    far = per_element(outcome.grid.influence[among], problem.classes)
    missed = (left - torch.mm(weights, known.flatten(1)).view_as(left)).mul_(far).sum(0)  # by the others alone
    off, size = problem.elements.norms(missed.norm(dim=1), outcome.states[-1, one].norm(dim=1))
    return found if float(off / size) > NOTICED * problem.tol else set()
