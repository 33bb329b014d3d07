"""Solves with the history on the host: the same samples in less memory, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import deqdiff_fast as dq
from deqdiff_fast.engine import placement
from deqdiff_fast.engine.placement import Placement
from deqdiff_fast.memory import SolverMemory
from deqdiff_fast.planner import planner

PIECE_BYTES = placement.PIECE_BYTES


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(placement, "PIECE_BYTES", 1 << 14)


def smooth(x, t):
    """Nearly linear in the state, and smooth in time."""
    level = (t.to(x.dtype) / 1000).view(-1, *[1] * (x.dim() - 1))
    return 0.9 * level * x + 0.05 * torch.sin(2 * x + level)


def both(model, schedule, start, **options):
    found = [
        dq.DEQSampler(model, schedule, solver="quasi-newton", memory=memory, **options).sample(start)
        for memory in ("device", "offload")
    ]
    assert [bool(solution.converged.all()) for solution in found] == [True, True]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tol", [1e-2, 2e-4])
def test_as_many_rounds_and_as_near(ddim, noise, relative_error, dtype, tol):
    if dtype == torch.bfloat16 and tol < 1e-2:
        pytest.skip("rounding is more")
    start = noise(3).to(dtype)
    device, host = both(smooth, ddim(50), start, tol=tol)
    assert host.stats.rounds == host.stats.node_rounds == device.stats.rounds
    assert host.sample.dtype == dtype
    expected = dq.DEQSampler(smooth, ddim(50)).serial(start).sample
    assert relative_error(host.sample.double(), expected.double()).max() <= tol


@pytest.mark.parametrize("kind", ["multistep", "spectrum", "weight", "guess"])
def test_other_coordinates_chains_and_guesses(ddim, noise, relative_error, karras, kind):
    schedule = dq.Schedule.from_sigmas(karras(30), method="dpmpp_2m") if kind == "multistep" else ddim(30)
    start, options, call = noise(2) * schedule.init_noise_sigma, {}, {}
    if kind == "spectrum":
        options["spectrum"] = dq.SpectralSlope.fit(noise(40, seed=5) * torch.linspace(0.2, 1, 8))
    elif kind == "weight":
        options["weight"] = torch.linspace(0, 2, 8)
    model = smooth if kind != "multistep" else lambda x, sigma: smooth(x, 100 * sigma)
    expected = dq.DEQSampler(model, schedule).serial(start).sample
    if kind == "guess":
        call["init"] = expected + 0.1 * noise(2, seed=9)
    sampler = dq.DEQSampler(model, schedule, solver="quasi-newton", memory="offload", tol=1e-3, **options)
    found = sampler.sample(start, **call)
    assert found.stats.node_rounds == found.stats.rounds
    if kind == "weight":
        found.sample, expected = (x * options["weight"].sqrt() for x in (found.sample, expected))
    assert relative_error(found.sample, expected).max() <= 1e-3


def test_the_plan_is_what_it_takes(ddim, noise, peak_bytes, monkeypatch):
    """The history on the device, all that there is at a time; with it on the host, what the pool has lent for it is
    what is planned there, and the rest what is planned for the device."""
    monkeypatch.setattr(placement, "PIECE_BYTES", 1 << 19)
    start, spent = noise(1, (12288,)), {}
    for memory in ("device", "offload"):
        sampler = dq.DEQSampler(smooth, ddim(20), solver="quasi-newton", memory=memory, max_batch=4)
        options, pool = sampler.options, SolverMemory(0)  # which keeps nothing idle
        object.__setattr__(options, "memory", pool)
        sampler.sample(start)
        place = Placement.of(options.system(start, None), options)
        planned, kept = place.bytes(options.solver)
        history = pool.stats()["high_water"] - place.plan().layout()[1]
        with peak_bytes() as count:
            sampler.sample(start)
        spent[memory] = count.peak - history
        assert 0.25 * planned < spent[memory] <= planned  # for half of the nodes, unless these do not suffice
        assert 0.4 * kept <= history <= 1.01 * kept  # each piece to a multiple of 256 bytes
    assert spent["offload"] < 0.35 * spent["device"]


def test_the_planner_knows_what_fits(ddim, noise, monkeypatch):
    """A device with room for the states but not for their history; and a host without."""
    start = noise(1, (3, 64, 64))
    options = {memory: dq.DEQSampler(smooth, ddim(50), memory=memory) for memory in ("device", "offload")}
    whole = {}
    for memory, sampler in options.items():
        place = Placement.of(sampler.options.system(start, None), sampler.options)
        whole[memory] = place.bytes(sampler.options.solver)
    assert whole["offload"][0] < 0.45 * whole["device"][0]
    room = 1.2 * whole["offload"][0]
    monkeypatch.setattr(planner, "usable_bytes", lambda device: room)
    notes = {memory: sampler.plan((3, 64, 64)).candidates[-1].note for memory, sampler in options.items()}
    assert notes["device"] == "does not fit in the free memory"
    assert notes["offload"] == "batches of that size were not measured"
    windows = [candidate.window for candidate in options["offload"].plan((3, 64, 64)).candidates]
    assert windows == [1, 50]  # some timesteps at a time are no choice
    room = whole["offload"][1] / 2
    other = dq.DEQSampler(smooth, ddim(50), memory="offload", tol=3e-3)
    assert other.plan((3, 64, 64)).candidates[-1].note == "does not fit in the free memory"


def test_planned_solves(ddim, noise, relative_error):
    sampler = dq.DEQSampler(smooth, ddim(40), memory="offload")
    assert sampler.warmup((3, 8, 8)) is not None
    for seed in range(4):
        found = sampler.sample(noise(1, seed=seed))
        assert found.stats.plan.chosen.window in (1, 40)
        assert relative_error(found.sample, sampler.serial(noise(1, seed=seed)).sample).max() <= 1e-2


def rough(x, t):
    """Another model at every other timestep, so that nodes do not suffice."""
    level = (t.to(x.dtype) / 1000).view(-1, *[1] * (x.dim() - 1))
    return 0.9 * level * x + 0.3 * ((t // 25) % 2).to(x.dtype).view_as(level) * torch.cos(x)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("given", ["one", "each", "none"])
def test_what_nodes_leave_is_made_serially_with_the_same_noise(ddim, noise, relative_error, eta, given):
    def draws():
        torch.manual_seed(3)
        one = torch.Generator().manual_seed(1)
        return {"one": one, "each": [torch.Generator().manual_seed(k) for k in range(2)], "none": None}[given]

    model = lambda x, t: rough(x, t)  # noqa: E731  # of which nothing is known yet
    sampler = dq.DEQSampler(model, ddim(60, eta), solver="quasi-newton", memory="offload", tol=1e-4)
    expected = sampler.serial(noise(2), generator=draws()).sample
    found = sampler.sample(noise(2), generator=draws())
    assert found.stats.stop_reason == "max_rounds"
    assert (found.stats.finished_serially, found.stats.timesteps_evaluated) == (60, 1.0)
    assert 0 < found.stats.rounds == len(found.stats.residual_trace)
    assert found.converged.all()
    assert relative_error(found.sample, expected).max() < 1e-5
    again = sampler.sample(noise(2), generator=draws())  # known not to be smooth: no rounds are tried
    assert relative_error(again.sample, expected).max() < 1e-5


def test_on_failure(ddim, noise):
    make = lambda how: dq.DEQSampler(  # noqa: E731
        smooth, ddim(40), solver="quasi-newton", memory="offload", tol=1e-6, max_rounds=4, on_failure=how
    )
    with pytest.raises(dq.NotConvergedError, match="2 of 2 samples did not converge in 4 rounds on nodes"):
        make("raise").sample(noise(2))
    with pytest.warns(dq.ConvergenceWarning, match="2 of 2"):
        found = make("warn").sample(noise(2))
    assert not found.converged.any()
    assert found.stats.finished_serially == 0
    assert make("serial").sample(noise(2)).stats.finished_serially == 40


def test_callbacks(ddim, noise):
    sampler = dq.DEQSampler(smooth, ddim(40), solver="quasi-newton", memory="offload", tol=1e-6, max_rounds=4)
    rounds, seen = [], []

    def look(info):
        rounds.append(info.round)
        seen.append(info.sample())

    found = sampler.sample(noise(2), callback=look)
    assert rounds == list(range(1, 45))
    assert torch.equal(seen[-1], found.sample)
    stopped = sampler.sample(noise(2), callback=lambda info: info.round == 2)
    assert (stopped.stats.stop_reason, stopped.stats.rounds) == ("callback", 2)
    late = sampler.sample(noise(2), callback=lambda info: info.round == 9)
    assert (late.stats.stop_reason, late.stats.finished_serially) == ("callback", 5)
    assert not late.converged.any()


def test_a_broken_model_is_named(ddim, noise):
    bad = lambda x, t: torch.where((t == 500).view(-1, 1, 1, 1), float("nan") * x, smooth(x, t))  # noqa: E731
    with pytest.raises(dq.NonFiniteError, match="timestep 500"):
        dq.DEQSampler(bad, ddim(20), solver="quasi-newton", memory="offload").sample(noise(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "picard"}, "memory: expected rounds on nodes: .*; got 'picard'"),
        ({"solver": "anderson"}, "got 'anderson"),
        ({"solver": dq.QuasiNewton(nodes=False)}, "memory: expected rounds on nodes"),
        ({"window": 8}, "window 8"),
        ({"max_rounds": 3}, "more than 3 rounds.* 3 rounds"),
        ({"draft": smooth}, "'draft' with a draft"),
        ({"certify": "full"}, "certify: expected 'estimate' with memory, got 'full'"),
        ({"memory": "disk"}, "memory: expected one of 'device', 'offload', got 'disk'"),
        ({"shard_states": True}, "shard_states: expected a group"),
        ({"shard_states": 1}, "shard_states: expected one of True, False, got 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_refused(ddim, change, message):
    with pytest.raises(ValueError, match=message):
        dq.DEQSampler(smooth, ddim(20), **({"memory": "offload"} | change))


def test_short_chains_trajectories_and_gradients_are_refused(ddim, noise):
    with pytest.raises(ValueError, match="9 timesteps"):
        dq.DEQSampler(smooth, ddim(9), memory="offload")
    sampler = dq.DEQSampler(smooth, ddim(20), memory="offload")
    with pytest.raises(ValueError, match="return_trajectory: expected none with shard_states or memory='offload'"):
        sampler.sample(noise(2), return_trajectory=True)
    with pytest.raises(ValueError, match="init_trajectory: expected none"):
        sampler.sample(noise(2), init_trajectory=torch.zeros(21, 2, 3, 8, 8))
    with pytest.raises(NotImplementedError, match="gradients: expected none"):
        sampler.sample(noise(2).requires_grad_())


@pytest.mark.parametrize(("memory", "device", "host"), [(None, 58.2, 0.0), ("offload", 22.6, 9.9)])
def test_what_the_docs_say_of_large_states(monkeypatch, ddim, memory, device, host):
    """The table of docs/devices.md, in GB: 10^7 elements, T = 50, eight rows a call."""
    monkeypatch.setattr(placement, "PIECE_BYTES", PIECE_BYTES)
    given = {} if memory is None else {"memory": memory}
    sampler = dq.DEQSampler(lambda x, t: x, ddim(50), solver="quasi-newton", max_batch=8, **given)
    options = sampler.options
    place = Placement.of(options.system(torch.zeros(1, 10_000_000), None), options)
    assert [count / 1e9 for count in place.bytes(options.solver)] == pytest.approx([device, host], abs=0.05)
