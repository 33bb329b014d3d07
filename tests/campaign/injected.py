"""Models and callbacks that fail: an error that says what it was, or the right sample; never a wrong one."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from problems import Problem, error, random_problem
from torch import Tensor

import deqdiff_fast as dq
from deqdiff_fast.memory import default_memory

ROUNDS = 12  # problems for each fault
Model = Callable[..., Any]


class Broken(Exception):
    """What a model raises here."""


def at_call(model: Model, number: int, what: Callable[[], BaseException]) -> Model:
    """The model, raising in its call `number`, once."""
    calls = iter(range(10**9))

    def failing(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise what()
        return model(x, t, **kwargs)

    return failing


def crowded(model: Model, rows: int) -> Model:
    """The model on a device that has room for so many rows."""

    def small(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        if len(x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return model(x, t, **kwargs)

    return small


def not_finite(model: Model, time: float, value: float) -> Model:
    def poisoned(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        hit = (t == time).view(-1, *[1] * (x.dim() - 1))
        return torch.where(hit, value, model(x, t, **kwargs))

    return poisoned


def writes(model: Model) -> Model:
    """The model, writing to all that it was given."""

    def rude(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        out = model(x.clone(), t.clone(), **kwargs).clone()
        x.fill_(torch.nan)
        t.zero_()
        return out

    return rude


def strided(model: Model) -> Model:
    """The model, whose outputs are views with gaps."""

    def view(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        out = model(x, t, **kwargs)
        return torch.stack([out, torch.full_like(out, torch.nan)], -1)[..., 0]

    return view


def reused(model: Model) -> Model:
    """The model, that returns the same memory in every call."""
    kept: dict[Any, Tensor] = {}

    def same(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        out = model(x, t, **kwargs)
        return kept.setdefault(out.shape, torch.empty_like(out)).copy_(out)

    return same


def coupled(model: Model) -> Model:
    def first_time(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        return model(x, t[:1].expand(len(x)), **kwargs)

    return first_time


def mixed_rows(model: Model) -> Model:
    def attending(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        out = model(x, t, **kwargs)
        return out + 0.3 * out.mean(0, keepdim=True)

    return attending


def random_rows(model: Model) -> Model:
    def dropping(x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        out = model(x, t, **kwargs)
        return out * torch.bernoulli(torch.full_like(out, 0.8))

    return dropping


HARMLESS: dict[str, Callable[[Model], Model]] = {
    "writes to its inputs": writes, "strided outputs": strided, "one output for all calls": reused,
    "a tuple": lambda model: lambda *a, **k: (model(*a, **k), None),
    "an object": lambda model: lambda *a, **k: type("Output", (), {"sample": model(*a, **k)})(),
    "room for 3 rows": lambda model: crowded(model, 3),
}  # fmt: skip
WRONG_ROWS = {"reads t[0]": coupled, "couples rows": mixed_rows, "dropout": random_rows}
EXCEPTIONS: tuple[type[BaseException], ...] = (Broken, ValueError, KeyboardInterrupt, SystemExit)
ANSWERS = (True, np.True_, torch.tensor(True), np.array([True]))


def compare(sampler: dq.DEQSampler, problem: Problem) -> str:
    """What is wrong with a sample, if anything."""
    noise = problem.noises[0]
    found = sampler.sample(noise, problem.kwargs, torch.Generator().manual_seed(problem.seed))
    off = error(found.sample, problem.reference(noise))[found.converged]
    limit = 3 * problem.outcome.tol + (2e-3 if noise.dtype == torch.bfloat16 else 0)
    return f"off by {float(off.max()):.1e}, converged" if len(off) and float(off.max()) > limit else ""


def harmless(problem: Problem, draw: random.Random) -> Iterator[str]:
    for name, change in HARMLESS.items():
        yield f"{name}: {compare(sampler_of(problem, change(problem.model)), problem)}"


def wrong_rows(problem: Problem, draw: random.Random) -> Iterator[str]:
    """Refused, or as the serial chain of that very model, or not converged."""
    if problem.chain.schedule.num_steps < 3 or problem.noises[0][0].numel() < 8:  # dropout of few numbers may drop none
        return
    for name in ("reads t[0]", "dropout") if len(problem.noises[0]) == 1 else WRONG_ROWS:
        sampler = sampler_of(problem, WRONG_ROWS[name](problem.model))
        try:
            said = compare(sampler, problem) if name == "reads t[0]" else ""
            if name != "reads t[0]":  # there is no serial chain to compare with: it must be refused, or made serially
                found = sampler.sample(problem.noises[0], problem.kwargs, torch.Generator().manual_seed(0))
                rounds = found.stats.finished_serially < problem.chain.schedule.num_steps
                said = "converged in rounds" if rounds and bool(found.converged.any()) else ""
            yield f"{name}: {said}"
        except dq.ModelOutputError:
            yield ""


def exceptions(problem: Problem, draw: random.Random) -> Iterator[str]:
    """They come out as they were, and the sampler works afterwards."""
    for kind in EXCEPTIONS:
        sampler = sampler_of(problem, at_call(problem.model, draw.randint(0, 3), kind))
        try:
            said = compare(sampler, problem)
        except kind:
            said = compare(sampler, problem)
        yield f"{kind.__name__}, and once more: {said}"
        active = default_memory().stats()["active"]
        yield f"{kind.__name__}: {f'{active} leases are left' if active else ''}"


def bad_numbers(problem: Problem, draw: random.Random) -> Iterator[str]:
    times = problem.chain.schedule.timesteps
    time, value = float(times[draw.randrange(len(times))]), draw.choice((torch.nan, torch.inf, -torch.inf))
    time = float(times.float()[0]) if times.is_floating_point() and problem.noises[0].dtype != torch.float64 else time
    sampler = sampler_of(problem, not_finite(problem.model, time, value))
    for solve in (sampler.sample, sampler.serial):
        try:
            found = solve(problem.noises[0], problem.kwargs, torch.Generator().manual_seed(0))
        except (dq.NonFiniteError, dq.ModelOutputError):
            continue
        bad = bool(found.converged[~found.sample.flatten(1).isfinite().all(1)].any())
        yield f"{value} at {time}, {solve.__name__}: {'converged' if bad else ''}"
        unseen = problem.chain.schedule.num_steps > found.stats.timesteps_evaluated * problem.chain.schedule.num_steps
        yield f"{value} at {time}, {solve.__name__}: {'' if unseen else 'not noticed, though evaluated'}"


def callbacks(problem: Problem, draw: random.Random) -> Iterator[str]:
    def sample(callback: Callable[[Any], object]) -> Any:
        sampler = sampler_of(problem, problem.model)
        return sampler.sample(problem.noises[0], problem.kwargs, torch.Generator().manual_seed(0), callback)

    for answer in ANSWERS:
        seen: list[int] = []
        found = sample(lambda info, answer=answer, seen=seen: (seen.append(info.round), answer)[1])
        yield f"a callback that returns {answer!r}: {'' if len(seen) <= 1 else f'called {len(seen)} times'}"
        done = found.stats.stop_reason != "callback" or len(seen) == 1
        yield f"a callback that returns {answer!r}: {'' if done else found.stats.stop_reason}"
    for kind in EXCEPTIONS:

        def raises(info: Any, kind: type[BaseException] = kind) -> None:
            raise kind

        with contextlib.suppress(kind):
            sample(raises)
            yield f"a callback that raises {kind.__name__}: swallowed"
        active = default_memory().stats()["active"]
        yield f"a callback that raises {kind.__name__}: {f'{active} leases are left' if active else ''}"


def sampler_of(problem: Problem, model: Model) -> dq.DEQSampler:
    """The problem's own settings, on another model."""
    settings = {key: value for key, value in problem.settings.items() if key not in ("max_rounds", "on_failure")}
    return dq.DEQSampler(model, problem.chain.schedule, **settings)


def run(seed: int) -> list[str]:
    """Every fault on a number of random problems. Returns complaints."""
    complaints, draw = [], random.Random(seed)
    for part in (harmless, wrong_rows, exceptions, bad_numbers, callbacks):
        number, left = 2 * 10**6, ROUNDS
        while left:
            problem, number = random_problem(seed, number), number + 1
            small = problem.chain.schedule.num_steps * problem.noises[0].numel() < 5000
            if not small or problem.outcome.family in ("experts", "nearest"):
                continue
            left -= 1
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    said = list(part(problem, draw))
                except Exception as caught:
                    said = [f"{type(caught).__name__}: {' '.join(str(caught).split())[:200]}"]
            about = f"{part.__name__}, problem {number - 1}, {problem.outcome.chain}, {problem.outcome.what}"
            complaints += [f"{about}: {line}" for line in said if line and not line.endswith(": ")]
    return complaints
