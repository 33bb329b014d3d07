"""`deqdiff-fast pairs`: many noises with the samples that a model makes of them, for training one-step students."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ._distill import conditions_of
from ._numbers import fraction, positive_float, positive_int, seed
from ._output import check_folder
from ._sample import SPACINGS

DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    """Add `pairs` and its options."""
    parser = commands.add_parser(
        "pairs",
        help="make pairs of noises and samples for one-step students",
        description="Draw many samples with DDIM and write them with their noises, as a folder of safetensors files. "
        "What was interrupted, at any moment, goes on when the same is asked for once more, as does a larger --count. "
        "Under torchrun every process makes its share.",
    )
    parser.add_argument("model", metavar="MODEL", help="diffusers folder, hub name or 'bundled'")
    parser.add_argument("--count", type=positive_int, required=True, help="how many pairs there are to be")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pairs")
    parser.add_argument("--steps", type=positive_int, default=50, help="timesteps of the chain (default 50)")
    parser.add_argument("--eta", type=fraction, default=0.0, help="0: DDIM (default), 1: as random as DDPM")
    parser.add_argument("--spacing", choices=SPACINGS, help="of the timesteps (default: the model's own)")
    clip = "clamp the predicted image (default: the model's own setting)"
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help=clip)
    how = "plain chain, or rounds, which are as exact as --tol (default auto: what makes more pairs a second)"
    parser.add_argument("--method", choices=("auto", "serial", "rounds"), default="auto", help=how)
    parser.add_argument("--batch", type=positive_int, help="pairs made at a time (default: the fastest number)")
    parser.add_argument("--tol", type=positive_float, help="relative error allowed in rounds (default 1e-2)")
    parser.add_argument("--seed", type=seed, default=0, help="pair k is image k of `sample --seed` (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="that the model computes in")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the pairs that are missing. Returns the exit status."""
    check_folder(args.out)

    from ..distillation import Pairs
    from ..integrations.diffusers import ddim_schedule, load_model
    from ._run import DTYPES, pick_device

    dtype = DTYPES[args.dtype]
    device = pick_device(args.device, dtype)
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:  # of torchrun
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}", dtype)
    loaded = load_model(args.model, device=device, dtype=dtype)
    schedule = ddim_schedule(loaded.scheduler, args.steps, eta=args.eta, spacing=args.spacing, clip=args.clip)
    pairs = Pairs.make(
        loaded.model, schedule, loaded.info.sample_shape, args.count, args.out,
        model_kwargs=conditions_of(args.model, loaded, device), seed=args.seed, method=args.method, batch=args.batch,
        tol=args.tol, device=device, progress=True, draft=loaded.draft, spectrum=loaded.spectrum,
    )  # fmt: skip
    made = pairs.manifest.identity
    how = "the plain chain" if made["method"] == "serial" else "rounds"
    print(f"{len(pairs)} pairs of {args.steps} timesteps, by {how}, {made['batch']} at a time, in {args.out}")
    return 0
