"""The fast part of the tests, against the wheels of dist/release/, on old and new versions of what they need.

Four cells, so chosen that each Python, each torch, both ends of diffusers and both of transformers and numpy are met.
One at a time, each in an environment that is made for it and removed; what cannot be had here is skipped, and the table
at the end says why. `make matrix` builds the wheels first (`release/wheels.py --only wheels`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from environments import ROOT, Environment, Skip, say

WORK = ROOT / "build" / "matrix"
# What meets the interfaces of torch, diffusers, numpy and Python itself; what is mathematics or takes long is left out.
FAST = [
    "tests/test_info.py",
    "tests/test_import_directions.py",
    "tests/test_copies.py",
    "tests/test_default_device.py",
    "tests/test_sampler.py",
    "tests/kernels/test_ops.py",
    "tests/kernels/test_register.py",
    "tests/kernels/test_extension.py",
    "tests/kernels/test_extension_arguments.py",
    "tests/kernels/test_workspace.py",
    "tests/engine/test_compile.py",
    "tests/engine/test_callbacks.py",
    "tests/schedule",
    "tests/memory",
    "tests/model",
    "tests/gradient/test_gradient.py",
    "tests/integrations",
    "tests/cli/test_reading.py",
]
TEST_PACKAGES = ("pytest", "pillow", "scipy", "torchsde", "scikit-learn", "matplotlib", "hypothesis")
SHOWN = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Cell:
    """What one environment has, as pip is asked for it."""

    name: str
    python: str
    torch: str
    diffusers: str
    transformers: str
    numpy: str


CELLS = (
    Cell("oldest", "3.10", "torch==2.6.0", "diffusers==0.32.0", "transformers<5", "numpy==1.26.*"),
    Cell("middle", "3.12", "torch==2.9.*", "diffusers==0.35.*", "transformers<5", "numpy>=2"),
    Cell("usual", "3.11", "torch==2.13.*", "diffusers", "transformers>=5", "numpy==1.26.*"),
    Cell("newest", "3.13", "torch", "diffusers", "transformers>=5", "numpy>=2"),
)


def wheel_for(python: str) -> Path:
    """The wheel in dist/release/ for that Python on this processor."""
    found = sorted((ROOT / "dist" / "release").glob(f"*-cp{python.replace('.', '')}-*_{os.uname().machine}.whl"))
    if len(found) != 1:
        raise Skip(f"{len(found)} wheels for it in dist/release/")
    return found[0]


def prepare(cell: Cell, torch_args: list[str]) -> Environment:
    """The cell's environment, with the wheel in it."""
    wheel = wheel_for(cell.python)
    environment = Environment(WORK / cell.name, cell.python)
    environment.install_torch(cell.torch, torch_args)
    installed = environment.version("torch").partition("+")[0]
    environment.install(
        str(wheel), f"torch=={installed}", cell.diffusers, cell.transformers, cell.numpy, *TEST_PACKAGES
    )
    return environment


def test(environment: Environment, tests: list[str], arguments: list[str], log: Path) -> tuple[str, bool]:
    """pytest's closing line, and whether all passed; its output goes to `log`."""
    options = [
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        ROOT,
    ]
    command = [environment.python, "-m", "pytest", *options, *arguments, *(ROOT / name for name in tests)]
    settings = {"OMP_NUM_THREADS": "1", "DEQDIFF_TEST_THREADS": "1", "DEQDIFF_TEST_INSTALLED": "1"}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=environment.folder, env={**os.environ, **settings}, stdout=file, stderr=subprocess.STDOUT
        )
    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
    return re.sub(r"^=+ | =+$", "", lines[-1]), done.returncode == 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", help=f"of {', '.join(cell.name for cell in CELLS)} (default: all)")
    parser.add_argument("--torch-args", default="", help="pip's arguments for torch, such as an index of CPU builds")
    parser.add_argument("--tests", default="", help="tests in place of the fast ones")
    parser.add_argument("--pytest-args", default="", help="more arguments for pytest")
    parser.add_argument("--keep", action="store_true", help="leave the environments in build/matrix")
    return parser


def main() -> int:
    """Run the cells. Returns 0, or 1 where a test failed or nothing could be tried."""
    parser = build_parser()
    args = parser.parse_args()
    unknown = sorted(set(args.cells) - {cell.name for cell in CELLS})
    if unknown:
        parser.error(f"no cell {unknown[0]!r}")
    WORK.mkdir(parents=True, exist_ok=True)
    rows, tried, failed = [("cell", "Python", *SHOWN, "seconds", "outcome")], 0, 0
    for cell in CELLS:
        if args.cells and cell.name not in args.cells:
            continue
        say(f"== {cell.name}: Python {cell.python}, {cell.torch}, {cell.diffusers}, {cell.transformers}, {cell.numpy}")
        asked = [cell.torch, cell.diffusers, cell.transformers, cell.numpy]
        try:
            environment = prepare(cell, args.torch_args.split())
            start, log = time.monotonic(), WORK / f"{cell.name}.log"
            said, passed = test(environment, args.tests.split() or FAST, args.pytest_args.split(), log)
            versions = [environment.version(package) for package in SHOWN]
            rows.append((cell.name, cell.python, *versions, f"{time.monotonic() - start:.0f}", said))
            tried, failed = tried + 1, failed + (not passed)
        except Skip as why:
            rows.append((cell.name, cell.python, *asked, "", f"skipped: {why}"))
        if not args.keep:
            shutil.rmtree(WORK / cell.name, ignore_errors=True)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{value:{width}}" for value, width in zip(row, widths)).rstrip())
    print(f"logs: {WORK.relative_to(ROOT)}/")
    return int(failed > 0 or tried == 0)


if __name__ == "__main__":
    sys.exit(main())
