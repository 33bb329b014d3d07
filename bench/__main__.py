"""`python -m bench NAME [options]`: the registry and the options that every benchmark has."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# A benchmark is a module of this folder with `add_arguments(parser)` and `run(args) -> int`, the exit status.
BENCHMARKS = {
    "calibration": "asked tolerance against true error, on models and on random small problems",
    "rounds": "per solver: rounds, model evaluations and error at tolerance",
    "accuracy": "the promised error of every solver's converged samples, as PASS or FAIL",
    "gradients": "every gradient mode against float64 back-propagation through the serial chain",
    "equilibrium": "implicit layers against torchdeq at equal tolerance: forward and backward, in turns",
    "inversion": "the paper's comparison of inversions: loss, evaluations, back-propagations, seconds; and round trips",
    "restoration": "images from measurements, ours and deepinv's DDRM, DiffPIR and DPS: PSNR, SSIM, evaluations",
    "kernels": "time of each op: reference, the paper's formulation, torch.compile, compiled; against a memory copy",
    "planner": "sample() against the serial chain in paired timings, with what was planned",
    "overhead": "share of a solve's time that is spent outside the model",
    "guesses": "rounds with a guess of the sample, as a one-step student makes it, and without",
    "pairs": "pairs a second for training students, against plain loops over batches",
    "students": "a one-step student against the teacher's short chains and a plain transformer of its size and time",
    "zoo": "small models of many kinds, trained here: rounds, evaluations, error, and seconds against a plain loop",
    "pipelines": "diffusers pipelines: rounds and evaluations against steps, and what surrounds the model",
    "ranks": "one sample on two processes against one and a plain loop; a prediction for more devices",
    "compiled": "what the compiled kernels predict for a GPU: registers, occupancy, bytes, launches; no times measured",
    "gpu": "all that is asked of a CUDA device: kernel tests, ops against their byte floor, whole samples",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name, summary in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", type=Path, metavar="FILE", help="write environment, settings and figures there")
        command.add_argument("--threads", type=int, help="torch threads, for all sides alike (default: torch's own)")
        command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
        importlib.import_module(f"bench.{name}").add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark. Returns its exit status: 0, 1 where a check failed, 2 for bad arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.threads is not None:
        if args.threads < 1:
            parser.error(f"--threads: expected a whole number >= 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: the folder does not exist; create it first")
    try:
        return int(importlib.import_module(f"bench.{args.benchmark}").run(args))
    except (ValueError, OSError, ImportError) as error:
        print(f"bench {args.benchmark}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
