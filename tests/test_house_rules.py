"""How large things may be, what they may be called, and where their tests lie.

Every complaint begins with the file and line, then says the rule.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from former_names import NAMES, ONLY_IN, WORDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS, TESTS = ROOT / "deqdiff_fast", ROOT / "kernels", ROOT / "tests"

FILE_LINES, FUNCTION_LINES, PARAMETERS = 260, 60, 12
PACKAGE_LINES, KERNELS_LINES = 30_226, 3_400  # to be lowered with every deletion; 11,500 was the aim of the package

LONGER_TESTS = {  # to be emptied
    "integrations/test_pipelines_custom_parts.py", "kernels/test_anderson_step.py", "kernels/test_newton_scan.py",
    "kernels/test_node_scan.py", "restoration/test_restorer.py",
}  # fmt: skip

# Signatures that are a promise to users, so that nothing can be bundled; self is not counted.
MORE_PARAMETERS = {
    "DEQSampler.__init__": "every setting of a sampler is a keyword of its own",
    "DEQInverter.__init__": "every setting of an inverter is a keyword of its own",
}


@functools.cache
def sources(folder: Path) -> dict[Path, str]:
    """{file: text} of every Python file below a folder."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


def at(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(qualified name, definition) of every function, methods and nested ones included."""
    for node in ast.iter_child_nodes(tree):
        inside = prefix
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name, node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = f"{prefix}{node.name}."
        yield from functions(node, inside)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    a = function.args
    every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return [arg for arg in every if arg.arg not in ("self", "cls")]


def too_large(tree: ast.AST, where: Path) -> Iterator[str]:
    for name, function in functions(tree):
        lines, count = (function.end_lineno or 0) - function.lineno + 1, len(parameters(function))
        place = at(where, function.lineno)
        if lines > FUNCTION_LINES:
            yield f"{place}: {name} has {lines} lines; at most {FUNCTION_LINES}"
        if count > PARAMETERS and name not in MORE_PARAMETERS:
            yield f"{place}: {name} has {count} parameters; at most {PARAMETERS}"


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of what a file names for others: classes, functions, their parameters, fields, attributes and
    module constants. Local variables are left out."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno
            yield from ((arg.arg, arg.lineno) for arg in parameters(node))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        if isinstance(node, (ast.ClassDef, ast.Module)):
            if isinstance(node, ast.ClassDef):
                yield node.name, node.lineno
            for child in node.body:
                targets = child.targets if isinstance(child, ast.Assign) else []
                targets = [child.target] if isinstance(child, ast.AnnAssign) else targets
                for target in targets:
                    yield from ((name.id, name.lineno) for name in ast.walk(target) if isinstance(name, ast.Name))


def word_complaint(name: str, where: str) -> str | None:
    """The word that an identifier should have in the place of one that it has."""
    whole = name.strip("_")
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", whole)
    if whole in NAMES and where.startswith(ONLY_IN.get(whole, "")):
        return f"`{name}`: say {NAMES[whole]}"
    return next((f"`{name}`: say {WORDS[part.lower()]}" for part in parts if part.lower() in WORDS), None)


def wrong_words(tree: ast.AST, where: Path) -> Iterator[str]:
    for name, line in identifiers(tree):
        complaint = word_complaint(name, str(where.relative_to(ROOT)))
        if complaint:
            yield f"{at(where, line)}: {complaint}"


def questions(tree: ast.AST, where: Path) -> Iterator[str]:
    """Where code asks what a solver has or which one it is, in the place of reading an attribute of `Solver`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "isinstance"):
            asked = ast.unparse(node.args[0]).rsplit(".", 1)[-1]
            if asked in ("solver", "resolved") and "str" not in ast.unparse(node.args[-1]):
                yield f"{at(where, node.lineno)}: `{ast.unparse(node)}`: read an attribute of loop.base.Solver"
        if isinstance(node, ast.ImportFrom):
            named = {alias.name for alias in node.names} & {"Drafted", "Anderson", "QuasiNewton", "Parareal"}
            yield from (f"{at(where, node.lineno)}: {name}: name no solver here" for name in sorted(named))


def agree(complaints: list[str]) -> None:
    assert not complaints, "\n" + "\n".join(complaints)


def too_long(folder: Path) -> dict[str, str]:
    """{file below the folder: complaint} of those with too many lines."""
    lines = {path: text.count("\n") for path, text in sources(folder).items()}
    long = {path: n for path, n in lines.items() if n > FILE_LINES}
    return {
        path.relative_to(folder).as_posix(): f"{at(path)}: {n} lines; at most {FILE_LINES}" for path, n in long.items()
    }


def test_files_are_short() -> None:
    agree([*too_long(PACKAGE).values()])
    found = too_long(TESTS)
    agree([complaint for name, complaint in found.items() if name not in LONGER_TESTS])
    agree(
        [f"tests/{name}: no longer too long; strike it off LONGER_TESTS" for name in sorted(LONGER_TESTS - set(found))]
    )


def test_functions_are_short_and_take_few_parameters() -> None:
    agree([line for path, text in sources(PACKAGE).items() for line in too_large(ast.parse(text), path)])


def test_signatures_that_may_be_longer_are_there() -> None:
    names = {name for text in sources(PACKAGE).values() for name, _ in functions(ast.parse(text))}
    assert set(MORE_PARAMETERS) <= names


@pytest.mark.parametrize(("folder", "most"), [(PACKAGE, PACKAGE_LINES), (KERNELS, KERNELS_LINES)])
def test_the_whole_is_short(folder: Path, most: int) -> None:
    count = sum(text.count("\n") for text in sources(folder).values())
    assert count <= most, f"{folder.name}/: {count} lines of Python; at most {most}"


def test_words_are_the_fields() -> None:
    every = {**sources(PACKAGE), **sources(KERNELS)}
    wrong = [line for path, text in every.items() for line in wrong_words(ast.parse(text), path)]
    wrong += [f"{at(path)}: {said}" for path in every if (said := word_complaint(path.stem, str(path)))]
    agree(wrong)


def test_nobody_asks_which_solver_it_is() -> None:
    """Those who run solvers know the base class alone; the serial chain's step may be `Picard`."""
    inside = ("engine", "loop", "planner", "sampler.py")
    files = {path: text for path, text in sources(PACKAGE).items() if path.relative_to(PACKAGE).parts[0] in inside}
    agree([line for path, text in files.items() for line in questions(ast.parse(text), path)])


def test_every_folder_has_its_tests() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} | {"kernels"}
    tested = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    agree([f"tests/{name}/: deqdiff_fast/{name}/ has no tests there" for name in sorted(folders - tested)])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("def f(" + ", ".join("abcdefghijklm") + "): pass", "f has 13 parameters; at most 12"),
        ("class A:\n    def f(self, " + ", ".join("abcdefghijkl") + "): pass", None),
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines; at most 60"),
        ("class Vigil: pass", "`Vigil`: say StallDetector"),
        ("class A:\n    def f(self):\n        self.saw_rounds = 1", "deqdiff_fast/x.py:3: `saw_rounds`: say record"),
        ("class A:\n    allowance: float = 0.0", "deqdiff_fast/x.py:2: `allowance`: say measure_budget"),
        ("def f(*, late=None): pass", "`late`: say lookahead"),
        ("def _take_up(): pass", "`_take_up`: say restart_sample"),
        ("def f(plan): pass", None),
        ("from .solver.draft import Drafted", "Drafted: name no solver here"),
        ("getattr(self.solver, 'reach', 0.0)", "read an attribute of loop.base.Solver"),
        ("isinstance(solver, str) or isinstance(model, Module)", None),
        ("def f():\n    late = 1", None),
        ("PATIENCE = 3", None),
    ],
)
def test_complaints(source: str, complaint: str | None) -> None:
    tree, where = ast.parse(source), PACKAGE / "x.py"
    found = [*too_large(tree, where), *wrong_words(tree, where), *questions(tree, where)]
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]
