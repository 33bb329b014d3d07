"""diffusers pipelines, tiny ones of each family: rounds and evaluations at tolerance, and what surrounds the model."""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from deqdiff_fast.integrations.pipelines.components import denoisers
from deqdiff_fast.integrations.pipelines.parallel import parallelize, restore

from ._common import environment, markdown, module_at, note, positive_float, positive_int, spread, summary, write_json
from ._problems import relative_error

SCHEDULERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=[10, 25, 50], help="default 10 25 50")
    parser.add_argument("--solver", default="quasi-newton", help="default quasi-newton")
    parser.add_argument("--tol", type=positive_float, help="default: the sampler's own")
    parser.add_argument("--repeats", type=positive_int, default=3, help="calls of each kind after a first (default 3)")


class Stopwatch:
    """Adds up the time and the calls of some modules."""

    def __init__(self, modules: list[torch.nn.Module], device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.seconds, self.calls = 0.0, 0
        self.modules = modules

    @contextmanager
    def running(self) -> Iterator[None]:
        """By their classes, not by hooks, which count calls: with them the loop would be left as it is."""
        kinds: list[Any] = list({type(module) for module in self.modules})
        plain: Any = torch.nn.Module.__call__

        def timed(called: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            start = self.now()
            output = plain(called, *args, **kwargs)
            self.seconds += self.now() - start
            self.calls += 1
            return output

        for kind in kinds:
            kind.__call__ = timed
        try:
            yield
        finally:
            for kind in kinds:
                del kind.__call__

    def now(self) -> float:
        """Seconds, when everything that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def run(args: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of diffusers, about configurations of old checkpoints
    from diffusers.utils import logging
    from transformers.utils import logging as more_logging

    logging.set_verbosity_error()
    more_logging.set_verbosity_error()
    tiny = module_at("tests", "tiny_pipelines.py")
    known = [*tiny.BUILDERS, *tiny.MORE]
    names = args.families or known
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"--families: expected some of {', '.join(known)}, got {', '.join(missing)}")
    facts, rows = environment(args.device), []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for rule in _schedulers(name, tiny):
                note(f"{name}, {rule} ...")
                try:
                    pipe = tiny.build(name, Path(folder), rule).to(args.device)
                except ImportError as error:
                    note(f"{name} left out: {str(error).strip().splitlines()[0]}")
                    continue
                watch = Stopwatch([part.module for part in denoisers(pipe).values()], args.device)
                for steps in args.steps:
                    given = tiny.arguments(name, num_inference_steps=steps)
                    rows.append(
                        {"family": name, "scheduler": rule}
                        | measure(args, pipe, watch, lambda given=given, pipe=pipe: tiny.call(pipe, **given)[0])
                    )
                    write_json(args, facts, rows)
    print(f"{summary(facts)}\nrandom weights, 2 samples, {args.solver}, tol {args.tol or 'default'}\n")
    header = (
        "family", "scheduler", "T", "rounds", "evaluations / T", "error", "plain: model, ms", "outside, ms",
        "parallel: model, ms", "outside, ms",
    )  # fmt: skip
    print(markdown(header, [_cells(row) for row in rows]))
    print("\nHow each was recognised, by the calls of its loop (x: the state; u, c: without and with a prompt):\n")
    seen = {row["family"]: row["recognised"] for row in rows}
    print(markdown(("family", "steps and calls"), [(name, "; ".join(said)) for name, said in seen.items()]))
    print(
        f"\nMedians of {args.repeats} calls with (smallest..largest). Outside: the whole call without its denoiser, so"
    )
    print("text encoders and decoder are part of it on both sides. Error: relative L2 of the worse sample.")
    return 0


def _schedulers(name: str, tiny: ModuleType) -> tuple[str, ...]:
    if name in tiny.MORE:
        return (tiny.MORE[name]()[1],)
    if name.startswith(("sd3", "flux")):
        return FLOW
    return {"ddim": SCHEDULERS[:1], "ddpm": ("DDPMScheduler",), "dit": SCHEDULERS[:2]}.get(name, SCHEDULERS)


def measure(args: argparse.Namespace, pipe: Any, watch: Stopwatch, call: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """The same call of the plain and of the parallel pipeline, with the figures of its solution."""
    plain, reference = _timed(args, watch, call)
    parallelize(pipe, solver=args.solver, tol=args.tol)
    parallel, sample = _timed(args, watch, call)
    recognised = list(pipe.last_recording)
    stats, steps = pipe.last_solution.stats, vars(pipe).get("_num_timesteps") or len(pipe.scheduler.timesteps)
    restore(pipe)
    return {
        "steps": steps,
        "rounds": stats.rounds,
        "finished_serially": stats.finished_serially,
        "evaluations": stats.model_evals / (len(sample) * steps),
        "error": float(relative_error(sample, reference).max()),
        "recognised": recognised,
        "plain": plain,
        "parallel": parallel,
    }


def _timed(
    args: argparse.Namespace, watch: Stopwatch, call: Callable[[], torch.Tensor]
) -> tuple[list[dict[str, float]], torch.Tensor]:
    runs, result = [], call()
    for _ in range(args.repeats):
        watch.seconds, watch.calls, start = 0.0, 0, watch.now()
        with watch.running():
            result = call()
        whole = watch.now() - start
        runs.append({"model": watch.seconds, "outside": whole - watch.seconds, "calls": watch.calls})
    return runs, result


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = [
        spread([1e3 * run[part] for run in row[side]], ".1f")
        for side in ("plain", "parallel")
        for part in ("model", "outside")
    ]
    rounds = str(row["rounds"]) + (f" + {row['finished_serially']} serial steps" if row["finished_serially"] else "")
    scheduler = row["scheduler"].removesuffix("Scheduler").removesuffix("Discrete")
    start = (row["family"], scheduler, str(row["steps"]), rounds, f"{row['evaluations']:.2f}", f"{row['error']:.1e}")
    return (*start, *times)
