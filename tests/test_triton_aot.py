"""Every Triton kernel, compiled ahead of time for GPUs that are not here, and read back.

The scans and the mix must move every element of D in accesses of 16 bytes; no kernel may spill or touch local memory;
registers stay within what the intended number of resident warps allows. Prints the table (pytest -s).
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.3", reason="compiling ahead of time by this interface")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from deqdiff_fast.kernels import _config  # noqa: E402
from deqdiff_fast.kernels.advance_window import _triton as advance  # noqa: E402
from deqdiff_fast.kernels.anderson_mix import _triton as anderson  # noqa: E402
from deqdiff_fast.kernels.anderson_mix import _triton_solve as solve  # noqa: E402
from deqdiff_fast.kernels.copy_rows import _triton as copies  # noqa: E402
from deqdiff_fast.kernels.ddim_update import _triton as scan  # noqa: E402
from deqdiff_fast.kernels.newton_scan import _triton as newton  # noqa: E402
from deqdiff_fast.kernels.newton_scan import _triton_prepare as prepare  # noqa: E402
from deqdiff_fast.kernels.newton_scan import _triton_products as products  # noqa: E402

NVIDIA = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH = {"fp32": 4, "bf16": 2, "mixed": 2, "fp64": 8}  # bytes of the narrowest element, which sets the block
HISTORY = 5
TABLES = (
    "state_coef",
    "model_coef",
    "partials",
    "gram",
    "alpha",
    "sq_diff",
    "sq_norm",
    "slope",
    "e_hat",
    "gains",
    "products",
    "gamma",
)
STREAMS = ("exact", "states", "predictions", "drift", "f", "g", "z", "e", "target", "source")
HISTORIES = ("g", "z", "e")
SINGLE = ("weights", "newton_norms", "bounds")  # one warp a program
# registers per thread: the scans are to keep 16 warps of 32 on a multiprocessor (65,536 registers), whose loads in
# flight cover the memory's latency; the mix four programs of four warps; a solve is small, and alone; the
# quasi-Newton scan is one program of eight warps, and its preparation, with the Gram of up to 7 columns, keeps 12 warps
BUDGET = {"ddim_update_kernel": 128, "anderson_scan_kernel": 128, "anderson_mix_kernel": 128, "solve_kernel": 255,
          "norms_kernel": 128, "newton_linear_kernel": 128, "newton_prepare_kernel": 168, "newton_weights_kernel": 128,
          "newton_norms_kernel": 128, "newton_advance_kernel": 255, "bounds_kernel": 128, "rows_kernel": 64,
          "copy_rows_kernel": 64, "gains_kernel": 64, "products_kernel": 255, "recursion_kernel": 128,
          "corrected_scan_kernel": 128}  # fmt: skip


def cases():
    """(kernel, storage, constants, operation in the launch table); L = 1 without and L = 2 with frozen noise."""
    for storage in STORAGE:
        for lags in (1, 2):
            common = {"L": lags, "DRIFT": lags == 2}
            yield scan.ddim_update_kernel, storage, common, "scan"
            yield (
                anderson.anderson_scan_kernel,
                storage,
                common | {"M": HISTORY, "K": 8, "MIXED": False},
                "anderson_scan",
            )
            for ring in (4, 8) if storage == "fp32" else (4,):
                secants = common | {"RING": ring, "P": ring, "MIXED": False}
                yield prepare.newton_prepare_kernel, storage, secants, "newton_prepare"
                yield newton.newton_advance_kernel, storage, secants | {"SPECTRAL": True}, "newton_advance"
            if storage == "bf16":  # of the history what may be narrow in bf16, the states in fp32
                mixed = common | {"M": HISTORY, "K": 8, "MIXED": False}
                yield anderson.anderson_scan_kernel, "mixed", mixed, "anderson_scan"
                secants = common | {"RING": 4, "P": 4, "MIXED": True}
                yield prepare.newton_prepare_kernel, "mixed", secants, "newton_prepare"
                yield newton.newton_advance_kernel, "mixed", secants | {"SPECTRAL": True}, "newton_advance"
            yield newton.newton_linear_kernel, storage, common | {"RING": lags - 1, "SPECTRAL": True}, "newton_linear"
        for damped in (False, True):
            yield anderson.anderson_mix_kernel, storage, {"M": HISTORY, "DAMPED": damped, "MIXED": False}, "mix"
        yield copies.copy_rows_kernel, storage, {}, "mix"
    yield anderson.anderson_mix_kernel, "mixed", {"M": HISTORY, "DAMPED": True, "MIXED": False}, "mix"
    yield products.gains_kernel, "fp32", {"SPECTRAL": True}, "newton_prepare"
    for ring in (4, 8):
        sizes = {"RING": ring, "P": ring, "Q": ring, "DRIFT": False, "SPECTRAL": True}
        tile = {"ROWS": products.TILE // ring, "SPAN": products.SPAN}
        yield products.products_kernel, "fp32", sizes | tile, "products"
        yield products.recursion_kernel, "fp32", {"P": ring, "Q": ring, "SPAN": 512}, "recursion"
        yield products.corrected_scan_kernel, "fp32", sizes, "newton_prepare"
    yield advance.bounds_kernel, "fp32", {"SPAN": 128}, "bounds"
    yield advance.rows_kernel, "fp32", {"SPAN": 1024}, "rows"
    yield newton.newton_norms_kernel, "fp32", {"SPAN": 64}, "newton_norms"
    for ring in (2, 4, 8):
        yield prepare.newton_weights_kernel, "fp32", {"RING": ring, "P": ring if ring > 2 else 1, "SPAN": 8}, "weights"
    yield scan.norms_kernel, "fp32", {"K": 2, "AT": 0, "ROWS": 16, "SPAN": 64}, "norms"
    for scope in ("timestep", "trajectory", "triangular"):
        shape = _config.TABLE["sm_90"]["solve"]
        sizes = {"M": HISTORY, "P": 8, "K": 8, "ROWS": shape.rows, "PRIOR": shape.prior}
        yield solve.solve_kernel, "fp32", {"SCOPE": scope, "RELATIVE": True, **sizes}, "solve"
    yield solve.solve_kernel, "fp64", {"SCOPE": scope, "RELATIVE": True, **sizes}, "solve"


def label(case) -> str:
    kernel, storage, constants, _ = case
    detail = "-".join(f"{k}{v}".lower() for k, v in constants.items() if k in ("L", "DAMPED", "SCOPE", "RING"))
    return f"{kernel.fn.__name__}-{storage}-{detail}"


CASES = {label(case): case for case in cases()}
SOLVES = [name for name in CASES if name.startswith("solve")]
# the solves are the slow ones to compile: all on one architecture, the largest on the others
ON_NVIDIA = [(a, n) for a in NVIDIA for n in CASES if n not in SOLVES or a == "sm_90" or "fp32-scopetriangular" in n]
ON_AMD = [n for n in CASES if "bf16" in n or "fp32-scopetriangular" in n]


@functools.cache
def compiled(name: str, target: GPUTarget, aligned: bool = True):
    """The kernel as a launch with D divisible by 16 compiles it, or with `aligned` off as one with odd D does."""
    kernel, storage, constants, op = CASES[name]
    architecture = target.arch if target.backend == "hip" else f"sm_{target.arch}"
    config = _config.TABLE[architecture].get(op, _config.Config(0, 1 if op in SINGLE else 4))
    constants = dict(constants)
    if "BLOCK" in kernel.arg_names:
        constants["BLOCK"] = config.block(WIDTH[storage])
    if constants.get("DRIFT") is False:
        constants["drift"] = None
    if constants.get("RING") == 0:
        constants |= {"z": None, "e": None, "filled": None}
    if constants.get("MIXED") is False and "exact" in kernel.arg_names:
        constants["exact"] = None
    if constants.get("L") == 1 and "e_hat" in kernel.arg_names:
        constants["e_hat"] = None
    types = dict.fromkeys(STREAMS, "*fp32" if storage == "mixed" else f"*{storage}") | dict.fromkeys(
        TABLES, "*fp64" if storage == "fp64" else "*fp32"
    )
    if storage == "mixed":
        types |= dict.fromkeys(HISTORIES, "*bf16")
    types |= dict.fromkeys(("lo", "hi", "filled", "was", "first", "last"), "*i32") | {"weights": "*fp64"}
    types |= {"verdict": "*fp32", "sq_norm": types["sq_diff"], "rows": "*i64"}
    types |= dict.fromkeys(("ridge", "floor", "stale", "undamped", "freeze", "finish"), "fp64")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    hints = [n for n, kind in signature.items() if kind.startswith("*") or (n == "D" and aligned)]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in hints},
    )
    warps = config.num_warps * (2 if storage == "fp64" else 1)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local bytes, as the linker would charge them."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def stream_accesses(ttgir: str, block: int, threads: int) -> tuple[int, int, int]:
    """16-byte loads and stores that whole blocks of D make per thread, and loads of other numbers, in a program."""
    found = {"load": 0, "store": 0, "other": 0}
    for line in ttgir.splitlines():
        if access := re.search(r"\btt\.(load|store)\b", line):
            tensor = re.search(r"tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)>", line)
            count = math.prod(map(int, tensor[1].split("x")[:-1])) if tensor else 1
            if tensor and tensor[1].endswith(f"{block}x"):
                found[access[1]] += count * int(tensor[2]) // 8 // 16 // threads
            elif access[1] == "load":
                found["other"] += count
    return found["load"], found["store"], found["other"]


def resident_warps(registers: int, shared: int, warps: int) -> int:
    """How many warps of an H100-sized multiprocessor's 64 fit: 65,536 registers, dealt out to a warp in units of 256,
    and 227 KiB of shared memory; blocks of `warps` warps, at most 32."""
    by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // warps
    by_memory = 227 * 1024 // max(shared, 1)
    return min(64 // warps, 32, by_registers, by_memory) * warps


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
    warps = resident_warps(used["REG"], used["SHARED"], kernel.metadata.num_warps)
    table.append(
        f"{architecture:8} {name:44} {used['REG']:5} {used['SHARED']:7} {used['LOCAL']:7} {warps:5}  "
        f"{wide['ld']}/{wide['st']}"
    )
    assert used["LOCAL"] == used["STACK"] == 0, "local memory"
    assert not re.search(r"\b(ld|st)\.local", ptx), "local memory"
    assert not re.search(r"\b(atom|red)\.", ptx), "sums in no fixed order"
    assert used["REG"] <= BUDGET[CASES[name][0].fn.__name__]
    if "BLOCK" in CASES[name][0].arg_names and CASES[name][0] is not newton.newton_advance_kernel:
        assert warps >= 12, "too few loads in flight to cover the memory's latency"
    if "BLOCK" in CASES[name][0].arg_names:
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
