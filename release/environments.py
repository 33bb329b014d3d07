"""Environments in which wheels are tried: one Python, one torch, and what else a caller asks for.

On Linux the registry's torch is the CUDA build, whose libraries take 6 GB. On a machine without a device most of them
are loaded and never called, and some are not even loaded; so torch comes without its dependencies, and of NVIDIA's
packages only those whose absence stops `import torch`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_GIGABYTES = 9.0  # a CUDA build, its libraries, the suite's packages, and pip's copies while it unpacks them

# What a library is called, in the packages' words. Those that are not here have the library's own name.
PACKAGE_OF = {
    "cudart": "cuda-runtime",
    "cublasLt": "cublas",
    "cupti": "cuda-cupti",
    "nvrtc": "cuda-nvrtc",
    "nvToolsExt": "nvtx",
    "nvshmem_host": "nvshmem",
}
REQUIREMENTS = "import sys, importlib.metadata as m; print(*m.requires(sys.argv[1]) or (), sep='\\n')"
APPLIES = (
    "import sys; from pip._vendor.packaging.requirements import Requirement as R; "
    "print(*(str(r).split(';')[0] for r in map(R, sys.stdin.read().splitlines()) "
    "if r.marker is None or any(r.marker.evaluate({'extra': e}) for e in ['', *sys.argv[1:]])), sep='\\n')"
)


class Skip(Exception):
    """Why something cannot be tried here."""


def find_python(version: str) -> Path | None:
    """The interpreter of `version` ("3.12"): on the path, or one that pyenv has installed."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(home.glob(f"versions/{version}.*/bin/python{version}"))]
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"],
                              capture_output=True, text=True)  # fmt: skip
        if said.returncode == 0 and said.stdout.strip() == version:
            return Path(candidate)
    return None


def require_space(folder: Path, gigabytes: float) -> None:
    """Raise Skip where the disk under `folder` has less than that free."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise Skip(f"{free:.1f} GB free, {gigabytes:g} GB needed")


def last_words(text: str) -> str:
    """The last line that says something, of what a failed program printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ERROR") or "Error" in line]
    return (told or lines or ["no output"])[-1][:160]


class Environment:
    """A virtual environment made anew in `folder`."""

    def __init__(self, folder: Path, version: str) -> None:
        python = find_python(version)
        if python is None:
            raise Skip(f"no Python {version} on this machine")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        self.folder, self.python = folder, folder / "bin" / "python"

    def run(self, *command: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run the environment's Python with these arguments, outside the checkout."""
        return subprocess.run([self.python, *command], capture_output=True, text=True, input=given, cwd=self.folder)

    def install(self, *requirements: str) -> None:
        """`pip install`; raises Skip with pip's own words where that fails."""
        done = self.run("-m", "pip", "--disable-pip-version-check", "--quiet", "install", *requirements)
        if done.returncode != 0:
            raise Skip(f"pip install {' '.join(requirements)[:60]}: {last_words(done.stderr)}")

    def version(self, package: str) -> str:
        """The installed version, or "-"."""
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return self.run("-c", code).stdout.strip() or "-"

    def install_torch(self, requirement: str, pip_arguments: list[str]) -> None:
        """torch, so that it imports: in full with `pip_arguments` (an index of CPU builds), else as little as works."""
        if pip_arguments:
            self.install(requirement, *pip_arguments)
            return
        require_space(self.folder, TORCH_GIGABYTES)
        self.install("--no-deps", requirement)
        pins = self._requirements("torch")
        device = {name: pin for name, pin in pins.items() if re.match(r"nvidia|cuda", name)}
        self.install(*(pin for name, pin in pins.items() if name not in device))
        if "cuda-toolkit" in device:  # a package of nothing but the other packages' versions, in extras
            self.install("--no-deps", re.sub(r"\[.*?\]", "", device["cuda-toolkit"]))
            extras = re.findall(r"[\w-]+", device["cuda-toolkit"].partition("[")[2].partition("]")[0])
            device = {**self._requirements("cuda-toolkit", extras), **device}
        self._install_what_import_needs(device)
        self._forget_device_packages()

    def _requirements(self, package: str, extras: list[str] | None = None) -> dict[str, str]:
        """{name: requirement} of an installed package, those that apply to this platform and Python."""
        lines = self.run("-c", REQUIREMENTS, package).stdout
        found = self.run("-c", APPLIES, *(extras or ()), given=lines).stdout.splitlines()
        return {re.split(r"[^\w.-]", line.strip())[0].lower(): line.strip() for line in found if line.strip()}

    def _install_what_import_needs(self, device: dict[str, str]) -> None:
        """Import torch, and add the package of the library that it misses, until it misses none."""
        missing, first = "cudart", True  # without it, torch asks for all the others itself, loaded or not
        while True:
            name = PACKAGE_OF.get(missing, missing).lower()
            pins = [pin for package, pin in device.items() if re.fullmatch(rf"nvidia-{name}(-cu\d+)?", package)]
            if not pins and (device or not first):  # a CPU build has none of them
                raise Skip(f"torch needs lib{missing}.so, which none of its requirements is named after")
            if pins:
                self.install("--no-deps", *pins)
                device = {package: pin for package, pin in device.items() if pin not in pins}
            done = self.run("-c", "import torch")
            if done.returncode == 0:
                return
            lacking = re.search(r"lib(\w+)\.so\S*: cannot open shared object", done.stderr)
            if lacking is None:
                raise Skip(f"import torch: {last_words(done.stderr)}")
            missing, first = lacking[1], False

    def _forget_device_packages(self) -> None:
        """Take what was left out off torch's metadata: pip would add it with the next package that needs torch."""
        (metadata,) = self.folder.glob("lib/python*/site-packages/torch-*.dist-info/METADATA")
        lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not re.match(r"Requires-Dist: (nvidia|cuda)", line)]
        metadata.write_text("".join(kept), encoding="utf-8")


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, file=sys.stderr, flush=True)
