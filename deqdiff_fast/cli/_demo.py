"""`deqdiff-fast demo`: the bundled model, serially and in parallel from the same noise; pictures, plot and table."""

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
        description="Sample the bundled model serially and in parallel rounds from the same noise, and compare.",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER", help="default out")
    parser.add_argument("--model", default="bundled", help="diffusers folder, hub name or 'bundled' (the default)")
    parser.add_argument("--steps", type=positive_int, default=100, help="DDIM timesteps (default 100)")
    parser.add_argument("--images", type=positive_int, default=16, help="images in the pictures (default 16)")
    parser.add_argument("--curve-images", type=positive_int, default=4, help="images behind the plot (default 4)")
    parser.add_argument("--solver", choices=SOLVERS, default="auto", help="of the pictures (default auto)")
    parser.add_argument("--tol", type=positive_float, help="relative error allowed in a sample (default 1e-2)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.set_defaults(run=run)


@dataclass
class TableRow:
    """One line of the table."""

    solver: str
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
        counts = (str(self.images), str(self.rounds), str(self.evals), f"{self.seconds:.1f}")
        return (self.solver, *counts, error, pixel, self.note)


PIXEL = "largest pixel difference (1/255)"
HEADER = ("solver", "images", "rounds", "model evaluations", "seconds", "relative error", PIXEL, "")


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
    args.curve_images = min(args.curve_images, args.images)
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
    from ._run import load_problem, solve_serially

    problem = load_problem(args.model, steps=args.steps, seed=args.seed, device=args.device)
    size = f"{problem.info.parameters / 1e6:.1f} M parameters"
    print(f"{args.images} images, DDIM, {args.steps} timesteps, {size}, {problem.device}")
    serial = solve_serially(problem, args.images)
    stats = serial.stats
    row = TableRow("serial chain", args.images, args.steps, stats.model_evals, stats.wall_seconds, note="the reference")
    main_row, sample = _measure(problem, serial.sample, args.images, args.solver, args.tol)
    rows = [row, main_row]
    _images.save(_images.panels(serial.sample, sample), paths["pictures"])
    print(f"wrote {paths['pictures']}")
    curves = [name for name in CURVES if name != "draft" or problem.draft is not None]
    rows += [_measure(problem, serial.sample, args.curve_images, solver, args.tol)[0] for solver in curves]
    where = str(problem.device)
    if problem.device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    _report(args, rows, paths, where, time.monotonic() - started)
    return 0


def _measure(problem: Any, reference: Any, images: int, solver: str, tol: float | None) -> tuple[TableRow, Any]:
    """Solve the first `images` chains and compare with the reference after every round. Returns row and samples."""
    from . import _images
    from ._run import solve

    wanted, curve = reference[:images], []
    solution = solve(
        problem, images, label=solver, solver=solver, tol=tol, window=problem.schedule.num_steps,
        on_round=lambda info: curve.append(float(_images.relative_error(info.sample(), wanted).max())),
    )  # fmt: skip
    stats = solution.stats
    name = stats.solver if solver == "auto" else solver
    row = TableRow(name, images, stats.rounds, stats.model_evals, stats.wall_seconds, curve=curve[: stats.rounds])
    row.error = float(_images.relative_error(solution.sample, wanted).max())
    row.pixel = _images.largest_difference(solution.sample, wanted)
    if stats.finished_serially:
        row.note = f"rounds ran out, the last {stats.finished_serially} steps made serially"
    return row, solution.sample


def _report(args: argparse.Namespace, rows: list[TableRow], paths: dict[str, Path], where: str, seconds: float) -> None:
    from ._plot import Curve, convergence_plot

    curves = [Curve(row.solver, row.curve) for row in rows[2:]]
    convergence_plot(
        curves, paths["plot"], ylabel="relative error of the running last state",
        title=f"{args.model} model, DDIM with {args.steps} timesteps, worst of {args.curve_images} images", target=1e-2,
    )  # fmt: skip
    print(f"wrote {paths['plot']}")
    table, notes = markdown(rows), "\n".join(_notes(args, rows, where))
    with replacing(paths["table"]) as partial:
        partial.write_text(f"{table}\n\n{notes}\n", encoding="utf-8")
    print(f"wrote {paths['table']}\n\n{table}\n\n{notes}\nThe demo took {seconds:.0f} s.")


def _notes(args: argparse.Namespace, rows: list[TableRow], where: str) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        f"DDIM, {args.steps} timesteps, eta 0, seed {args.seed}, on {where}. Relative errors and pixel "
        "differences are the largest over the images, against the serial chain."
    ]
    if args.curve_images < args.images:
        notes.append(
            f"To save time, the plot and the last {len(rows) - 2} rows use the first {args.curve_images} of the "
            f"{args.images} images."
        )
    serial, parallel = rows[0], rows[1]
    if parallel.seconds > serial.seconds:
        notes.append(
            f"{parallel.solver}: {serial.rounds} steps in {parallel.rounds} rounds, with "
            f"{parallel.evals / serial.evals:.1f} times the model evaluations. {args.images} images at a time already "
            "fill this device, so the evaluations decide and the serial chain is faster; rounds pay where one call "
            "leaves the device idle."
        )
    return notes
