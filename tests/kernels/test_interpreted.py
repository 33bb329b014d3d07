"""The Triton kernels run through Triton's interpreter on the CPU, against the same float64 references.

Whether a kernel is interpreted is settled when it is imported, so this takes processes of their own: the process that
inspects compiled kernels (test_triton_aot.py) cannot interpret them too. A process takes seconds to start, so it runs
several files; the groups take about as long as each other, for pytest-xdist to spread.
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
GROUPS = {  # files: how many of their tests there must be at least
    ("ddim_update", "anderson_step", "copy_rows", "ops"): 56,
    ("newton_scan", "mark_converged", "advance_window", "stopping_rule", "launches"): 50,
    ("workspace", "device_solve", "races"): 40,
    ("node_scan", "secant_fit", "inverse_scan"): 84,
}


@pytest.mark.skipif(INTERPRETED, reason="this run is interpreted already")
@pytest.mark.parametrize("group", GROUPS, ids="+".join)
def test_triton_kernels_interpreted(group):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider"]
    files = [str(HERE / f"test_{name}.py") for name in group]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take as long to import as some files take to run
    run = subprocess.run(
        [*command, *files, "-k", "triton"], env=environment, capture_output=True, text=True, timeout=900
    )
    if run.returncode and "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("this Triton's interpreter is older than this NumPy; update triton")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout[-2000:]
    assert int(passed[1]) >= GROUPS[group], run.stdout[-2000:]


def test_every_file_with_triton_tests_is_in_a_group():
    listed = {name for group in GROUPS for name in group}
    others = {file.stem.removeprefix("test_") for file in HERE.glob("test_*.py")} - listed
    assert others == {
        "config", "extension", "extension_arguments", "interpreted", "no_reads", "outdated_extension", "register",
        "repeats",
    }  # fmt: skip
