"""The Triton kernels run through Triton's interpreter on the CPU, against the same float64 reference.

Whether a kernel is interpreted is settled when it is imported, so this takes a process of its own: the process that
inspects compiled kernels (test_triton_aot.py) cannot interpret them too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="this run is interpreted already")
def test_triton_kernels_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider"]
    ops = ("ddim_update", "anderson_step", "newton_scan", "draft_scan", "window_ops", "device_solve", "launches")
    ops += ("workspace",)
    files = [str(HERE / f"test_{op}.py") for op in ops]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(
        [*command, *files, "-k", "triton"], env=environment, capture_output=True, text=True, timeout=900
    )
    if run.returncode and "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("this Triton's interpreter is older than this NumPy; update triton")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout[-2000:]
    assert int(passed[1]) >= 97, run.stdout[-2000:]
