"""The command line: `deqdiff-fast sample | invert | restore | distill | pairs | demo | info | bench`."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from ..errors import DeqDiffError
from . import _bench, _demo, _devices, _distill, _invert, _pairs, _restore, _sample
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
    _restore.add_parser(commands)
    _distill.add_parser(commands)
    _pairs.add_parser(commands)
    _demo.add_parser(commands)
    info = commands.add_parser("info", help="versions, devices, backends and why one is missing")
    info.set_defaults(run=_info)
    _bench.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0; 2 for what the user can mend; 1 where work failed, or a part of it:
    what was finished is written; 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((k for k, word in enumerate(words) if not word.startswith("-")), len(words))
    # What follows `bench` is for the benchmark's own parser, options first included, which argparse cannot express.
    own, bench_args = (words[: command + 1], words[command + 1 :]) if words[command:][:1] == ["bench"] else (words, [])
    _open_streams()
    args = build_parser().parse_args(own)
    args.bench_args = bench_args
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("deqdiff_fast").setLevel(logging.INFO if args.verbose else logging.WARNING)
    try:
        if _devices.to_be_launched(args):
            return _devices.launch(words, args.devices)
        return _flushed(int(args.run(args)))
    except KeyboardInterrupt:
        print("deqdiff-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        expected = isinstance(error, _MISTAKES)
        text = " ".join(str(error).split()) if expected else next(iter(str(error).strip().splitlines()), "")
        if not (expected and text):
            text = f"{type(error).__name__}: {text} (--debug shows where)"
        print(f"deqdiff-fast: error: {text}", file=sys.stderr)
        _devices.let_the_first_speak()
        return _flushed(getattr(error, "status", 2 if expected else 1))


def _open_streams() -> None:
    """Standard streams that take every file name, and are there: a shell may have closed them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _flushed(status: int) -> int:
    """The status, once what was printed has left; Python itself says it too late, and with a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"deqdiff-fast: error: standard output: {error.strerror or error}", file=sys.stderr)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status or 1
    return status


def _info(args: argparse.Namespace) -> int:
    from ..info import main as info

    return info([])


def _version() -> str:
    try:
        return version("deqdiff_fast")
    except PackageNotFoundError:
        return "unknown: not installed"
