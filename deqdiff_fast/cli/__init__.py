"""The command line: `deqdiff-fast sample | invert | demo | info | bench`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from ..errors import DeqDiffError
from . import _bench, _demo, _invert, _sample
from ._output import CommandError

_MISTAKES = (CommandError, DeqDiffError, ValueError, OSError, ImportError)


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to the function that does the work."""
    parser = _Parser(prog="deqdiff-fast", description="Sample diffusion models in parallel rounds.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is chosen on the way")
    parser.add_argument("--debug", action="store_true", help="errors with their traceback")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _sample.add_parser(commands)
    _invert.add_parser(commands)
    _demo.add_parser(commands)
    info = commands.add_parser("info", help="versions, devices, backends and why one is missing")
    info.set_defaults(run=_info)
    _bench.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for anything that the user can mend, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((k for k, word in enumerate(words) if not word.startswith("-")), len(words))
    # What follows `bench` is for the benchmark's own parser, options first included, which argparse cannot express.
    own, bench_args = (words[: command + 1], words[command + 1 :]) if words[command:][:1] == ["bench"] else (words, [])
    args = build_parser().parse_args(own)
    args.bench_args = bench_args
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("deqdiff_fast").setLevel(logging.INFO if args.verbose else logging.WARNING)
    try:
        return int(args.run(args))
    except _MISTAKES as error:
        if args.debug:
            raise
        print(f"deqdiff-fast: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deqdiff-fast: interrupted", file=sys.stderr)
        return 130


def _info(args: argparse.Namespace) -> int:
    from ..info import main as info

    return info([])


def _version() -> str:
    try:
        return version("deqdiff_fast")
    except PackageNotFoundError:
        return "unknown: not installed"
