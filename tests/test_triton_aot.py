"""Every Triton kernel, compiled ahead of time for GPUs that are not here, and read back.

The scans and the mix must move every element of D in accesses of 16 bytes; no kernel may spill or touch local memory;
registers stay within what the intended number of resident warps allows. Prints the table (pytest -s).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", minversion="3.3", reason="compiling ahead of time by this interface")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)
ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench" / "_ahead.py").is_file():
    pytest.skip("bench/ is not beside the tests", allow_module_level=True)

_path = list(sys.path)
sys.path.insert(0, str(ROOT))
from bench._ahead import (  # noqa: E402
    ALONE,
    AMD,
    CASES,
    LONG,
    NVIDIA,
    WIDTH,
    compiled,
    resident_warps,
    resources,
    stream_accesses,
)

sys.path[:] = _path
from deqdiff_fast.kernels import _config  # noqa: E402

# registers per thread: the scans are to keep 16 warps of 32 on a multiprocessor (65,536 registers), whose loads in
# flight cover the memory's latency; the mix four programs of four warps; a solve is small, and alone; the
# quasi-Newton and inverse scans are one program of eight warps, and their preparation, with the Gram of up to 7 columns
# or 30, keeps 12 warps; the scan over nodes, with two steps in flight, keeps 15 in half types
BUDGET = {
    "ddim_update_kernel": 128, "anderson_scan_kernel": 128, "anderson_mix_kernel": 128, "anderson_solve_kernel": 255,
    "ddim_norms_kernel": 128, "newton_linear_kernel": 128, "newton_prepare_kernel": 168, "newton_weights_kernel": 128,
    "newton_norms_kernel": 128, "newton_advance_kernel": 255, "window_bounds_kernel": 128, "active_rows_kernel": 64,
    "mark_converged_kernel": 64, "copy_rows_kernel": 64, "node_scan_kernel": 130, "secant_fit_kernel": 96,
    "inverse_prepare_kernel": 168, "inverse_advance_kernel": 255,
}  # fmt: skip


SOLVES = [name for name in CASES if name.startswith("anderson_solve")]
# All on one architecture. On the others not what is slow to compile: of the solves the largest, and no long histories.
PARTS = {n for n in SOLVES if "fp32-scopetriangular" not in n} | {n for n in CASES if f"ring{LONG}" in n}
ON_NVIDIA = [(a, n) for a in NVIDIA for n in CASES if a == "sm_90" or n not in PARTS]
ON_AMD = [n for n in CASES if ("bf16" in n or "fp32-scopetriangular" in n) and n not in PARTS]


@pytest.fixture(scope="module")
def table(request):
    rows: list[str] = []
    yield rows
    header = f"{'target':8} {'kernel':44} {'regs':>5} {'shared':>7} {'spills':>7} {'warps':>5}  16-byte loads/stores"
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join([header, *rows]))


@pytest.mark.parametrize(("architecture", "name"), ON_NVIDIA)
def test_nvidia(architecture, name, table, tmp_path):
    kernel = compiled(name, NVIDIA[architecture])
    ptx, used = kernel.asm["ptx"], resources(kernel.asm["cubin"], tmp_path)
    wide = {op: len(re.findall(rf"\b{op}\.global\S*\.v4\.b32", ptx)) for op in ("ld", "st")}
    used["SHARED"] = max(used["SHARED"], kernel.metadata.shared)
    warps = resident_warps(used["REG"], used["SHARED"], kernel.metadata.num_warps, architecture)
    table.append(
        f"{architecture:8} {name:44} {used['REG']:5} {used['SHARED']:7} {used['LOCAL']:7} {warps:5}  "
        f"{wide['ld']}/{wide['st']}"
    )
    assert used["LOCAL"] == used["STACK"] == 0, "local memory"
    assert not re.search(r"\b(ld|st)\.local", ptx), "local memory"
    assert not re.search(r"\b(atom|red)\.", ptx), "sums in no fixed order"
    assert used["REG"] <= BUDGET[CASES[name][0].fn.__name__]
    if "BLOCK" in CASES[name][0].arg_names and CASES[name][3] not in ALONE:
        assert warps >= 12, "too few loads in flight to cover the memory's latency"
    # long histories are those of a few rows: their threads share out the columns, and have less than 16 bytes of each
    if "BLOCK" in CASES[name][0].arg_names and CASES[name][2].get("RING") != LONG:
        config = _config.TABLE[architecture][CASES[name][3]]
        block = config.block(WIDTH[CASES[name][1]])
        loads, stores, scalars = stream_accesses(kernel.asm["ttgir"], block, 32 * config.num_warps)
        assert loads > 0
        assert stores > 0
        assert wide == {"ld": loads, "st": stores}
        narrow = len(re.findall(r"\bld\.global\S*", ptx)) - wide["ld"]
        assert narrow <= scalars, "elements of D are loaded one by one"


def test_the_check_sees_narrow_accesses():
    """The same kernel with a D that 16 does not divide has no 16-byte access: the test above can fail."""
    ptx = compiled("ddim_update_kernel-fp32-l1", NVIDIA["sm_90"], aligned=False).asm["ptx"]
    assert not re.search(r"\b(ld|st)\.global\S*\.v4\.b32", ptx)


@pytest.mark.parametrize("name", ON_AMD)
def test_amd(name, table):
    try:
        kernel = compiled(name, AMD["gfx942"])
    except Exception as error:
        if not re.search(r"ROCm|lld|supports_target|Cannot find backend", str(error)):
            raise
        pytest.skip(f"this Triton does not compile for gfx942: {error}")
    text = kernel.asm["amdgcn"]

    def count(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", text)[1])

    wide = {op: len(re.findall(rf"\b(?:global|buffer)_{op}_dwordx4", text)) for op in ("load", "store")}
    spills = count("vgpr_spill_count")
    used = (count("vgpr_count"), kernel.metadata.shared, spills)
    table.append("gfx942   {:44} {:5} {:7} {:7}        {}/{}".format(name, *used, wide["load"], wide["store"]))
    assert spills == count("private_segment_fixed_size") == 0
    if "BLOCK" in CASES[name][0].arg_names:
        assert wide["load"] > 0
        assert wide["store"] > 0
