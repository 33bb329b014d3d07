"""A one-step student against what costs as much: the teacher's own short chains, and a plain transformer.

GET and transformer have as many parameters, are trained by `examples/train_get.py` on the same pairs for the same
minutes of processor time, one after the other, and what is written is resumed: interrupted, the same command goes on.
The error is that of samples against the teacher's, relative L2, the mean over noises that nobody was trained on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.distillation import GET, Pairs

from ._common import environment, markdown, module_at, note, positive_float, positive_int, summary, write_json
from ._plain_transformer import PlainTransformer
from ._problems import Problem, add_model_arguments, load, relative_error

STEPS, SHORT, BATCH, SHOWN, SAME = [1, 2, 4, 8, 16, 32], (1, 2, 3, 4), 50, 8, 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--pairs", type=Path, required=True, help="folder that `deqdiff-fast pairs` has made")
    parser.add_argument("--steps", type=positive_int, required=True, help="T of the teacher's chain in these pairs")
    parser.add_argument("--held-out", type=positive_int, default=500, help="pairs, the last ones (default 500)")
    parser.add_argument("--minutes", type=positive_float, default=30.0, help="of training, each (default 30)")
    parser.add_argument("--out", type=Path, default=Path("build/students"), help="default build/students")
    parser.add_argument("--grid", type=Path, help="write a picture of samples there")
    parser.add_argument("--only", choices=("GET", "transformer"), help="train that one, and compare nothing")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="last: arguments of train_get.py")


def run(args: argparse.Namespace) -> int:
    problem, facts, folder = load(args), environment(args.device), Pairs(args.pairs)
    pairs = [folder[k] for k in range(len(folder))]  # in memory: reading is no part of training
    script = module_at("examples", "train_get.py")
    makers: dict[str, Callable[..., Any]] = {
        "GET": script.build,
        "transformer": lambda *given: PlainTransformer.as_large_as(script.build(*given)),
    }
    trained = {
        name: _trained(args, script, pairs, name, make) for name, make in makers.items() if args.only in (None, name)
    }
    if args.only is not None:
        return 0
    items = [pairs[k] for k in range(len(pairs) - args.held_out, len(pairs))]
    noise, target = (torch.stack([item[name] for item in items]).to(args.device) for name in ("noise", "sample"))
    rows, shown = [], {"teacher": target[:SHOWN]}
    for name, calls, sampler in _samplers(args, problem, trained):
        sample, seconds = _samples(sampler, noise)
        errors = relative_error(sample, target)
        shown[name] = sample[:SHOWN]
        rows.append(
            {"name": name, "calls": calls, "error": float(errors.mean()), "worst": float(errors.max()), "ms": seconds}
        )
        note(f"{name}: {rows[-1]['error']:.3f}")
    if rows[-1]["error"] > SAME:  # the teacher's whole chain
        raise ValueError(f"--steps {args.steps}: the samples of these pairs are not of that chain of {problem.name}")
    for name, training in trained.items():
        rows.append({"name": f"{name}, training"} | _training_facts(training))
    write_json(args, facts, rows)
    if args.grid is not None:
        _draw(shown, args.grid)
    kept = f"{len(pairs) - args.held_out} pairs, {args.held_out} held out"
    print(f"{summary(facts)}\n{problem.name}, T = {args.steps}, {kept}")
    for name, training in trained.items():
        print(f"{name}: " + ", ".join(f"{value} {key}" for key, value in _training_facts(training).items()))
    header = ("sample by", "model calls", "error", "largest", "ms a sample")
    print("\n" + markdown(header, [_cells(row) for row in rows if "error" in row]))
    return 0


def _trained(
    args: argparse.Namespace, script: ModuleType, pairs: list[dict[str, Any]], name: str, make: Callable[..., Any]
) -> Any:  # fmt: skip
    """The training of train_get.py, at its end."""
    out = args.out / name
    out.mkdir(parents=True, exist_ok=True)
    words = [str(args.pairs), "--out", str(out), "--minutes", str(args.minutes), "--held-out", str(args.held_out)]
    given = script.arguments([*words, "--device", args.device, *args.train])
    given.resume = given.resume or (out / "checkpoint.pt").exists()
    torch.manual_seed(given.seed)
    training = script.Training(given, pairs, make)
    note(f"{name}: {sum(p.numel() for p in training.model.parameters()) / 1e6:.2f} M parameters")
    training.run()
    return training


def _training_facts(training: Any) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()), "steps of the optimizer": training.step,
        "seconds": round(training.seconds),
    }  # fmt: skip


def _samplers(
    args: argparse.Namespace, problem: Problem, trained: dict[str, Any]
) -> list[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """(name, model calls, noises -> samples); the teacher's whole chain is the last."""
    found: list[tuple[str, str, Callable[[Tensor], Tensor]]] = []
    student, plain = trained["GET"].average, trained["transformer"].average
    found.append(("transformer", "1", plain))
    found += [(f"GET, {steps} equilibrium steps", "1", _stepped(student, steps)) for steps in STEPS]
    for steps in (*SHORT, args.steps):
        spacing = "trailing" if steps < args.steps else None  # a short chain from the highest noise on: the better one
        sampler = dq.DEQSampler(problem.model, problem.schedule(steps, 0.0, spacing))
        found.append((f"teacher, DDIM, {steps} steps", str(steps), lambda x, s=sampler: s.serial(x).sample))
    return found


def _stepped(student: GET, steps: int) -> Callable[[Tensor], Tensor]:
    return lambda noise: student(noise, max_steps=steps)


@torch.no_grad()
def _samples(sampler: Callable[[Tensor], Tensor], noise: Tensor) -> tuple[Tensor, float]:
    """(samples, processor milliseconds of this thread for each)."""
    began = time.thread_time()
    found = torch.cat([sampler(part) for part in noise.split(BATCH)])
    return found, 1e3 * (time.thread_time() - began) / len(noise)


def _draw(shown: dict[str, Tensor], path: Path) -> None:
    """A row of samples for each."""
    from PIL import Image

    rows = torch.stack(list(shown.values())).float().clamp(-1, 1).cpu()  # (rows, n, C, H, W)
    pixels = ((rows + 1) * 127.5).round().byte().permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    found = Image.fromarray(pixels.contiguous().numpy())
    found.resize((found.width * 2, found.height * 2), Image.Resampling.NEAREST).save(path)


def _cells(row: dict[str, Any]) -> list[str]:
    return [row["name"], row["calls"], f"{row['error']:.3f}", f"{row['worst']:.3f}", f"{row['ms']:.3g}"]
