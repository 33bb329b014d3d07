"""For mkdocs: research notes enter the navigation once they are there; error messages are listed from the source."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GAP = "…"  # what an f-string fills in
ALL_MESSAGES = "<!-- all messages -->"


class Message(NamedTuple):
    kind: str
    text: str
    module: str


def messages() -> Iterator[Message]:
    """What the library raises and warns of, in the order of the source; a gap where a value goes."""
    for folder, package in (("deqdiff_fast", "deqdiff_fast"), ("kernels", "deqdiff_fast.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            module = ".".join((package, *(part for part in parts if part != "__init__")))
            yield from _of_module(ast.parse(path.read_text(encoding="utf-8")), module)


def _of_module(tree: ast.Module, module: str) -> Iterator[Message]:
    named = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and any(_texts(node.value))
    }

    def texts(node: ast.AST) -> list[str]:
        return _texts(named.get(node.id, node) if isinstance(node, ast.Name) else node)

    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        kind = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if kind == "report_not_converged":  # deqdiff_fast/engine/reporting.py
            for failure in texts(node.args[2]):
                for kind in ("NotConvergedError", "ConvergenceWarning"):
                    yield Message(kind, f"{GAP} of {GAP} {failure or GAP}; {texts(node.args[3])[0] or GAP}", module)
            continue
        found = texts(node.args[0])
        if kind == "warn" and len(node.args) > 1 and isinstance(node.args[1], ast.Name):
            kind = node.args[1].id
        elif kind == "at_step" and isinstance(node.func, ast.Attribute):  # deqdiff_fast/errors.py
            kind = ast.unparse(node.func.value)
            found = [what + _standard_end() for what in found]
        if kind.endswith(("Error", "Warning")):
            yield from (Message(kind, text, module) for text in found if re.search("[a-z]{3}", text))


@functools.cache
def _standard_end() -> str:
    """What `NonFiniteError.at_step` puts after what happened."""
    tree = ast.parse((ROOT / "deqdiff_fast" / "errors.py").read_text(encoding="utf-8"))
    made = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "at_step")
    return next(_text(node) for node in ast.walk(made) if isinstance(node, ast.JoinedStr)).removeprefix(GAP)


def _texts(node: ast.AST) -> list[str]:
    """Both texts of a choice between two."""
    return [*_texts(node.body), *_texts(node.orelse)] if isinstance(node, ast.IfExp) else [_text(node)]


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) if isinstance(value, ast.Constant) else GAP for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or GAP) + (_text(node.right) or GAP)
    return ""


def on_config(config: Any) -> Any:
    """Add a section for the research notes that there are."""
    root = Path(config["docs_dir"])
    pages = [str(path.relative_to(root)) for path in sorted((root / "research").glob("*.md"))]
    if pages:
        config["nav"].append({"Research": pages})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the list of all messages where a page asks for it."""
    if ALL_MESSAGES not in markdown:
        return markdown
    lines, last = [], ""
    for message in dict.fromkeys(messages()):
        if message.module != last:
            lines += ["", f"**{message.module}**", ""]
            last = message.module
        quoted = message.text.replace("`", "'")
        lines.append(f"- {message.kind}: `{quoted}`")
    return markdown.replace(ALL_MESSAGES, "\n".join(lines))
