"""`deqdiff-fast demo`: the bundled model, in rounds and serially from the same noise; pictures, plot and table."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..schedule.tensor_file import replacing
from ..solver import NAMED
from ._numbers import positive_float, positive_int, seed
from ._output import CommandError, check_file, check_folder, require_pillow

SOLVERS = tuple(NAMED)
CURVES = tuple(name for name in NAMED if name != "auto")
NAMES = {"pictures": "samples.png", "plot": "convergence.png", "table": "results.md"}


def add_parser(commands: Any) -> None:
    """Add `demo` and its options."""
    parser = commands.add_parser(
        "demo",
        help="serial and parallel side by side",
        description="Sample the bundled model in rounds and serially from the same noise, and compare: a long chain, "
        "then a shorter one with every solver.",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="default out")
    parser.add_argument("--model", default="bundled", help="diffusers folder, hub name or 'bundled' (the default)")
    parser.add_argument("--steps", type=positive_int, default=1000, help="DDIM timesteps (default 1000)")
    parser.add_argument("--images", type=positive_int, default=16, help="images in the pictures (default 16)")
    parser.add_argument("--curve-steps", type=positive_int, default=100, help="timesteps of the plot (default 100)")
    parser.add_argument("--curve-images", type=positive_int, default=1, help="images behind the plot (default 1)")
    parser.add_argument("--solver", choices=SOLVERS, default="auto", help="of the pictures (default auto)")
    parser.add_argument("--tol", type=positive_float, help="relative error allowed in a sample (default 1e-2)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.set_defaults(run=run)


@dataclass
class TableRow:
    """One line of the table."""

    solver: str
    steps: int
    images: int
    rounds: int
    evals: int
    seconds: float
    error: float | None = None
    pixel: int | None = None
    note: str = ""
    curve: list[float] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """The texts under HEADER."""
        error = "-" if self.error is None else f"{self.error:.1e}"
        pixel = "-" if self.pixel is None else str(self.pixel)
        counts = (str(self.steps), str(self.images), str(self.rounds), str(self.evals), f"{self.seconds:.1f}")
        return (self.solver, *counts, error, pixel, self.note)


PIXEL = "largest pixel difference (1/255)"
HEADER = ("solver", "timesteps", "images", "rounds", "model evaluations", "seconds", "relative error", PIXEL, "")


def markdown(rows: list[TableRow]) -> str:
    """An aligned markdown table."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADER))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    text = ["| " + " | ".join(cells) + " |" for cells in padded]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def run(args: argparse.Namespace) -> int:
    """Sample, compare, and write pictures, plot and table. Returns the exit status."""
    started = time.monotonic()
    paths = {what: args.out / name for what, name in NAMES.items()}
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out {args.out}: that is a file; name a folder")
    check_folder(args.out)
    for path in paths.values():
        check_file("--out", path)
    from ._plot import require_matplotlib

    require_pillow()
    require_matplotlib()
    import torch

    from . import _images
    from ._run import load_problem

    problem = load_problem(args.model, steps=args.steps, seed=args.seed, device=args.device)
    size = f"{problem.info.parameters / 1e6:.1f} M parameters"
    print(f"{args.images} images, DDIM, {args.steps} timesteps, {size}, {problem.device}")
    rows, samples = _compare(problem, args.images, [args.solver], args.tol, curves=False)
    _images.save(_images.panels(*samples), paths["pictures"])
    print(f"wrote {paths['pictures']}\n{args.curve_images} images, {args.curve_steps} timesteps, every solver")
    curves = [name for name in CURVES if name != "draft" or problem.draft is not None]
    rows += _compare(problem.with_steps(args.curve_steps), args.curve_images, curves, args.tol, curves=True)[0]
    where = str(problem.device)
    if problem.device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    _report(args, rows, paths, where, time.monotonic() - started)
    return 0


def _compare(
    problem: Any, images: int, solvers: list[str], tol: float | None, *, curves: bool
) -> tuple[list[TableRow], tuple[Any, Any]]:
    """A chain by those solvers and serially. Returns a row for each, the serial chain's first, and two samples: the
    serial chain's and the last solver's. curves: every solver runs twice, and is looked at the first time."""
    from . import _images
    from ._run import solve_serially

    steps = problem.schedule.num_steps
    solved = [_solve(problem, images, solver, tol, curves) for solver in solvers]
    print(f"  serially, {steps} steps:", end=" ", flush=True)
    serial = solve_serially(problem, images)
    print(f"{serial.stats.wall_seconds:.1f} s")
    rows = [
        TableRow(
            "serial chain", steps, images, steps, serial.stats.model_evals, serial.stats.wall_seconds,
            note="the reference",
        )
    ]  # fmt: skip
    for row, solution, iterates in solved:
        row.curve = [float(_images.relative_error(iterate, serial.sample).max()) for iterate in iterates]
        row.error = float(_images.relative_error(solution.sample, serial.sample).max())
        row.pixel = _images.largest_difference(solution.sample, serial.sample)
        rows.append(row)
    return rows, (serial.sample, solved[-1][1].sample)


def _solve(problem: Any, images: int, solver: str, tol: float | None, watch: bool) -> tuple[TableRow, Any, list[Any]]:
    """A timed solve, where `watch` is set after another one that is looked at after every round. Returns its row, its
    solution and the samples that were seen."""
    steps, seen = problem.schedule.num_steps, list[Any]()
    sampler = problem.sampler(solver=solver, tol=tol, window=steps)
    noise, streams = problem.noise(images)
    if watch:
        sampler.sample(noise, generator=streams, callback=lambda info: seen.append(info.sample()))
    print(f"  {solver}:", end=" ", flush=True)
    solution = sampler.sample(noise, generator=problem.streams(images))
    stats = solution.stats
    print(f"{stats.rounds} rounds, {stats.model_evals} model evaluations, {stats.wall_seconds:.1f} s")
    name = stats.solver if solver == "auto" else solver
    row = TableRow(name, steps, images, stats.rounds, stats.model_evals, stats.wall_seconds)
    if stats.finished_serially:
        row.note = f"rounds ran out, the last {stats.finished_serially} steps made serially"
    return row, solution, seen[: stats.rounds]


def _report(args: argparse.Namespace, rows: list[TableRow], paths: dict[str, Path], where: str, seconds: float) -> None:
    from ._plot import Curve, convergence_plot

    curves = [Curve(row.solver, row.curve) for row in rows if row.curve]
    convergence_plot(
        curves, paths["plot"], ylabel="relative error of the running last state",
        title=f"{args.model} model, DDIM with {args.curve_steps} timesteps, worst of {args.curve_images}", target=1e-2,
    )  # fmt: skip
    print(f"wrote {paths['plot']}")
    table, notes = markdown(rows), "\n".join(_notes(args, rows, where))
    with replacing(paths["table"]) as partial:
        partial.write_text(f"{table}\n\n{notes}\n", encoding="utf-8")
    print(f"wrote {paths['table']}\n\n{table}\n\n{notes}\nThe demo took {seconds:.0f} s.")


def _notes(args: argparse.Namespace, rows: list[TableRow], where: str) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        f"DDIM, eta 0, seed {args.seed}, on {where}. Relative errors and pixel differences are the largest over the "
        "images, against the serial chain."
    ]
    serial, parallel = rows[0], rows[1]
    if parallel.seconds > serial.seconds:
        notes.append(
            f"{parallel.solver}: {serial.rounds} steps in {parallel.rounds} rounds, with "
            f"{parallel.evals / serial.evals:.1f} times the model evaluations. {args.images} images at a time already "
            "fill this device, so the evaluations decide and the serial chain is faster; rounds pay where one call "
            "leaves the device idle."
        )
    return notes
