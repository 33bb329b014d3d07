"""Starts processes that run the checks of a file together, and collects what each of them says."""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

from torch import distributed as dist

HERE = Path(__file__).resolve().parent
LIMIT = 240.0  # seconds for all checks of a file


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error:`torch.distributed:FutureWarning"}


def start(file: str, size: int, folder: Path, checks: list[str]) -> list[tuple[int, str, str]]:
    """(exit status, output, errors) of each of so many processes, started for this; ended where they take too long."""
    command, pipe = [sys.executable, str(HERE / file), str(folder / "store"), *checks], subprocess.PIPE
    env = os.environ | ENVIRONMENT | {"WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True)
        for rank in range(size)
    ]
    try:
        return [(process.wait(), *said) for process in processes if (said := process.communicate(timeout=LIMIT))]
    finally:
        for process in processes:
            process.kill()


@cache
def server() -> subprocess.Popen[str]:
    """The process of rank_server.py, which ends with this one."""
    pipe, command = subprocess.PIPE, [sys.executable, str(HERE / "rank_server.py")]
    process = subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )
    atexit.register(stop, process)
    return process


def stop(process: subprocess.Popen[str]) -> None:
    """The server and all that it has forked."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def fork(file: str, size: int, folder: Path, checks: list[str]) -> list[tuple[int, str, str]]:
    """What `start` returns, of processes that the server forks."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(HERE / file), size, str(folder), checks]) + "\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], LIMIT)[0]:
        server.cache_clear()
        stop(process)
        raise TimeoutError(f"{file}: {size} processes took longer than {LIMIT} s")
    said = zip(json.loads(process.stdout.readline()), range(size))
    return [(status, *((folder / f"{name}-{rank}").read_text() for name in ("out", "errors"))) for status, rank in said]


def results(file: str, size: int, checks: list[str], forked: bool) -> dict[str, list[str]]:
    """What every rank says of every check: "" where it passed; of "" what it ended with, where not well."""
    with tempfile.TemporaryDirectory() as folder:
        told = (fork if forked else start)(file, size, Path(folder), checks)
    found: dict[str, list[str]] = {}
    for status, out, errors in told:
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"check"')]
        for line in lines:
            found.setdefault(line["check"], []).append(line["fault"])
        if status or not lines:
            found.setdefault("", []).append(f"exit status {status}: {errors[-3000:]}")
    return found


class CheckedFile:
    """The checks of a file of this folder but those left out, which are run once for each number of processes.

    Processes are forked where that is safe, unless they are to be `apart`: started one by one, as torchrun does, with
    addresses and hashes of strings that differ between ranks.
    """

    def __init__(self, file: str, *left_out: str, apart: bool = False) -> None:
        self.file, self.found = file, dict[int, dict[str, list[str]]]()
        self.forked = sys.platform == "linux" and not apart
        text = (HERE / file).read_text(encoding="utf-8")
        names = re.findall(r"\w+", text.rpartition("CHECKS = (")[2].partition(")")[0])
        self.names = [name for name in names if name not in left_out]

    def passes(self, check: str, size: int, gone: list[int] | None = None) -> None:
        """Raises AssertionError unless all ranks say so, but for those that are gone by then."""
        if size not in self.found:
            self.found[size] = results(self.file, size, self.names, self.forked)
        told = self.found[size].get(check, [])
        assert not any(told), told
        assert len(told) == size - len(gone or ()), self.found[size].get("", told)


def join(timeout: float = 60.0) -> tuple[int, int]:
    """(rank, size) of this process, which joins the others through the file that it was given."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    return rank, size


def run_checks(checks: dict[str, Callable[[], None]]) -> None:
    """Run them all, and say what came of each. After one that failed the ranks may be apart, so that is the end."""
    join()
    wanted = sys.argv[2:] or list(checks)
    for name, check in ((name, checks[name]) for name in wanted):
        began = time.monotonic()
        try:
            check()
            fault = ""
        except BaseException:
            fault = traceback.format_exc()
        print(json.dumps({"check": name, "fault": fault, "seconds": time.monotonic() - began}), flush=True)
        if fault:
            os._exit(1)
    dist.destroy_process_group()
