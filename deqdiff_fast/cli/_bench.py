"""`deqdiff-fast bench`: hands over to the benchmarks of a source checkout, which the wheel does not hold."""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

from ._output import CommandError


def add_parser(commands: Any) -> None:
    """Add `bench`, whose options are the benchmarks' own."""
    parser = commands.add_parser(
        "bench",
        help="run the benchmarks of a source checkout",
        description="Run `bench` of the checkout in the current folder against the installed package.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Only `bench` itself is made importable: with the whole checkout on the path, its sources would be measured."""
    folder = Path.cwd() / "bench"
    if not (folder / "__main__.py").is_file():
        raise CommandError("bench: the benchmarks are in the source repository; run this in the root of a checkout")
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location("bench", init, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not init.is_file():
        raise CommandError(f"bench: {init} is missing; is this a complete checkout?")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    sys.argv = ["bench", *args.bench_args]
    runpy.run_module("bench", run_name="__main__")
    return 0
