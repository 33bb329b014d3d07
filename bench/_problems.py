"""What is sampled: an analytic Gaussian mixture, or a diffusers model; and the solvers that are compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.loop.base import Solver
from deqdiff_fast.schedule import timesteps
from deqdiff_fast.solver import NAMED, resolve

from ._common import positive_int

ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
TRAIN_STEPS = len(ABAR)
FULL_ROUNDS = "quasi-newton, full rounds"


class Mixture:
    """E[eps | x] of data from a mixture of isotropic Gaussians: a model whose every value is known exactly."""

    def __init__(self, shape: tuple[int, ...], components: int = 10, variance: float = 0.05) -> None:
        draw = torch.Generator().manual_seed(0)
        self.means = 0.6 * torch.randn(components, *shape, generator=draw).flatten(1)
        self.variance = variance

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        abar = ABAR.to(x.device)[t].to(x.dtype)[:, None]
        means, flat = self.means.to(x.device, x.dtype), x.flatten(1)
        total = abar * self.variance + 1 - abar
        # |x - alpha m|^2 without its |x|^2, which the softmax over the components cancels
        share = ((2 * abar.sqrt() * (flat @ means.T) - abar * means.square().sum(1)) / (2 * total)).softmax(1)
        return ((1 - abar).sqrt() * (flat - abar.sqrt() * (share @ means)) / total).view_as(x)


@dataclass
class Problem:
    """A model, its schedules and the shape of one sample."""

    name: str
    model: Callable[..., Any]
    schedule: Callable[..., dq.Schedule]  # of steps, eta and, where a benchmark varies it, the spacing
    shape: tuple[int, ...]
    device: str
    spectrum: dq.SpectralSlope | None = None
    draft: Callable[..., Any] | None = None

    @property
    def aids(self) -> dict[str, Any]:
        """What a sampler of the model is given beside it."""
        return {"spectrum": self.spectrum, "draft": self.draft}

    def noise(self, seeds: range) -> Tensor:
        """(len(seeds), *shape): one noise for each seed, whatever the other seeds are."""
        drawn = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.device)

    def generators(self, seeds: range) -> list[torch.Generator]:
        """Fresh generators of the frozen noise, one for each sample: the same draws for every solver."""
        return [torch.Generator().manual_seed(10**6 + seed) for seed in seeds]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="bundled", help="'bundled' (default), 'mixture', or a diffusers folder or hub name"
    )
    parser.add_argument(
        "--alone", action="store_true", help="without the draft and the spectrum that the model brings, as a stranger's"
    )
    parser.add_argument(
        "--betas", choices=("own", "linear"), default="own", help="linear: the chain of DDPM's betas, 1e-4 to 0.02; a "
        "model of other ones is asked at that of its times which has the noise level"
    )  # fmt: skip
    parser.add_argument("--size", type=positive_int, default=32, help="image size of the mixture (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first noise (default 0)")
    parser.add_argument(
        "--max-batch", type=positive_int, help="most rows in one model call (default: the sampler's own)"
    )


def load(args: argparse.Namespace) -> Problem:
    """The problem that the arguments of `add_model_arguments` name."""
    if args.model == "mixture":
        shape = (3, args.size, args.size)
        return Problem("mixture", Mixture(shape), linear_betas, shape, args.device)
    from deqdiff_fast.integrations.diffusers import ddim_schedule, load_model

    loaded = load_model(args.model, device=args.device)
    if loaded.info.conditional:
        raise ValueError(f"--model {args.model}: it needs {loaded.info.conditional}; the benchmarks give x and t only")

    def schedule(steps: int, eta: float, spacing: str | None = None) -> dq.Schedule:
        return ddim_schedule(loaded.scheduler, steps, eta=eta, spacing=spacing)

    problem = Problem(
        Path(args.model).name, loaded.model, schedule, loaded.info.sample_shape, args.device,
        None if args.alone else loaded.spectrum, None if args.alone else loaded.draft,
    )  # fmt: skip
    if getattr(args, "betas", "own") == "linear":
        problem.name, problem.schedule = f"{problem.name}, linear betas", linear_betas
        times = same_levels(loaded.scheduler.alphas_cumprod.double()).to(args.device, torch.float32)
        problem.model = at_times(problem.model, times)
        problem.draft = None if problem.draft is None else at_times(problem.draft, times)
    return problem


def linear_betas(steps: int, eta: float, spacing: str | None = None) -> dq.Schedule:
    """The chain of DDPM's betas (Ho et al. 2020, arXiv 2006.11239)."""
    return dq.Schedule.ddim(ABAR, timesteps(TRAIN_STEPS, steps, spacing or "leading"), eta=eta)


def same_levels(abar: Tensor) -> Tensor:
    """(1000,) times, between the integers, at which a model of those alphas_cumprod, (N,), has the noise of `ABAR`."""
    level = -torch.logit(ABAR)
    own = -torch.logit(abar)
    after = torch.searchsorted(own, level).clamp(1, len(own) - 1)
    part = (level - own[after - 1]) / (own[after] - own[after - 1])
    return (after - 1 + part).clamp(0, len(own) - 1)


def at_times(model: Callable[..., Any], times: Tensor) -> Callable[..., Any]:
    """The model asked at times[t] in the place of t."""
    return lambda x, t, **kwargs: model(x, times[t], **kwargs)


def solvers(names: list[str] | None, drafted: bool = False) -> dict[str, Solver]:
    """The named solvers, the trajectory scope, and quasi-Newton on all timesteps from the first round on.

    drafted: there is a draft of the model. Each once; the one that "auto" stands for says so.
    """
    known: dict[str, Solver] = {
        name: resolve(name) for name in NAMED if name != "auto" and (drafted or name != "draft")
    }
    known["trajectory"] = dq.Anderson(scope="trajectory")
    known[FULL_ROUNDS] = dq.QuasiNewton(nodes=False)
    automatic = resolve("draft" if drafted else "auto")
    twins = [name for name, solver in known.items() if solver == automatic]
    if not twins:
        known["auto"] = automatic
    if names:
        missing = [name for name in names if name not in known and name != "auto"]
        if missing:
            raise ValueError(f"--solvers: expected some of {', '.join([*known, 'auto'])}, got {', '.join(missing)}")
        wanted = {twins[0] if name == "auto" and twins else name for name in names}
        known = {name: solver for name, solver in known.items() if name in wanted}
    return {f"{name} = auto" if name in twins else name: solver for name, solver in known.items()}


def warm_up(problem: Problem) -> None:
    """A short solve, so that what is loaded on first use does not count in the first one timed."""
    sampler = dq.DEQSampler(problem.model, problem.schedule(4, 0.0), solver="quasi-newton", spectrum=problem.spectrum)
    sampler.sample(problem.noise(range(1)))
    sampler.serial(problem.noise(range(1)))


def relative_error(sample: Tensor, reference: Tensor) -> Tensor:
    """(B,) relative L2 error."""
    apart, size = (sample.double() - reference.double()).flatten(1), reference.double().flatten(1)
    return apart.square().sum(1).sqrt() / size.square().sum(1).sqrt()
