"""Run by the processes of test_faults.py: what goes wrong on one rank is raised on all, and the next solve is right."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch
from problems import Denoiser, apart, noise, schedule
from rank_launch import run_checks
from torch import Tensor
from torch import distributed as dist

import deqdiff_fast as dq
from deqdiff_fast.ranks.group import Ranks


class Faulty(Denoiser):
    """A model that fails in its call number `when`, on one rank; `fault` makes the fault."""

    def __init__(self, rank: int, when: int, fault: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.rank, self.when, self.fault, self.calls = rank, when, fault, 0
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.when and dist.get_rank() == self.rank:
            return self.fault(x)
        return super().forward(x, t, **kwargs)


def raising(error: BaseException) -> Callable[[Tensor], Any]:
    def fault(x: Tensor) -> Any:
        raise error

    return fault


def raised(work: Callable[[], Any]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


def next_solve_is_right() -> None:
    model, chain, x = Denoiser().requires_grad_(False), schedule(), noise(2)
    found = dq.DEQSampler(model, chain, solver="quasi-newton", tol=1e-6, group="world").sample(x)
    assert apart(found.sample, dq.DEQSampler(model, chain).serial(x).sample) < 1e-5


def sampler(model: Any, **options: Any) -> dq.DEQSampler:
    return dq.DEQSampler(model, schedule(), **({"solver": "picard", "group": "world"} | options))


def same_error(error: BaseException | None) -> BaseException:
    """All ranks have raised the same."""
    said = Ranks.of("world").exchange_text(f"{type(error).__name__}: {error}")
    assert len(set(said)) == 1, said
    assert error is not None
    return error


def an_exception_names_rank_timestep_and_round() -> None:
    for rank in range(dist.get_world_size()):
        # four calls of the row check come first, then round 1
        error = same_error(
            raised(lambda rank=rank: sampler(Faulty(rank, 6, raising(KeyError("lost")))).sample(noise(2)))
        )
        assert isinstance(error, dq.RankError)
        assert (error.rank, error.round) == (rank, 3)
        assert error.timestep is not None
        assert "KeyError: 'lost'" in str(error)
        assert f"rank {rank} failed at timesteps" in str(error)
        assert isinstance(error.__cause__, KeyError) == (dist.get_rank() == rank)
        next_solve_is_right()


def nan_and_inf() -> None:
    last = dist.get_world_size() - 1
    for value in (float("nan"), float("inf")):
        error = same_error(raised(lambda v=value: sampler(Faulty(last, 6, lambda x: x * v)).sample(noise(2))))
        assert isinstance(error, dq.NonFiniteError)
        assert error.round == 3
        next_solve_is_right()


def outputs_that_are_none() -> None:
    last = dist.get_world_size() - 1
    for fault in (lambda x: None, lambda x: x[:1, :2], lambda x: x.long()):
        error = same_error(raised(lambda f=fault: sampler(Faulty(last, 5, f)).sample(noise(3))))
        assert isinstance(error, dq.ModelOutputError), error
        next_solve_is_right()
    error = same_error(raised(lambda: sampler(lambda x, t: x[:, :2]).sample(noise(3))))
    assert isinstance(error, dq.ModelOutputError)
    assert "expected (" in str(error)


def other_dtypes_are_agreed_on_anew() -> None:
    """A model that goes over to another dtype of its own accord."""

    base = Denoiser()
    now = {"dtype": torch.float32}
    model = dq.sharded(lambda x, t: base(x, t).to(now["dtype"]))
    with torch.no_grad():
        for now["dtype"] in (torch.float32, torch.float32, torch.float64, torch.float64, torch.float16):
            assert model(noise(5), torch.arange(5)).dtype == now["dtype"]


def no_memory_on_one_shrinks_all() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()

    class Small(Denoiser):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if rank == size - 1 and len(x) > 8:
                raise torch.OutOfMemoryError(f"out of memory on {len(x)} rows")
            return super().forward(x, t)

    chain = sampler(Small().requires_grad_(False))
    found = chain.sample(noise(2))
    limits = Ranks.of("world").exchange([chain.options.learned["max_batch"]])
    assert limits == [[15]] * size  # of 60 rows a share of 30 or 20 is too much, of 30 one of 15 or 10
    assert apart(found.sample, dq.DEQSampler(Denoiser(), schedule()).serial(noise(2)).sample) < 1e-2
    error = same_error(
        raised(lambda: sampler(Faulty(0, 5, raising(torch.OutOfMemoryError("all of it")))).serial(noise(1)))
    )
    assert isinstance(error, torch.OutOfMemoryError)
    next_solve_is_right()


def ctrl_c_in_the_model_of_one_ends_all() -> None:
    error = same_error(raised(lambda: sampler(Faulty(1, 6, raising(KeyboardInterrupt()))).sample(noise(2))))
    assert isinstance(error, KeyboardInterrupt)
    next_solve_is_right()


def other_arguments_are_found_before_any_work() -> None:
    rank, model = dist.get_rank(), Denoiser().requires_grad_(False)
    odd = Denoiser().requires_grad_(False)
    odd.shift.data += rank
    chain = schedule(eta=1.0)
    draw = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    cases: dict[str, Callable[[], Any]] = {
        "values of the noise": lambda: sampler(model).sample(noise(2, seed=rank)),
        "other noise and": lambda: sampler(model).sample(noise(2 + rank)),
        "options": lambda: sampler(model, tol=1e-3 * (1 + rank)).sample(noise(2)),
        "other options": lambda: sampler(model, max_rounds=4 + rank).sample(noise(2)),
        "schedule": lambda: dq.DEQSampler(model, schedule(30 + rank), group="world").sample(noise(2)),
        "model_kwargs": lambda: sampler(model).sample(noise(2), {"c": noise(2, seed=rank)}),
        "generator": lambda: dq.DEQSampler(model, chain, group="world").sample(noise(2), generator=draw(rank)),
        "weights of the model": lambda: sampler(odd).sample(noise(2)),
        "call": lambda: (sampler(model).sample if rank else sampler(model).serial)(noise(2)),
        "image": lambda: dq.DEQInverter(model, schedule(), group="world").invert(noise(2, seed=rank)),
    }
    for what, work in cases.items():
        error = same_error(raised(work))
        assert isinstance(error, dq.RankError), (what, error)
        assert what in str(error), (what, error)
        assert error.rank == 1
    torch.manual_seed(rank)  # torch's own generator draws where none is given
    assert "generator" in str(same_error(raised(lambda: dq.DEQSampler(model, chain, group="world").sample(noise(2)))))
    error = raised(lambda: sampler(model).sample(noise(2) if rank else None))  # type: ignore[arg-type]
    assert type(error) is (dq.RankError if rank else TypeError), error
    assert model.calls == 0 if hasattr(model, "calls") else True
    next_solve_is_right()


def callbacks_of_one_rank_stop_all() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Denoiser().requires_grad_(False)
    seen: list[int] = []

    def stop(info: Any) -> bool:
        seen.append(info.round)
        return info.round == 4

    for chain in (sampler(model, tol=1e-12), dq.DEQSampler(model, schedule(), group="world")):
        found = chain.sample(noise(2), callback=stop if rank == size - 1 else None)
        assert found.stats.stop_reason == "callback"
        assert Ranks.of("world").exchange([found.stats.rounds]) == [[4]] * size
    assert seen == ([1, 2, 3, 4] * 2 if rank == size - 1 else [])
    inverter = dq.DEQInverter(model, schedule(), group="world")
    assert inverter.invert(noise(2), callback=stop if rank == 0 else None).stats.rounds <= 5

    class Enough(Exception):
        pass

    def fail(info: Any) -> None:
        raise Enough("seen enough")

    error = raised(lambda: sampler(model).sample(noise(2), callback=fail if rank == 1 else None))
    assert type(error) is (Enough if rank == 1 else dq.RankError)
    assert "seen enough" in str(error)
    next_solve_is_right()


def rows_that_depend_on_each_other() -> None:
    """As many ranks as rows in the row check: each must see a whole batch, or none would find it."""
    error = same_error(raised(lambda: sampler(lambda x, t: x * (1 + t[0] / 1000)).sample(noise(2))))
    assert isinstance(error, dq.ModelOutputError)
    assert "not independent" in str(error)
    next_solve_is_right()


def ranks_that_have_parted_are_told() -> None:
    """A loss that is another one on each rank, and a model of one's own called on other rows."""
    rank = dist.get_rank()
    x = noise(4).requires_grad_()
    y = dq.sharded(Denoiser())(x, torch.arange(4))
    error = same_error(raised(lambda: (y.square().sum() * (1 + rank)).backward()))
    assert isinstance(error, dq.RankError)
    with torch.no_grad():
        error = same_error(raised(lambda: dq.sharded(Denoiser())(noise(4, seed=rank), torch.arange(4))))
    assert isinstance(error, dq.RankError)
    assert "other rows" in str(error)
    next_solve_is_right()


def faults_at_random() -> None:
    """Many, of every kind, on any rank, in any round; NaN where the model says nothing is told by the solver."""
    draw, size = random.Random(0), dist.get_world_size()
    kinds: tuple[Callable[[Tensor], Any], ...] = (
        raising(ValueError("no")), raising(KeyboardInterrupt()), lambda x: x * float("nan"), lambda x: "nothing",
        raising(torch.OutOfMemoryError("full")), raising(SystemExit(3)),
    )  # fmt: skip
    for _ in range(int(os.environ.get("FAULTS", "24"))):
        kind, rank, when = draw.choice(kinds), draw.randrange(size), draw.randrange(1, 9)
        solver, batch = draw.choice(("picard", "quasi-newton", "auto")), draw.randrange(1, 4)
        faulty = Faulty(rank, when, kind)
        error = raised(lambda f=faulty, s=solver, b=batch: sampler(f, solver=s).sample(noise(b)))
        said = Ranks.of("world").exchange_text(f"{type(error).__name__}: {error}")
        assert len(set(said)) == 1, (said, when)
        next_solve_is_right()


CHECKS = (
    an_exception_names_rank_timestep_and_round, nan_and_inf, outputs_that_are_none, other_dtypes_are_agreed_on_anew,
    no_memory_on_one_shrinks_all, ctrl_c_in_the_model_of_one_ends_all, other_arguments_are_found_before_any_work,
    callbacks_of_one_rank_stop_all, rows_that_depend_on_each_other, ranks_that_have_parted_are_told, faults_at_random,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
