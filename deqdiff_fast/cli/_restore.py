"""`deqdiff-fast restore`: images from measurements of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..restoration import NAMED
from . import _devices
from ._numbers import factor, fraction, positive_float, positive_int, seed
from ._operators import NAMES as OPERATORS
from ._operators import make_operator, operator_name
from ._output import CommandError, check_folder, check_picture, require_pillow

PICTURES = {"measurement": "measurement.png", "restored": "restored.png", "truth": "truth.png"}


def noise(text: str) -> float | None:
    """A standard deviation >= 0, or "auto"."""
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number >= 0 or 'auto'")
    return value


def add_parser(commands: Any) -> None:
    """Add `restore` and its options."""
    parser = commands.add_parser(
        "restore",
        help="images from blurred, small, noisy or incomplete ones",
        description="Restore images from linear measurements of them, in parallel rounds.",
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="picture files, of the size of a measurement"
    )
    parser.add_argument("--operator", type=operator_name, required=True, metavar="NAME", help=OPERATORS)
    parser.add_argument(
        "--sigma", type=noise, default=0.0, help="standard deviation of the noise, of pixels in [-1, 1], or 'auto'"
    )
    parser.add_argument("--simulate", action="store_true", help="IMAGEs are the truth: measure them, with that noise")
    parser.add_argument("--truth", nargs="+", type=Path, metavar="IMAGE", help="the truth, to compare with")
    parser.add_argument("--mask", type=Path, help="of inpaint: a picture, white where it is measured (default: half)")
    parser.add_argument("--width", type=positive_float, help="of blur and motion, in pixels (default 1)")
    parser.add_argument("--model", default="bundled", help="diffusers folder, hub name or 'bundled' (the default)")
    parser.add_argument("--method", choices=tuple(NAMED), default="ddnm", help="default ddnm")
    parser.add_argument("--steps", type=positive_int, default=50, help="timesteps of the chain (default 50)")
    parser.add_argument(
        "--eta", type=fraction, default=0.85, help="0: deterministic, 1: as random as DDPM (default 0.85)"
    )
    parser.add_argument(
        "--temperature", type=factor, default=1.0, metavar="FACTOR",
        help="of all noise that is drawn: 1 for a sample of what may be behind the measurement, 0 for none, near the "
        "mean of all that may be, with the least error (default 1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of all noise, random masks and sensing (default 0)")
    parser.add_argument("--tol", type=positive_float, help="relative error against the serial chain (default 1e-2)")
    parser.add_argument("--serial", action="store_true", help="one step after the other")
    parser.add_argument("--max-batch", type=positive_int, help="most rows in one model call")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    _devices.add_option(parser)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("restored"), metavar="FOLDER", help="default restored")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Restore, and write the pictures. Returns the exit status."""
    if args.simulate and args.truth:
        raise CommandError("--truth: with --simulate the pictures are the truth already; leave one of the two out")
    if args.truth and len(args.truth) != len(args.images):
        raise CommandError(f"--truth: expected {len(args.images)} pictures, one for each measurement")
    if args.simulate and args.sigma is None:
        raise CommandError("--sigma auto: with --simulate the noise is added here; give its standard deviation")
    for option, operators in (("mask", ("inpaint",)), ("width", ("blur", "motion"))):
        if getattr(args, option) is not None and args.operator not in operators:
            raise CommandError(f"--{option}: it is of {' and '.join(operators)}; leave it out for {args.operator}")
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out {args.out}: that is a file; name a folder")
    check_folder(args.out)
    for name in PICTURES.values():
        check_picture("--out", args.out / name)
    require_pillow()

    import torch

    from ..restorer import DEQRestorer
    from ._run import load_problem

    problem = load_problem(
        args.model, steps=args.steps, eta=args.eta, seed=args.seed, device=args.device, dtype=args.dtype,
        max_batch=args.max_batch, group=_devices.group_of(args),
    )  # fmt: skip
    shape = problem.info.sample_shape
    operator = make_operator(args.operator, shape, width=args.width or 1.0, mask=args.mask, seed=args.seed)
    y, truth = measurements(args, problem, operator)
    problem.check_room(len(y))
    options = {name: value for name, value in problem.kwargs.items() if value is not None}
    restorer = DEQRestorer(
        problem.model, problem.schedule, operator, sigma=args.sigma, method=args.method, temperature=args.temperature,
        tol=args.tol, **options,
    )  # fmt: skip
    with torch.no_grad():
        result = restore(problem, restorer, y, args)
    if _devices.writes():
        write(result, operator, y, truth, args.out)
    print(summary(args, result, truth))
    return 0


def measurements(args: argparse.Namespace, problem: Any, operator: Any) -> tuple[Any, Any]:
    """(y, the truth or None), on the problem's device. Raises CommandError for pictures of another size."""
    import torch

    from ._invert import read

    shape = problem.info.sample_shape
    paths = args.images if args.simulate else args.truth
    truth = None if not paths else read(paths, shape, None).to(problem.device, problem.dtype)
    probe = operator.A(torch.zeros(1, *shape, device=problem.device, dtype=problem.dtype))
    if args.simulate:
        draw = torch.Generator().manual_seed(args.seed)
        y = operator.A(truth)
        return y + args.sigma * torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y), truth
    if probe.dim() != 4 or probe.shape[1] not in (1, 3):
        raise CommandError(
            f"--operator {args.operator}: its measurements are no pictures; give the truth with --simulate, or use "
            "DEQRestorer in Python"
        )
    return read(args.images, tuple(probe.shape[1:]), None).to(problem.device, problem.dtype), truth


def restore(problem: Any, restorer: Any, y: Any, args: argparse.Namespace) -> Any:
    """One restoration, with a bar over final timesteps."""
    from ._run import progress

    with progress(problem, len(y), args.method, "row", lambda info: f"round {info.round}") as advance:
        solve = restorer.serial if args.serial else restorer.restore
        return solve(y, generator=problem.streams(len(y)), callback=advance)


def write(result: Any, operator: Any, y: Any, truth: Any, folder: Path) -> None:
    """The pictures: measurements as they are, or their pseudo-inverse where they are no pictures."""
    from . import _images

    shown = y if y.dim() == 4 and y.shape[1] in (1, 3) else operator.A_dagger(y)
    named = {"measurement": shown, "restored": result.sample, "truth": truth}
    for name, samples in named.items():
        if samples is not None:
            _images.save(_images.grid(_images.pixels(samples)), folder / PICTURES[name])
    print(f"wrote {', '.join(PICTURES[name] for name, samples in named.items() if samples is not None)} in {folder}")


def summary(args: argparse.Namespace, result: Any, truth: Any) -> str:
    """One sentence about a restoration."""
    stats, count = result.stats, len(result.sample)
    text = (
        f"{args.method}, {args.operator}: {count} image{'s' * (count != 1)}, sigma {float(result.sigma.mean()):.3g}, "
        f"{args.steps} timesteps: {stats.rounds} rounds, {stats.model_evals} model evaluations, "
        f"{stats.wall_seconds:.2f} s; ||A x - y|| / ||y|| {float(result.consistency.max()):.1e} at most"
    )
    if truth is not None:
        from ._quality import psnr, ssim

        near, alike = psnr(result.sample, truth), ssim(result.sample, truth)
        text += f"; PSNR {float(near.mean()):.2f} dB, SSIM {float(alike.mean()):.3f}"
    left = int((~result.converged).sum())
    return text + (f"; NOT within tolerance for {left} of {count}" if left else "")
