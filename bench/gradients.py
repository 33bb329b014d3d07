"""Gradients of every mode, in float32 at tolerance 1e-6, against float64 back-propagation through the serial chain.

The loss is the squared distance of the sample from a fixed target; the gradients are those with respect to the noise
and to all parameters of the model (of the mixture: its means).
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import deqdiff_fast as dq
from deqdiff_fast._types import unwrap_output
from deqdiff_fast.gradient import NAMED, resolve
from deqdiff_fast.inversion.counting_model import CountingModel
from deqdiff_fast.schedule.chain import serial_chain
from deqdiff_fast.solver import NAMED as SOLVERS

from ._common import environment, markdown, note, positive_float, positive_int, summary, write_json
from ._problems import Mixture, Problem, add_model_arguments, load

EXACT = ("implicit", "reversible", "unrolled")
COSINE, RELATIVE = 0.9999, 1e-3  # what the exact modes are held to


class MixtureModule(nn.Module):
    """The mixture with its means as parameters."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = copy.copy(mixture)
        self.means = nn.Parameter(mixture.means)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.mixture.means = self.means
        return self.mixture(x, t)


class CountingModule(nn.Module):
    """Counts rows, forwards and backwards, of a model whose parameters the sampler must see."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, CountingModel(model)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = self.count(x, t)
        return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[20], help="T (default 20)")
    parser.add_argument("--tol", type=positive_float, default=1e-6, help="tolerance of the sampler (default 1e-6)")
    parser.add_argument(
        "--solver", choices=tuple(SOLVERS), default="quasi-newton",
        help="of the chain and of its adjoint (default quasi-newton; auto lets the planner choose)",
    )  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=tuple(NAMED), default=list(NAMED), help="default: all")
    parser.add_argument("--check", action="store_true", help="exit 1 where implicit, reversible or unrolled miss")


def run(args: argparse.Namespace) -> int:
    problem, facts = load(args), environment(args.device)
    model = MixtureModule(problem.model) if isinstance(problem.model, Mixture) else problem.model
    assert isinstance(model, nn.Module)
    model.requires_grad_(True)
    rows: list[dict[str, Any]] = []
    for steps in args.steps:
        schedule = problem.schedule(steps, 0.0)
        if schedule.lags > 1:
            raise ValueError("--model: its schedule looks back more than one step; this benchmark takes DDIM")
        noise, target = (
            problem.noise(range(args.seed, args.seed + 1)),
            problem.noise(range(args.seed + 1, args.seed + 2)),
        )
        note(f"T = {steps}: the reference in float64 ...")
        wide = copy.deepcopy(model).double()
        expected = _serial(wide, schedule, noise.double(), target.double())
        for mode in args.modes:
            note(f"T = {steps}: {mode} ...")
            rows.append({"steps": steps, "mode": resolve(mode).name, "exact": mode in EXACT}
                        | _measure(args, model, schedule, problem, mode, noise, target, expected))  # fmt: skip
            write_json(args, facts, rows)
    print(f"{summary(facts)}\n{problem.name}, B = 1, tol {args.tol:g}\n")
    header = (
        "T", "mode", "noise: relative error", "1 - cosine", "parameters: relative error", "1 - cosine", "rounds",
        "evaluations / T", "back-propagations / T", "seconds forward", "backward", "verdict",
    )  # fmt: skip
    print(markdown(header, [_cells(row) for row in rows]))
    print(f"\nThe exact modes are held to a relative error of {RELATIVE:g} and a cosine of {COSINE:g}.")
    return 1 if args.check and any(row["exact"] and not _holds(row) for row in rows) else 0


def _serial(model: nn.Module, schedule: dq.Schedule, noise: Tensor, target: Tensor) -> Sequence[Tensor]:
    """The gradients by autograd through the plain chain."""

    def predict(state: Tensor, i: int) -> Tensor:
        t = schedule.timesteps[i].to(noise.device).expand(len(noise))
        value: Tensor = unwrap_output(model(state.view_as(noise) * schedule.input_scale[i], t))
        return value.flatten(1)

    x = noise.requires_grad_(True)
    sample = serial_chain(schedule, x.flatten(1), predict)[-1].view_as(target)
    return torch.autograd.grad((sample - target).square().sum(), [x, *model.parameters()])


def _measure(
    args: argparse.Namespace, model: nn.Module, schedule: dq.Schedule, problem: Problem, mode: str, noise: Tensor,
    target: Tensor, expected: Sequence[Tensor],
) -> dict[str, Any]:  # fmt: skip
    counted = CountingModule(model)
    sampler = dq.DEQSampler(
        counted,
        schedule,
        solver=args.solver,
        tol=args.tol,
        gradient=mode,
        max_batch=args.max_batch,
        spectrum=problem.spectrum,
    )
    start = noise.clone().requires_grad_(True)
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", dq.ConvergenceWarning)
        solution = sampler.sample(start)
        middle = time.perf_counter()
        loss = (solution.sample - target).square().sum()
        got = torch.autograd.grad(loss, [start, *model.parameters()])
    end = time.perf_counter()
    return {
        "noise": _apart(got[:1], expected[:1]), "parameters": _apart(got[1:], expected[1:]),
        "rounds": solution.stats.rounds, "evaluations": counted.count.evals,
        "backpropagations": counted.count.backpropagations, "forward": middle - begin, "backward": end - middle,
        "warnings": [str(warning.message) for warning in caught],
    }  # fmt: skip


def _apart(got: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """(relative error, 1 - cosine) of all of them as one vector."""
    a, b = (torch.cat([part.double().flatten() for part in parts]) for parts in (got, expected))
    return float((a - b).norm() / b.norm()), 1 - float(torch.cosine_similarity(a, b, dim=0))


def _holds(row: dict[str, Any]) -> bool:
    return all(error <= RELATIVE and angle <= 1 - COSINE for error, angle in (row["noise"], row["parameters"]))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    errors = (f"{value:.1e}" for value in (*row["noise"], *row["parameters"]))
    return (
        str(row["steps"]), row["mode"], *errors, str(row["rounds"]), f"{row['evaluations'] / row['steps']:.1f}",
        f"{row['backpropagations'] / row['steps']:.1f}", f"{row['forward']:.2f}", f"{row['backward']:.2f}",
        ("PASS" if _holds(row) else "FAIL") if row["exact"] else "",
    )  # fmt: skip
