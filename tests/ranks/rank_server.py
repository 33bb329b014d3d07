"""Forks ranks, with torch and the library imported once for all of them: the imports take longer than most checks."""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import torch._dynamo  # which a TorchDispatchMode imports
import torch.distributed  # noqa: F401

import deqdiff_fast  # noqa: F401


def be_rank(rank: int, size: int, file: str, folder: Path, checks: list[str]) -> None:
    """In the forked process: runs the file as a process started for it would, and ends."""
    for stream, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    sys.argv = [file, str(folder / "store"), *checks]
    warnings.filterwarnings("error", "`torch.distributed", FutureWarning)
    status = 0
    try:
        runpy.run_path(file, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    """A line of JSON for every file to run; answered, when all its ranks have ended, by their exit statuses."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # as for a script
    for line in sys.stdin:
        file, size, folder, checks = json.loads(line)
        pids = []
        for rank in range(size):
            pids.append(os.fork())
            if pids[-1] == 0:
                be_rank(rank, size, file, Path(folder), checks)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    serve()
