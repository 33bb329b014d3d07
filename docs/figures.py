"""The figures of the documentation, from real runs on the bundled model.

    python docs/figures.py            # writes docs/figures/*.png and docs/figures/facts.json

Needs: deqdiff_fast[diffusers,plot]. About a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.integrations.diffusers import LoadedModel, ddim_schedule, load_model

HERE = Path(__file__).resolve().parent
SOLVERS = ("picard", "deq-ddim", "triangular", "quasi-newton")


def errors(x: Tensor, reference: Tensor) -> Tensor:
    """(T + 1,) relative L2 error of every state of one sample; x, reference: (T + 1, 1, *shape)."""
    apart, size = (x - reference).flatten(1).double(), reference.flatten(1).double()
    return apart.norm(dim=1) / size.norm(dim=1)


def history(loaded: LoadedModel, solver: str, steps: int, seed: int) -> tuple[list[Tensor], int]:
    """The error of all states after every round of a solve at tol=1e-5; and the round at which tol=None would stop."""
    schedule = ddim_schedule(loaded.scheduler, steps)
    noise = torch.randn(1, *loaded.info.sample_shape, generator=torch.Generator().manual_seed(seed))
    sampler = dq.DEQSampler(
        loaded.model, schedule, solver=solver, tol=1e-5, spectrum=loaded.spectrum, window=steps, max_rounds=15
    )
    reference = sampler.serial(noise, return_trajectory=True).trajectory
    rounds: list[Tensor] = []

    def watch(info: dq.RoundInfo) -> None:
        if info.round <= 15:
            rounds.append(errors(torch.stack([info.state(i) for i in range(steps + 1)]), reference))

    sampler.sample(noise, callback=watch)
    plain = dq.DEQSampler(loaded.model, schedule, solver=solver, spectrum=loaded.spectrum, window=steps)
    return rounds, plain.sample(noise).stats.rounds


def call_cost(model: Any, shape: tuple[int, ...], rows: list[int], repeats: int = 5) -> list[float]:
    """Milliseconds of one call on n rows, medians."""
    cost = []
    for n in rows:
        x, t = torch.randn(n, *shape), torch.randint(0, 1000, (n,))
        times = []
        for k in range(repeats + 1):
            began = time.perf_counter()
            model(x, t)
            times.append(time.perf_counter() - began)
            if k == 0:
                times.clear()  # warm-up
        cost.append(1e3 * statistics.median(times))
    return cost


def draw(found: dict[str, Any], folder: Path) -> None:
    """Three PNG files out of the numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 110})
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, rounds in found["sample_error"].items():
        axes.semilogy(range(1, len(rounds) + 1), rounds, marker=".", label=name)
    axes.axhline(1e-2, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="round (one batched model call)", ylabel="relative error of the sample", ylim=(3e-7, 5))
    axes.legend()
    figure.savefig(folder / "convergence.png")

    grid = torch.tensor(found["state_error"]).clamp_min(1e-7).log10()
    figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
    image = axes.imshow(grid, aspect="auto", cmap="viridis", origin="lower", interpolation="nearest",
                        extent=(-0.5, grid.shape[1] - 0.5, 0.5, grid.shape[0] + 0.5))  # fmt: skip
    axes.set(xlabel="state (0 is the noise, the last one the sample)", ylabel="round")
    axes.grid(False)
    figure.colorbar(image, label="log10 relative error")
    figure.savefig(folder / "front.png")

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    per_row = [c / n / found["call_ms"][0] for c, n in zip(found["call_ms"], found["call_rows"])]
    axes.semilogx(found["call_rows"], per_row, marker=".", base=2)
    axes.set(xlabel="rows in one model call", ylabel="cost of a row, in single calls", ylim=(0, 1.1))
    figure.savefig(folder / "cost.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, default=HERE / "figures")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    loaded = load_model("bundled")
    found: dict[str, Any] = {"steps": args.steps, "sample_error": {}, "rounds_at_default_tol": {}}
    for solver in SOLVERS:
        rounds, stop = history(loaded, solver, args.steps, seed=0)
        found["sample_error"][solver] = [float(f"{float(r[-1]):.3e}") for r in rounds]
        found["rounds_at_default_tol"][solver] = stop
        if solver == "quasi-newton":
            found["state_error"] = [[float(f"{e:.2e}") for e in r.tolist()] for r in rounds]
    found["call_rows"] = args.rows
    found["call_ms"] = [round(c, 2) for c in call_cost(loaded.model, loaded.info.sample_shape, args.rows)]
    found["torch"], found["threads"] = torch.__version__, torch.get_num_threads()
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=HERE)
    found["commit"] = git.stdout.strip() or "unknown"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "facts.json").write_text(json.dumps(found) + "\n")
    draw(found, args.out)


if __name__ == "__main__":
    main()
