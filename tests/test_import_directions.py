"""Arrows between modules run one way; optional libraries stay where they belong."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A unit is a module or package right below deqdiff_fast. It may import units of earlier layers and of its own, inside
# functions too.
LAYERS = (
    {"errors", "_types", "_devices", "_locks", "_C", "plan"},
    {"solution", "kernels"},
    {"schedule", "memory", "loop", "operators"},
    {"solver", "model", "nodes"},
    {"ranks"},
    {"engine"},
    {"gradient", "planner"},
    {"sampler", "equilibrium"},
    {"inversion", "distillation", "restoration"},
    {"inverter", "restorer"},
    {"__init__"},
    {"integrations", "presets", "info"},
    {"cli"},
)
LAYER_OF = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}
# Stricter than their layer: the kernels stand alone, the loop and the solvers know no diffusion, schedules are torch.
ONLY = {
    "kernels": {"errors", "_C"},
    "loop": {"errors", "_types", "kernels"},
    "solver": {"errors", "_types", "kernels", "loop"},
    "nodes": {"errors", "_types", "_devices", "kernels", "schedule"},
    "ranks": {"errors", "_types", "_devices", "_locks", "kernels", "solution", "model"},
    "schedule": {"errors", "_types", "_devices", "_locks"},
    "memory": {"errors", "_locks", "_C"},
    "operators": {"errors", "_devices"},
}
# Who may import a library that is not a plain dependency of the package.
HOMES = {
    "diffusers": {"integrations"},
    "k_diffusion": {"integrations"},
    "triton": {"kernels"},
    "PIL": {"cli"},
    "matplotlib": {"cli"},
    "kernels": set[str](),  # it is deqdiff_fast.kernels; `import kernels` would load a second copy
}
# Optional: an import of the package must not need them, so they are imported inside functions or private modules.
NEVER_UP_FRONT = {"diffusers", "k_diffusion", "matplotlib"}


class Arrow(NamedTuple):
    unit: str  # who imports
    target: str  # a unit of ours, or the name of a library
    ours: bool
    lazy: bool  # inside a function
    where: str


def arrows(source: str, module: str, is_package: bool, where: str) -> Iterator[Arrow]:
    """The imports of one module, e.g. "deqdiff_fast.solver.picard"; those for type checkers only are left out."""
    unit = ([*module.split("."), "__init__"])[1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Arrow]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            line = f"{where}:{getattr(child, 'lineno', 0)}"
            for name in names(child, module, is_package):
                parts = name.split(".")
                ours = parts[0] == "deqdiff_fast"
                yield Arrow(unit, ([*parts, "__init__"])[1] if ours else parts[0], ours, lazy, line)
            yield from visit(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return visit(ast.parse(source), False)


def names(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Absolute names of what an import statement imports; of `from x import y` also y where x is our top package."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module.split(".") if is_package else module.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    if base != "deqdiff_fast":
        return [base]
    return [f"{base}.{alias.name}" if alias.name in LAYER_OF else base for alias in node.names]


@functools.cache
def modules() -> dict[str, Path]:
    """{name: file} of every module of the library."""
    found = {}
    for folder, name in (("deqdiff_fast", "deqdiff_fast"), ("kernels", "deqdiff_fast.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [name, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(module: str) -> Iterator[str]:
    """The modules of the library that one of them imports anywhere, its own package aside."""
    path = modules()[module]

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            for base in names(child, module, path.name == "__init__.py"):
                inside = [f"{base}.{alias.name}" for alias in child.names] if isinstance(child, ast.ImportFrom) else []
                found = {name for name in inside if name in modules()} or {base}
                yield from (name for name in found if name in modules() and not module.startswith(f"{name}."))
            yield from visit(child)

    return (name for name in visit(ast.parse(path.read_text(encoding="utf-8"))) if name != module)


@functools.cache
def library() -> list[Arrow]:
    found = []
    for module, path in modules().items():
        is_package = path.name == "__init__.py"
        found += arrows(path.read_text(encoding="utf-8"), module, is_package, str(path.relative_to(ROOT)))
    return found


def complaints(found: list[Arrow]) -> list[str]:
    wrong = []
    for arrow in found:
        step = f"{arrow.where}: {arrow.unit} imports {arrow.target}"
        if not arrow.ours:
            if arrow.unit not in HOMES.get(arrow.target, {arrow.unit}):
                wrong.append(f"{step}, which only {sorted(HOMES[arrow.target])} may")
            if arrow.target in NEVER_UP_FRONT and not arrow.lazy:
                wrong.append(f"{step} while it is imported itself; move that into the function that needs it")
        elif {arrow.unit, arrow.target} - set(LAYER_OF):
            wrong.append(f"{step}: give both a layer in this test")
        elif arrow.unit != arrow.target:
            if LAYER_OF[arrow.target] > LAYER_OF[arrow.unit]:
                wrong.append(f"{step}, a later layer")
            if arrow.target not in ONLY.get(arrow.unit, {arrow.target}):
                wrong.append(f"{step}; it may import {sorted(ONLY[arrow.unit])} only")
    return wrong


def test_arrows_run_one_way() -> None:
    found = library()
    assert {arrow.unit for arrow in found} >= {"kernels", "solver", "sampler", "cli"}, "no sources were found"
    assert complaints(found) == []


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count."""
    after = {module: set(imported_modules(module)) for module in modules()}
    done: set[str] = set()
    while ready := {module for module in after if module not in done and after[module] <= done}:
        done |= ready
    assert set(after) - done == set(), "these import each other"


def test_the_top_floor_is_small() -> None:
    assert len(list((ROOT / "deqdiff_fast").glob("*.py"))) <= 12


@pytest.mark.parametrize("folder", ["tests", "bench", "examples"])
def test_nothing_imports_the_kernels_by_their_folder(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for arrow in arrows(path.read_text(encoding="utf-8"), f"{folder}.{path.stem}", False, str(path)):
            assert arrow.target != "kernels" or arrow.ours, f"{arrow.where}: import deqdiff_fast.kernels instead"


@pytest.mark.parametrize(
    ("source", "module", "complaint"),
    [
        ("from ..sampler import DEQSampler", "deqdiff_fast.solver.picard", "a later layer"),
        ("from ..schedule import Schedule", "deqdiff_fast.solver.picard", "may import"),
        ("from ...memory import Lease", "deqdiff_fast.kernels.ddim_update.reference", "may import"),
        ("from .. import sampler", "deqdiff_fast.engine.system", "a later layer"),
        ("from deqdiff_fast import cli", "deqdiff_fast.engine.system", "a later layer"),
        ("import deqdiff_fast.cli.main", "deqdiff_fast.engine.system", "a later layer"),
        ("def f():\n    from ..engine import solve", "deqdiff_fast.loop.host", "a later layer"),
        ("def f():\n    from ..sampler import DEQSampler", "deqdiff_fast.schedule.spectral", "a later layer"),
        ("from ..unheard_of import x", "deqdiff_fast.engine.system", "give both a layer"),
        ("def f():\n    import diffusers", "deqdiff_fast.schedule.probe", "which only"),
        ("import diffusers.schedulers", "deqdiff_fast.integrations.diffusers", "while it is imported"),
        ("from kernels import ddim_update", "deqdiff_fast.engine.system", "which only"),
    ],
)
def test_a_wrong_arrow_is_noticed(source: str, module: str, complaint: str) -> None:
    wrong = complaints(list(arrows(source, module, False, "x.py")))
    assert any(complaint in line for line in wrong), wrong


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from ..kernels import ddim_update\nfrom ..loop.base import Chain", "deqdiff_fast.solver.picard"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import X", "deqdiff_fast.solution"),
        ("def f():\n    import diffusers", "deqdiff_fast.integrations.diffusers"),
    ],
)
def test_a_right_arrow_passes(source: str, module: str) -> None:
    assert complaints(list(arrows(source, module, False, "x.py"))) == []


def test_the_checkout_offers_nothing_to_libraries_that_look_for_kernels() -> None:
    """transformers imports a package `kernels` where it finds one, and the root of the checkout has such a folder."""
    code = "import kernels; assert not hasattr(kernels, 'ddim_update'), 'the kernels were loaded a second time'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
