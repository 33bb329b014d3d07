"""What a package index is told, and that the Pythons and versions claimed are those that are built and tried.

`make release` checks the files themselves: the sdist against what is tracked, and its tests where it was unpacked.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
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
        import environments
        import matrix
        import wheels
    finally:
        sys.path.remove(str(ROOT / "release"))
    return matrix, wheels, environments


def test_links_of_the_description_need_no_files_beside_it(arguments):
    text = arguments()["long_description"]
    relative = [link for link in LINK.findall(text) if not link.startswith(("https://", "#"))]
    assert relative == []
    assert "(docs/how-it-works.md)" in text, "what was a link still says which file is meant"
    assert "#what-the-estimate-says" not in text
    assert "![" not in text, "a picture is named by its words alone"


def test_links_of_the_description_lead_to_the_files(arguments):
    """Below the address, whose part behind it is a path of this repository."""
    address = "https://example.org/tree/v1"
    links = [link for link in LINK.findall(arguments(address)["long_description"]) if link.startswith(address)]
    assert len(links) > 10
    for link in links:
        path = link.removeprefix(address + "/").partition("#")[0].removesuffix("?raw=true")
        assert (ROOT / path).exists(), link
        assert path.endswith(".png") == link.endswith("?raw=true"), "a picture is the file, not a page about it"


def test_every_package_is_in_the_wheel(arguments):
    packages = arguments()["package_dir"]
    folders = {str(path) for path in packages.values()}
    for top in ("deqdiff_fast", "kernels"):
        for init in (ROOT / top).rglob("__init__.py"):
            assert str(init.parent.relative_to(ROOT)) in folders
    assert (ROOT / packages["deqdiff_fast"] / "py.typed").is_file()


def test_pythons_that_are_claimed_are_built_and_tried(release):
    matrix, wheels, _ = release
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
    matrix, wheels, _ = release
    for name in (*matrix.FAST, *wheels.TESTS_OF_SDIST):
        assert (ROOT / name).exists(), name


@pytest.mark.skipif(os.environ.get("DEQDIFF_TEST_INSTALLED") != "1", reason="not the installed wheel")
def test_smoke():
    """What the release tries in an empty environment holds in this one."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "release" / "smoke.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "within" in done.stdout


REQUIRES = {
    "torch": {
        "sympy": "sympy>=1.13",
        "nvidia-cudnn-cu13": "nvidia-cudnn-cu13==9.1",
        "nvidia-cusolver-cu12": "nvidia-cusolver-cu12==11",
        "cuda-toolkit": "cuda-toolkit[cublas,cudart]==13.0",
    },
    "cuda-toolkit": {
        "nvidia-cublas": "nvidia-cublas==13.1.*",
        "nvidia-cuda-runtime": "nvidia-cuda-runtime==13.0.*",
    },
}


class TestTorchWithoutItsLibraries:
    """`install_torch`, with pip and the interpreter replaced."""

    @pytest.fixture
    def fake(self, release, tmp_path, monkeypatch):
        _, _, environments = release
        monkeypatch.setattr(environments, "TORCH_GIGABYTES", 0.0)

        class Fake(environments.Environment):
            def __init__(self, errors: list[str]) -> None:
                self.folder, self.errors, self.installed = tmp_path, errors, []
                self.metadata = tmp_path / "lib/python3.10/site-packages/torch-2.6.0.dist-info/METADATA"
                self.metadata.parent.mkdir(parents=True)
                self.metadata.write_text("Requires-Dist: sympy\nRequires-Dist: nvidia-cusolver-cu12==11\n\nabout\n")

            def install(self, *requirements: str) -> None:
                self.installed.append(requirements)

            def run(self, *command, given=""):
                error = self.errors.pop(0) if self.errors else ""
                return subprocess.CompletedProcess(command, int(bool(error)), "", error)

            def _requirements(self, package, extras=None):
                assert package == "torch" or extras == ["cublas", "cudart"]
                return REQUIRES[package]

        return Fake

    def test_only_what_import_misses_is_installed(self, fake):
        words = "ImportError: lib{}.so.12: cannot open shared object file: No such file or directory"
        made = fake([words.format("cudnn"), words.format("cublasLt")])
        made.install_torch("torch==2.6.0", [])
        assert made.installed == [
            ("--no-deps", "torch==2.6.0"),
            ("sympy>=1.13",),
            ("--no-deps", "cuda-toolkit==13.0"),
            ("--no-deps", "nvidia-cuda-runtime==13.0.*"),
            ("--no-deps", "nvidia-cudnn-cu13==9.1"),
            ("--no-deps", "nvidia-cublas==13.1.*"),
        ]
        assert made.metadata.read_text() == "Requires-Dist: sympy\n\nabout\n", "pip must not add the rest later"

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            ("ImportError: libodd.so.1: cannot open shared object file", "libodd.so, which none"),
            ("ImportError: libcudart.so.1: cannot open shared object file", "libcudart.so, which none"),
            ("ImportError: undefined symbol: f", "undefined symbol: f"),
        ],
    )
    def test_what_cannot_be_had_is_a_reason_to_skip(self, release, fake, error, said):
        with pytest.raises(release[2].Skip, match=said):
            fake([error]).install_torch("torch", [])

    def test_an_index_of_cpu_builds_is_left_to_pip(self, fake):
        made = fake([])
        made.install_torch("torch", ["--index-url", "a"])
        assert made.installed == [("torch", "--index-url", "a")]


def test_too_little_space_is_a_reason_to_skip(release, tmp_path):
    environments = release[2]
    with pytest.raises(environments.Skip, match="1e\\+09 GB needed"):
        environments.require_space(tmp_path, 1e9)
    environments.require_space(tmp_path, 0.0)
    assert environments.find_python("3.99") is None
