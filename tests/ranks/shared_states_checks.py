"""Run by the processes of test_shared_states.py: each holds its share of the states, and the sample is the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rank_launch import run_checks
from torch import Tensor
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import PeakBytes
from equality_checks import ROUNDING, alike
from fault_checks import Faulty, raised, raising, same_error
from problems import Denoiser, apart, noise, schedule

import deqdiff_fast as dq
from deqdiff_fast.engine import placement
from deqdiff_fast.engine.placement import Placement
from deqdiff_fast.memory import SolverMemory
from deqdiff_fast.nodes.grid import most_nodes, round_sizes
from deqdiff_fast.ranks.group import Ranks
from deqdiff_fast.ranks.shares import share_of

WIDTH = 65  # uneven shares


def sampler(model: Any, chain: dq.Schedule, shared: bool = True, **options: Any) -> dq.DEQSampler:
    group = {"group": "world", "shard_states": True} if shared else {}
    return dq.DEQSampler(model, chain, **({"solver": "quasi-newton"} | group | options))


def both(model: Any, chain: dq.Schedule, x: Tensor, kwargs: Any = None, call: Any = None, **options: Any) -> Any:
    """(solution on all ranks, solution of this process alone)."""
    found = [sampler(model, chain, shared, **options).sample(x, kwargs, **(call or {})) for shared in (True, False)]
    alike(found[0].sample, found[0].converged, found[0].stats.rounds, found[0].stats.model_evals)
    return found


def same_as_one_process() -> None:
    placement.PIECE_BYTES = 1 << 12
    for dtype in (torch.float64, torch.float32):
        for steps, batch, tol in ((50, 3, 1e-2), (50, 1, 1e-3), (100, 2, 1e-2)):
            model, x = Denoiser(dtype, WIDTH).requires_grad_(False), noise(batch, dtype, WIDTH)
            for memory in ("device", "offload"):
                shared, alone = both(model, schedule(steps), x, tol=tol, memory=memory)
                rounds = [shared.stats.rounds, shared.stats.node_rounds, alone.stats.rounds]
                assert len(set(rounds)) == 1, (dtype, steps, memory, rounds)
                assert apart(shared.sample, alone.sample) <= ROUNDING[dtype], (dtype, steps, memory)
                checks = [found.stats.model_evals - found.stats.check_evals for found in (shared, alone)]
                assert checks[0] == checks[1]


def conditions_guidance_and_calls_in_pieces() -> None:
    base, chain, x = Denoiser(width=WIDTH).requires_grad_(False), schedule(), noise(3, width=WIDTH)
    c, other = noise(3, width=WIDTH, seed=8), noise(3, width=WIDTH, seed=9)
    for options in ({}, {"max_batch": 5}, {"max_batch": 1}):
        shared, alone = both(base, chain, x, {"c": c}, tol=1e-3, **options)
        assert apart(shared.sample, alone.sample) < 1e-12
    guided = dq.guided(base, {"c": c}, {"c": other}, torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64))
    shared, alone = both(guided, chain, x, tol=1e-3)
    assert apart(shared.sample, alone.sample) < 1e-12


def other_coordinates_chains_and_guesses() -> None:
    """A spectrum, a weight and a guess of the sample are of whole samples."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        level = (t.to(x.dtype) / 1000).view(-1, *[1] * (x.dim() - 1))
        return 0.9 * level * x + 0.05 * torch.sin(2 * x + level)

    x = noise(2, width=192).view(2, 3, 8, 8)
    samples = noise(40, width=192, seed=5).view(40, 3, 8, 8) * torch.linspace(0.2, 1, 8, dtype=torch.float64)
    spectrum = dq.SpectralSlope.fit(samples)
    near = sampler(model, schedule(), False).serial(x).sample + 0.1 * x.flip(0)
    for options, call in (
        ({"spectrum": spectrum}, {}),
        ({"weight": torch.linspace(0, 2, 8)}, {}),
        ({"spectrum": spectrum}, {"init": near}),
    ):
        shared, alone = both(model, schedule(), x, None, call, tol=1e-3, **options)
        assert shared.stats.rounds == shared.stats.node_rounds
        assert apart(shared.sample, alone.sample) < 1e-12


def what_nodes_leave_is_made_serially() -> None:
    model, chain, x = Denoiser(width=WIDTH).requires_grad_(False), schedule(40, 1.0), noise(2, width=WIDTH)
    draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    serial = sampler(model, chain, False).serial(x, generator=draw()).sample
    for _ in range(2):
        found = sampler(model, chain, tol=1e-5).sample(x, generator=draw())
        assert found.stats.finished_serially == 40
        assert apart(found.sample, serial) < 1e-12
        alike(found.sample, found.stats.stop_reason)
    loose = sampler(model, chain, tol=0.3).sample(x, generator=draw())
    assert loose.stats.rounds == loose.stats.node_rounds
    assert apart(loose.sample, serial) < 0.3
    assert apart(loose.sample, serial) > 0


def a_share_of_the_memory() -> None:
    """All that is there at a time, and what was planned, are one process's divided by the ranks, but for a few rows."""
    size, x, chain = dist.get_world_size(), noise(1, torch.float32, 6000), schedule(30)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (1 - t.to(x.dtype) / 2000)[:, None] * x + 0.1 * torch.tanh(x)

    peaks, planned = [], []
    for shared in (True, False):
        one = sampler(model, chain, shared, max_batch=size, memory=SolverMemory(0))
        place = Placement.of(one.options.system(x, None), one.options)
        planned.append(place.bytes(one.options.solver)[0])
        one.sample(x)  # makes tables
        with PeakBytes() as count:
            found = one.sample(x)
        assert found.stats.rounds == found.stats.node_rounds
        peaks.append(count.peak)
    row = x.nbytes
    peaks = [max(peak) for peak in zip(*Ranks.of("world").exchange(peaks))]
    assert peaks[0] <= planned[0]
    few = (12 * size + 6) * row  # of the row check, whose calls all ranks gather: three rows for each; of small calls
    assert planned[0] <= planned[1] / size + few
    assert peaks[0] <= peaks[1] / size + few, (peaks, planned, row)
    assert peaks[1] > 10 * few


def bytes_of_a_call() -> None:
    ranks, rank, size = Ranks.of("world"), dist.get_rank(), dist.get_world_size()
    model, chain, x = Denoiser(torch.float32, WIDTH).requires_grad_(False), schedule(), noise(2, torch.float32, WIDTH)
    one = sampler(model, chain)
    system = one.options.system(x, None)
    place = Placement.of(system, one.options)
    assert place.shared is not None
    start, stop = share_of(WIDTH, size, rank)
    assert place.numel == stop - start
    for count in (1, 2, 7):
        states, flat = noise(count, torch.float32, WIDTH, seed=count), torch.arange(count) * 3
        out = torch.empty(count, stop - start)
        with one.options.memory.lease(place.plan()) as lease:
            sent, messages = ranks.bytes, ranks.messages
            place.shared.ask(lease, place.own(states), flat, torch.arange(count), out, 1)
            sent, messages = ranks.bytes - sent, ranks.messages - messages
        with torch.no_grad():
            expected = model(states, chain.timesteps[flat // 2])
        assert apart(out, expected[:, start:stop]) < 1e-6
        assert apart(place.whole(out), expected) < 1e-6
        first, last = share_of(count, size, rank)
        forward, back = (count - last + first) * (stop - start), (last - first) * (WIDTH - stop + start)
        assert sent == 4 * (forward + back) + (size - 1) * 24  # and three numbers, what has become of the others
        assert messages == 3


def planned_solves_stay_together() -> None:
    model, chain = Denoiser(width=WIDTH).requires_grad_(False), schedule(40)
    one = sampler(model, chain, solver="auto")
    for number in range(4):
        x = noise(1, width=WIDTH, seed=number)
        found = one.sample(x)
        assert [candidate.window for candidate in found.stats.plan.candidates] == [1, 40]
        alike(found.sample, found.stats.rounds, str(found.stats.plan))
        assert apart(found.sample, sampler(model, chain, False).serial(x).sample) < 1e-2


def callbacks_see_whole_samples() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model, chain, x = Denoiser(width=WIDTH).requires_grad_(False), schedule(), noise(2, width=WIDTH)
    seen: list[Tensor] = []
    one = sampler(model, chain, tol=1e-3)
    found = one.sample(x, callback=(lambda info: seen.append(info.sample())) if rank == size - 1 else None)
    assert len(seen) == (found.stats.rounds if rank == size - 1 else 0)
    assert all(sample.shape == x.shape for sample in seen)
    assert not seen or apart(seen[-1], found.sample) < 1e-12
    stopped = one.sample(x, callback=lambda info: info.round == 2)
    assert (stopped.stats.stop_reason, stopped.stats.rounds) == ("callback", 2)


def faults_of_one_are_raised_on_all() -> None:
    size, chain, x = dist.get_world_size(), schedule(), noise(2, width=WIDTH)
    right = sampler(Denoiser(width=WIDTH).requires_grad_(False), chain, False).sample(x).sample

    def faulty(rank: int, when: int, fault: Any) -> Any:
        model = Faulty(rank, when, fault)
        model.mix, model.shift, model.width = (
            getattr(Denoiser(width=WIDTH), name) for name in ("mix", "shift", "width")
        )
        return model.requires_grad_(False)

    for rank in range(size):  # three calls of the row check come first
        error = same_error(raised(lambda r=rank: sampler(faulty(r, 6, raising(KeyError("lost"))), chain).sample(x)))
        assert isinstance(error, dq.RankError), error
        assert (error.rank, error.round) == (rank, 3)
        assert error.timestep is not None
        error = same_error(raised(lambda r=rank: sampler(faulty(r, 6, lambda x: x[:, :2]), chain).sample(x)))
        assert isinstance(error, dq.ModelOutputError)
        error = same_error(raised(lambda r=rank: sampler(faulty(r, 6, raising(KeyboardInterrupt())), chain).sample(x)))
        assert isinstance(error, KeyboardInterrupt)
        one = sampler(faulty(rank, 6, raising(torch.OutOfMemoryError("out of memory"))), chain)
        for _ in range(2):
            assert apart(one.sample(x).sample, right) < 1e-12
        alike(one.options.learned["max_batch"])
        assert one.options.learned["max_batch"] < size * most_nodes(30, round_sizes(30)) * 2

    class Broken(Denoiser):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            broken = float("nan") if dist.get_rank() == 1 else 0.0
            return super().forward(x, t) + broken

    error = same_error(raised(lambda: sampler(Broken(width=WIDTH).requires_grad_(False), chain).sample(x)))
    assert isinstance(error, dq.NonFiniteError)
    assert apart(sampler(Denoiser(width=WIDTH).requires_grad_(False), chain).sample(x).sample, right) < 1e-12


CHECKS = (
    same_as_one_process, conditions_guidance_and_calls_in_pieces, other_coordinates_chains_and_guesses,
    what_nodes_leave_is_made_serially, a_share_of_the_memory, bytes_of_a_call, planned_solves_stay_together,
    callbacks_see_whole_samples, faults_of_one_are_raised_on_all,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_checks({check.__name__: check for check in CHECKS})
