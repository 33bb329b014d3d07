"""Nothing that runs in every round on a device reads from it: the sources are searched for what would."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("rows_are_known")


ROOT = Path(__file__).resolve().parents[2]


# What a device round runs through, and the one place where the host may look.
HOT = {
    "deqdiff_fast/loop/device.py": ("queue", "step"),
    "deqdiff_fast/loop/device_state.py": ("enqueue", "read"),
    "deqdiff_fast/loop/stopping.py": ("mark_converged", "advance_on_device", "reset_steps"),
    "deqdiff_fast/solver/picard.py": ("step",),
    "deqdiff_fast/solver/anderson.py": ("step", "settle", "enter"),
    "deqdiff_fast/solver/quasi_newton.py": ("step", "enter"),
    "deqdiff_fast/engine/workspace.py": ("evaluate", "rebuild"),
    "deqdiff_fast/model/batched.py": ("evaluate", "_evaluate", "clip", "expand_kwargs", "pad"),
    "deqdiff_fast/engine/initial_guess.py": ("_nonlinear_part", "linear_scan"),
    "kernels/advance_window/reference.py": ("advance_window",),
    "kernels/advance_window/_triton.py": ("launch",),
    "kernels/mark_converged/reference.py": ("mark_converged",),
    "kernels/mark_converged/_triton.py": ("launch",),
    "kernels/copy_rows/reference.py": ("copy_rows",),
    "kernels/copy_rows/_triton.py": ("launch",),
    "kernels/ddim_update/_triton.py": ("launch", "launch_norms"),
    "kernels/anderson_step/_triton.py": ("launch",),
    "kernels/newton_scan/_triton.py": ("launch",),
    "kernels/newton_scan/_triton_linear.py": ("launch_linear",),
    "kernels/_workspace.py": ("cut",),
    "kernels/_register.py": ("__call__", "run", "_choose", "_run_triton"),
    "kernels/node_scan/_triton.py": ("launch",),
}


LOOKS = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize"}


def looks(source: str, functions: tuple[str, ...]) -> list[str]:
    """Calls in the named functions that would make the host wait, unless their line is marked as the late read."""
    tree, lines, found = ast.parse(source), source.splitlines(), []
    names = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name in functions:
        for node in ast.walk(names[name]):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of_tensor = isinstance(node.func, ast.Attribute) and called in LOOKS
            cast = called in ("bool", "float") or (called == "int" and "Tensor" not in lines[node.lineno - 1])
            if (of_tensor or (cast and isinstance(node.func, ast.Name))) and "late read" not in lines[node.lineno - 1]:
                found.append(f"{name}:{node.lineno}: {lines[node.lineno - 1].strip()}")
    return found


@pytest.mark.skipif(not (ROOT / "kernels" / "__init__.py").is_file(), reason="the sources are not beside the tests")
@pytest.mark.parametrize("file", HOT)
def test_no_look_in_the_sources(file):
    assert looks((ROOT / file).read_text(encoding="utf-8"), HOT[file]) == []


@pytest.mark.parametrize("line", ["x.item()", "x.cpu()", "x.tolist()", "bool(x)", "float(x.max())", "bool(x.any())"])
def test_a_look_is_noticed(line):
    assert looks(f"def f(x):\n    return {line}\n", ("f",))
