"""`--devices N`: the same command in N processes, started by torch's own launcher."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from typing import Any

import torch

from ._numbers import positive_int
from ._output import CommandError

PATIENCE = 10.0  # seconds in which the first process has said what is wrong, if it is wrong there too


def add_option(parser: Any) -> None:
    """Add `--devices`."""
    parser.add_argument(
        "--devices", type=positive_int, default=1, metavar="N",
        help="share the model's rows among N devices, or processes of one thread on a CPU (starts torchrun)",
    )  # fmt: skip


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def to_be_launched(args: argparse.Namespace) -> bool:
    """Whether the command is to be run by other processes."""
    return getattr(args, "devices", 1) > 1 and not launched()


def group_of(args: argparse.Namespace) -> str | None:
    """What samplers and inverters are given as their group."""
    return "world" if args.devices > 1 or (launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1) else None


def writes() -> bool:
    """Whether this process is the one that writes files and says what was done."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def let_the_first_speak() -> None:
    """Called by a process that is about to fail: the launcher ends all others with it, and only the first one, which
    mostly fails for the same reason, is heard."""
    if launched() and not writes():
        time.sleep(PATIENCE)


def own_device(name: str) -> str:
    """The device of this process, where the user has left that open. Raises CommandError where there are too few."""
    if not launched() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= count:
        raise CommandError(f"--devices: there are {count} CUDA devices here; ask for as many, or use --device cpu")
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def launch(words: list[str], count: int) -> int:
    """Run `deqdiff-fast` with these words in `count` processes on this machine, of which the first one speaks. Returns
    the exit status of the first that failed, else 0."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # rank 0 says what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which would say so
    own = ["--standalone", f"--nproc-per-node={count}", "--local-ranks-filter=0", "-m", f"{__package__}"]
    sys.stdout.flush()
    try:
        run.main([*own, *words])
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        status = failure.exitcode
        if number != 0:  # what it said is not shown
            print(f"deqdiff-fast: error: process {number} of {count} failed, status {status}", file=sys.stderr)
        return status if status > 0 else 1
    except SignalException as error:
        raise KeyboardInterrupt from error
    return 0
