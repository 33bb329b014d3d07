"""Builds deqdiff_fast._C with CMake. Everything declarative is in pyproject.toml.

DEQDIFF_FAST_NO_EXT=1 builds a pure wheel without the extension (the reference backend serves then). CMAKE_ARGS: more
arguments for CMake, such as those of a cross-compiling build (release/wheels.py).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"


class CMakeBuild(build_ext):
    """Runs CMake for the one extension of this project; it knows all sources itself."""

    def build_extension(self, ext: Extension) -> None:
        cmake = self._cmake()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S", str(ROOT),
            "-B", str(build),
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DDEQDIFF_OUTPUT_DIRECTORY={output}",
            f"-DDEQDIFF_VERSION={VERSION}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self._pybind11()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        cache = build / "CMakeCache.txt"
        if cache.exists():  # a build environment of an earlier isolated build is gone by now
            cache.unlink()
        self._run(configure, "configuring")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        self._run([cmake, "--build", str(build), "--target", "_C", "--parallel", jobs], "compiling")

    @staticmethod
    def _cmake() -> str:
        found = shutil.which("cmake")
        if found is None:
            raise SystemExit(
                "deqdiff_fast: CMake was not found. Install it (pip install cmake ninja) or build without "
                "--no-build-isolation; DEQDIFF_FAST_NO_EXT=1 builds a pure Python package without the C++ core."
            )
        return found

    @staticmethod
    def _pybind11() -> str:
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                "deqdiff_fast: pybind11 was not found. Install it (pip install pybind11) or build without "
                "--no-build-isolation."
            ) from None
        return str(pybind11.get_cmake_dir())

    @staticmethod
    def _run(command: list[str], doing: str) -> None:
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            why = f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else str(error)
            raise SystemExit(
                f"deqdiff_fast: {doing} the C++ core failed ({why}); the output is above. It needs a C++17 compiler "
                "(Debian: apt install g++; Fedora: dnf install gcc-c++) and the Python headers. "
                "DEQDIFF_FAST_NO_EXT=1 builds a pure Python package without it."
            ) from None


def subpackages(folder: str, name: str) -> dict[str, str]:
    """Packages below `folder`, under the import name `name`: {import name: path}."""
    found = {name: folder}
    for init in sorted((ROOT / folder).rglob("__init__.py")):
        relative = init.parent.relative_to(ROOT / folder)
        if relative.parts:
            found[".".join((name, *relative.parts))] = str(Path(folder) / relative)
    return found


def readme() -> str:
    """README.md for a page that has no files beside it: links to files become links below DEQDIFF_FAST_URL, or text.

    DEQDIFF_FAST_URL is where the files of this version can be read; the release workflow sets it to its repository.
    """
    path, base = ROOT / "README.md", os.environ.get("DEQDIFF_FAST_URL", "").rstrip("/")

    def away(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if base:
            return f"{picture}[{words}]({base}/{target}{'?raw=true' if picture else ''})"
        file = target.partition("#")[0]
        return words if file in words else f"{words} ({file})"

    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.sub(r"(!?)\[([^]]*)\]\((?!https?://|#)([^)]+)\)", away, text)


packages = {
    **subpackages("deqdiff_fast", "deqdiff_fast"),
    **subpackages("kernels", "deqdiff_fast.kernels"),
    "deqdiff_fast.assets": "assets",
}
pure = os.environ.get("DEQDIFF_FAST_NO_EXT", "0") not in ("", "0")
setup(
    version=VERSION,
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=list(packages),
    package_dir=packages,
    package_data={
        "deqdiff_fast": ["py.typed", "*.pyi"],
        "deqdiff_fast.assets": ["**/*.json", "**/*.safetensors", "**/*.md"],
    },
    include_package_data=False,
    ext_modules=[] if pure else [Extension("deqdiff_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
