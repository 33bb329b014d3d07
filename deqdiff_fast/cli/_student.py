"""`deqdiff-fast sample --student FILE`: one-step samples of a trained `GET`."""

from __future__ import annotations

import argparse
import time

from ._output import CommandError

# what belongs to a chain, which a student does not have
CHAIN = ("model", "preset", "steps", "eta", "spacing", "clip", "solver", "tol", "max_rounds", "max_batch", "plot")


def refuse_chain_options(args: argparse.Namespace) -> None:
    """Raises CommandError for an option that says nothing to a student."""
    given = [name for name in CHAIN if getattr(args, name) is not None]
    given += ["window"] * (args.window != "auto") + ["compare-serial"] * args.compare_serial
    given += ["dtype"] * (args.dtype != "float32")
    if given:
        raise CommandError(f"--{given[0].replace('_', '-')}: a student has no chain; leave it out with --student")


def run(args: argparse.Namespace) -> int:
    """Sample and write the picture. Returns the exit status."""
    import torch

    from ..distillation import GET
    from . import _images
    from ._run import pick_device

    device = pick_device(args.device)
    model = GET.load(args.student, device=device)
    # the noise of image k is that of the other commands
    streams = [torch.Generator().manual_seed(args.seed * 1_000_003 + k) for k in range(args.batch)]
    noise = torch.stack([torch.randn(model.shape, generator=stream) for stream in streams]) * model.noise_scale
    condition = None
    if model.features:
        raise CommandError(f"--student {args.student}: it takes vectors of {model.features} numbers; use it in Python")
    if model.classes:
        if args.label is not None and args.label >= model.classes:
            raise CommandError(f"--label {args.label}: the student has labels 0 to {model.classes - 1}")
        labels = (
            torch.arange(args.batch) % model.classes if args.label is None else torch.full((args.batch,), args.label)
        )
        condition = labels.to(device)
    elif args.label is not None:
        raise CommandError(f"--label {args.label}: the student has none")
    start = time.perf_counter()
    with torch.no_grad():
        sample, info = model(noise.to(device), condition, max_steps=args.equilibrium_steps, return_info=True)
    seconds = time.perf_counter() - start
    _images.save(_images.grid(_images.pixels(sample)), args.out)
    text = f"{args.batch} image{'s' * (args.batch != 1)} in one step, {info.evaluations} of the equilibrium"
    text += f", {seconds:.2f} s"
    bad = int((~info.converged).sum())
    print(
        text + (f"; the equilibrium of {bad} is left at a residual of {float(info.residual.max()):.1e}" if bad else "")
    )
    print(f"wrote {args.out}")
    return 0
