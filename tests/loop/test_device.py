"""The loop with its decisions on the device, run here on CPU tensors: the same rows final, no look at the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deqdiff_fast as dq
from deqdiff_fast.engine import solve
from deqdiff_fast.kernels import advance_window, copy_rows
from deqdiff_fast.loop.device import DeviceLoop
from deqdiff_fast.loop.rows import clear_rows
from deqdiff_fast.loop.stopping import StoppingRule
from deqdiff_fast.loop.task import Lookahead
from deqdiff_fast.loop.window import Window

pytestmark = pytest.mark.usefixtures("rows_are_known")


FULL = dq.QuasiNewton(nodes=False)


SOLVERS = [
    pytest.param(FULL, id="full-rounds"), "quasi-newton", "picard", "triangular", "anderson", "paradigms", "parataa",
    dq.Anderson(scope="trajectory"), dq.Anderson(history_dtype=torch.bfloat16, label="triangular-bf16"),
]  # fmt: skip


EAGER, ALWAYS = Lookahead(near=float("inf")), Lookahead(near=0.0)


@pytest.fixture
def late(monkeypatch):
    """Makes every solve use a policy."""

    def use(policy):
        monkeypatch.setattr(solve, "lookahead_policy", lambda system, request: policy)

    return use


class NoLook(TorchDispatchMode):
    """Fails on what makes the host wait for a device: values, data-dependent shapes, copies that are not queued."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")

    def __init__(self):
        super().__init__()
        self.looking, self.seen = False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.looking:
            self.seen += 1
            assert not any(name in str(func) for name in self.FORBIDDEN), f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unseen(monkeypatch, mixture):
    """A guard that watches the rounds that the host queues, and a model that may look."""
    guard, model, queue = NoLook(), mixture(), DeviceLoop.queue
    guard.looking = True

    def watched(self):
        guard.looking = False
        queue(self)
        guard.looking = True

    def private(x, t):
        was, guard.looking = guard.looking, True
        out = model(x, t)
        guard.looking = was
        return out

    monkeypatch.setattr(DeviceLoop, "queue", watched)
    return guard, private


@pytest.mark.parametrize("seed", range(6))
def test_advance_window_decides_as_the_host_does(seed):
    draw = torch.Generator().manual_seed(seed)
    steps, batch, width = 23, 3, (23, 7, 1)[seed % 3]
    window = Window(steps, batch, width)
    lo = torch.zeros(batch, dtype=torch.int32)
    hi = torch.full((batch,), width, dtype=torch.int32)
    previous_bounds, decision = torch.zeros(2, batch, dtype=torch.int32), torch.zeros(4, batch, dtype=torch.float64)
    rows = torch.empty(steps * batch + 5, dtype=torch.int64)
    for _ in range(60):
        residual = 10 ** (4 * torch.rand(steps, batch, generator=draw, dtype=torch.float64) - 4.5)
        first = {}
        if torch.rand(1, generator=draw) < 0.3:
            b = int(torch.randint(batch, (1,), generator=draw))
            live = range(window.lo[b], window.hi[b])
            if len(live):
                first[b] = live[len(live) // 2]
                residual[first[b], b] = (float("nan"), float("inf"))[seed % 2]
        old_lo, old_hi = list(window.lo), list(window.hi)
        advance_window(
            residual.square(),
            torch.ones_like(residual),
            lo,
            hi,
            previous_bounds,
            decision,
            rows,
            1e-3,
            1e-2,
            width,
        )
        for b, step in first.items():
            residual[step : old_hi[b], b] = float("inf")
        worst = StoppingRule(1e-3, 1e-2).advance(window, residual.t().tolist())
        assert lo.tolist() == window.lo == decision[0].int().tolist()
        assert hi.tolist() == window.hi == decision[1].int().tolist()
        assert previous_bounds[0].tolist() == old_lo
        assert previous_bounds[1].tolist() == [max(a, b) for a, b in zip(old_hi, window.lo)]
        assert decision[2].int().tolist() == [first.get(b, steps) for b in range(batch)]
        assert decision[3].tolist() == pytest.approx(worst)
        expected = [i * batch + b for i in range(steps) for b in range(batch) if window.lo[b] <= i < window.hi[b]]
        assert len(expected) == window.count
        assert rows.tolist() == expected + [steps * batch] * (len(rows) - len(expected))
        if window.done:
            break
    else:
        pytest.fail("the window never reached the end")


def test_copies_between_bounds():
    ring, target = torch.randn(4, 3, 5), torch.zeros(9, 3, 5)
    first, last = torch.tensor([0, 3, 5]), torch.tensor([4, 3, 9])
    filled = torch.full((4, 3), 7, dtype=torch.int32)
    copy_rows(target, ring, first.int(), last.int())
    clear_rows(filled, first.int(), (last - (last > 6).int()).int())
    for b in range(3):
        inside = range(int(first[b]), int(last[b]))
        for i in range(9):
            assert torch.equal(target[i, b], ring[i % 4, b] if i in inside else torch.zeros(5))
    assert filled.tolist() == [[0, 7, 7], [0, 7, 0], [0, 7, 0], [0, 7, 0]]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s if isinstance(s, str) else s.name)
@pytest.mark.parametrize("window", ["auto", 9])
def test_the_same_sample_at_most_one_round_late(late, mixture, ddim, noise, solver, window):
    model, start = mixture(), noise(3)
    sampler = dq.DEQSampler(model, ddim(30, eta=0.3), solver=solver, window=window, tol=1e-3)

    def run():
        model.rows = 0
        return sampler.sample(start, generator=torch.Generator().manual_seed(0), return_trajectory=True), model.rows

    expected, rows = run()
    assert expected.stats.model_evals == rows
    for policy in (EAGER, Lookahead(), ALWAYS):
        late(policy)
        out, rows = run()
        extra = out.stats.rounds - expected.stats.rounds
        assert extra in ((0,) if policy is EAGER else (0, 1))
        assert out.stats.model_evals == expected.stats.model_evals <= rows
        assert out.converged.all()
        assert out.stats.window == expected.stats.window
        assert torch.allclose(out.trajectory, expected.trajectory, atol=1e-5)
        trace = out.stats.residual_trace
        assert torch.allclose(trace[: len(trace) - extra], expected.stats.residual_trace, rtol=1e-2, atol=1e-6)
        assert len(trace) == out.stats.rounds


@pytest.mark.parametrize("policy", [Lookahead(), ALWAYS], ids=["near", "always"])
@pytest.mark.parametrize("window", ["auto", 7])
@pytest.mark.parametrize("solver", [pytest.param(FULL, id="full-rounds"), "picard", "triangular"])
def test_no_look_at_the_device_in_a_round(late, unseen, ddim, noise, solver, window, policy):
    late(policy)
    guard, private = unseen
    with guard:
        out = dq.DEQSampler(private, ddim(20), solver=solver, window=window).sample(noise(2))
    assert out.converged.all()
    assert guard.seen > 20 * out.stats.rounds


def test_no_look_at_the_device_after_rounds_on_nodes_with_a_draft(late, unseen, ddim, noise):
    late(ALWAYS)
    guard, private = unseen
    sampler = dq.DEQSampler(
        private, ddim(60), solver="draft", draft=lambda x, t: private(x, t) + 0.05 * x.sin(), tol=1e-4, certify="full"
    )
    with guard:
        out = sampler.sample(noise(2))
    assert out.converged.all()
    assert out.stats.rounds > out.stats.node_rounds > 0
    assert guard.seen > 20 * (out.stats.rounds - out.stats.node_rounds)
    assert (out.sample - sampler.serial(noise(2)).sample).norm() < 1e-4 * out.sample.norm()


@pytest.mark.parametrize("policy", [EAGER, ALWAYS], ids=["eager", "always"])
def test_faults_are_found_late(late, mixture, ddim, noise, policy):
    late(policy)
    model = mixture()

    def broken(x, t):
        out = model(x, t)
        out[t == 450] = float("nan")
        return out

    with pytest.raises(dq.NonFiniteError, match=r"NaN or Inf at timestep 450 .*, sample 0"):
        dq.DEQSampler(broken, ddim(20), solver="picard").sample(noise(2))


@pytest.mark.parametrize("policy", [EAGER, ALWAYS], ids=["eager", "always"])
@pytest.mark.parametrize("solver", ["picard", "triangular", "quasi-newton", pytest.param(FULL, id="full-rounds")])
def test_transient_overflow_is_repaired(late, ddim, noise, relative_error, solver, policy):
    late(policy)
    schedule = ddim(100)
    stiffness = torch.zeros(1000)
    stiffness[schedule.timesteps] = (-1.5 / schedule.model_coef[:, 0]).float()
    sampler = dq.DEQSampler(
        lambda x, t: stiffness[t][:, None, None, None] * (x - 0.7), schedule, solver=solver, tol=1e-3, max_rounds=100
    )
    reference, out = sampler.serial(noise(2)), sampler.sample(noise(2))
    assert relative_error(out.sample, reference.sample).max() < 1e-3
    assert out.converged.all()
    if solver == "picard":
        assert out.stats.repairs > 0, "the test must meet an overflow"


def test_out_of_rounds(late, mixture, ddim, noise, relative_error):
    late(Lookahead())
    sampler = dq.DEQSampler(mixture(), ddim(50), solver="quasi-newton", max_rounds=2, tol=1e-6)
    out = sampler.sample(noise(2))
    assert out.stats.rounds == 2
    assert out.stats.finished_serially > 0
    assert relative_error(out.sample, sampler.serial(noise(2)).sample).max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_on_cuda(mixture, ddim, noise):
    model = mixture()

    def on_device(x, t):
        torch.cuda.set_sync_debug_mode("default")  # the analytic model keeps its tables on the host
        out = model(x, t)
        torch.cuda.set_sync_debug_mode("error")
        return out

    sampler = dq.DEQSampler(on_device, ddim(20), solver=FULL)  # rounds on nodes look once each
    start = noise(2).cuda()
    try:
        out = sampler.sample(start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.converged.all()
