"""The documentation speaks of what is there: messages, names, links, figures."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import deqdiff_fast as dq

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pieces_in_order(documented: str, text: str, gap: str) -> bool:
    """Whether the parts of `documented` between its gaps stand in `text` in this order, none across a gap of it."""
    at = 0
    for piece in documented.split(gap):
        at = text.find(piece.strip(), at)
        if at < 0:
            return False
        at += len(piece.strip())
    return True


def test_every_documented_message_is_raised_somewhere(hooks):
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    documented = re.findall(r"^### (.*)$", page, re.M)
    source = [message.text for message in hooks.messages()]
    # a message may be put together from parts: literals of the source count too
    for path in [*(DOCS.parent / "deqdiff_fast").rglob("*.py"), *(DOCS.parent / "kernels").rglob("*.py")]:
        source += filter(None, map(hooks._text, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    assert len(documented) > 30
    missing = [line for line in documented if not any(pieces_in_order(line, text, hooks.GAP) for text in source)]
    assert missing == []


def test_the_list_of_all_messages_is_complete(hooks):
    """Against the errors met here, one of each way in which the source writes them."""
    found = {message.text for message in hooks.messages()}
    kinds = {message.kind for message in hooks.messages()}
    assert {"ValueError", "TypeError", "NonFiniteError", "NotConvergedError", "NotAffineError"} <= kinds
    for call, error in (
        (lambda: dq.DEQSampler(3, 4), TypeError),
        (lambda: dq.guided(print, None, None, 1.0), TypeError),
        (lambda: dq.Schedule.ddim([0.9, 0.5], [0, 1]), ValueError),
        (lambda: dq.Anderson(history=0), ValueError),
    ):
        with pytest.raises(error) as caught:
            call()
        said = str(caught.value)
        assert any(re.fullmatch(".*".join(map(re.escape, text.split(hooks.GAP))), said, re.S) for text in found), said
    rendered = hooks.on_page_markdown((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    assert rendered.count("\n- ") > 100
    assert hooks.on_page_markdown("no list here") == "no list here"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_code_exist(page):
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deqdiff_fast"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
    for name in re.findall(r"\bdq((?:\.\w+)+)", text):
        found = dq
        for part in name.strip(".").split("."):
            found = getattr(found, part)
    for name in re.findall(r"^::: (\S+)$", text, re.M):
        assert pkgutil.resolve_name(name).__doc__, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("https://"):
            found = page.parent / target
            assert found.is_file() or (page.parent == DOCS.parent and found.is_dir()), target  # not in mkdocs' pages
    folders = "examples|bench|docs|integrations|deqdiff_fast|kernels|csrc|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", text):
        assert (DOCS.parent / path).exists(), path


def test_research_notes_enter_the_navigation(hooks, tmp_path):
    config = {"docs_dir": str(tmp_path), "nav": [{"Start": "index.md"}]}
    assert hooks.on_config(config)["nav"] == [{"Start": "index.md"}]
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "rounds.md").touch()
    assert hooks.on_config(config)["nav"][1] == {"Research": ["research/rounds.md"]}
