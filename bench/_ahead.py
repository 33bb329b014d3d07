"""Every Triton kernel compiled ahead of time for GPUs that are not here, and what the compiled code says of itself.

What the tests check and `bench compiled` prints: registers, shared and local memory, 16-byte accesses. Needs Triton and
no GPU; not in a process where kernels are interpreted.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deqdiff_fast.kernels import _config, stopping
from deqdiff_fast.kernels.advance_window import _triton as advance
from deqdiff_fast.kernels.anderson_step import _triton as anderson
from deqdiff_fast.kernels.anderson_step import _triton_solve as solve
from deqdiff_fast.kernels.copy_rows import _triton as copies
from deqdiff_fast.kernels.ddim_update import _triton as scan
from deqdiff_fast.kernels.inverse_scan import _triton as inverse
from deqdiff_fast.kernels.mark_converged import _triton as marking
from deqdiff_fast.kernels.newton_scan import _triton as newton
from deqdiff_fast.kernels.newton_scan import _triton_linear as linear
from deqdiff_fast.kernels.newton_scan import _triton_prepare as prepare
from deqdiff_fast.kernels.node_scan import _triton as nodes
from deqdiff_fast.kernels.secant_fit import _triton as fits

NVIDIA = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH = {"fp32": 4, "bf16": 2, "mixed": 2, "fp64": 8}  # bytes of the narrowest element, which sets the block
HISTORY = 5
TABLES = (
    "state_coef", "model_coef", "partials", "gram", "alpha", "sq_diff", "sq_norm", "slope", "e_hat", "previous",
    "strict", "decision", "remainder_coef", "size", "ridges", "guess_error", "weight", "sq_miss",
)  # fmt: skip
STREAMS = (
    "exact", "states", "predictions", "drift", "f", "g", "z", "e", "target", "source", "remainder",
)  # fmt: skip
HISTORIES = ("g", "z", "e")
INTEGERS = ("lo", "hi", "filled", "previous_bounds", "first", "last", "start", "classes", "count")
SETTINGS = (
    "ridge", "floor", "stale", "undamped", "freeze", "finish", "guessed", "nonlinear", "damping", "reach",
)  # fmt: skip
SINGLE = ("weights", "newton_norms", "window_bounds", "mark_converged", "secant_fit")  # one warp a program
ALONE = ("newton_advance", "inverse_advance")  # one program a sample
STAGES = {"newton_advance": 1, "inverse_advance": 1}  # as they are launched
LONG = 31  # columns of the longest rings, of the inverse scan


def cases():
    """(kernel, storage, constants, operation in the launch table); L = 1 without and L = 2 with frozen noise."""
    for storage in STORAGE:
        for lags in (1, 2):
            common = {"L": lags, "DRIFT": lags == 2}
            yield scan.ddim_update_kernel, storage, common, "ddim_update"
            scanned = common | {"M": HISTORY, "K": 8, "MIXED": False}
            yield anderson.anderson_scan_kernel, storage, scanned, "anderson_scan"
            for ring in (4, 8) if storage == "fp32" else (4,):
                secants = common | {"RING": ring, "P": ring, "MIXED": False}
                yield prepare.newton_prepare_kernel, storage, secants, "newton_prepare"
                yield newton.newton_advance_kernel, storage, secants | {"SPECTRAL": True}, "newton_advance"
            if storage == "bf16":  # of the history what may be narrow in bf16, the states in fp32
                yield anderson.anderson_scan_kernel, "mixed", scanned, "anderson_scan"
                secants = common | {"RING": 4, "P": 4, "MIXED": True}
                yield prepare.newton_prepare_kernel, "mixed", secants, "newton_prepare"
                yield newton.newton_advance_kernel, "mixed", secants | {"SPECTRAL": True}, "newton_advance"
            yield linear.newton_linear_kernel, storage, common | {"RING": lags - 1, "SPECTRAL": True}, "newton_linear"
        for damped in (False, True):
            yield (
                anderson.anderson_mix_kernel,
                storage,
                {"M": HISTORY, "DAMPED": damped, "MIXED": False},
                "anderson_mix",
            )
        for lags, drift, by_class in ((1, False, True), (1, True, False), (2, True, True), (3, False, True)):
            given = {"L": lags, "S": 4, "CLASSES": by_class, "DRIFT": drift}
            yield nodes.node_scan_kernel, storage, given, "node_scan"
        for ring in (4, 8, LONG) if storage == "fp32" else (4,):
            columns = {"L": 1, "DRIFT": ring == 4, "RING": ring, "P": -(-ring // 4) * 4}
            yield inverse.inverse_prepare_kernel, storage, columns | {"WEIGHTED": True}, "inverse_prepare"
            advanced = columns | {"SPECTRAL": True, "SPAN": 8 if ring < LONG else 1}
            yield inverse.inverse_advance_kernel, storage, advanced, "inverse_advance"
        yield copies.copy_rows_kernel, storage, {}, "copy_rows"
    yield anderson.anderson_mix_kernel, "mixed", {"M": HISTORY, "DAMPED": True, "MIXED": False}, "anderson_mix"
    rates = {name: getattr(stopping, name) for name in ("MIN_RATE", "MAX_RATE", "FIRST_RATE")}
    rates["TINY"] = stopping.TINY_OF[torch.float32]
    yield marking.mark_converged_kernel, "fp32", rates | {"SPAN": 128}, "mark_converged"
    yield advance.window_bounds_kernel, "fp32", {"TINY": stopping.TINY_OF[torch.float32], "SPAN": 128}, "window_bounds"
    yield advance.active_rows_kernel, "fp32", {"SPAN": 1024}, "rows"
    yield linear.newton_norms_kernel, "fp32", {"SPAN": 64}, "newton_norms"
    for ring in (2, 4, 8):
        yield prepare.newton_weights_kernel, "fp32", {"RING": ring, "P": ring if ring > 2 else 1, "SPAN": 8}, "weights"
    for columns in (3, 7):
        fitted = {"H": columns, "P": columns + 1, "GUESSED": True}
        yield fits.secant_fit_kernel, "fp32", fitted, "secant_fit"
    yield scan.ddim_norms_kernel, "fp32", {"K": 2, "AT": 0, "ROWS": 16, "SPAN": 64}, "norms"
    for scope in ("timestep", "trajectory", "triangular"):
        shape = _config.TABLE["sm_90"]["anderson_solve"]
        sizes = {"M": HISTORY, "P": 8, "K": 8, "ROWS": shape.rows, "PRIOR": shape.prior}
        yield solve.anderson_solve_kernel, "fp32", {"SCOPE": scope, "RELATIVE": True, **sizes}, "anderson_solve"
    yield solve.anderson_solve_kernel, "fp64", {"SCOPE": scope, "RELATIVE": True, **sizes}, "anderson_solve"


def label(case) -> str:
    kernel, storage, constants, _ = case
    detail = "-".join(
        f"{k}{v}".lower() for k, v in constants.items() if k in ("L", "DAMPED", "SCOPE", "RING", "CLASSES", "H")
    )
    return f"{kernel.fn.__name__}-{storage}-{detail}"


CASES = {label(case): case for case in cases()}


@functools.cache
def compiled(name: str, target: GPUTarget, aligned: bool = True):
    """The kernel as a launch with D divisible by 16 compiles it, or with `aligned` off as one with odd D does."""
    kernel, storage, constants, op = CASES[name]
    architecture = target.arch if target.backend == "hip" else f"sm_{target.arch}"
    config = _config.TABLE[architecture].get(op, _config.Config(0, 1 if op in SINGLE else 4))
    constants, warps = dict(constants), config.num_warps * (2 if storage == "fp64" else 1)
    if "BLOCK" in kernel.arg_names:
        constants["BLOCK"] = config.block(WIDTH[storage])
    if constants.get("RING") == LONG:  # see inverse_scan/_triton.py
        if op == "inverse_prepare":
            warps *= 4
        else:
            constants["BLOCK"] = config.block(8) // 4
    if constants.get("DRIFT") is False:
        constants["drift"] = None
    if constants.get("CLASSES") is False:
        constants["classes"] = None
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
    types |= dict.fromkeys(INTEGERS, "*i32")
    types |= {"secant_weights": "*fp64", "fit": "*fp64", "rows": "*i64"}
    if constants.get("RING") == LONG:
        types["partials"] = "*fp64"
    types |= dict.fromkeys(SETTINGS, "fp64")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    hints = [n for n, kind in signature.items() if kind.startswith("*") or (n == "D" and aligned)]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in hints},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if op in STAGES:
        options["num_stages"] = STAGES[op]
    return triton.compile(source, target=target, options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local bytes, as the linker would charge them."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def stream_accesses(ttgir: str, block: int, threads: int) -> tuple[int, int, int]:
    """16-byte loads and stores that whole blocks of D make per thread, and loads of other numbers, in a program. What
    is looked up in a table that is to stay in the cache (evict_last) is of no such block."""
    found = {"load": 0, "store": 0, "other": 0}
    for line in ttgir.splitlines():
        if access := re.search(r"\btt\.(load|store)\b", line):
            tensor = re.search(r"tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)>", line)
            count = math.prod(map(int, tensor[1].split("x")[:-1])) if tensor else 1
            if "evict_last" in line or "evictionPolicy = 3" in line:
                found["other"] += count // threads
            elif tensor and tensor[1].endswith(f"{block}x"):
                found[access[1]] += count * int(tensor[2]) // 8 // 16 // threads
            elif access[1] == "load":
                found["other"] += count
    return found["load"], found["store"], found["other"]


def resident_warps(registers: int, shared: int, warps: int, architecture: str = "sm_90") -> int:
    """How many warps of a multiprocessor's 64 fit: 65,536 registers, dealt out to a warp in units of 256, and 227 KiB
    of shared memory (163 on an A100), of which the device keeps 1 KiB a block; blocks of `warps` warps, at most 32."""
    room = 1024 * (164 if architecture == "sm_80" else 228)
    by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // warps
    return min(64 // warps, 32, by_registers, room // (shared + 1024)) * warps
