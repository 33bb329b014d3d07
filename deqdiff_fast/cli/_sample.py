"""`deqdiff-fast sample`: draw samples in parallel rounds, as a PNG grid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..presets import PRESETS, preset
from ..solver import NAMED
from . import _devices, _student
from ._numbers import class_label, fraction, positive_float, positive_int, seed, window
from ._output import CommandError, check_picture, require_pillow

SPACINGS = ("leading", "trailing", "linspace", "quad")
DEFAULTS = {"model": "bundled", "steps": 50, "eta": 0.0, "solver": "auto"}


def add_parser(commands: Any) -> None:
    """Add `sample` and its options."""
    parser = commands.add_parser(
        "sample",
        help="draw samples in parallel rounds",
        description="Draw samples with DDIM, all timesteps in parallel, and write them as a PNG grid.",
    )
    parser.add_argument("--model", metavar="MODEL", help="diffusers folder, hub name or 'bundled' (the default)")
    parser.add_argument("--student", type=Path, metavar="FILE", help="one-step samples of a trained GET instead")
    parser.add_argument("--label", type=class_label, help="of all images of a student (default: one after another)")
    parser.add_argument("--equilibrium-steps", type=positive_int, help="of a student (default: its own)")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="the paper's model and settings; other options win")
    parser.add_argument("--steps", type=positive_int, help="timesteps of the chain (default 50)")
    parser.add_argument("--eta", type=fraction, help="0: DDIM (default), 1: as random as DDPM")
    parser.add_argument("--spacing", choices=SPACINGS, help="of the timesteps (default: the model's own)")
    clip = "clamp the predicted image (default: the model's own setting)"
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help=clip)
    parser.add_argument(
        "--solver", choices=tuple(NAMED), help="default auto: as is predicted to be the fastest, be it the serial chain"
    )
    parser.add_argument("--tol", type=positive_float, help="relative error allowed in a sample (default 1e-2)")
    parser.add_argument("--max-rounds", type=positive_int, help="rounds before the rest is finished serially")
    parser.add_argument("--window", type=window, default="auto", help="timesteps solved at a time, or 'auto' (default)")
    parser.add_argument(
        "--max-batch",
        type=positive_int,
        help="most rows in one model call (default: all on a GPU, 64 or more on a CPU)",
    )
    parser.add_argument("--batch", type=positive_int, default=16, help="number of images (default 16)")
    parser.add_argument("--seed", type=seed, default=0, help="image k is the same for every --batch (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    _devices.add_option(parser)
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), metavar="PNG", help="default samples.png")
    parser.add_argument(
        "--compare-serial",
        action="store_true",
        help="run the serial chain too, report the error, and make the PNG serial | parallel | 16 x difference",
    )
    plot = "write a convergence plot; with it, solver and window 'auto' solve all timesteps at once"
    parser.add_argument("--plot", type=Path, metavar="PNG", help=plot)
    parser.set_defaults(run=run)


def settle(args: argparse.Namespace) -> None:
    """Fill what was not given from the preset, then from the defaults."""
    chosen = preset(args.preset) if args.preset else None
    for name in ("model", "steps", "eta", "spacing", "solver", "tol", "max_rounds"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(chosen, name) if chosen else DEFAULTS.get(name))
    if args.clip is None and chosen:
        args.clip = False


def run(args: argparse.Namespace) -> int:
    """Sample, and write picture and plot. Returns the exit status."""
    if args.student is None:
        if args.label is not None or args.equilibrium_steps is not None:
            raise CommandError("--label and --equilibrium-steps are for a student; name one with --student")
        settle(args)
    else:
        _student.refuse_chain_options(args)
    check_picture("--out", args.out)
    check_picture("--plot", args.plot)
    require_pillow()
    if args.student is not None:
        return _student.run(args)
    if args.plot is not None:
        from ._plot import require_matplotlib

        require_matplotlib()
        if args.plot.resolve() == args.out.resolve():
            raise CommandError(f"--out and --plot both name {args.out}; name two files")

    from . import _images
    from ._run import load_problem, solve, solve_serially

    problem = load_problem(
        args.model, steps=args.steps, eta=args.eta, spacing=args.spacing, clip=args.clip, seed=args.seed,
        device=args.device, dtype=args.dtype, max_batch=args.max_batch, group=_devices.group_of(args),
    )  # fmt: skip
    reference = solve_serially(problem, args.batch) if args.compare_serial else None
    errors: list[float] = []

    def on_round(info: Any) -> None:
        if reference is not None and args.plot is not None:
            errors.append(float(_images.relative_error(info.sample(), reference.sample).max()))

    if args.plot is not None and args.window == "auto":  # the serial chain has nothing to plot
        args.window = problem.schedule.num_steps
    solution = solve(
        problem, args.batch, label="sampling", on_round=on_round, solver=args.solver, tol=args.tol,
        max_rounds=args.max_rounds, window=args.window,
    )  # fmt: skip
    if not _devices.writes():
        return 0
    if reference is None:
        picture = _images.grid(_images.pixels(solution.sample))
    else:
        picture = _images.panels(reference.sample, solution.sample)
    _images.save(picture, args.out)
    print(summary(solution, problem.schedule.num_steps, args.batch))
    if reference is not None:
        print(comparison(solution, reference))
    print(f"wrote {args.out}")
    if args.plot is not None:
        _plot(args, solution, errors)
        print(f"wrote {args.plot}")
    return 0


def summary(solution: Any, steps: int, batch: int) -> str:
    """One sentence about a solve."""
    stats = solution.stats
    how = f"solver {stats.solver}, window {stats.window}"
    if stats.plan is not None:
        how = f"{'serial chain' if stats.solver == 'serial' else how}, since {stats.plan.reason}"
    text = (
        f"{batch} image{'s' * (batch != 1)}, {steps} timesteps, {how}: "
        f"{stats.rounds} rounds, {stats.model_evals} model evaluations"
        f"{f' and {stats.draft_evals} of its draft' if stats.draft_evals else ''}, {stats.wall_seconds:.2f} s"
    )
    if stats.stop_reason == "replanned":
        text += f"; {stats.finished_serially} steps were finished serially, which had become the faster way"
    elif stats.finished_serially and stats.solver != "serial":
        text += f"; the rounds ran out and {stats.finished_serially} steps were finished serially"
    elif not bool(solution.converged.all()):
        text += f"; NOT converged for {int((~solution.converged).sum())} of {batch} images"
    return text


def comparison(solution: Any, reference: Any) -> str:
    """One sentence about a solve against the serial chain."""
    from . import _images

    error = float(_images.relative_error(solution.sample, reference.sample).max())
    pixel = _images.largest_difference(solution.sample, reference.sample)
    return (
        f"serial chain: {reference.stats.wall_seconds:.2f} s; largest relative error {error:.1e}, "
        f"largest pixel difference {pixel}/255"
    )


def _plot(args: argparse.Namespace, solution: Any, errors: list[float]) -> None:
    from ._plot import Curve, convergence_plot

    curves = [Curve("residual (largest of the unfinished timesteps)", solution.stats.residual_trace.amax(1).tolist())]
    if errors:
        curves.insert(0, Curve("relative error of the last state against the serial chain", errors))
    title = f"{args.model}, {args.steps} timesteps, eta {args.eta:g}, {args.batch} images, {solution.stats.solver}"
    convergence_plot(curves, args.plot, ylabel="largest over the images", title=title)
