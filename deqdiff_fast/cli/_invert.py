"""`deqdiff-fast invert`: the noise behind images, with what the chain makes of it beside them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..inversion import NAMED
from . import _devices
from ._numbers import fraction, positive_float, positive_int, seed, window
from ._output import CommandError, UnfinishedError, check_file, check_folder, check_picture, require_pillow

NAMES = {"noise": "noise.safetensors", "picture": "inversion.png", "plot": "inversion_error.png"}
COMPARED = ("ddim", "fixed_point", "equilibrium")


def add_parser(commands: Any) -> None:
    """Add `invert` and its options."""
    parser = commands.add_parser(
        "invert",
        help="find the noise behind images",
        description="Find the noise that DDIM maps to each image; write it, and what the chain makes of it.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files of the model's size")
    parser.add_argument("--model", default="bundled", help="diffusers folder, hub name or 'bundled' (the default)")
    parser.add_argument("--method", choices=tuple(NAMED), default="auto", help="default auto: the faster exact one")
    parser.add_argument("--steps", type=positive_int, default=50, help="timesteps of the chain (default 50)")
    parser.add_argument("--eta", type=fraction, default=0.0, help="0: DDIM (default), 1: as random as DDPM")
    parser.add_argument("--seed", type=seed, default=0, help="of the chain's own noise where eta > 0 (default 0)")
    parser.add_argument("--tol", type=positive_float, help="relative error allowed in the image (default 1e-3)")
    parser.add_argument("--max-rounds", type=positive_int, help="rounds before steps are finished one by one")
    parser.add_argument("--window", type=window, default="auto", help="timesteps solved at a time, or 'auto' (default)")
    parser.add_argument("--max-batch", type=positive_int, help="most rows in one model call")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    _devices.add_option(parser)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("inversion"), metavar="FOLDER", help="default inversion")
    parser.add_argument("--resize", action="store_true", help="scale images to the model's size")
    parser.add_argument(
        "--compare", action="store_true", help=f"run {', '.join(COMPARED)} and plot error against seconds"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Invert, and write noise, picture and plot. Returns the exit status; raises UnfinishedError where pictures were
    left out."""
    if not any(path.is_file() for path in args.images):
        first = args.images[0]
        raise CommandError(f"{first}: {'that is a folder; name a file' if first.is_dir() else 'there is no such file'}")
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out {args.out}: that is a file; name a folder")
    check_folder(args.out)
    paths = {what: args.out / name for what, name in NAMES.items()}
    check_picture("--out", paths["picture"])
    check_file("--out", paths["noise"])
    require_pillow()
    if args.compare:
        from ._plot import require_matplotlib

        check_picture("--out", paths["plot"])
        require_matplotlib()

    from ._run import load_problem

    problem = load_problem(
        args.model, steps=args.steps, eta=args.eta, seed=args.seed, device=args.device, dtype=args.dtype,
        max_batch=args.max_batch, group=_devices.group_of(args),
    )  # fmt: skip
    image, names, refused = read_those_that_can_be(args.images, problem.info.sample_shape, args.resize)
    problem.check_room(len(image))
    image = image.to(problem.device, problem.dtype)
    chosen = invert(problem, image, args.method, args)
    print(summary(args.method, chosen, args))
    if _devices.writes():
        write(chosen, image, names, paths)
    if args.compare:
        compare(problem, image, chosen, args, paths["plot"])
    if refused:
        raise UnfinishedError(f"inverted {len(names)} of {len(args.images)} pictures; left out {'; '.join(refused)}")
    return 0


def write(result: Any, image: Any, names: list[str], paths: dict[str, Path]) -> None:
    """Noise and picture. Beside the noise lie the names of the images, row by row, as JSON."""
    from ..schedule.tensor_file import write_tensors
    from . import _images

    write_tensors({"noise": result.noise, "image": image}, paths["noise"], {"images": json.dumps(names)})
    _images.save(_images.panels(image, result.reconstruction, ("image", "reconstruction")), paths["picture"])
    print(f"wrote {paths['noise']} and {paths['picture']}")


def compare(problem: Any, image: Any, chosen: Any, args: argparse.Namespace, path: Path) -> None:
    """Run the other methods, and plot error against seconds of all."""
    from ._plot import error_plot

    results = {args.method: chosen}
    for name in COMPARED:
        if name != args.method:
            results[name] = invert(problem, image, name, args)
            print(summary(name, results[name], args))
    if not _devices.writes():
        return
    points = {name: (r.stats.wall_seconds, float(r.error.max())) for name, r in results.items()}
    title = f"{args.model}, {args.steps} timesteps, eta {args.eta:g}, worst of {len(image)} images"
    error_plot(points, path, title=title, target=args.tol or 1e-3)
    print(f"wrote {path}")


def invert(problem: Any, image: Any, method: str, args: argparse.Namespace) -> Any:
    """One inversion, with a bar over final states."""
    from ..inverter import DEQInverter
    from ._run import progress

    with progress(problem, len(image), method, "state", lambda info: f"round {info.round}") as advance:
        inverter = DEQInverter(
            problem.model, problem.schedule, method, tol=args.tol, max_rounds=args.max_rounds, window=args.window,
            **problem.kwargs,
        )  # fmt: skip
        return inverter.invert(image, generator=problem.streams(len(image)), callback=advance)


def read(paths: list[Path], shape: tuple[int, ...], resize: bool | None) -> Any:
    """(B, C, H, W) float64 in [-1, 1]. Raises CommandError as `read_picture`."""
    import torch

    from ._reading import read_picture

    if shape[0] not in (1, 3):
        raise CommandError(
            f"the model works on {shape[0]} channels: its samples are no pictures, invert them in Python"
        )
    return torch.stack([read_picture(path, shape, resize) for path in paths])


def read_those_that_can_be(paths: list[Path], shape: tuple[int, ...], resize: bool) -> tuple[Any, list[str], list[str]]:
    """(B, C, H, W) of the pictures that can be read, their names, and why the others cannot."""
    import torch

    def attempt(path: Path) -> Any:
        try:
            return read([path], shape, resize)
        except CommandError as error:
            return error

    found = [(str(path), attempt(path)) for path in paths]
    refused = [str(result) for _, result in found if isinstance(result, CommandError)]
    if len(refused) == len(found):
        raise CommandError("; ".join(refused))
    read_well = [(name, result) for name, result in found if not isinstance(result, CommandError)]
    return torch.cat([picture for _, picture in read_well]), [name for name, _ in read_well], refused


def summary(name: str, result: Any, args: argparse.Namespace) -> str:
    """One sentence about an inversion."""
    stats, error = result.stats, result.error
    count = len(error)
    text = (
        f"{name}: {count} image{'s' * (count != 1)}, {args.steps} timesteps: {stats.rounds} rounds, "
        f"{stats.model_evals} model evaluations, {stats.wall_seconds:.2f} s; relative error "
        f"{float(error.median()):.1e} (largest {float(error.max()):.1e})"
    )
    left = int((~result.converged).sum())
    return text + (f"; NOT within tolerance for {left} of {len(error)}" if left else "")
