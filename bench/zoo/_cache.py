"""Trained weights, kept in a folder under a hash of what they were trained by."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import ROOT, _policy
from .._common import note
from . import _data, _nets, _recipes, _train
from ._recipes import RECIPES

FOLDER = ROOT / "build" / "zoo"
POLICY_STEPS = 1000
NAMES = (*RECIPES, "policy")


def settings(name: str, steps: int | None = None) -> dict[str, str | int]:
    """What a model is trained by: the recipe's numbers and the code that reads them. steps: in place of its own."""
    if name == "policy":
        return {"name": name, "steps": steps or POLICY_STEPS, "code": _code(_policy)}
    recipe = RECIPES[name]
    return {
        "name": name, "steps": steps or recipe.steps, "batch": recipe.batch, "rate": recipe.rate, "seed": recipe.seed,
        "code": _code(_data, _nets, _recipes, _train),
    }  # fmt: skip


def _code(*modules: object) -> str:
    """A hash of the modules' code, comments, layout and docstrings apart."""
    found = hashlib.sha256()
    for module in modules:
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [part for part in body if not _is_text(part)]  # type: ignore[attr-defined]
        found.update(ast.dump(tree).encode())
    return found.hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def path(folder: Path, name: str, steps: int | None = None) -> Path:
    key = hashlib.sha256(json.dumps(settings(name, steps), sort_keys=True).encode()).hexdigest()
    return folder / f"{name}-{key[:16]}.safetensors"


def trained(name: str, folder: Path = FOLDER, steps: int | None = None) -> nn.Module:
    """The model of that name, from the folder or trained now and put there. Raises ImportError, OSError."""
    file = path(folder, name, steps)
    if file.is_file():
        with torch.random.fork_rng(devices=[]):
            net = (_policy.Policy if name == "policy" else RECIPES[name].build)()
        net.load_state_dict(load_file(file))
        return net.eval().requires_grad_(False)
    chosen = settings(name, steps)
    note(f"training {name}: {chosen['steps']} steps ...")
    started = time.perf_counter()
    count = int(chosen["steps"])
    net = _policy.fitted(count) if name == "policy" else _train.fit(name, RECIPES[name], count)
    note(f"training {name}: {time.perf_counter() - started:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")  # two runs may train side by side; the last one to finish stays
    save_file(net.state_dict(), unfinished, {key: str(value) for key, value in chosen.items()})
    unfinished.replace(file)
    return net
