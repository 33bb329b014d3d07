"""`bench restoration --rounds`: rounds to a restoration, ours and those of the paper's Anderson acceleration.

For each operator and method, without noise and with, eta 0 and 0.85. Ours, at the default tolerance, on all images:
rounds, error against the serial restorer; on the first few at tol 1e-5 as well. The paper's: what Cao et al. 2024
(arXiv 2311.11600) and their code (caojiezhang/DeqIR) solve with, Anderson acceleration for each timestep, history 5,
ridge 1e-3, from copies of the noise, to a residual of 1e-3; there it gives up after 15 rounds, here it goes on, to be
counted. It works on whole states, as there, but for DDRM and for DDNM+, which the paper does not solve in parallel:
there it is given our coordinates, without what is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.operators import Operator
from deqdiff_fast.restoration import Method, resolve
from deqdiff_fast.restoration.base import Coordinates, Rows, Start, Task
from deqdiff_fast.restoration.known_range import KnownRange, null_part
from deqdiff_fast.restorer import DEQRestorer

from ._common import markdown, note
from ._problems import Problem, relative_error

OTHER_NOISE = 10**5  # images that the model made must not be sought from the noise that made them
TARGET, TIGHT, TIGHT_TARGET = 1e-2, 1e-5, 1e-4
HEADER = (
    "operator", "method", "sigma", "eta", "rounds", "on nodes", "calls", "evaluations / T", "error", "consistency",
    "tol 1e-5: rounds", "error", "Anderson: rounds", "to 1e-2", "within T / 3", "half of Anderson's",
)  # fmt: skip


@dataclass(frozen=True)
class WholeRange:
    """Coordinates of measurements without noise that take nothing out: u = x, w = A^+ y + (1 - A^+ A) x0."""

    fresh = False

    def begin(self, task: Task, noise: Tensor, draws: Tensor | None) -> Start:
        return Start(noise, task.frozen(draws), {"measured": task.operator.A_dagger(task.y)})

    def state(self, u: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return u, u

    def clean(self, x0: Tensor, unknown: Tensor, rows: Rows) -> Tensor:
        measured: Tensor = rows.data["measured"]
        return measured + null_part(rows.operator, x0)

    def finish(self, u: Tensor, task: Task, data: dict[str, Any]) -> Tensor:
        return u


@dataclass(frozen=True)
class WholeStates:
    """A method on whole states, where it can be."""

    method: Method

    @property
    def needs_vjp(self) -> bool:
        return self.method.needs_vjp

    @property
    def name(self) -> str:
        return f"{self.method.name} on whole states"

    def check(self, operator: Operator, schedule: dq.Schedule, noisy: bool) -> None:
        self.method.check(operator, schedule, noisy)

    def coordinates(self, noisy: bool) -> Coordinates:
        usual = self.method.coordinates(noisy)
        return WholeRange() if usual == KnownRange() else usual

    def restored(self, x0: Tensor, x: Tensor, rows: Rows) -> Tensor:
        return self.method.restored(x0, x, rows)


def measure(
    args: argparse.Namespace, problem: Problem, name: str, chosen: dict[float, Operator], truth: Tensor,
    noise: Tensor, methods: list[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of one operator. chosen: {sigma: it}. noise: standard normal, of the shape of the measurements."""
    for sigma, operator in chosen.items():
        y = operator.A(truth) + sigma * noise
        for method in methods:
            if method == "diffpir" and sigma == 0 and "ddnm" in methods:
                continue  # it is the same there
            for eta in args.etas:
                note(f"{name}: {method}, sigma {sigma:g}, eta {eta:g} ...")
                row = {"operator": name, "method": method, "sigma": sigma, "eta": eta}
                yield row | _cell(args, problem, operator, y, method, sigma, eta)


def _cell(
    args: argparse.Namespace, problem: Problem, operator: Operator, y: Tensor, method: str, sigma: float, eta: float
) -> dict[str, Any]:
    def restorer(chosen: Any, **options: Any) -> DEQRestorer:
        return DEQRestorer(
            problem.model, problem.schedule(args.steps, eta, args.spacing), operator, sigma=sigma, method=chosen,
            max_batch=args.max_batch, window=args.steps, **options,
        )  # fmt: skip

    first = args.seed + OTHER_NOISE
    seeds, few = range(first, first + len(y)), range(first, first + min(args.watched, len(y)))
    ours = restorer(method, tol=args.tol, **problem.aids)
    expected = ours.serial(y, generator=problem.generators(seeds), noise=problem.noise(seeds)).sample
    found = ours.restore(y, generator=problem.generators(seeds), noise=problem.noise(seeds))
    stats = found.stats
    row: dict[str, Any] = {
        "rounds": stats.rounds,
        "node_rounds": stats.node_rounds,
        "calls": stats.rounds + stats.finished_serially,
        "evaluations": stats.model_evals / len(y) / args.steps,
        "errors": relative_error(found.sample, expected).tolist(),
        "unconverged": int((~found.converged).sum()),
        "consistency": float(found.consistency.max()) if sigma == 0 else None,
    }
    y, expected = y[: len(few)], expected[: len(few)]
    tight = restorer(method, tol=TIGHT, **problem.aids).restore(
        y, generator=problem.generators(few), noise=problem.noise(few)
    )
    row |= {"tight_rounds": tight.stats.rounds, "tight_errors": relative_error(tight.sample, expected).tolist()}
    return row | _anderson(restorer, resolve(method), problem, y, expected, few)


def _anderson(
    restorer: Any, method: Method, problem: Problem, y: Tensor, expected: Tensor, seeds: range
) -> dict[str, Any]:
    """Rounds at its own stopping, and from which on all samples stay within the target."""
    theirs = restorer(WholeStates(method), solver=replace(dq.Anderson.deq_ddim(), max_rounds=None))
    states: list[Tensor] = []
    found = theirs.restore(
        y, generator=problem.generators(seeds), noise=problem.noise(seeds),
        callback=lambda info: states.append(info.sample().clone()),
    )  # fmt: skip
    # a sample is its unknowns and what is known, so that they are as far apart as it is
    apart = [(state - states[-1]).flatten(1).norm(dim=1) for state in states]
    final = relative_error(found.sample, expected)
    size = expected.flatten(1).norm(dim=1)
    off = [bool((part / size + final.to(part) > TARGET).any()) for part in apart]
    reached = 1 + max((k + 1 for k, far in enumerate(off) if far), default=0)
    return {
        "anderson_rounds": found.stats.rounds + found.stats.finished_serially,
        "anderson_to": reached if reached <= len(off) else None,
        "anderson_errors": final.tolist(),
    }


def table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """With what must hold of each row: calls within T / 3, and half of Anderson's rounds at most."""
    return markdown(HEADER, [_cells(row, args.steps) for row in rows])


def verdict(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """In how many rows each of what must hold does."""
    counts = {
        f"error at most {TARGET:g}": [max(row["errors"]) <= TARGET for row in rows],
        f"error at most {TIGHT_TARGET:g} at tol {TIGHT:g}": [max(row["tight_errors"]) <= TIGHT_TARGET for row in rows],
        "calls at most T / 3": [row["calls"] <= args.steps // 3 for row in rows],
        "rounds at most half of Anderson's at its own stopping": [_half(row) for row in rows],
        "consistency at most 1e-4 without noise": [
            row["consistency"] <= 1e-4 for row in rows if row["consistency"] is not None
        ],
    }
    return "\n".join(f"{what}: {sum(held)} of {len(held)}" for what, held in counts.items())


def _half(row: dict[str, Any]) -> bool:
    return bool(2 * row["rounds"] <= row["anderson_rounds"])


def _cells(row: dict[str, Any], steps: int) -> tuple[str, ...]:
    reached = row["anderson_to"]
    return (
        row["operator"], row["method"], f"{row['sigma']:g}", f"{row['eta']:g}", str(row["rounds"]),
        str(row["node_rounds"]), str(row["calls"]), f"{row['evaluations']:.1f}", f"{max(row['errors']):.1e}",
        "" if row["consistency"] is None else f"{row['consistency']:.0e}", str(row["tight_rounds"]),
        f"{max(row['tight_errors']):.0e}", str(row["anderson_rounds"]), "never" if reached is None else str(reached),
        "yes" if row["calls"] <= steps // 3 else "no", "yes" if _half(row) else "no",
    )  # fmt: skip
