"""What a package index is told, and that the Pythons and versions claimed are those that are built and tried.

`make release` checks the files themselves: the sdist against what is tracked, and its tests where it was unpacked.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CLASSIFIERS = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
LINK = re.compile(r"\]\(([^)]+)\)")


@pytest.fixture
def arguments(monkeypatch):
    """What setup.py tells setuptools, with a given address of the files."""
    setuptools = pytest.importorskip("setuptools")

    def read(address: str = "") -> dict[str, Any]:
        said: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **kwargs: said.update(kwargs))
        monkeypatch.setenv("DEQDIFF_FAST_URL", address)
        runpy.run_path(str(ROOT / "setup.py"))
        return said

    return read


@pytest.fixture(scope="module")
def release():
    """The modules of release/, which import each other by name."""
    sys.path.insert(0, str(ROOT / "release"))
    try:
        import matrix
        import wheels
    finally:
        sys.path.remove(str(ROOT / "release"))
    return matrix, wheels


def test_links_of_the_description_need_no_files_beside_it(arguments):
    text = arguments()["long_description"]
    relative = [link for link in LINK.findall(text) if not link.startswith(("https://", "#"))]
    assert relative == []
    assert "(docs/how-it-works.md)" in text, "what was a link still says which file is meant"
    assert "#what-the-estimate-says" not in text


def test_links_of_the_description_lead_to_the_files(arguments):
    """Below the address, whose part behind it is a path of this repository."""
    address = "https://example.org/tree/v1"
    links = [link for link in LINK.findall(arguments(address)["long_description"]) if link.startswith(address)]
    assert len(links) > 10
    for link in links:
        path = link.removeprefix(address + "/").partition("#")[0]
        assert (ROOT / path).exists(), link


def test_every_package_is_in_the_wheel(arguments):
    packages = arguments()["package_dir"]
    folders = {str(path) for path in packages.values()}
    for top in ("deqdiff_fast", "kernels"):
        for init in (ROOT / top).rglob("__init__.py"):
            assert str(init.parent.relative_to(ROOT)) in folders
    assert (ROOT / packages["deqdiff_fast"] / "py.typed").is_file()


def test_pythons_that_are_claimed_are_built_and_tried(release):
    matrix, wheels = release
    assert list(wheels.PYTHONS) == CLASSIFIERS
    assert {cell.python for cell in matrix.CELLS} == set(CLASSIFIERS)
    (build,) = re.findall(r"^build = \[(.*)\]", PYPROJECT, re.M)
    assert re.findall(r"cp(\d+)-", build) == [version.replace(".", "") for version in CLASSIFIERS]
    for workflow in ROOT.glob(".github/workflows/tests.yml"):  # not in the sdist
        text = workflow.read_text(encoding="utf-8")
        assert re.findall(r'"(3\.\d+)"', text.partition("python: [")[2].partition("]")[0]) == CLASSIFIERS
        cells = text.partition("cell: [")[2].partition("]")[0].split(", ")
        assert cells == [cell.name for cell in matrix.CELLS]


def test_floors_are_what_the_oldest_cell_has(release):
    oldest = release[0].CELLS[0]
    assert f'requires-python = ">={oldest.python}"' in PYPROJECT
    for package in ("torch", "diffusers"):
        floors = set(re.findall(rf'"{package}>=([\d.]+)"', PYPROJECT))
        assert len(floors) == 1, package
        assert getattr(oldest, package).removeprefix(f"{package}==").startswith(floors.pop())


def test_tests_of_the_matrix_are_there(release):
    matrix, wheels = release
    for name in (*matrix.FAST, *wheels.TESTS_OF_SDIST):
        assert (ROOT / name).exists(), name
