"""`deqdiff-fast invert`: the noise behind images, with what the chain makes of it beside them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..inversion import NAMED
from ._numbers import fraction, positive_float, positive_int, window
from ._output import CommandError, check_folder, check_picture, replacing

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
    parser.add_argument("--seed", type=int, default=0, help="of the chain's own noise where eta > 0 (default 0)")
    parser.add_argument("--tol", type=positive_float, help="relative error allowed in the image (default 1e-3)")
    parser.add_argument("--max-rounds", type=positive_int, help="rounds before steps are finished one by one")
    parser.add_argument("--window", type=window, default="auto", help="timesteps solved at a time, or 'auto' (default)")
    parser.add_argument("--max-batch", type=positive_int, help="most rows in one model call")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("inversion"), metavar="FOLDER", help="default inversion")
    parser.add_argument("--resize", action="store_true", help="scale images to the model's size")
    parser.add_argument(
        "--compare", action="store_true", help=f"run {', '.join(COMPARED)} and plot error against seconds"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Invert, and write noise, picture and plot. Returns the exit status."""
    missing = [path for path in args.images if not path.is_file()]
    if missing:
        raise CommandError(f"{missing[0]}: there is no such file")
    if args.out.exists() and not args.out.is_dir():
        raise CommandError(f"--out {args.out}: that is a file; name a folder")
    check_folder(args.out)
    paths = {what: args.out / name for what, name in NAMES.items()}
    check_picture("--out", paths["picture"])
    if args.compare:
        from ._plot import require_matplotlib

        check_picture("--out", paths["plot"])
        require_matplotlib()
    from safetensors.torch import save_file

    from . import _images
    from ._run import load_problem

    problem = load_problem(
        args.model, steps=args.steps, eta=args.eta, seed=args.seed, device=args.device, dtype=args.dtype,
        max_batch=args.max_batch,
    )  # fmt: skip
    image = read(args.images, problem.info.sample_shape, args.resize).to(problem.device, problem.dtype)
    names = [args.method, *(name for name in COMPARED if args.compare and name != args.method)]
    results = {name: invert(problem, image, name, args) for name in names}
    for name, result in results.items():
        print(summary(name, result, args))
    chosen = results[args.method]
    with replacing(paths["noise"]) as partial:
        save_file({"noise": chosen.noise.cpu().contiguous(), "image": image.cpu().contiguous()}, str(partial))
    _images.save(_images.panels(image, chosen.reconstruction, ("image", "reconstruction")), paths["picture"])
    print(f"wrote {paths['noise']} and {paths['picture']}")
    if args.compare:
        from ._plot import error_plot

        points = {name: (r.stats.wall_seconds, float(r.error.max())) for name, r in results.items()}
        title = f"{args.model}, {args.steps} timesteps, eta {args.eta:g}, worst of {len(image)} images"
        error_plot(points, paths["plot"], title=title, target=args.tol or 1e-3)
        print(f"wrote {paths['plot']}")
    return 0


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


def read(paths: list[Path], shape: tuple[int, ...], resize: bool) -> Any:
    """(B, C, H, W) float64 in [-1, 1]. Raises CommandError for a file that is no picture or has another size."""
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    if channels not in (1, 3):
        raise CommandError(
            f"the model works on {channels} channels: its samples are no pictures, invert them in Python"
        )
    pictures = []
    for path in paths:
        try:
            picture = Image.open(path).convert("L" if channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise CommandError(f"{path}: not a picture that can be read ({error})") from error
        if picture.size != (width, height):
            if not resize:
                found = f"{picture.size[0]} x {picture.size[1]}"
                raise CommandError(f"{path}: {found} pixels, and the model makes {width} x {height}; pass --resize")
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        pictures.append(np.asarray(picture, dtype=np.float64).reshape(height, width, channels))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1


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
