"""Parareal: the paper's iterates, what they cost, and when they end."""

from __future__ import annotations

import itertools

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.solver import Parareal

pytestmark = pytest.mark.usefixtures("rows_are_known")


def by_hand(model, schedule, noise, edges):
    """The samples after every sweep of algorithm 1 of arXiv 2412.08292, by the textbook DDIM step (eta = 0)."""

    def jump(x, i, j):
        eps = model(x, schedule.timesteps[i].expand(len(x)))
        clean = (x - schedule.sigma[i] * eps) / schedule.signal[i]
        return schedule.signal[j] * clean + schedule.sigma[j] * eps

    def fine(x, i, j):
        for k in range(i, j):
            x = jump(x, k, k + 1)
        return x

    count = len(edges) - 1
    u = [noise]
    for j in range(count):
        u.append(jump(u[j], edges[j], edges[j + 1]))
    samples = [u[-1]]
    for k in range(count):
        ends = [fine(u[j], edges[j], edges[j + 1]) for j in range(count)]
        long = [jump(u[j], edges[j], edges[j + 1]) for j in range(count)]
        new = [*u[: k + 1], ends[k]]
        for j in range(k + 1, count):
            new.append(ends[j] + jump(new[j], edges[j], edges[j + 1]) - long[j])
        u = new
        samples.append(u[-1])
    return samples


def counted(model):
    """A model that writes down how many rows each of its calls had."""
    rows = []

    def call(x, t):
        rows.append(len(x))
        return model(x, t)

    return call, rows


@pytest.mark.parametrize(("steps", "blocks"), [(20, None), (30, 4), (7, 7), (9, 1), (1, None)])
def test_the_papers_iterates(mixture, ddim, noise, relative_error, steps, blocks):
    model, schedule, start = mixture(), ddim(steps), noise(2).double()
    solver = Parareal(blocks=blocks)
    edges = solver.edges(steps)
    assert (edges[0], edges[-1]) == (0, steps)
    assert len(edges) - 1 == (blocks or round(steps**0.5))
    expected = by_hand(model, schedule, start, edges)
    seen = []
    call, rows = counted(model)
    sampler = dq.DEQSampler(call, schedule, solver=solver, tol=1e-30)
    out = sampler.sample(start, callback=lambda info: seen.append((info.front.tolist(), info.sample())))
    count, longest = len(edges) - 1, max(b - a for a, b in itertools.pairwise(edges))
    sweeps, at = [], 0  # the rounds with which sweeps end
    for k in range(count):
        at += (count - k) + (longest - 1 if k else 0)
        sweeps.append(at)
    assert len(seen) == out.stats.rounds == len(rows) == len(out.stats.residual_trace)
    assert out.stats.rounds <= solver.round_limit(steps)
    assert out.stats.model_evals == sum(rows)
    whole = sweeps[:2] if count == steps else sweeps[:-1]  # blocks of one step: the second sweep moves nothing
    for k, at in enumerate(whole):
        front, sample = seen[at - 1]
        assert front == [edges[k]] * 2 or front == [steps] * 2
        assert relative_error(sample, expected[k]).max() < 1e-10
    assert out.stats.stop_reason == "rounding"  # no state is good to 1e-30
    assert out.stats.finished_serially == 0
    assert relative_error(out.sample, expected[-1]).max() < 1e-12
    assert relative_error(out.sample, sampler.serial(start).sample).max() < 1e-12


def test_rounds_and_evaluations(mixture, ddim, noise):
    """25 steps in 5 blocks: 5 rounds, then 4 on all blocks that are left and a sweep over them."""
    call, rows = counted(mixture())
    out = dq.DEQSampler(call, ddim(25), solver="parareal", tol=1e-30, max_batch=7).sample(noise(2).double())
    iteration = [[2 * left] * 4 + [2] * (left - 1) for left in (5, 4, 3, 2, 1)]
    wanted = [2] * 5 + list(itertools.chain(*iteration))
    assert out.stats.rounds == len(wanted) == Parareal().round_limit(25)
    pieces = [piece for count in wanted for piece in (7,) * (count // 7) + ((count % 7,) if count % 7 else ())]
    assert rows == pieces
    assert out.stats.model_evals == sum(wanted)
    assert out.stats.model_calls == len(pieces)


@pytest.mark.parametrize(("steps", "eta"), [(20, 0.0), (50, 0.5), (100, 0.0), (60, 1.0)])
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_reaches_the_serial_sample(mixture, ddim, noise, relative_error, steps, eta, tol):
    sampler = dq.DEQSampler(mixture(), ddim(steps, eta), solver="parareal", tol=tol)
    serial = sampler.serial(noise(3), generator=torch.Generator().manual_seed(1)).sample
    out = sampler.sample(noise(3), generator=torch.Generator().manual_seed(1))
    assert out.converged.all()
    assert (out.stats.solver, out.stats.stop_reason, out.stats.finished_serially) == ("parareal", "converged", 0)
    assert relative_error(out.sample, serial).max() <= tol
    most = Parareal().round_limit(steps)
    assert out.stats.rounds < most or steps == 20  # there the last of its four blocks may be what ends it
    assert out.stats.rounds == most or out.stats.residual_trace[-1].max() <= 0.7 * tol


def test_the_first_sweep_is_the_short_chain(mixture, ddim, noise, relative_error):
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    short = dq.Schedule.ddim(abar, ddim(100).timesteps[::10])
    first = []
    sampler = dq.DEQSampler(mixture(), ddim(100), solver="parareal")
    sampler.sample(noise(2).double(), callback=lambda info: first.append(info.sample()) or info.round == 10)
    expected = dq.DEQSampler(mixture(), short).serial(noise(2).double()).sample
    assert relative_error(first[9], expected).max() < 1e-10


@pytest.mark.parametrize("chain", ["ddim", "eta", "ddpm", "euler", "flow"])
def test_long_steps_are_exact_where_the_clean_sample_is_known(ddim, karras, noise, relative_error, chain):
    """Any noise of the chain's own included: so the first sweep has the sample, and one iteration confirms it."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    schedule = {
        "ddim": lambda: ddim(25, 0.0, "sample"),
        "eta": lambda: ddim(25, 0.7, "sample"),
        "ddpm": lambda: dq.Schedule.ddpm(abar, torch.arange(25).flip(0) * 40, prediction_type="sample"),
        "euler": lambda: dq.Schedule.from_sigmas(karras(25)),
        "flow": lambda: dq.Schedule.from_sigmas(torch.linspace(1, 0, 26), flow=True, prediction_type="sample"),
    }[chain]()
    clean = noise(1, seed=5).double()
    sampler = dq.DEQSampler(lambda x, t: clean.expand_as(x), schedule, solver="parareal", tol=1e-9)
    first = []
    out = sampler.sample(
        noise(2).double(), generator=torch.Generator().manual_seed(3), callback=lambda info: first.append(info.sample())
    )
    serial = sampler.serial(noise(2).double(), generator=torch.Generator().manual_seed(3)).sample
    assert relative_error(first[4], serial).max() < 1e-10
    assert relative_error(out.sample, serial).max() < 1e-10
    assert out.stats.rounds == 5 + 4 + 4


def test_samples_end_one_by_one(mixture, ddim, noise, relative_error):
    """A sample that is final is not evaluated again, and none is changed by its neighbours."""
    model, asked, done = mixture(), [], []

    def call(x, t, who):
        asked.append(set(who.tolist()))
        return model(x, t)

    start = noise(6)
    sampler = dq.DEQSampler(call, ddim(50, 1.0), solver="parareal")

    def draws(who):
        return [torch.Generator().manual_seed(b) for b in who]

    def watch(info):
        done.append({b for b in range(6) if info.front[b] == 50})

    out = sampler.sample(start, {"who": torch.arange(6)}, generator=draws(range(6)), callback=watch)
    assert out.converged.all()
    assert any(0 < len(finished) < 6 for finished in done), "all of them ended together: this tests nothing"
    assert all(not finished & later for finished, later in zip(done, asked[1:]))
    evals, rounds = 0, []
    for b in range(6):
        alone = sampler.sample(start[b : b + 1], {"who": torch.tensor([b])}, generator=draws([b]))
        assert relative_error(alone.sample, out.sample[b : b + 1]).max() < 1e-5
        evals, rounds = evals + alone.stats.model_evals, [*rounds, alone.stats.rounds]
    assert (out.stats.model_evals, out.stats.rounds) == (evals, max(rounds))


def test_rounds_that_run_out(mixture, ddim, noise, relative_error):
    start, reference = noise(2), None
    memory = dq.SolverMemory(poison=True)  # what was not asked of the model must not be used
    for limit in (1, 3, 5, 7, 12, 14):  # in the first sweep, inside blocks, in a later sweep
        sampler = dq.DEQSampler(mixture(), ddim(25), solver="parareal", max_rounds=limit, tol=1e-6, memory=memory)
        reference = sampler.serial(start).sample if reference is None else reference
        out = sampler.sample(start)
        assert out.converged.all()
        assert (out.stats.rounds, out.stats.stop_reason) == (limit, "max_rounds")
        assert out.stats.finished_serially == 25 - 5 * ((limit >= 9) + (limit >= 17))
        assert relative_error(out.sample, reference).max() < 1e-5
    sampler = dq.DEQSampler(mixture(), ddim(25), solver=Parareal(max_rounds=3), tol=1e-6, on_failure="raise")
    with pytest.raises(dq.NotConvergedError, match="2 of 2 samples did not converge in 3 rounds"):
        sampler.sample(start)


def test_callbacks_stop_it_and_see_what_there_is(mixture, ddim, noise):
    infos = []

    def stop(info):
        infos.append((info.round, info.front.tolist(), info.preview().isfinite().all(), info.state(0)))
        return info.round == 7

    out = dq.DEQSampler(mixture(), ddim(25), solver="parareal").sample(noise(2), callback=stop)
    assert [(round, front) for round, front, _, _ in infos] == [(k, [0, 0]) for k in range(1, 8)]
    assert all(bool(finite) for _, _, finite, _ in infos)
    assert (out.stats.stop_reason, out.stats.rounds) == ("callback", 7)
    assert not out.converged.any()


def test_a_given_trajectory_replaces_the_first_sweep(mixture, ddim, noise, relative_error):
    sampler = dq.DEQSampler(mixture(), ddim(25), solver="parareal")
    first = sampler.sample(noise(2), return_trajectory=True)
    again = sampler.sample(noise(2), init_trajectory=first.trajectory)
    assert again.stats.rounds == 1 + 4 + 4
    assert again.stats.model_evals == 2 * (5 + 4 * 5 + 4)
    assert relative_error(again.sample, sampler.serial(noise(2)).sample).max() < 1e-3


def test_gradients(bent, noise):
    """The adjoint chain is solved by another solver: it predicts no clean sample."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    schedule = dq.Schedule.ddim(abar, torch.arange(9).flip(0) * 100, prediction_type="v_prediction")
    model, found = bent(), []
    for solver in ("parareal", "picard"):
        start = noise(2, (6,)).double().requires_grad_(True)
        dq.DEQSampler(model, schedule, solver=solver, tol=1e-9).sample(start).sample.square().sum().backward()
        found.append(start.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
