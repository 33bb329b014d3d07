"""What the commands share: a model with its schedule and noise, solves of it, and their progress bar."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..integrations.diffusers import ModelInfo, ddim_schedule, load_model
from ..planner.free_memory import free_bytes
from ..sampler import DEQSampler
from ..schedule import Schedule
from ..solution import RoundInfo, Solution
from ._devices import own_device
from ._output import CommandError

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
STREAM_BYTES = 5000  # of a generator


@dataclass
class Problem:
    """One chain to solve, the same each time it is asked for: noise and frozen step noise come from `seed`."""

    model: torch.nn.Module
    schedule: Schedule
    info: ModelInfo
    seed: int
    device: torch.device
    dtype: torch.dtype
    kwargs: dict[str, Any] = field(default_factory=dict)  # of samplers and inverters
    draft: Any = None  # of samplers
    make_schedule: Callable[[int], Schedule] | None = None  # of that many steps

    def with_steps(self, steps: int) -> Problem:
        """The same model along a chain of that many steps."""
        assert self.make_schedule is not None
        return replace(self, schedule=self.make_schedule(steps))

    def streams(self, batch: int) -> list[torch.Generator]:
        """A fresh generator for each image."""
        return [torch.Generator().manual_seed(self.seed * 1_000_003 + k) for k in range(batch)]

    def check_room(self, batch: int) -> None:
        """Refuse a batch that cannot be: where memory is promised and then not there, the process is killed."""
        numel = math.prod(self.info.sample_shape)
        for device, each in (
            (torch.device("cpu"), 8 * numel + STREAM_BYTES),
            (self.device, 2 * numel * self.dtype.itemsize),
        ):
            free = free_bytes(device)
            if free is not None and batch * each > free:
                raise CommandError(
                    f"a batch of {batch} images: their noise alone takes {batch * each / 2**30:.1f} GiB of memory "
                    f"({device.type}), and {free / 2**30:.1f} GiB are free; ask for fewer at a time"
                )

    def noise(self, batch: int) -> tuple[Tensor, list[torch.Generator]]:
        """(batch, C, H, W) initial states and their generators. Image k has a stream of its own, whatever the batch."""
        self.check_room(batch)
        streams = self.streams(batch)
        noise = torch.stack([torch.randn(self.info.sample_shape, generator=stream) for stream in streams])
        noise *= self.schedule.init_noise_sigma
        return noise.to(self.device, self.dtype), streams

    def sampler(self, **settings: Any) -> DEQSampler:
        """That of the chain; `settings` win over the problem's own."""
        return DEQSampler(self.model, self.schedule, **{**self.kwargs, "draft": self.draft, **settings})


def pick_device(name: str, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device called `name`, or "auto". Raises CommandError for one that cannot compute here in that dtype."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device, dtype=dtype).sum())
    except Exception as error:  # each of torch's backends has its own way to say that it is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CommandError(f"--device {name}: not usable here ({reason}); `deqdiff-fast info` lists devices") from error
    return device


def load_problem(
    model: str,
    *,
    steps: int,
    eta: float = 0.0,
    spacing: str | None = None,
    clip: bool | None = None,
    seed: int,
    device: str,
    dtype: str = "float32",
    max_batch: int | None = None,
    group: str | None = None,
) -> Problem:
    """Load `model` and lay out its chain. Raises CommandError for a model that needs more than noise and time."""
    precision = DTYPES[dtype]
    where = pick_device(own_device(device), precision)
    loaded = load_model(model, device=where, dtype=precision)
    if loaded.info.conditional:
        raise CommandError(
            f"{model} is a {loaded.info.model_class}, which needs {loaded.info.conditional}; the command line samples "
            "unconditional models: use DEQSampler with model_kwargs in Python"
        )
    make = partial(ddim_schedule, loaded.scheduler, eta=eta, spacing=spacing, clip=clip)
    options = {"max_batch": max_batch, "spectrum": loaded.spectrum, "group": group}
    return Problem(loaded.model, make(steps), loaded.info, seed, where, precision, options, loaded.draft, make)


def solve(
    problem: Problem,
    batch: int,
    *,
    label: str,
    on_round: Callable[[RoundInfo], None] | None = None,
    **settings: Any,
) -> Solution:
    """One parallel solve; the bar counts final timesteps and shows round, converged samples and residual."""
    noise, streams = problem.noise(batch)
    sampler = problem.sampler(**settings)

    def text(info: RoundInfo) -> str:
        done = int((info.front >= info.num_steps).sum())
        return f"round {info.round}/{info.max_rounds}, converged {done}/{batch}"

    with progress(problem, batch, label, "row", text) as advance:

        def callback(info: RoundInfo) -> None:
            advance(info)
            if on_round is not None:
                on_round(info)

        return sampler.sample(noise, generator=streams, callback=callback)


@contextmanager
def progress(
    problem: Problem, batch: int, label: str, unit: str, text: Callable[[RoundInfo], str]
) -> Iterator[Callable[[RoundInfo], None]]:
    """A bar over the final timesteps of all samples, as a callback; `text` and the residual stand behind it."""
    total = problem.schedule.num_steps * batch
    with tqdm(total=total, desc=label, unit=unit, file=sys.stderr, dynamic_ncols=True) as bar:

        def advance(info: RoundInfo) -> None:
            bar.set_postfix_str(f"{text(info)}, residual {float(info.residual.max()):.1e}", refresh=False)
            bar.update(int(info.front.sum()) - bar.n)

        yield advance


def solve_serially(problem: Problem, batch: int) -> Solution:
    """The ordinary chain from the same noise."""
    noise, streams = problem.noise(batch)
    return problem.sampler().serial(noise, generator=streams)
