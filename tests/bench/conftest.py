"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deqdiff_fast as dq

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def baseline(monkeypatch):
    """The modules of bench/, with the path put back afterwards."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    import bench.__main__
    import bench._operands
    import bench._policy
    import bench._timing

    return bench


@pytest.fixture
def report_of():
    """What a benchmark wrote as JSON, checked for what all of them write."""

    def read(name: str, file: Path) -> dict:
        report = json.loads(file.read_text(encoding="utf-8"))
        assert report["benchmark"] == name
        assert {"device", "cpu", "threads", "torch", "triton", "deqdiff_fast", "commit"} <= set(report["environment"])
        assert report["environment"]["deqdiff_fast"] == dq.__version__
        assert report["environment"]["threads"] == 1
        return report

    return read


@pytest.fixture
def figures(baseline, report_of, tmp_path, capsys):
    """Run a benchmark that must succeed, in this process; what it wrote as JSON, and its table."""

    def run(name: str, *words: str | Path) -> tuple[dict, str]:
        file, threads = tmp_path / f"{name}.json", torch.get_num_threads()
        try:
            status = baseline.__main__.main([name, "--json", str(file), "--threads", "1", *map(str, words)])
        finally:
            torch.set_num_threads(threads)
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return report_of(name, file), printed.out

    return run


@pytest.fixture
def bench():
    """Run `python -m bench` in the root of the checkout, on one thread, against the deqdiff_fast imported here."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        where = os.environ.get("PYTHONPATH", "")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": where, "PYTHONWARNINGS": "default"}
        command = [sys.executable, "-m", "bench", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return run
